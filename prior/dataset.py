"""Code files -> sequences of token ids."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from vqgen.seeding import LARGE, epoch_slice, step_seed, window_slice, window_steps
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.codes.loaded import CodeRows

from .conditioning import Conditioning
from .parts.part import Rows
from .parts.scan import scanned
from .parts.source import random_masks


@dataclass(frozen=True)
class Examples:
    """Sequences of one layout, int64 (B, layout.length + codes)."""

    tokens: Tensor
    layout: Conditioning
    wanted: Tensor | None = None
    """Codes that are to be predicted, bool (B, codes); None for all."""
    share: float = 1.0
    """Share of the codes of the global batch that are to be predicted."""

    def __len__(self) -> int:
        return len(self.tokens)


class Sequences:
    """Code files as token sequences, prefix and then codes."""

    def __init__(self, codes: CodeFiles, conditioning: Conditioning) -> None:
        self.codes, self.conditioning = codes, conditioning

    def __len__(self) -> int:
        """Number of images."""
        return len(self.codes)

    def rows(
        self,
        indices: np.ndarray,
        views: np.ndarray,
        unknown: Tensor | None = None,
        scans: np.ndarray | None = None,
        files: CodeRows | None = None,
    ) -> Examples:
        """Sequences of the given images and views.

        With `unknown`, bool (B, h, w), the source is the images' own codes less those, and those are wanted. With
        `scans`, (B,), the grids are in these orders, and so are those of `unknown`. They are read from `files`,
        by default the code files.
        """
        files = files or self.codes
        codes = files.gather(indices, views)
        codes = codes if scans is None else scanned(codes, scans)
        layout = self.conditioning.plain if unknown is None else self.conditioning
        prefix = layout.of_rows(Rows(files, indices, views, codes, unknown, scans))
        tokens = torch.cat([prefix, layout.vocabulary.to_tokens(codes)], dim=1)
        if unknown is None:
            return Examples(tokens, layout)
        cells = unknown[..., None].expand(*unknown.shape, layout.vocabulary.depth).reshape(codes.shape)
        return Examples(tokens, layout, layout.vocabulary.to_sequence(cells))

    def ordered(self, indices: Sequence[int], batch_size: int, masks: Tensor | None = None) -> Iterator[Examples]:
        """Batches of the given images in order, view 0; masks of unknown cells are bool (len(indices), h, w)."""
        for start in range(0, len(indices), batch_size):
            part = np.asarray(indices[start : start + batch_size])
            unknown = None if masks is None else masks[start : start + batch_size]
            yield self.rows(part, np.zeros_like(part), unknown)

    def _drawn(self, seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        """Images of a global batch, their views, and the generator of what else the step draws."""
        if len(self) < LARGE:
            images = epoch_slice(len(self), seed, step * size, size)
        else:
            images = window_slice(len(self), seed, step, size)
        random = np.random.default_rng(step_seed(seed, step, 1))  # epochs are shuffled by (seed, epoch)
        return images, random.integers(self.codes.views, size=size), random

    def training(
        self,
        batch_size: int,
        seed: int,
        first_step: int,
        rank: int,
        world: int,
        progress: Callable[[int], float] = lambda step: 0.0,
    ) -> Iterator[Examples]:
        """Endless shuffled batches of this process; the batch of step s, its layout included, depends on (seed, s).

        `batch_size` is of one process; the processes take neighbouring slices of a global batch. `progress` is the
        share of the run that is done before a step. From `LARGE` images on, those of a window are read at once.
        """
        scan, everywhere = self.conditioning.scan, batch_size * world
        local = slice(rank * batch_size, (rank + 1) * batch_size)
        files: CodeRows = self.codes
        steps, drawn = range(0), list[tuple[np.ndarray, np.ndarray, np.random.Generator]]()
        for step in count(first_step):
            if step not in steps:
                steps = window_steps(len(self), step, everywhere) if len(self) >= LARGE else range(step, step + 1)
                drawn = [self._drawn(seed, each, everywhere) for each in steps]
                if len(self) >= LARGE:
                    files = self.codes  # what was loaded before is given up first
                    both = [(images[local], views[local]) for images, views, _ in drawn]
                    files = self.codes.load(*np.concatenate(both, axis=1))
            global_batch, views, random = drawn[step - steps.start]
            indices, views = global_batch[local], views[local]
            if files is not self.codes:  # these are images of what was loaded
                indices, views = np.arange(batch_size) + (step - steps.start) * batch_size, np.zeros_like(views)
            orders = np.random.default_rng(step_seed(seed, step, 2))
            scans = scan.draw(len(global_batch), progress(step), orders)[local] if scan else None
            source = self.conditioning.masked_source
            if source and random.random() < source.inpainting:
                masks = random_masks(len(global_batch), self.codes.grid, random)
                found = self.rows(indices, views, masks[local], scans, files)
                yield Examples(found.tokens, found.layout, found.wanted, masks.float().mean().item())
            else:
                yield self.rows(indices, views, scans=scans, files=files)
