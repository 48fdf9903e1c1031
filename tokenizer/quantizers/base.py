"""The interface of every quantizer: latents become codes, and codes latents again.

Everything runs in float32 whatever autocast says. In training mode `forward` also lets the codebook learn from the
batch, as batch norm does with its averages, and every process of a distributed run holds the same codebook afterwards.
The quantizers themselves lie in files beside this one; `quantizers.py` chooses by name.
"""

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .options import QuantizerConfig


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns.

    Attributes:
        z_q: quantized latents (B, D, h, w), with a gradient to the latents.
        codes: int64 (B, h, w), or (B, h, w, depth) for residual and product quantizers.
        loss: scalar, all terms of the quantizer with their weights.
        stats: scalars of this batch: `perplexity` of the code histogram and `usage`, the share of codes that occur,
            both means over the depths; and what the quantizer adds of its own.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    stats: dict[str, Tensor]


@dataclass(frozen=True)
class Chosen:
    """What a quantizer makes of vectors (N, d).

    Attributes:
        vectors: (N, d) in their place, with a gradient to the given ones.
        codes: int64 (N,), or (N, depth) where `depth` is more than 1.
        loss: scalar, weighted.
        counts: how often each code was chosen, (depth, K).
        stats: further scalars to log.
    """

    vectors: Tensor
    codes: Tensor
    loss: Tensor
    counts: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module):
    """A linear map into the space of the codes, a choice of codes there, and a linear map back.

    Args:
        dim: channels D of the latents.
        width: dimension d of the space of the codes.
        config: its options.
        width_in: dimension that `quantize` and `choose` take, where it is not d.

    A subclass gives `quantize`, `choose` and `lookup` on vectors (N, d); images and grids are dealt with here.
    """

    depth = 1
    """Codes a position."""
    progress = 1.0
    """Share of the run that is done; the trainer sets it before each step, for what is annealed."""
    starts = False
    """Whether `start_from` places codes; the trainer then gives it the first latents."""

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
        """Names of the tensors that only learning needs; a model folder leaves them out."""
        return set()

    @abstractmethod
    def quantize(self, flat: Tensor) -> Chosen:
        """Choose codes for vectors (N, d); in training mode the codebook then learns from them."""

    @abstractmethod
    def choose(self, flat: Tensor) -> Tensor:
        """Vectors (N, d) -> codes int64 (N,) or (N, depth); nothing learns and nothing is random."""

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (N,) or (N, depth) -> vectors (N, d)."""

    def reset_training_state(self) -> None:
        """Bring what only learning needs into line with codes that were just loaded without it."""

    def start_from(self, flat: Tensor) -> None:
        """Start the codebook from vectors (N, d) of an untrained encoder, the same on all processes."""

    def vectors(self, z: Tensor) -> Tensor:
        """Latents (B, D, h, w) -> vectors (B*h*w, d) in the space of the codes, float32, raster order."""
        with torch.autocast(z.device.type, enabled=False):
            return self.project_in(z.float()).permute(0, 2, 3, 1).flatten(0, 2)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, D, h, w); in training mode the codebook then learns from them."""
        with torch.autocast(z.device.type, enabled=False):
            chosen = self.quantize(self.vectors(z))
            z_q = self.project_out(self._grid(chosen.vectors, z.shape)).to(z.dtype)
        stats = {**_histogram_stats(chosen.counts), **chosen.stats}
        return Quantized(z_q, self._codes(chosen.codes, z.shape), chosen.loss, stats)

    def encode(self, z: Tensor) -> Tensor:
        """Latents (B, D, h, w) -> codes int64 (B, h, w) or (B, h, w, depth); nothing learns."""
        with torch.autocast(z.device.type, enabled=False):
            return self._codes(self.choose(self.vectors(z)), z.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) or (B, h, w, depth) -> quantized latents (B, D, h, w)."""
        with torch.autocast(codes.device.type, enabled=False):
            flat = self.lookup(codes.flatten(0, 2))
            return self.project_out(self._grid(flat, (len(codes), 0, *codes.shape[1:3])))

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Start the codebook from latents (B, D, h, w), gathered over all processes."""
        self.start_from(gathered(self.vectors(z)))

    @staticmethod
    def _grid(flat: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """(B*h*w, d) -> (B, d, h, w) for latents of `shape` (B, _, h, w)."""
        return flat.view(shape[0], shape[2], shape[3], flat.shape[1]).permute(0, 3, 1, 2)

    @staticmethod
    def _codes(codes: Tensor, shape: torch.Size) -> Tensor:
        """(B*h*w,) or (B*h*w, depth) -> (B, h, w) or (B, h, w, depth) for latents of `shape` (B, _, h, w)."""
        return codes.view(shape[0], *shape[2:], *codes.shape[1:])


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gathered(flat: Tensor) -> Tensor:
    """Vectors (N, d) of every process, in order of rank: (world * N, d)."""
    if not distributed():
        return flat
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, flat.contiguous())
    return torch.cat(parts)


def _histogram_stats(counts: Tensor) -> dict[str, Tensor]:
    """Perplexity and usage of histograms (depth, K), means over the depths."""
    share = counts / counts.sum(dim=1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-10).log()).sum(dim=1)
    return {"perplexity": entropy.exp().mean(), "usage": (counts > 0).float().mean()}
