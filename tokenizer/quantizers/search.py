"""Nearest-code search, k-means and histograms of codes."""

from collections.abc import Callable
from functools import cache, wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Groups in which the columns of a tile of distances are searched for their minimum.
_GROUPS = 32


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Exclude a function from compilation, which would unroll its loops over slices."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return _disabled(function)(*args, **kwargs)  # type: ignore[no-any-return]

    return call


@cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, which imports the compiler: a second that decoding does not need."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def _tile(device: torch.device) -> tuple[int, int]:
    """Return the numbers of vectors and codes of a tile of distances; codes are a multiple of `_GROUPS`."""
    if device.type == "cpu":
        return 256 * torch.get_num_threads(), 2048  # 2 MiB a thread, to stay in its cache
    return 4096, 4096  # 64 MiB, for few large kernel launches


@uncompiled
def nearest(vectors: Tensor, codebook: Tensor, unit: bool = False) -> Tensor:
    """Find the nearest code by Euclidean distance in float32: vectors (N, d), codes (K, d) -> int64 (N,).

    With `unit` the codes must have unit length. Distances are computed in tiles, without |v|^2, which is the same for
    all codes.
    """
    rows, columns = _tile(vectors.device)
    size = len(codebook)
    even = size - size % _GROUPS
    bounds = sorted({*range(0, even, columns), even, size})
    found: list[Tensor] = []
    with torch.autocast(vectors.device.type, enabled=False), torch.no_grad():
        squares = None if unit else codebook.square().sum(dim=1)
        for part in vectors.split(rows):
            part = -2 * part
            best = part.new_full((len(part),), torch.inf)
            codes = torch.zeros_like(best, dtype=torch.long)
            for start, end in pairwise(bounds):
                table = codebook[start:end].T
                distances = part @ table if squares is None else torch.addmm(squares[start:end], part, table)
                lowest, index = _minimum(distances)
                closer = lowest < best
                best = torch.where(closer, lowest, best)
                codes = torch.where(closer, index + start, codes)
            found.append(codes)
    return torch.cat(found)


def _minimum(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum of each row of (n, m) and its column.

    On a CPU `min` with indices takes ten times as long as `amin`, so it is applied to the minima of groups only.
    """
    if values.shape[1] % _GROUPS:
        return values.min(dim=1)
    groups = values.view(len(values), _GROUPS, values.shape[1] // _GROUPS)
    lowest, rest = groups.amin(dim=1).min(dim=1)
    within = groups.gather(2, rest[:, None, None].expand(-1, _GROUPS, 1))[:, :, 0].argmin(dim=1)
    return lowest, within * groups.shape[2] + rest


def kmeans(vectors: Tensor, codes: int) -> Tensor:
    """Cluster vectors (N, d) by ten steps of Lloyd's algorithm -> (codes, d). Empty clusters restart at random ones."""
    order = torch.randperm(len(vectors), device=vectors.device)
    if len(vectors) < codes:  # repeat them, with a little noise below
        order = order.repeat(-(-codes // len(vectors)))
    centres = vectors[order[:codes]].clone()
    if len(vectors) < codes:
        centres += 0.01 * vectors.std() * torch.randn_like(centres)
    for _ in range(10):
        owner = nearest(vectors, centres)
        counts = histogram(owner, codes)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        random = vectors[torch.randint(len(vectors), (codes,), device=vectors.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], random)
    return centres


def histogram(codes: Tensor, size: int) -> Tensor:
    """Count each of `size` codes in int64 (N,): float32 (size,). Unlike `bincount` it does not wait for a GPU."""
    counts = torch.zeros(size, device=codes.device)
    return counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
