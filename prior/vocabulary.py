"""Token ids of codes, classes and the null token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vqgen.errors import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: `depth` ranges of `codebook_size` codes, then one id a class, then the null id."""

    codebook_size: int
    depth: int
    grid: tuple[int, int]
    classes: int

    @property
    def length(self) -> int:
        """Code tokens an image."""
        return self.grid[0] * self.grid[1] * self.depth

    @property
    def null(self) -> int:
        """The id that is both "unconditional" and the start of an unconditional sequence."""
        return self.codebook_size * self.depth + self.classes

    @property
    def size(self) -> int:
        """Number of ids, the null id included."""
        return self.null + 1

    def class_id(self, labels: Tensor) -> Tensor:
        """Labels (B,) -> token ids (B,); -1 (no label) becomes the null id."""
        return torch.where(labels < 0, self.null, labels + self.codebook_size * self.depth)

    def allowed(self, position: int) -> tuple[int, int]:
        """First and one-past-last id that may stand at code position `position` (0 is the first code)."""
        start = position % self.depth * self.codebook_size
        return start, start + self.codebook_size

    def to_tokens(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w) or (B, h, w, depth) -> tokens (B, length), raster order, depth innermost."""
        shape = (*self.grid, self.depth) if self.depth > 1 else self.grid
        if codes.shape[1:] != torch.Size(shape):
            raise UserError(f"codes have shape {tuple(codes.shape[1:])}, this prior was made for {tuple(shape)}")
        ranges = torch.arange(self.depth, device=codes.device) * self.codebook_size
        return (codes.reshape(len(codes), self.length // self.depth, self.depth) + ranges).flatten(1)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        ranges = torch.arange(self.depth, device=tokens.device) * self.codebook_size
        codes = tokens.reshape(len(tokens), *self.grid, self.depth) - ranges
        return codes if self.depth > 1 else codes.squeeze(-1)
