"""A further quantizer: each dimension rounded to 0 or 1."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from vqgen.options import Range
from vqgen.tokenizer.quantizers.base import QuantizedVectors, Quantizer
from vqgen.tokenizer.quantizers.options import QuantizerConfig
from vqgen.tokenizer.quantizers.search import histogram


@dataclass
class BinaryConfig(QuantizerConfig):
    """Binary rounding."""

    codes_option: ClassVar[str] = "--bits"

    bits: Annotated[int, Range(least=1, most=16)] = 4
    """Dimensions, each rounded to 0 or 1."""

    @property
    def codes(self) -> int:
        return 2**self.bits


class Binary(Quantizer):
    def __init__(self, dim: int, config: BinaryConfig) -> None:
        super().__init__(dim, config.bits, config)
        self.bits = config.bits

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        codes = self.choose(flat)
        vectors = flat + (self.lookup(codes) - flat).detach()
        return QuantizedVectors(vectors, codes, flat.new_zeros(()), histogram(codes, self.codebook_size)[None])

    def choose(self, flat: Tensor) -> Tensor:
        return ((flat > 0.5).long() << torch.arange(self.bits, device=flat.device)).sum(dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return (codes[:, None] >> torch.arange(self.bits, device=codes.device) & 1).float()
