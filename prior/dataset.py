"""Code files -> sequences of token ids."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vqgen.seeding import epoch_slice, step_seed
from vqgen.tokenizer.codes.format import CodeFiles

from .vocabulary import Vocabulary


def vocabulary_of(codes: CodeFiles) -> Vocabulary:
    """The vocabulary that fits code files; class-conditional where they have class names."""
    return Vocabulary(codes.codebook_size, codes.depth, codes.grid, len(codes.class_names or []))


class Sequences:
    """Code files as token sequences `[condition][codes]`, int64 (n, 1 + vocabulary.length)."""

    def __init__(self, codes: CodeFiles, vocabulary: Vocabulary) -> None:
        self.codes, self.vocabulary = codes, vocabulary

    def __len__(self) -> int:
        """Number of images."""
        return len(self.codes)

    def rows(self, indices: np.ndarray, views: np.ndarray) -> Tensor:
        """Sequences of the given images and views."""
        tokens = self.vocabulary.to_tokens(self.codes.gather(indices, views))
        labels = torch.from_numpy(self.codes.labels[indices])
        if self.vocabulary.classes == 0:
            labels = torch.full_like(labels, -1)
        return torch.cat([self.vocabulary.class_id(labels)[:, None], tokens], dim=1)

    def ordered(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """The given images in order, view 0."""
        for start in range(0, len(indices), batch_size):
            part = np.asarray(indices[start : start + batch_size])
            yield self.rows(part, np.zeros_like(part))

    def training(self, batch_size: int, seed: int, first_step: int, rank: int, world: int) -> Iterator[Tensor]:
        """Endless shuffled batches of this process; step s is a function of (seed, s) alone, whatever came before.

        Args:
            batch_size: sequences a step on one process; the processes take neighbouring slices of a global batch.
        """
        step = first_step
        while True:
            whole = epoch_slice(len(self), seed, step * batch_size * world, batch_size * world)
            random = np.random.default_rng(step_seed(seed, step, 1))  # epochs are shuffled by (seed, epoch)
            views = random.integers(self.codes.views, size=len(whole))
            mine = slice(rank * batch_size, (rank + 1) * batch_size)
            yield self.rows(whole[mine], views[mine])
            step += 1
