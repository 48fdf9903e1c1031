"""Vector quantization (van den Oord et al. 2017): each latent vector becomes the index of its nearest code.

`forward` returns the quantized latents, the codes, the loss and statistics; in training mode it also lets the codebook
learn from the batch, as batch norm does with its averages. Everything runs in float32 whatever autocast says, and
every process of a distributed run holds the same codebook after every update.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.errors import UsageError

# Rows of the distance matrix held at once: this many float32 numbers, 16 MiB, whatever N and K.
_DISTANCES = 2**22


@dataclass
class QuantizerConfig:
    """The codebook and how it learns."""

    codebook_size: int = 1024
    """Number of codes K."""
    code_dim: int = 8
    """Dimension of a code; a linear map leads from the latents to it and back."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How codes learn: as moving averages of their vectors, or by the gradient of the codebook loss."""
    codebook_decay: float = 0.99
    """Decay of the moving averages (ema only)."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss, which draws the encoder towards its codes."""
    l2_normalize: bool = True
    """Compare directions: latents and codes lie on the unit sphere (Yu et al. 2022, section 3.2)."""
    kmeans_start: bool = True
    """Start the codebook from k-means over the first batches of latents."""
    revive_after: int = 100
    """A code unused for this many steps is moved to a random latent of the batch; 0 = never."""

    def __post_init__(self) -> None:
        if self.codebook_size < 2:
            raise UsageError(f"--codebook-size: found {self.codebook_size}, expected at least 2")
        if self.code_dim < 1:
            raise UsageError(f"--code-dim: found {self.code_dim}, expected at least 1")
        if self.l2_normalize and self.code_dim < 2:
            raise UsageError("--code-dim: 1 with --l2-normalize leaves only two codes; use a larger --code-dim")
        if not 0 < self.codebook_decay < 1:
            raise UsageError(f"--codebook-decay: found {self.codebook_decay}, expected 0 < decay < 1")
        if self.commitment_weight < 0:
            raise UsageError(f"--commitment-weight: found {self.commitment_weight}, expected at least 0")
        if self.revive_after < 0:
            raise UsageError(f"--revive-after: found {self.revive_after}, expected 0 or a number of steps")


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns.

    Attributes:
        z_q: quantized latents (B, D, h, w); the gradient passes straight through to the encoder.
        codes: int64 (B, h, w), or (B, h, w, depth) for residual and product quantizers.
        loss: scalar, all terms of the quantizer with their weights.
        stats: scalars of this batch: `perplexity` of the code histogram, `usage` the share of codes that occur.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    stats: dict[str, Tensor]


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code in Euclidean distance: (N, d), (K, d) -> int64 (N,).

    The N x K distances exist only a slice at a time. |v|^2 is the same for all codes and left out.
    """
    rows = max(1, _DISTANCES // len(codebook))
    with torch.autocast(vectors.device.type, enabled=False):
        bias = codebook.square().sum(dim=1)
        parts = [torch.addmm(bias, part, codebook.T, alpha=-2).argmin(dim=1) for part in vectors.split(rows)]
    return torch.cat(parts) if parts else vectors.new_zeros(0, dtype=torch.long)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def kmeans(vectors: Tensor, codes: int, iterations: int = 10) -> Tensor:
    """Lloyd's algorithm: (N, d) -> (codes, d). Empty clusters restart at random vectors; uses torch's random state."""
    order = torch.randperm(len(vectors), device=vectors.device)
    if len(vectors) < codes:  # too few to start one code each: repeat them, told apart by a little noise
        order = order.repeat(-(-codes // len(vectors)))
    centres = vectors[order[:codes]].clone()
    if len(vectors) < codes:
        centres += 0.01 * vectors.std() * torch.randn_like(centres)
    for _ in range(iterations):
        owner = nearest(vectors, centres)
        counts = torch.bincount(owner, minlength=codes)
        sums = torch.zeros_like(centres).index_add_(0, owner, vectors)
        random = vectors[torch.randint(len(vectors), (codes,), device=vectors.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], random)
    return centres


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with an EMA or a gradient codebook.

    Args:
        dim: channels D of the latents.

    The loss is `commitment_weight * |z - sg(e)|^2` (mean over elements), plus `|sg(z) - e|^2` for a gradient
    codebook (van den Oord et al. 2017, eq. 3; the EMA update is their appendix A.1).
    """

    depth = 1
    codebook: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        size, code_dim = config.codebook_size, config.code_dim
        self.project_in = nn.Conv2d(dim, code_dim, 1)
        self.project_out = nn.Conv2d(code_dim, dim, 1)
        codebook = F.normalize(torch.randn(size, code_dim), dim=1)
        if config.codebook == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("counts", torch.ones(size))
            self.register_buffer("sums", codebook.clone())
        self.register_buffer("idle", torch.zeros(size, dtype=torch.long))

    @property
    def training_state(self) -> set[str]:
        """Names of the tensors that only learning needs; a model folder leaves them out."""
        return {"idle"} | ({"counts", "sums"} if self.config.codebook == "ema" else set())

    def vectors(self, z: Tensor) -> Tensor:
        """Latents (B, D, h, w) -> vectors (B*h*w, d) in the space of the codes, float32, raster order."""
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.project_in(z.float()).permute(0, 2, 3, 1).flatten(0, 2)
            return F.normalize(vectors, dim=1) if self.config.l2_normalize else vectors

    def codes_table(self) -> Tensor:
        """The codes as compared and decoded: (K, d), unit length where l2-normalised."""
        table = self.codebook.float()
        return F.normalize(table, dim=1) if self.config.l2_normalize else table

    def forward(self, z: Tensor) -> Quantized:
        """Quantize latents (B, D, h, w); in training mode the codebook then learns from them."""
        with torch.autocast(z.device.type, enabled=False):
            flat = self.vectors(z)
            table = self.codes_table()
            codes = nearest(flat.detach(), table.detach())
            chosen = F.embedding(codes, table)
            loss = self.config.commitment_weight * F.mse_loss(flat, chosen.detach())
            if self.config.codebook == "gradient":
                loss = loss + F.mse_loss(chosen, flat.detach())
            counts = torch.bincount(codes, minlength=len(table))
            if self.training:
                self._learn(flat.detach(), codes, counts)
            straight = flat + (chosen - flat).detach()
            z_q = self.project_out(self._grid(straight, z.shape)).to(z.dtype)
        share = counts / counts.sum()
        stats = {
            "perplexity": torch.exp(-(share * share.clamp_min(1e-10).log()).sum()),
            "usage": (counts > 0).float().mean(),
        }
        return Quantized(z_q, codes.view(len(z), *z.shape[2:]), loss, stats)

    def encode(self, z: Tensor) -> Tensor:
        """Latents (B, D, h, w) -> codes int64 (B, h, w); nothing learns."""
        return nearest(self.vectors(z), self.codes_table()).view(len(z), *z.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> quantized latents (B, D, h, w)."""
        with torch.autocast(codes.device.type, enabled=False):
            flat = F.embedding(codes.flatten(), self.codes_table())
            return self.project_out(self._grid(flat, (len(codes), 0, *codes.shape[1:])))

    @staticmethod
    def _grid(flat: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """(B*h*w, d) -> (B, d, h, w) for latents of `shape` (B, _, h, w)."""
        return flat.view(shape[0], shape[2], shape[3], -1).permute(0, 3, 1, 2)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """Start the codebook by k-means over latents (B, D, h, w), gathered over all processes."""
        flat = self.vectors(z)
        if _distributed():
            parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, flat.contiguous())
            flat = torch.cat(parts)
        self._place(torch.ones_like(self.idle, dtype=torch.bool), kmeans(flat, len(self.codebook)), len(flat))

    def _place(self, where: Tensor, vectors: Tensor, seen: int) -> None:
        """Move the codes of `where` (K,) to rows of `vectors` (K, d), their averages included, on all processes alike.

        `seen`: vectors a step, so that a moved code starts with the average share of them.
        """
        if _distributed():
            dist.broadcast(vectors, 0)
        self.codebook.data = torch.where(where[:, None], vectors, self.codebook.data)
        self.idle.masked_fill_(where, 0)
        if self.config.codebook == "ema":
            share = seen / len(self.codebook)
            self.counts.masked_fill_(where, share)
            self.sums.copy_(torch.where(where[:, None], vectors * share, self.sums))

    @torch.no_grad()
    def _learn(self, flat: Tensor, codes: Tensor, counts: Tensor) -> None:
        """Moving averages (ema) and revival of idle codes from one batch: flat (N, d), codes (N,), counts (K,)."""
        counts = counts.float()
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, flat) if self.config.codebook == "ema" else None
        if _distributed():
            dist.all_reduce(counts)
            if sums is not None:
                dist.all_reduce(sums)
        used = counts > 0
        if sums is not None:
            self.counts.lerp_(counts, 1 - self.config.codebook_decay)
            self.sums.lerp_(sums, 1 - self.config.codebook_decay)
            # Only codes that were used move: an unused one keeps its place while both its averages fade.
            mean = self.sums / self.counts.clamp_min(1e-8)[:, None]
            if self.config.l2_normalize:
                mean = F.normalize(mean, dim=1)
            self.codebook.copy_(torch.where(used[:, None], mean, self.codebook))
        self.idle.add_(1).masked_fill_(used, 0)
        if self.config.revive_after:
            dead = self.idle >= self.config.revive_after
            if dead.any():
                random = flat[torch.randint(len(flat), (len(self.codebook),), device=flat.device)]
                self._place(dead, random, int(counts.sum()))
