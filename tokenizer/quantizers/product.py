"""Product quantization (Jegou et al. 2011): each part of a vector has its own codebook."""

import torch
from torch import Tensor

from .base import QuantizedVectors
from .codebook import Codebook
from .multi_codebook import MultiCodebookQuantizer
from .options import ProductConfig


class ProductQuantizer(MultiCodebookQuantizer):
    """`depth` codes a position, one for each part of the vector.

    `z_q = (q_1(z_1), ..., q_depth(z_depth))` for the parts z_i of z, of `code_dim` dimensions each (section II-B). Each
    q_i is an independent vector quantizer, see `Codebook`. Losses are means over all elements.

    Args:
        dim: channels D of the latents.
    """

    def __init__(self, dim: int, config: ProductConfig) -> None:
        codebooks = [Codebook(config, config.code_dim, config.l2_normalize) for _ in range(config.depth)]
        super().__init__(dim, config.depth * config.code_dim, config, codebooks)

    def _parts(self, flat: Tensor) -> list[tuple[Codebook, Tensor]]:
        """Return each codebook with its part (N, code_dim) of vectors (N, depth * code_dim)."""
        return list(zip(self.depth_codebooks, flat.chunk(self.depth, dim=1), strict=True))

    def quantize(self, flat: Tensor) -> QuantizedVectors:
        each: list[QuantizedVectors] = [codebook(part) for codebook, part in self._parts(flat)]
        stats = {"code_distance": torch.stack([part.stats["code_distance"] for part in each]).mean()}
        if self.training:
            stats["codes_revived"] = torch.stack([part.stats["codes_revived"] for part in each]).sum()
        return QuantizedVectors(
            torch.cat([part.vectors for part in each], dim=1),
            torch.stack([part.codes for part in each], dim=1),
            torch.stack([part.loss for part in each]).mean(),
            torch.cat([part.counts for part in each]),
            stats,
        )

    def choose(self, flat: Tensor) -> Tensor:
        return torch.stack([codebook.choose(part) for codebook, part in self._parts(flat)], dim=1)

    def lookup(self, codes: Tensor) -> Tensor:
        return torch.cat([codebook.lookup(part) for codebook, part in self.split(codes)], dim=1)

    def initialize_from(self, flat: Tensor) -> None:
        for codebook, part in self._parts(flat):
            codebook.initialize_from(part)
