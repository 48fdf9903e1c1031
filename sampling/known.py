"""Codes of images that are known before drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vqgen.prior.vocabulary import Vocabulary


@dataclass(frozen=True)
class Known:
    """What is known of a series of images, per position; image i goes by row i % m."""

    codes: Tensor
    """int64 (m, h, w[, depth]); where `mask` is False any value."""
    mask: Tensor
    """bool (m, h, w), True where the codes are known."""
    vocabulary: Vocabulary

    def __len__(self) -> int:
        """Number of rows m."""
        return len(self.codes)

    @cached_property
    def tokens(self) -> Tensor:
        """Code tokens in drawing order (m, length), -1 where none is known."""
        mask = self.mask[..., None].expand(*self.mask.shape, self.vocabulary.depth)
        mask = self.vocabulary.to_sequence(mask.reshape(len(mask), *self.vocabulary.shape))
        return torch.where(mask, self.vocabulary.to_tokens(self.codes), -1)

    @cached_property
    def leading(self) -> int:
        """Number of first tokens that are known in every row."""
        return int((self.tokens >= 0).all(0).long().cumprod(0).sum())

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Tokens (B, length) of images of the series."""
        return self.tokens[[index % len(self) for index in indices]]
