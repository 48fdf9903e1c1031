"""Statistics of a stream of features, accumulated in each process and reduced over all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vqgen.errors import UserError
from vqgen.seeding import fixed_subset

KEPT = 10_000
"""Features kept of a set, spread over it: those that the kernel and nearest-neighbour metrics compare."""
SPLITS, SEED = 10, 2020  # parts of the Inception Score, and the seed that assigns images to them: torch-fidelity's


@dataclass(frozen=True)
class Statistics:
    """A set of images as the distances see it: moments of all features, and `KEPT` of the features."""

    count: int
    mean: Tensor
    """float64 (D,)."""
    covariance: Tensor
    """float64 (D, D), unbiased."""
    features: Tensor
    """float32 (min(count, KEPT), D), in the order of the images."""
    inception_score: tuple[float, float] | None = None
    """Mean and standard deviation, if the extractor gives logits."""


def reduce_sum(tensor: Tensor, device: torch.device) -> Tensor:
    """Sum of a tensor over all processes, on the CPU; the collective runs on `device`."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.cpu()


class Moments:
    """Count, mean and scatter matrix of feature vectors, float64, updated as in Chan et al. 1979."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(size, size, dtype=torch.float64)
        """Sum of the outer products of the deviations from the mean."""

    def add(self, features: Tensor) -> None:
        """Add features (B, D), B at least 1."""
        exact, other = features.double(), Moments(0)
        other.count, other.mean = len(exact), exact.mean(0)
        centred = exact - other.mean
        other.scatter = centred.T @ centred
        self.merge(other)

    def merge(self, other: "Moments") -> None:
        """Add the moments of another set."""
        if other.count:
            total = self.count + other.count
            delta = other.mean - self.mean
            self.mean = self.mean + delta * (other.count / total)
            self.scatter += other.scatter
            self.scatter.addr_(delta, delta, alpha=self.count * other.count / total)
            self.count = total

    def reduce(self, device: torch.device) -> None:
        """Replace these moments by those of all processes together."""
        totals = reduce_sum(torch.cat([self.mean * self.count, self.mean.new_tensor([self.count])]), device)
        count = int(totals[-1])
        mean = totals[:-1] / max(count, 1)
        delta = self.mean - mean
        self.scatter = reduce_sum(self.scatter + self.count * torch.outer(delta, delta), device)
        self.count, self.mean = count, mean

    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D), of at least 2 vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, found {self.count}")
        return self.scatter / (self.count - 1)


class InceptionScore:
    """Inception Score of `count` images from a stream of logits, as torch-fidelity computes it from all at once."""

    def __init__(self, count: int, classes: int) -> None:
        self.splits = min(SPLITS, count)
        place = np.empty(count, dtype=np.int64)
        place[np.random.RandomState(SEED).permutation(count)] = np.arange(count)
        bounds = [part * count // self.splits for part in range(1, self.splits)]
        self.part = torch.from_numpy(np.searchsorted(bounds, place, side="right"))
        # Columns: sum of p, sum of p log p, number of images.
        self.sums = torch.zeros(self.splits, classes + 2, dtype=torch.float64)

    def add(self, positions: Tensor, logits: Tensor) -> None:
        """Add logits (B, classes) of the images at these positions of the set."""
        p, log_p = logits.double().softmax(1), logits.double().log_softmax(1)
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones(len(p), 1, dtype=torch.float64)], 1)
        self.sums.index_add_(0, self.part[positions], rows)

    def compute(self, device: torch.device) -> tuple[float, float]:
        """Mean and standard deviation over the parts, over all processes."""
        sums = reduce_sum(self.sums, device)
        means = sums[:, :-1] / sums[:, -1:]
        marginal = means[:, :-1]
        scores = (means[:, -1] - torch.special.xlogy(marginal, marginal).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


class FeatureSets:
    """Statistics of the first n images of a set, for several n.

    Each process adds its share of the images; moments are reduced, the kept features gathered by the main process.
    """

    def __init__(self, size: int, device: torch.device, counts: Sequence[int], classes: int = 0) -> None:
        """`size` is D; collectives run on `device`; `counts` are the values of n, the largest the whole set."""
        self.device, self.counts = device, sorted(set(counts))
        self._moments = [Moments(size) for _ in self.counts]  # of the images between two counts
        self._bounds = torch.tensor(self.counts)
        self._wanted = torch.zeros(self.counts[-1], dtype=torch.bool)
        for count in self.counts:
            self._wanted[fixed_subset(KEPT, count)] = True
        self._positions, self._features = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, size)]
        self._scores = {count: InceptionScore(count, classes) for count in self.counts if classes}

    def add(self, positions: Tensor, features: Tensor, logits: Tensor | None = None) -> None:
        """Add features (B, D), and logits (B, classes) if there are any, of the images at these positions (B,)."""
        segments = torch.bucketize(positions, self._bounds, right=True)
        for segment in segments.unique().tolist():
            self._moments[segment].add(features[segments == segment])
        wanted = self._wanted[positions]
        self._positions.append(positions[wanted])
        self._features.append(features[wanted])
        if logits is not None:
            for count, score in self._scores.items():
                inside = positions < count
                score.add(positions[inside], logits[inside])

    def reduce(self, main: bool) -> dict[int, Statistics]:
        """Statistics by n in the main process, nothing in the others; every process must call it. Raises `UserError`
        for fewer than 2 images, as those that cannot be read are left out."""
        positions, features = torch.cat(self._positions), torch.cat(self._features)
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.gather_object((positions, features), parts if main else None)
            if main:
                positions, features = (torch.cat(side) for side in zip(*parts))
        order = positions.argsort()
        positions, features = positions[order], features[order]
        total, found = Moments(len(self._moments[0].mean)), {}
        for count, moments in zip(self.counts, self._moments, strict=True):
            moments.reduce(self.device)
            total.merge(moments)
            if total.count < 2:  # in every process
                raise UserError(f"a distance needs at least 2 images that can be read, found {total.count}; give more")
            score = self._scores[count].compute(self.device) if self._scores else None
            if main:
                subset = torch.isin(positions, torch.tensor(fixed_subset(KEPT, count)))
                kept = features[subset].float()
                found[count] = Statistics(total.count, total.mean.clone(), total.covariance(), kept, score)
        return found
