"""A codebook on plain vectors: its losses, how the gradient passes it, and how codes learn.

VectorQuantizer has one, residual and product quantizers several. In a distributed run every process holds the same
codes after every update, revival and k-means start.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .base import Chosen, distributed
from .options import QuantizerConfig
from .search import histogram, kmeans, nearest, uncompiled

# Soft choices held at once: this many float32 numbers, 16 MiB, whatever N and K.
_SOFT = 2**22


def vq_loss(flat: Tensor, chosen: Tensor, commitment_weight: float, learned: bool) -> Tensor:
    """`commitment_weight * |z - sg(e)|^2`, plus `|sg(z) - e|^2` where codes are `learned` by gradient.

    The last two terms of van den Oord et al. 2017, eq. 3, for z and e (N, d); means over elements.
    """
    loss = commitment_weight * F.mse_loss(flat, chosen.detach())
    return loss + F.mse_loss(chosen, flat.detach()) if learned else loss


def estimated(flat: Tensor, chosen: Tensor, config: QuantizerConfig) -> Tensor:
    """The vectors `chosen` (N, d), with a gradient to the vectors `flat` (N, d) and none to the codes.

    straight-through: the gradient of z is that of the code q in its place (Bengio et al. 2013).
    rotation: that of `sg(|q| / |z| R) z`, which is q, with R the rotation in the plane of z and q that turns z to q,
    `R = I - 2 r r^T + 2 q' z'^T` for `z' = z / |z|`, `q' = q / |q|`, `r = (z' + q') / |z' + q'|` (Fifty et al. 2024,
    section 4.2).
    """
    rule: Any = _Rotated if config.estimator == "rotation" else _StraightThrough
    return rule.apply(flat, chosen.detach())


class _Normalized(torch.autograd.Function):
    """`F.normalize` over the rows of (N, d), with half its passes over memory on the way back."""

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
    """`z + sg(q - z)`, without the rounding and without the memory."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, chosen: Tensor) -> Tensor:
        return chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Rotated(torch.autograd.Function):
    """`sg(|q| / |z| R) z`."""

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
    """E[H(p(z))] and H(E[p(z)]), in nats, of the soft choices `p(k|z) = softmax_k(-|z - e_k|^2 / temperature)`.

    The two terms of the entropy loss of Yu et al. 2023, eq. 5, for vectors (N, d) and codes (K, d). The N x K choices
    exist a slice at a time: the backward pass computes them anew. With `averaged`, E[p] is the mean over all processes.
    """
    squares = table.square().sum(dim=1)

    def slice_of(part: Tensor, table: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (torch.addmm(squares, part, table.T, alpha=-2) / -temperature).log_softmax(dim=1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(dim=0)

    each, mean = flat.new_zeros(()), torch.zeros_like(squares)
    for part in flat.split(max(1, _SOFT // len(table))):
        entropy, p = checkpoint(slice_of, part, table, squares, use_reentrant=False, preserve_rng_state=False)
        each, mean = each + entropy / len(flat), mean + p / len(flat)
    return each, entropy_of_mean(mean, averaged)


def entropy_of_mean(mean: Tensor, averaged: bool) -> Tensor:
    """Entropy in nats of a distribution (K,) that is the mean over the vectors here; `averaged`: of all processes."""
    if averaged and distributed():
        total = mean.detach().clone()
        dist.all_reduce(total)
        # Gradients are averaged over the processes: each brings that of its own part, whole.
        mean = mean + (total / dist.get_world_size() - mean.detach())
    return -(mean * mean.clamp_min(1e-30).log()).sum()


class Codebook(nn.Module):
    """K codes of d dimensions, learned as moving averages or by gradient (van den Oord et al. 2017, eq. 3).

    Vectors and codes are compared in Euclidean distance; with `unit` both are first brought to unit length.

    Moving averages (their appendix A.1): of how many vectors take the code, `N <- g N + (1 - g) n`, and of their sum,
    `m <- g m + (1 - g) sum z`; the code is `m / N`, with `unit` `m / |m|`. So m is the code times a number, its
    *weight*: N, or |m|. That number is all that is kept beside the code. Where a code is not used its weight fades and
    it stays where it is, so that a step touches no more of the codebook than the codes it used.

    Args:
        width: dimension d of a code.
        unit: compare directions. Codes learned as moving averages then have unit length themselves.
    """

    codes: Tensor
    weights: Tensor
    idle: Tensor

    def __init__(self, config: QuantizerConfig, width: int, unit: bool) -> None:
        super().__init__()
        self.config, self.unit = config, unit
        self.learned = config.codebook == "gradient"
        codes = F.normalize(torch.randn(config.codebook_size, width), dim=1)
        if self.learned:
            self.codes = nn.Parameter(codes)
        else:
            self.register_buffer("codes", codes)
            self.register_buffer("weights", torch.ones(len(codes)))
        self.register_buffer("idle", torch.zeros(len(codes), dtype=torch.long))

    def codebook_parameters(self) -> list[nn.Parameter]:
        """Parameters whose rows are codes."""
        return [self.codes] if isinstance(self.codes, nn.Parameter) else []

    @property
    def training_state(self) -> set[str]:
        """Names of the tensors that only learning needs."""
        return {"idle"} if self.learned else {"idle", "weights"}

    def scaled(self, flat: Tensor) -> Tensor:
        """Vectors (N, d) as compared."""
        return _Normalized.apply(flat) if self.unit else flat  # type: ignore[no-any-return]

    def _decoded(self, rows: Tensor) -> Tensor:
        """Rows of `codes` as compared and decoded: with `unit` of unit length."""
        # Moving averages keep to it as they learn; the average of several models' codes does not.
        kept = self.training and not self.learned
        return rows.float() if kept else self.scaled(rows.float())

    def table(self) -> Tensor:
        """All codes as compared and decoded: (K, d)."""
        return self._decoded(self.codes)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (N,) -> vectors (N, d)."""
        return self._decoded(F.embedding(codes, self.codes))

    def choose(self, flat: Tensor) -> Tensor:
        """Vectors (N, d) -> codes (N,)."""
        return nearest(self.scaled(flat), self.table(), self.unit)

    def forward(self, flat: Tensor) -> Chosen:
        """Quantize vectors (N, d); in training mode the codes then learn from them."""
        config, flat = self.config, self.scaled(flat)
        codes = nearest(flat.detach(), self.table().detach(), self.unit)
        chosen = self.lookup(codes)
        loss = vq_loss(flat, chosen, config.commitment_weight, self.learned)
        stats: dict[str, Tensor] = {}
        if config.entropy_weight:
            table = self._decoded(self.codes.clone())  # the codes move before the backward pass
            each, mean = entropies(flat, table, config.entropy_temperature, self.training)
            loss = loss + config.entropy_weight * (each - config.entropy_diversity * mean)
            stats = {"entropy_each": each.detach(), "entropy_mean": mean.detach()}
        vectors = estimated(flat, chosen, config)
        if self.training:
            self.learn(flat.detach(), codes, chosen.detach())
        return Chosen(vectors, codes, loss, histogram(codes, len(self.codes))[None], stats)

    @torch.no_grad()
    def start_from(self, flat: Tensor) -> None:
        """Start the codes by k-means over vectors (N, d), which are those of all processes."""
        flat = self.scaled(flat)
        centres = kmeans(flat, len(self.codes))
        if distributed():
            dist.broadcast(centres, 0)
        self.codes.copy_(self.scaled(centres))
        self.idle.zero_()
        if not self.learned:
            share = len(flat) / len(self.codes)  # each code starts with the mean count
            self.weights.copy_(share * centres.norm(dim=1) if self.unit else torch.full_like(self.weights, share))

    @torch.no_grad()
    def reset_training_state(self) -> None:
        """Bring what only learning needs into line with codes that were just loaded without it."""
        self.idle.zero_()
        if not self.learned:  # the codes may be those of a gradient codebook, of any length
            self.codes.copy_(self.scaled(self.codes))
            self.weights.fill_(1)

    @torch.no_grad()
    def learn(self, flat: Tensor, codes: Tensor, chosen: Tensor) -> None:
        """Move the codes by one batch: vectors (N, d) as compared, their codes (N,), the vectors of these (N, d)."""
        counts = histogram(codes, len(self.codes))
        if distributed():
            dist.all_reduce(counts)
        if not self.learned:
            self._average(flat, codes, chosen, counts)
        self.idle.add_(1).masked_fill_(counts > 0, 0)
        if self.config.revive_after:
            dead = self.idle >= self.config.revive_after
            if dead.device.type != "cpu" or dead.any():  # to look would wait for a GPU; on the CPU it saves the work
                self._revive(flat, codes, dead)

    def _average(self, flat: Tensor, codes: Tensor, chosen: Tensor, counts: Tensor) -> None:
        """The moving averages, by how far each vector lies from its code: `e + (1 - g) sum(z - e) / (g w + (1 - g) n)`.

        With weight w that is `(g w e + (1 - g) sum z) / (g w + (1 - g) n)`, the new mean; unused codes are in no sum.
        """
        fresh = 1 - self.config.codebook_decay
        moves = flat - chosen
        used = counts > 0
        self.weights.lerp_(counts, fresh)
        if distributed() or len(self.codes) <= len(codes):
            # Summed a code: over processes, before they touch one, for the order of additions must be the same on all;
            # and where codes are fewer than vectors, since then that is less work.
            moves = torch.zeros_like(self.codes).index_add_(0, codes, moves)
            if distributed():
                dist.all_reduce(moves)
            codes = torch.arange(len(self.codes), device=codes.device)
        rate = torch.where(used, fresh / self.weights, 0)
        self.codes.index_add_(0, codes, moves.mul_(rate[codes, None]))
        if self.unit:
            means = self.codes[codes]  # a code that occurs twice is read and written twice alike
            length = torch.where(used[codes], means.norm(dim=1).clamp_min(1e-12), 1)
            self.codes[codes] = means.div_(length[:, None])
            self.weights[codes] = self.weights[codes] * length

    def _revive(self, flat: Tensor, codes: Tensor, dead: Tensor) -> None:
        """Move codes that are `dead` (K,) to vectors of the batch, each to another, and restart their averages.

        Where more are dead than there are vectors, the others follow at the next steps.
        """
        slots = min(len(flat), len(dead))
        rank = dead.cumsum(0) - 1
        slot = torch.where(dead & (rank < slots), rank, slots)
        everyone = torch.arange(len(dead), device=dead.device)
        takers = codes.new_zeros(slots + 1).scatter_(0, slot, everyone)[:slots]
        taken = everyone[:slots] < dead.sum()
        # A slot that no dead code takes goes to a code in use, which stays as it is.
        takers = torch.where(taken, takers, codes[:slots])
        random = flat[torch.randperm(len(flat), device=flat.device)[:slots]]
        if distributed():
            dist.broadcast(random, 0)
        self.codes[takers] = torch.where(taken[:, None], random, self.codes[takers])
        self.idle[takers] = torch.where(taken, 0, self.idle[takers])
        if not self.learned:
            share = len(flat) * (dist.get_world_size() if distributed() else 1) / len(self.codes)
            self.weights[takers] = torch.where(taken, share, self.weights[takers])
