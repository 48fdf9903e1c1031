"""How far one set of images lies from another, by their features; most of the arithmetic is torch-fidelity's.

FID (Heusel et al. 2017), KID (Binkowski et al. 2018), Inception Score (Salimans et al. 2016), precision and recall
(Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqgen.seeding import fixed_subset

NEIGHBOURS = {"precision and recall": 3, "density and coverage": 5}
"""k of the balls around an image, as published."""
KEPT = 10_000
"""Images that the figures by neighbours and KID look at, from all over a larger set; the moments are of all."""
SUBSET = 1000
"""Images of a subset that KID is the mean over."""
CHUNK = 1000
"""Features in float64 at once."""
SEED = 2020
"""Of KID's subsets and the Inception Score's parts: torch-fidelity's own."""


@dataclass(frozen=True)
class Statistics:
    """What is kept of a set of images: the moments of all features, and `KEPT` of the features themselves."""

    count: int
    mean: Tensor
    """float64 (D,)."""
    covariance: Tensor
    """float64 (D, D), unbiased."""
    features: Tensor
    """float32 (min(count, KEPT), D)."""


def statistics(features: Tensor) -> Statistics:
    """Moments of features (N, D), summed in float64; of at least 2 images."""
    count = len(features)
    if count < 2:
        raise ValueError(f"moments need at least 2 images, found {count}")
    # Near the mean, so that the squares do not swallow the differences.
    shift = features[:CHUNK].double().mean(0)
    total, squares = torch.zeros_like(shift), torch.zeros(len(shift), len(shift), dtype=torch.float64)
    for part in features.split(CHUNK):
        exact = part.double() - shift
        total += exact.sum(0)
        squares += exact.T @ exact
    mean = total / count
    covariance = (squares - count * torch.outer(mean, mean)) / (count - 1)
    return Statistics(count, mean + shift, covariance, features[fixed_subset(KEPT, count)].float())


def frechet(samples: Statistics, reference: Statistics) -> float:
    """Fréchet distance of two Gaussians with these moments (Dowson & Landau 1982)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    both = [{"mu": s.mean.numpy(), "sigma": s.covariance.numpy()} for s in (samples, reference)]
    return float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])


def kernel_distance(samples: Tensor, reference: Tensor) -> tuple[float, float | None]:
    """KID: mean and standard deviation over 100 pairs of subsets of 1,000, or of as many as there are; no deviation
    where there is but one subset on either side."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET, len(samples), len(reference))
    found = kid_features_to_metric(samples, reference, kid_subset_size=size, rng_seed=SEED, verbose=False)
    whole = size == len(samples) == len(reference)
    return float(found[KEY_METRIC_KID_MEAN]), None if whole else float(found[KEY_METRIC_KID_STD])


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over ten parts of the logits (N, classes)."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=min(10, len(logits)), rng_seed=SEED)
    return float(found[KEY_METRIC_ISC_MEAN]), float(found[KEY_METRIC_ISC_STD])


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of the samples within the reference's manifold, and of the reference within the samples'."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    k = min(NEIGHBOURS["precision and recall"], len(samples) - 1, len(reference) - 1)
    found = prc_features_to_metric(samples, reference, prc_neighborhood=k, save_cpu_ram=True, verbose=False)
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])


def density_coverage(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Naeem et al. 2020, eq. 5 and 6: how many of the balls around reference images, reaching to their k-th neighbour,
    a sample lies in, by k; and the share of those balls that hold a sample."""
    k = min(NEIGHBOURS["density and coverage"], len(reference) - 1)
    # By products of matrices, small distances between vectors far from 0 are exact in float64 alone.
    samples, reference = samples.double(), reference.double()
    inside, covered = 0, 0
    for part in reference.split(2000):
        radii = torch.cdist(part, reference).kthvalue(k + 1).values[:, None]  # each is its own nearest
        distances = torch.cdist(part, samples)
        inside += int((distances < radii).sum())
        covered += int((distances < radii).any(1).sum())
    return inside / (k * len(samples)), covered / len(reference)


def figures(
    samples: Statistics, reference: Statistics, name: str, kernel: str, logits: Tensor | None = None
) -> dict[str, float]:
    """Every figure by name.

    Args:
        name, kernel: what the Fréchet and the kernel distance are called with these features.
        logits: (N, classes) where the features are those of the Inception network.
    """
    here, there = samples.features, reference.features
    found = {name: frechet(samples, reference)}
    found[kernel], deviation = kernel_distance(here, there)
    if deviation is not None:
        found[f"{kernel}_std"] = deviation
    found["precision"], found["recall"] = precision_recall(here, there)
    found["density"], found["coverage"] = density_coverage(here, there)
    if logits is not None:
        found["inception_score"], found["inception_score_std"] = inception_score(logits)
    return found
