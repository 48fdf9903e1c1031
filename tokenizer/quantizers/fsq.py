"""Finite scalar quantization (Mentzer et al. 2023): each dimension is bounded and rounded to a grid."""

import math

import torch
from torch import Tensor

from .base import QuantizedVectors, Quantizer
from .options import FSQConfig
from .search import histogram

# Share by which the bound exceeds the outermost levels, as in vector-quantize-pytorch. (The paper's listing has
# 1 - 1e-3, and tan where f(0) = 0 requires atanh.)
_MARGIN = 1e-3


class FSQ(Quantizer):
    """Rounding to L_i levels in dimension i: K = prod L_i codes, without a learned codebook.

    Section 3: `z_hat = round(f(z))` with a straight-through gradient, where f bounds each dimension to L_i integers.
    For odd L_i `f(z) = floor(L_i / 2) tanh(z)`. For even L_i `f(z) = (L_i - 1)/2 tanh(z + s) - 1/2` gives -L_i/2 ...
    L_i/2 - 1, with s such that f(0) = 0 (appendix A.1). Divided by floor(L_i / 2) the vectors lie in [-1, 1].

    A code is a number in mixed radix, dimension 0 its lowest digit: `sum_i (z_hat_i + floor(L_i / 2)) prod_{j<i} L_j`.
    There is no loss.

    Args:
        dim: channels D of the latents.
    """

    levels: Tensor
    radix: Tensor

    def __init__(self, dim: int, config: FSQConfig) -> None:
        levels = config.fsq_levels
        super().__init__(dim, len(levels), config)
        radix = [math.prod(levels[:i]) for i in range(len(levels))]
        # Floats, exact up to 2^24: averaging of models includes buffers and would round integers down.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer("radix", torch.tensor(radix, dtype=torch.float32), persistent=False)

    @property
    def middle(self) -> Tensor:
        """floor(L / 2) (d,): the level of f(0) in each dimension, counted from 0."""
        return (self.levels / 2).floor()

    def bound(self, flat: Tensor) -> Tensor:
        """Bound vectors (N, d) by f of the class docstring, to round to integers -floor(L/2) ... ceil(L/2) - 1."""
        half = (self.levels - 1) * ((1 + _MARGIN) / 2)
        offset = 0.5 * (self.levels % 2 == 0)
        return (flat + (offset / half).atanh()).tanh() * half - offset

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        codes = self.choose(flat.detach())
        bounded = self.bound(flat) / self.middle
        # Exactly the grid's values: the added term is 0 with a gradient. It is NaN where the latents are, which would
        # otherwise not show, since there is no loss.
        vectors = self.lookup(codes) + (bounded - bounded.detach())
        return QuantizedVectors(vectors, codes, flat.new_zeros(()), histogram(codes, self.codebook_size)[None])

    def choose(self, flat: Tensor) -> Tensor:
        # NaN would become a code out of range.
        levels = self.bound(flat).round().nan_to_num(0) + self.middle
        return (levels * self.radix).sum(dim=1).long()

    def lookup(self, codes: Tensor) -> Tensor:
        levels = codes[:, None] // self.radix.long() % self.levels.long()
        return (levels - self.middle) / self.middle
