"""Token ids of codes, and the order in which the codes of an image stand in a sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vqgen.errors import UserError

from .orders import ORDERS


@cache
def _permutation(order: Callable[[int, int], list[int]], height: int, width: int) -> Tensor:
    """Raster indices of a grid in the order of drawing; made once, since every training batch needs them."""
    return torch.tensor(order(height, width))


@dataclass(frozen=True)
class Vocabulary:
    """Ids of codes: `depth` ranges of `codebook_size` ids each. The ids of the conditioning follow them."""

    codebook_size: int
    depth: int
    grid: tuple[int, int]
    order: str = "raster"
    """Name in `ORDERS`."""

    def __post_init__(self) -> None:
        count = self.grid[0] * self.grid[1]
        if self.order != "raster" and sorted(ORDERS[self.order](*self.grid)) != list(range(count)):
            text = f"order {self.order!r} of a {self.grid[0]}x{self.grid[1]} grid is no permutation of 0 to {count - 1}"
            raise UserError(f"prior/orders.py: {text}; correct its function")

    @property
    def length(self) -> int:
        """Code tokens an image."""
        return self.grid[0] * self.grid[1] * self.depth

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes of an image, (h, w[, depth])."""
        return (*self.grid, self.depth) if self.depth > 1 else self.grid

    @property
    def size(self) -> int:
        """Number of ids of codes; the first id of the conditioning."""
        return self.codebook_size * self.depth

    def allowed(self, position: int) -> tuple[int, int]:
        """First and one-past-last id of the codes at code position `position` (0 is the first code of a sequence)."""
        start = position % self.depth * self.codebook_size
        return start, start + self.codebook_size

    def to_sequence(self, values: Tensor) -> Tensor:
        """Values on the grid (B, h, w[, depth]) -> (B, length), in drawing order, depth innermost."""
        if values.shape[1:] != torch.Size(self.shape):
            raise UserError(f"codes have shape {tuple(values.shape[1:])}, this prior was made for {tuple(self.shape)}")
        order = _permutation(ORDERS[self.order], *self.grid).to(values.device)
        return values.reshape(len(values), len(order), self.depth)[:, order].flatten(1)

    def to_grid(self, values: Tensor) -> Tensor:
        """The inverse of `to_sequence`."""
        order = _permutation(ORDERS[self.order], *self.grid).to(values.device)
        values = values.reshape(len(values), len(order), self.depth)[:, order.argsort()]
        return values.reshape(len(values), *self.shape)

    def to_tokens(self, codes: Tensor) -> Tensor:
        """Codes int64 (B, h, w[, depth]) -> token ids (B, length)."""
        return self.to_sequence(codes) + self._first_ids(codes.device)

    def to_codes(self, tokens: Tensor) -> Tensor:
        """The inverse of `to_tokens`."""
        return self.to_grid(tokens - self._first_ids(tokens.device))

    def _first_ids(self, device: torch.device) -> Tensor:
        """First id of the range of each code position: (length,)."""
        return torch.arange(self.length, device=device) % self.depth * self.codebook_size
