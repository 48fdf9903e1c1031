"""Grids larger than a prior's: drawn in overlapping windows, each given the codes that are there already.

The windows are drawn one after another, those that know most first. The whole grid is decoded at once, so that the
decoder makes no seams.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from itertools import product

import torch
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.prior.conditioning import Conditions
from vqgen.prior.parts.source import masked
from vqgen.seeding import hash64

from .decoding.generate import image_uniforms
from .drawing import Drawer, Recipe
from .filling import Filling
from .guidance import Guidance
from .known import Known


@dataclass(frozen=True)
class Window:
    """A window of a grid of codes, at the time when it is drawn."""

    number: int
    """Its place among all windows in raster order."""
    rows: slice
    columns: slice
    unknown: Tensor
    """Codes that are drawn, bool (m, h, w) for m masks."""

    def of(self, codes: Tensor) -> Tensor:
        """The part of codes (B, H, W[, depth]) in the window."""
        return codes[:, self.rows, self.columns]


def _starts(size: int, window: int) -> list[int]:
    """First cells of windows along one side of `size` cells: neighbours share at least half a window."""
    last = size - window
    return [*range(0, last, max(window // 2, 1)), last]


def _overlapping(starts: list[int], window: slice) -> range:
    """The numbers of the windows along one side that share a cell with one of them."""
    side = window.stop - window.start
    return range(bisect_right(starts, window.start - side), bisect_left(starts, window.stop))


def windows(cells: Tensor, grid: Sequence[int]) -> Iterator[Window]:
    """The windows of `grid` rows and columns that draw the cells of masks, bool (m, H, W), in their order.

    The next one is that with the fewest unknown cells over all masks, the first of them in raster order; those without
    any are left out. The order depends on the masks alone.
    """
    unknown = cells.clone()
    tops, lefts = (_starts(size, side) for size, side in zip(cells.shape[1:], grid, strict=True))
    places = [(slice(top, top + grid[0]), slice(left, left + grid[1])) for top, left in product(tops, lefts)]
    counts = [0] * len(places)
    queue: list[tuple[int, int]] = []

    def count(numbers: Iterable[int]) -> None:
        """Count the unknown cells of windows anew, and queue those where the number has changed."""
        for number in numbers:
            rows, columns = places[number]
            if (found := int(unknown[:, rows, columns].sum())) != counts[number]:
                counts[number] = found
                heappush(queue, (found, number))

    count(range(len(places)))
    while queue:
        found, number = heappop(queue)
        if not found or found != counts[number]:  # it has fewer by now
            continue
        rows, columns = places[number]
        yield Window(number, rows, columns, unknown[:, rows, columns].clone())
        unknown[:, rows, columns] = False
        overlapping = product(_overlapping(tops, rows), _overlapping(lefts, columns))
        count(row * len(lefts) + column for row, column in overlapping)


@dataclass(frozen=True)
class Painter:
    """Draws what a `Filling` leaves open on a grid of any size, at least that of the prior."""

    drawer: Drawer
    filling: Filling

    def __post_init__(self) -> None:
        grid, found = self.drawer.vocabulary.grid, tuple(self.filling.cells.shape[1:])
        if any(side < least for side, least in zip(found, grid, strict=True)):
            raise UsageError(f"--size: found a grid of {found} codes, expected at least the prior's {grid}")

    @cached_property
    def windows(self) -> list[Window]:
        """All windows, in their order."""
        return list(windows(self.filling.cells, self.drawer.vocabulary.grid))

    @cached_property
    def spans(self) -> list[range]:
        """For each window the positions of its codes that are drawn or fed one by one, see `Known.span`."""
        vocabulary = self.drawer.vocabulary
        parts = ((window.of(self.filling.codes), ~window.unknown) for window in self.windows)
        return [Known(codes, known, vocabulary).span for codes, known in parts]

    @property
    def tokens(self) -> int:
        """Codes that are drawn or fed one by one for each image."""
        return sum(map(len, self.spans))

    def draw(self, indices: Sequence[int], recipe: Recipe) -> tuple[Tensor, Tensor]:
        """Codes (B, H, W[, depth]) of images of a series, and the NLL of those that were drawn, float64 (B,)."""
        indices, size = list(indices), recipe.batch_size
        conditions = self.drawer.conditioning.conditions(recipe.conditions)
        parts = [indices[first : first + size] for first in range(0, len(indices), size)]
        found = [self._batch(part, conditions, recipe) for part in parts]
        none = self.filling.codes[:0], torch.zeros(0, dtype=torch.float64)
        codes, nats = zip(none, *found, strict=True)
        return torch.cat(codes), torch.cat(nats)

    def _batch(self, indices: list[int], conditions: Conditions, recipe: Recipe) -> tuple[Tensor, Tensor]:
        conditioning, vocabulary = self.drawer.conditioning, self.drawer.vocabulary
        rows = [index % len(self.filling) for index in indices]
        codes, nats = self.filling.codes[rows], torch.zeros(len(indices), dtype=torch.float64)
        for window, span in zip(self.windows, self.spans, strict=True):
            part, unknown = window.of(codes), window.unknown[rows]
            layout, given = conditioning.plain, {}
            if conditioning.masked_source and not window.unknown.all():
                layout, given = conditioning, {"source": conditioning.masked_source.of_codes(masked(part, unknown))}
            prefix = layout.prefixes(conditions, indices, given)
            uniforms = image_uniforms(hash64(recipe.seed, "window", window.number), indices, vocabulary.length)
            known = Known(part, ~unknown, vocabulary).tokens
            seen = {**conditions, **{name: list(ids) for name, ids in given.items()}}
            guidance = Guidance.of(layout, recipe.settings, seen)
            drawn = self.drawer.tokens(guidance, prefix, uniforms, recipe, known, span)
            codes[:, window.rows, window.columns] = vocabulary.to_codes(drawn.tokens.cpu())
            nats += drawn.nats.cpu()
        return codes, nats
