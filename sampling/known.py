"""What is known of images before they are drawn: some of their codes, or what they are made from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.degrade import Keep


@dataclass(frozen=True)
class Known:
    """What is known of a series of images, per position; image i goes by row i % m."""

    codes: Tensor
    """int64 (m, h, w[, depth]); where `mask` is False any value."""
    mask: Tensor
    """bool (m, h, w), True where the codes are known."""
    vocabulary: Vocabulary
    own: bool = False
    """Whether each image of the series has a row of its own, so that there are as many as images are drawn."""

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
    def span(self) -> range:
        """Code positions from the first to the last that is unknown in some row of a series of any number of images."""
        length = self.tokens.shape[1]
        if self.own:
            return range(length)
        unknown = (self.tokens < 0).any(0).nonzero()[:, 0].tolist()
        return range(unknown[0], unknown[-1] + 1) if unknown else range(0)

    def rows(self, indices: Sequence[int]) -> Tensor:
        """Tokens (B, length) of images of the series."""
        return self.tokens[[index % len(self) for index in indices]]


@dataclass(frozen=True)
class Sources:
    """Images that others are made from; image i of a series is made from row i % m."""

    codes: Tensor
    """int64 (m, h, w[, depth])."""
    keep: Keep | None = None
    """Gives drawn images what their sources show as it was."""
    images: Tensor | None = None
    """uint8 (m, C, H, W), of the size of what is drawn, where something of them is kept."""

    def __len__(self) -> int:
        """Number of rows m."""
        return len(self.codes)

    def finished(self, indices: Sequence[int], images: Tensor) -> Tensor:
        """Decoded images uint8 (B, C, H, W) of a series, with what is kept of their sources."""
        if self.keep is None or self.images is None:
            return images
        return self.keep(images, self.images[[index % len(self) for index in indices]])

    @property
    def fingerprint(self) -> str | None:
        """sha256 of the pixels of which something is kept."""
        return None if self.images is None else hashlib.sha256(self.images.numpy().tobytes()).hexdigest()
