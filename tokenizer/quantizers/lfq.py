"""Lookup-free quantization (Yu et al. 2023, "Language model beats diffusion"): a code is a vector of signs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import QuantizedVectors, Quantizer
from .codebook import entropy_of_mean, vq_loss, with_gradient
from .options import LFQConfig
from .search import histogram


class LFQ(Quantizer):
    """The sign of each of log2 K dimensions (section 3.1), without codebook or search.

    `z_hat_i = sign(z_i)`, -1 at 0 (their eq. 3); the code is `sum_i 2^i 1{z_i > 0}` (eq. 4), dimension 0 its lowest
    bit. The gradient is straight-through. The loss is `commitment_weight * |z - sg(z_hat)|^2` (mean over elements)
    plus `entropy_weight * (E[H(q(z))] - entropy_diversity * H(E[q(z)]))` (eq. 5), in nats, where
    `q(k|z) = softmax_k(-|z - e_k|^2 / entropy_temperature)` over all K codes e_k.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: LFQConfig) -> None:
        bits = config.codebook_size.bit_length() - 1
        super().__init__(dim, bits, config)
        self.config: LFQConfig = config
        self.bits = bits

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        codes = self.choose(flat)
        signs = self.lookup(codes)
        config = self.config
        loss = vq_loss(flat, signs, config.commitment_weight, by_gradient=False)
        stats: dict[str, Tensor] = {}
        if config.entropy_weight:
            each, mean = bit_entropies(flat, config.entropy_temperature, self.training)
            loss = loss + config.entropy_weight * (each - config.entropy_diversity * mean)
            stats = {"entropy_each": each.detach(), "entropy_mean": mean.detach()}
        counts = histogram(codes, self.codebook_size)
        vectors = with_gradient(flat, signs, "straight-through")
        return QuantizedVectors(vectors, codes, loss, counts[None], stats)

    def choose(self, flat: Tensor) -> Tensor:
        return ((flat > 0).long() << torch.arange(self.bits, device=flat.device)).sum(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return (codes[:, None] >> torch.arange(self.bits, device=codes.device) & 1) * 2.0 - 1


def bit_entropies(flat: Tensor, temperature: float, averaged: bool) -> tuple[Tensor, Tensor]:
    """Compute E[H(q(z))] and H(E[q(z)]) of vectors (N, d) over all 2^d sign codes, in nats, without an N x 2^d matrix.

    Given z the bits are independent, because `|z - e|^2` is a sum over them: bit i is 1 with probability
    sigmoid(4 z_i / temperature), and H(q(z)) is the sum of the bits' entropies. The probability of a code is the
    product of those of its low and its high half, so E[q] is one matrix product of (2^(d/2), N) and (N, 2^(d/2)). With
    `averaged`, E[q] is the mean over all processes.
    """
    logits = flat * (4 / temperature)
    one, zero = logits.sigmoid(), (-logits).sigmoid()
    each = -(one * F.logsigmoid(logits) + zero * F.logsigmoid(-logits)).sum(dim=1).mean()
    half = flat.shape[1] // 2
    low, high = _joint(zero[:, :half], one[:, :half]), _joint(zero[:, half:], one[:, half:])
    return each, entropy_of_mean((high.T @ low) / len(flat), averaged)


def _joint(zero: Tensor, one: Tensor) -> Tensor:
    """Combine probabilities (N, d) of independent bits into those of their 2^d values (N, 2^d), bit 0 lowest."""
    table = zero.new_ones(len(zero), 1)
    for off, on in zip(zero.unbind(1), one.unbind(1)):
        table = torch.cat([table * off[:, None], table * on[:, None]], dim=1)
    return table
