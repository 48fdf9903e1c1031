"""Code files in memory: the rows of some images, which many batches are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def as_indices(values: ArrayLike) -> NDArray[np.int64]:
    """Indices as int64. Raises `IndexError` for others than integers: a mask would be taken for images 0 and 1."""
    found = np.asarray(values)
    if found.size and found.dtype.kind not in "iu":
        raise IndexError(f"found indices of type {found.dtype}, expected integers")
    return found.astype(np.int64, copy=False)


class CodeRows(Protocol):
    """What batches are made of: code files, or what was loaded of them."""

    @property
    def has_captions(self) -> bool: ...

    @property
    def has_source(self) -> bool: ...

    def gather(self, indices: ArrayLike, views: ArrayLike) -> Tensor: ...

    def gather_source(self, indices: ArrayLike, views: ArrayLike) -> Tensor: ...

    def gather_labels(self, indices: ArrayLike) -> NDArray[np.int64]: ...

    def captions(self, indices: ArrayLike) -> Sequence[str]: ...


@dataclass(frozen=True)
class LoadedRows:
    """What `CodeFiles.load` read: image i of it, in its only view 0, is the i-th that was asked for.

    Methods raise `IndexError` for others.
    """

    rows: NDArray[np.int64]
    """The row of each image (m,): below they are in the order of the files."""
    codes: NDArray[Any]
    """(m, h, w[, depth])"""
    labels: NDArray[np.int64]
    """(m,), -1 where an image has none."""
    source: NDArray[Any] | None
    """(m, h', w'[, depth])"""
    texts: list[str] | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_captions(self) -> bool:
        return self.texts is not None

    @property
    def has_source(self) -> bool:
        return self.source is not None

    def _rows(self, indices: ArrayLike, views: ArrayLike = 0) -> NDArray[np.int64]:
        image = as_indices(indices)
        if (image.size and not 0 <= image.min() <= image.max() < len(self)) or as_indices(views).any():
            raise IndexError("found images or views that were not loaded")
        return self.rows[image]

    def gather(self, indices: ArrayLike, views: ArrayLike) -> Tensor:
        return torch.from_numpy(self.codes[self._rows(indices, views)].astype(np.int64))

    def gather_source(self, indices: ArrayLike, views: ArrayLike) -> Tensor:
        assert self.source is not None
        return torch.from_numpy(self.source[self._rows(indices, views)].astype(np.int64))

    def gather_labels(self, indices: ArrayLike) -> NDArray[np.int64]:
        return self.labels[self._rows(indices)]

    def captions(self, indices: ArrayLike) -> list[str]:
        assert self.texts is not None
        return [self.texts[row] for row in self._rows(indices).tolist()]
