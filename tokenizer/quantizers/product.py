"""Product quantization (Jegou et al. 2011): the parts of a vector have codebooks of their own, side by side."""

import torch
from torch import Tensor

from .base import Chosen
from .codebook import Codebook
from .options import QuantizerConfig
from .vq import MultiCodebookQuantizer


class ProductQuantizer(MultiCodebookQuantizer):
    """`depth` codes a position, one for each part of the vector.

    `z_q = (q_1(z_1), ..., q_depth(z_depth))` for the parts z_i of z, of `code_dim` dimensions each (their section
    II-B). Each q_i is a vector quantizer, see `Codebook`: it normalises, turns the gradient and learns by itself.
    Losses are means over all elements.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: QuantizerConfig) -> None:
        books = [Codebook(config, config.code_dim, config.l2_normalize) for _ in range(config.depth)]
        super().__init__(dim, config.depth * config.code_dim, config, books)

    def _parts(self, flat: Tensor) -> list[tuple[Codebook, Tensor]]:
        """Each codebook with its part (N, code_dim) of vectors (N, depth * code_dim)."""
        return list(zip(self.books, flat.split(self.config.code_dim, dim=1), strict=True))

    def quantize(self, flat: Tensor) -> Chosen:
        each: list[Chosen] = [book(part) for book, part in self._parts(flat)]
        return Chosen(
            torch.cat([chosen.vectors for chosen in each], dim=1),
            torch.stack([chosen.codes for chosen in each], dim=1),
            torch.stack([chosen.loss for chosen in each]).mean(),
            torch.cat([chosen.counts for chosen in each]),
        )

    def choose(self, flat: Tensor) -> Tensor:
        return torch.stack([book.choose(part) for book, part in self._parts(flat)], dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return torch.cat([book.lookup(part) for book, part in self.apart(codes)], dim=1)

    def start_from(self, flat: Tensor) -> None:
        for book, part in self._parts(flat):
            book.start_from(part)
