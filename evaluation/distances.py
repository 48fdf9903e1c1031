"""Distances between two sets of images by their features; most of the arithmetic is torch-fidelity's.

FID (Heusel et al. 2017), KID (Binkowski et al. 2018), Inception Score (Salimans et al. 2016), precision and recall
(Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020). `DISTANCES` registers them.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vqgen.metric import Metric

from .features import Statistics
from .options import Network

PRECISION_RECALL_K, DENSITY_COVERAGE_K = 3, 5  # k of the k-nearest-neighbour balls, as published
SUBSET, SEED = 1000, 2020  # images of a subset of KID, and the seed of the subsets: torch-fidelity's


def frechet(samples: Statistics, reference: Statistics) -> float:
    """Fréchet distance of two Gaussians with these moments (Dowson & Landau 1982)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    both = [{"mu": s.mean.numpy(), "sigma": s.covariance.numpy()} for s in (samples, reference)]
    return float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])


def kernel_distance(samples: Tensor, reference: Tensor) -> tuple[float, float | None]:
    """KID: mean and standard deviation over 100 pairs of subsets of 1,000 features, or of as many as both sets have.

    The deviation is None if both sets have only one subset of that size.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET, len(samples), len(reference))
    found = kid_features_to_metric(samples, reference, kid_subset_size=size, rng_seed=SEED, verbose=False)
    single = size == len(samples) == len(reference)
    return float(found[KEY_METRIC_KID_MEAN]), None if single else float(found[KEY_METRIC_KID_STD])


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of the samples within the reference's manifold, and of the reference within the samples'."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    k = min(PRECISION_RECALL_K, len(samples) - 1, len(reference) - 1)
    found = prc_features_to_metric(samples, reference, prc_neighborhood=k, save_cpu_ram=True, verbose=False)
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])


def density_coverage(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Density and coverage of Naeem et al. 2020, eq. 5 and 6.

    The ball of a reference image reaches to its k-th neighbour. Density is the number of balls that a sample lies in,
    divided by k; coverage is the share of balls that contain a sample. A ball whose neighbours are copies of its image
    contains what equals that.
    """
    k = min(DENSITY_COVERAGE_K, len(reference) - 1)
    # cdist uses matrix products, which lose small distances between vectors far from 0 in float32.
    samples, reference = samples.double(), reference.double()
    inside, covered = 0, 0
    for part in reference.split(2000):
        radii = torch.cdist(part, reference).kthvalue(k + 1).values[:, None]  # the nearest is the image itself
        distances = torch.cdist(part, samples)
        equal = distances <= 1e-7 * (part.norm(dim=1)[:, None] + samples.norm(dim=1))  # but for rounding
        within = (distances < radii) | equal
        inside += int(within.sum())
        covered += int(within.any(1).sum())
    return inside / (k * len(samples)), covered / len(reference)


@dataclass(frozen=True)
class Comparison:
    """Samples and the reference they are compared with; quantities that several metrics share are computed once."""

    samples: Statistics
    reference: Statistics
    kernel = cached_property(lambda self: kernel_distance(self.samples.features, self.reference.features))
    precision_recall = cached_property(lambda self: precision_recall(self.samples.features, self.reference.features))
    density_coverage = cached_property(lambda self: density_coverage(self.samples.features, self.reference.features))


def _frechet(pair: Comparison) -> float:
    return frechet(pair.samples, pair.reference)


_MANIFOLD = (
    Metric("precision", "Precision", "", "higher", lambda pair: pair.precision_recall[0]),
    Metric("recall", "Recall", "", "higher", lambda pair: pair.precision_recall[1]),
    Metric("density", "Density", "", "higher", lambda pair: pair.density_coverage[0]),
    Metric("coverage", "Coverage", "", "higher", lambda pair: pair.density_coverage[1]),
)


def _distances_of(network: str, title: str) -> tuple[Metric, ...]:
    """The metrics of a network other than that of the published FID, which bear its name."""
    kernel = f"Kernel distance ({title})"
    return (
        Metric(f"fd-{network}", f"Fréchet distance ({title})", "", "lower", _frechet),
        Metric(f"kd-{network}", kernel, "", "lower", lambda pair: pair.kernel[0]),
        Metric(f"kd-{network}_std", f"{kernel}, standard deviation", function=lambda pair: pair.kernel[1]),
        *_MANIFOLD,
    )


DISTANCES: dict[Network, tuple[Metric, ...]] = {
    "inception": (
        Metric("fid", "FID", "", "lower", _frechet),
        Metric("kid", "KID", "", "lower", lambda pair: pair.kernel[0]),
        Metric("kid_std", "KID, standard deviation", "", "", lambda pair: pair.kernel[1]),
        *_MANIFOLD,
        Metric("inception_score", "Inception Score", "", "higher", lambda pair: pair.samples.inception_score[0]),
        Metric(
            "inception_score_std",
            "Inception Score, standard deviation",
            function=lambda p: p.samples.inception_score[1],
        ),
    ),
    "fd-vgg16": _distances_of("vgg16", "VGG16"),
    "fd-efficientnet-lite0": _distances_of("efficientnet-lite0", "EfficientNet-Lite0"),
}
"""Metrics by extractor; their functions take a `Comparison` and return None if they are not defined for it."""
RECONSTRUCTION_DISTANCES: dict[Network, Metric] = {
    "inception": Metric("rfid", "rFID", "", "lower", _frechet),
    "fd-vgg16": Metric("rfd-vgg16", "rFD (VGG16)", "", "lower", _frechet),
    "fd-efficientnet-lite0": Metric("rfd-efficientnet-lite0", "rFD (EfficientNet-Lite0)", "", "lower", _frechet),
}


def compute_distances(samples: Statistics, reference: Statistics, network: Network) -> dict[str, float]:
    """All metrics of `DISTANCES[network]` that are defined, by name."""
    pair = Comparison(samples, reference)
    values = {metric.name: metric.function(pair) for metric in DISTANCES[network] if metric.function}
    return {name: value for name, value in values.items() if value is not None}
