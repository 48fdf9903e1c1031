"""Finite scalar quantization (Mentzer et al. 2023): each dimension is bounded and rounded; the codebook is a grid."""

import math

import torch
from torch import Tensor

from .base import Chosen, Quantizer
from .codebook import histogram
from .options import QuantizerConfig

# The bound reaches this share beyond the outermost levels, as in vector-quantize-pytorch, which others build on: the
# same latents have the same codes. (The paper's listing has 1 - 1e-3 there, and tan where f(0) = 0 asks for atanh.)
_MARGIN = 1e-3


class FSQ(Quantizer):
    """Rounding to L_i levels in dimension i: K = prod L_i codes, no codebook to learn and none to collapse.

    Section 3: `z_hat = round(f(z))`, where f bounds each dimension so that L_i integers are left, and the gradient goes
    straight through the rounding. For odd L_i `f(z) = floor(L_i / 2) tanh(z)`. The integers of an even L_i have no
    middle one: `f(z) = (L_i - 1)/2 tanh(z + s) - 1/2` leaves -L_i/2 ... L_i/2 - 1, with s such that f(0) = 0 (their
    appendix A.1). Divided by floor(L_i / 2) the vectors lie in [-1, 1].

    A code is a number in mixed radix, dimension 0 its lowest digit: `sum_i (z_hat_i + floor(L_i / 2)) prod_{j<i} L_j`.
    There is no loss: nothing draws the encoder towards the codes, for the bound keeps it among them.

    Args:
        dim: channels D of the latents.
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        levels = config.fsq_levels
        super().__init__(dim, len(levels), config)
        radix = [math.prod(levels[:i]) for i in range(len(levels))]
        # Floats, exact up to 2^24: an average of models, which takes buffers along, would round integers down.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer("radix", torch.tensor(radix, dtype=torch.float32), persistent=False)

    @property
    def middle(self) -> Tensor:
        """floor(L / 2): the level of each dimension, counted from 0, that f(0) lies at; (d,)."""
        return (self.levels / 2).floor()

    def bound(self, flat: Tensor) -> Tensor:
        """f of the docstring above: (N, d) -> (N, d), which round to integers -floor(L/2) ... ceil(L/2) - 1."""
        half = (self.levels - 1) * ((1 + _MARGIN) / 2)
        offset = 0.5 * (self.levels % 2 == 0)
        return (flat + (offset / half).atanh()).tanh() * half - offset

    def quantize(self, flat: Tensor) -> Chosen:
        codes = self.choose(flat.detach())
        bounded = self.bound(flat) / self.middle
        # The grid's values to the last bit: what is added is 0, with the gradient. Or no number where the latents are
        # none: there is no loss that would show it.
        vectors = self.lookup(codes) + (bounded - bounded.detach())
        return Chosen(vectors, codes, flat.new_zeros(()), histogram(codes, self.codebook_size)[None])

    def choose(self, flat: Tensor) -> Tensor:
        # What is no number would be a code out of range.
        levels = self.bound(flat).round().nan_to_num(0) + self.middle
        return (levels * self.radix).sum(dim=1).long()

    def lookup(self, codes: Tensor) -> Tensor:
        levels = codes[:, None] // self.radix.long() % self.levels.long()
        return (levels - self.middle) / self.middle
