"""The interface of all quantizers: latents to codes, and codes to quantized latents.

Quantizers compute in float32 whatever autocast says. In training mode `forward` also updates the codebook from the
batch, as batch norm updates its averages; afterwards every process of a distributed run has the same codebook.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .options import QuantizerConfig


@dataclass(frozen=True)
class Quantized:
    """Result of quantizing latents.

    Attributes:
        z_q: quantized latents (B, D, h, w), with a gradient to the latents.
        codes: int64 (B, h, w), or (B, h, w, depth) where `depth` is more than 1.
        loss: (), the weighted sum of the quantizer's losses.
        stats: scalars of the batch to log: `perplexity` of the code histogram and `usage`, the share of codes that
            occur, both means over the depths; and the quantizer's own.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class QuantizedVectors:
    """Result of quantizing vectors (N, d).

    Attributes:
        vectors: quantized vectors (N, d), with a gradient to the given ones.
        codes: int64 (N,), or (N, depth) where `depth` is more than 1.
        loss: (), weighted.
        counts: histogram of the codes (depth, K).
        stats: further scalars to log.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    counts: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Base of quantizers: a linear map of latents to vectors, a choice of codes for them, and a linear map back.

    A subclass implements `quantize`, `choose` and `lookup` on vectors (N, d); this class handles grids and autocast.

    Args:
        dim: channels D of the latents.
        width: dimension d of the quantized vectors.
        config: options of this kind.
        width_in: dimension of the vectors given to `quantize` and `choose`, where it is not d.
    """

    depth = 1
    """Codes a position."""
    training_progress = 1.0
    """Share of the run's steps that are done, for annealing; the trainer sets it before each step."""
    needs_initialization = False
    """Whether the trainer shall call `initialize` with the first latents."""

    def __init__(self, dim: int, width: int, config: QuantizerConfig, width_in: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Conv2d(dim, width_in or width, 1)
        self.project_out = nn.Conv2d(width, dim, 1)

    @property
    def codebook_size(self) -> int:
        """Codes K of each codebook."""
        return self.config.codes

    @property
    def training_state(self) -> set[str]:
        """Names of the tensors that only training needs; a model folder leaves them out."""
        return set()

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Return this module's own codebook parameters, which have no weight decay; submodules answer for theirs."""
        return []

    @abstractmethod
    def quantize(self, flat: Tensor) -> QuantizedVectors:
        """Quantize vectors (N, d); in training mode also update the codebook."""

    @abstractmethod
    def choose(self, flat: Tensor) -> Tensor:
        """Choose codes int64 (N,) or (N, depth) for vectors (N, d), without randomness or updates."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors (N, d) of codes (N,) or (N, depth)."""

    def reset_training_state(self) -> None:
        """Reset the tensors that only training needs, after codes were loaded without them."""

    def initialize_from(self, flat: Tensor) -> None:
        """Initialize the codebook from vectors (N, d) of an untrained encoder, the same on all processes."""

    def vectors(self, z: Tensor) -> Tensor:
        """Map latents (B, D, h, w) to vectors (B*h*w, d), float32, in raster order."""
        with torch.autocast(z.device.type, enabled=False):
            if z.device.type == "cpu":
                return self.project_in(z.float()).permute(0, 2, 3, 1).flatten(0, 2)
            # Convolutions in float32 round to 10 bits (TF32) on CUDA, which chooses other codes; products do not.
            flat, layer = z.float().permute(0, 2, 3, 1).flatten(0, 2), self.project_in
            return F.linear(flat, layer.weight.flatten(1), layer.bias)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, D, h, w); in training mode also update the codebook."""
        with torch.autocast(z.device.type, enabled=False):
            result = self.quantize(self.vectors(z))
            found, expected = tuple(result.counts.shape), (self.depth, self.codebook_size)
            if found != expected:
                raise ValueError(f"{type(self).__name__}: counts have shape {found}, expected (depth, K) = {expected}")
            z_q = self.project_out(self._grid(result.vectors, z.shape)).to(z.dtype)
        stats = {**_histogram_stats(result.counts), **result.stats}
        return Quantized(z_q, self._codes(result.codes, z.shape), result.loss, stats)

    def encode(self, z: Tensor) -> Tensor:
        """Choose codes int64 (B, h, w) or (B, h, w, depth) for latents (B, D, h, w), without updates."""
        with torch.autocast(z.device.type, enabled=False):
            return self._codes(self.choose(self.vectors(z)), z.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the quantized latents (B, D, h, w) of codes (B, h, w) or (B, h, w, depth)."""
        with torch.autocast(codes.device.type, enabled=False):
            flat = self.lookup(codes.flatten(0, 2))
            return self.project_out(self._grid(flat, (len(codes), 0, *codes.shape[1:3])))

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        """Initialize the codebook from latents (B, D, h, w) of all processes."""
        if self.needs_initialization:
            self.initialize_from(gathered(self.vectors(z)))

    @staticmethod
    def _grid(flat: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Reshape (B*h*w, d) to (B, d, h, w) for latents of `shape` (B, _, h, w)."""
        return flat.view(shape[0], shape[2], shape[3], flat.shape[1]).permute(0, 3, 1, 2)

    @staticmethod
    def _codes(codes: Tensor, shape: torch.Size) -> Tensor:
        """Reshape codes (B*h*w[, depth]) to (B, h, w[, depth]) for latents of `shape` (B, _, h, w)."""
        return codes.view(shape[0], *shape[2:], *codes.shape[1:])


def distributed() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(flat: Tensor) -> Tensor:
    """Gather vectors (N, d) of all processes in order of rank: (world * N, d)."""
    if not distributed():
        return flat
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat.contiguous())
    return torch.cat(parts)


def _histogram_stats(counts: Tensor) -> dict[str, Tensor]:
    """Compute perplexity and usage of histograms (depth, K), means over the depths."""
    share = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-10).log()).sum(dim=1)
    return {"perplexity": entropy.exp().mean(), "usage": (counts > 0).float().mean()}
