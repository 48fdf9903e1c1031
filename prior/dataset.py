"""Code files -> sequences of token ids."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from vqgen.seeding import epoch_slice, step_seed
from vqgen.tokenizer.codes.format import CodeFiles

from .conditioning import Conditioning
from .parts import Rows


class Sequences:
    """Code files as token sequences, prefix and then codes: int64 (n, conditioning.length + vocabulary.length)."""

    def __init__(self, codes: CodeFiles, conditioning: Conditioning) -> None:
        self.codes, self.conditioning = codes, conditioning

    def __len__(self) -> int:
        """Number of images."""
        return len(self.codes)

    def rows(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """Sequences of the given images and views."""
        codes = self.codes.gather(indices, views)
        prefix = self.conditioning.of_rows(Rows(self.codes, indices, codes))
        return torch.cat([prefix, self.conditioning.vocabulary.to_tokens(codes)], dim=1)

    def ordered(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """Batches of the given images in order, view 0."""
        for start in range(0, len(indices), batch_size):
            part = np.asarray(indices[start : start + batch_size])
            yield self.rows(part, np.zeros_like(part))

    def training(self, batch_size: int, seed: int, first_step: int, rank: int, world: int) -> Iterator[Tensor]:
        """Endless shuffled batches of this process; the batch of step s depends on (seed, s) alone.

        `batch_size` is of one process; the processes take neighbouring slices of a global batch.
        """
        for step in count(first_step):
            global_batch = epoch_slice(len(self), seed, step * batch_size * world, batch_size * world)
            random = np.random.default_rng(step_seed(seed, step, 1))  # epochs are shuffled by (seed, epoch)
            views = random.integers(self.codes.views, size=len(global_batch))
            local = slice(rank * batch_size, (rank + 1) * batch_size)
            yield self.rows(global_batch[local], views[local])
