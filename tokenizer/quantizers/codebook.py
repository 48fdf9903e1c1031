"""A codebook on vectors: losses, gradient estimators, entropy loss, and how codes learn.

`VectorQuantizer` has one, residual and product quantizers several. In a distributed run every process has the same
codes after every update, revival and k-means initialization.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .base import QuantizedVectors, distributed
from .options import CodebookConfig, Estimator, SoftEntropy
from .search import histogram, kmeans, nearest, uncompiled

# Elements of the N x K matrix of soft choices in memory at once: 16 MiB in float32.
_SOFT_ELEMENTS = 2**22


def vq_loss(flat: Tensor, quantized: Tensor, commitment_weight: float, by_gradient: bool) -> Tensor:
    """Commitment loss `commitment_weight * |z - sg(e)|^2`, plus `|sg(z) - e|^2` where codes learn `by_gradient`.

    The last two terms of van den Oord et al. 2017, eq. 3, for z and e (N, d); means over elements.
    """
    loss = commitment_weight * F.mse_loss(flat, quantized.detach())
    return loss + F.mse_loss(quantized, flat.detach()) if by_gradient else loss


def with_gradient(flat: Tensor, quantized: Tensor, estimator: Estimator) -> Tensor:
    """Return the vectors `quantized` (N, d) with a gradient to the vectors `flat` (N, d) and none to the codes.

    straight-through: the gradient of z is that of its code q (Bengio et al. 2013).
    rotation: the gradient of `sg(|q| / |z| R) z`, which equals q. R is the rotation in the plane of z and q that turns
    z to q, `R = I - 2 r r^T + 2 q' z'^T` for `z' = z / |z|`, `q' = q / |q|`, `r = (z' + q') / |z' + q'|` (Fifty et al.
    2024, section 4.2).
    """
    rule: Any = _Rotation if estimator == "rotation" else _StraightThrough
    return rule.apply(flat, quantized.detach())


class _Normalized(torch.autograd.Function):
    """`F.normalize` over the rows of (N, d), whose backward pass reads memory half as often."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor) -> Tensor:
        inverse = flat.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
        unit = flat * inverse
        ctx.save_for_backward(unit, inverse)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (unit, inverse) = grads, ctx.saved_tensors
        return torch.addcmul(grad, unit, (unit * grad).sum(dim=1, keepdim=True), value=-1).mul_(inverse)


class _StraightThrough(torch.autograd.Function):
    """`z + sg(q - z)`, without its rounding and memory."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, chosen: Tensor) -> Tensor:
        return chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Rotation(torch.autograd.Function):
    """`sg(|q| / |z| R) z`, see `with_gradient`."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(flat, chosen)
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), (z, q) = grads, ctx.saved_tensors
        eps = 1e-6  # far below the length of any latent; keeps the gradient finite at 0
        z_length, q_length = (v.norm(dim=1, keepdim=True) for v in (z, q))
        z, q = z / z_length.clamp_min(eps), q / q_length.clamp_min(eps)
        r = F.normalize(z + q, dim=1, eps=eps)
        # R^T g = g - 2 r (r^T g) + 2 z' (q'^T g)
        turned = grad - 2 * r * (r * grad).sum(dim=1, keepdim=True) + 2 * z * (q * grad).sum(dim=1, keepdim=True)
        return turned * (q_length / z_length.clamp_min(eps)), None


@uncompiled
def entropies(flat: Tensor, table: Tensor, temperature: float, averaged: bool) -> tuple[Tensor, Tensor]:
    """Compute E[H(p(z))] and H(E[p(z)]) in nats for soft choices `p(k|z) = softmax_k(-|z - e_k|^2 / temperature)`.

    The two terms of the entropy loss of Yu et al. 2023, eq. 5, for vectors (N, d) and codes (K, d). The N x K matrix is
    computed in slices, and again in the backward pass. With `averaged`, E[p] is the mean over all processes.
    """
    squares = table.square().sum(dim=1)

    def slice_of(part: Tensor, table: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (torch.addmm(squares, part, table.T, alpha=-2) / -temperature).log_softmax(dim=1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(dim=0)

    each, mean = flat.new_zeros(()), torch.zeros_like(squares)
    for part in flat.split(max(1, _SOFT_ELEMENTS // len(table))):
        entropy, p = checkpoint(slice_of, part, table, squares, use_reentrant=False, preserve_rng_state=False)
        each, mean = each + entropy / len(flat), mean + p / len(flat)
    return each, entropy_of_mean(mean, averaged)


def entropy_of_mean(mean: Tensor, averaged: bool) -> Tensor:
    """Entropy in nats of a mean distribution (K,); with `averaged`, of the mean over all processes."""
    if averaged and distributed():
        total = mean.detach().clone()
        dist.all_reduce(total)
        # Gradients are averaged over the processes, so each contributes the full gradient of its own part.
        mean = mean + (total / dist.get_world_size() - mean.detach())
    return -(mean * mean.clamp_min(1e-30).log()).sum()


class Codebook(nn.Module):
    """K codes of d dimensions, learned as moving averages or by gradient (van den Oord et al. 2017, eq. 3).

    Vectors and codes are compared by Euclidean distance; with `unit` both are first normalized to unit length.

    Moving averages (appendix A.1): of the number of vectors of each code, `N <- g N + (1 - g) n`, and of their sum,
    `m <- g m + (1 - g) sum z`; the code is `m / N`, with `unit` `m / |m|`. Stored are the code and its *weight*, N or
    |m|, whose product is m. The weight of an unused code decays while the code stays, so that an update writes no codes
    but the used ones.

    Args:
        width: dimension d of a code.
        unit: compare directions. Codes learned as moving averages then have unit length themselves.
        entropy: options of the entropy loss, where the kind has it.
    """

    codes: Tensor
    weights: Tensor
    idle: Tensor

    def __init__(self, config: CodebookConfig, width: int, unit: bool, entropy: SoftEntropy | None = None) -> None:
        super().__init__()
        self.config, self.unit, self.entropy = config, unit, entropy
        self.by_gradient = config.codebook == "gradient"
        codes = torch.empty(config.codebook_size, width)
        if not codes.is_meta:  # there random numbers import the compiler
            codes = F.normalize(torch.randn(codes.shape), dim=1)
        if self.by_gradient:
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
            self.register_buffer("weights", torch.ones(len(codes)))
        self.register_buffer("idle", torch.zeros(len(codes), dtype=torch.long))

    @property
    def training_state(self) -> set[str]:
        """Names of the tensors that only training needs."""
        return {"idle"} if self.by_gradient else {"idle", "weights"}

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are codes."""
        return [self.codes] if isinstance(self.codes, nn.Parameter) else []

    def scaled(self, flat: Tensor) -> Tensor:
        """Return vectors (N, d) as they are compared: with `unit`, normalized."""
        return _Normalized.apply(flat) if self.unit else flat  # type: ignore[no-any-return]

    def _decoded(self, rows: Tensor) -> Tensor:
        """Return rows of `codes` as they are compared and decoded: with `unit`, normalized."""
        # Updates by moving averages keep unit length; averaging the weights of several steps does not.
        normalized = self.training and not self.by_gradient
        return rows.float() if normalized else self.scaled(rows.float())

    def table(self) -> Tensor:
        """Return all codes as they are compared and decoded, (K, d)."""
        return self._decoded(self.codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the vectors (N, d) of codes (N,)."""
        return self._decoded(F.embedding(codes, self.codes))

    def choose(self, flat: Tensor) -> Tensor:
        """Return the nearest codes (N,) of vectors (N, d)."""
        return nearest(self.scaled(flat), self.table(), self.unit)

    def forward(self, flat: Tensor) -> QuantizedVectors:
        """Quantize vectors (N, d); in training mode also update the codes."""
        config, flat = self.config, self.scaled(flat)
        codes = nearest(flat.detach(), self.table().detach(), self.unit)
        quantized = self.lookup(codes)
        loss = vq_loss(flat, quantized, config.commitment_weight, self.by_gradient)
        stats: dict[str, Tensor] = {}
        if self.entropy and self.entropy.entropy_weight:
            table = self._decoded(self.codes.clone())  # the update below writes to the codes before the backward pass
            each, mean = entropies(flat, table, self.entropy.entropy_temperature, self.training)
            loss = loss + self.entropy.entropy_weight * (each - self.entropy.entropy_diversity * mean)
            stats = {"entropy_each": each.detach(), "entropy_mean": mean.detach()}
        vectors = with_gradient(flat, quantized, config.estimator)
        stats["code_distance"] = (flat - quantized).detach().square().sum() / flat.detach().square().sum()
        if self.training:
            stats["codes_revived"] = self.update(flat.detach(), codes, quantized.detach())
        return QuantizedVectors(vectors, codes, loss, histogram(codes, len(self.codes))[None], stats)

    @torch.no_grad()
    def initialize_from(self, flat: Tensor) -> None:
        """Initialize the codes by k-means over vectors (N, d), those of all processes."""
        flat = self.scaled(flat)
        centres = kmeans(flat, len(self.codes))
        if distributed():
            dist.broadcast(centres, 0)
        self.codes.copy_(self.scaled(centres))
        self.idle.zero_()
        if not self.by_gradient:
            share = len(flat) / len(self.codes)  # the mean count
            self.weights.copy_(share * centres.norm(dim=1) if self.unit else torch.full_like(self.weights, share))

    @torch.no_grad()
    def reset_training_state(self) -> None:
        """Reset the tensors that only training needs, after codes were loaded without them."""
        self.idle.zero_()
        if not self.by_gradient:  # the loaded codes may be those of a gradient codebook, of any length
            self.codes.copy_(self.scaled(self.codes))
            self.weights.fill_(1)

    @torch.no_grad()
    def update(self, flat: Tensor, codes: Tensor, quantized: Tensor) -> Tensor:
        """Update the codes with one batch; return how many were revived, ().

        Args:
            flat: vectors (N, d) as compared.
            codes, quantized: their codes (N,) and the vectors of these (N, d).
        """
        counts = histogram(codes, len(self.codes))
        if distributed():
            dist.all_reduce(counts)
        if not self.by_gradient:
            self._update_averages(flat, codes, quantized, counts)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        if self.config.revive_after:
            dead = self.idle >= self.config.revive_after
            if dead.device.type != "cpu" or dead.any():  # on a GPU, testing would wait for the device
                self._revive(flat, codes, dead)
                return dead.sum().clamp(max=len(flat)).float()
        return flat.new_zeros(())

    def _update_averages(self, flat: Tensor, codes: Tensor, quantized: Tensor, counts: Tensor) -> None:
        """Update the moving averages, as `e + (1 - g) sum(z - e) / (g w + (1 - g) n)`.

        With weight w that is `(g w e + (1 - g) sum z) / (g w + (1 - g) n)`, the new mean; unused codes do not change.
        """
        fresh = 1 - self.config.codebook_decay
        moves = flat - quantized
        used = counts > 0
        self.weights.lerp_(counts, fresh)
        if distributed() or len(self.codes) <= len(codes):
            # Sum per code first: over processes, so that all add in the same order; and where codes are fewer than
            # vectors, because it is less work.
            moves = torch.zeros_like(self.codes).index_add_(0, codes, moves)
            if distributed():
                dist.all_reduce(moves)
            codes = torch.arange(len(self.codes), device=codes.device)
        rate = torch.where(used, fresh / self.weights, 0)
        self.codes.index_add_(0, codes, moves.mul_(rate[codes, None]))
        if self.unit:
            means = self.codes[codes]  # a repeated code is read and written repeatedly with the same value
            length = torch.where(used[codes], means.norm(dim=1).clamp_min(1e-12), 1)
            self.codes[codes] = means.div_(length[:, None])
            self.weights[codes] = self.weights[codes] * length

    def _revive(self, flat: Tensor, codes: Tensor, dead: Tensor) -> None:
        """Move codes that are `dead` (K,) to different vectors of the batch, and restart their averages.

        Where more codes are dead than there are vectors, the rest follow at the next steps.
        """
        slots = min(len(flat), len(dead))
        rank = dead.cumsum(0) - 1
        slot = torch.where(dead & (rank < slots), rank, slots)
        everyone = torch.arange(len(dead), device=dead.device)
        takers = codes.new_zeros(slots + 1).scatter_(0, slot, everyone)[:slots]
        taken = everyone[:slots] < dead.sum()
        # Slots without a dead code are given to codes in use, which keep their values.
        takers = torch.where(taken, takers, codes[:slots])
        random = flat[torch.randperm(len(flat), device=flat.device)[:slots]]
        if distributed():
            dist.broadcast(random, 0)
        self.codes[takers] = torch.where(taken[:, None], random, self.codes[takers])
        self.idle[takers] = torch.where(taken, 0, self.idle[takers])
        if not self.by_gradient:
            share = len(flat) * (dist.get_world_size() if distributed() else 1) / len(self.codes)
            self.weights[takers] = torch.where(taken, share, self.weights[takers])
