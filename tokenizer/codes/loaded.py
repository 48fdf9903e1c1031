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

    def gather(self, indices: ArrayLike, views: ArrayLike) -> Tensor: ...

    def gather_source(self, indices: ArrayLike, views: ArrayLike) -> Tensor: ...

    def gather_labels(self, indices: ArrayLike) -> NDArray[np.int64]: ...

    def captions(self, indices: ArrayLike) -> Sequence[str]: ...


@dataclass(frozen=True)
class LoadedRows:
    """Rows of some images, each in one view or more. Methods take indices in the code files, as `CodeFiles` does.

    They raise `IndexError` for what was not loaded.
    """

    keys: NDArray[np.int64]
    """image * views + view of each row, ascending, each once (n,)."""
    views: int
    """Of an image in the code files."""
    codes: NDArray[Any]
    """(n, h, w[, depth])"""
    labels: NDArray[np.int64]
    """(n,), -1 where an image has none."""
    source: NDArray[Any] | None
    """(n, h', w'[, depth])"""
    texts: list[str] | None

    @property
    def has_captions(self) -> bool:
        return self.texts is not None

    def _rows(self, indices: ArrayLike, views: ArrayLike | None = None) -> NDArray[np.int64]:
        """Rows of these images in these views, by default in any."""
        image = as_indices(indices)
        wanted = image * self.views + (0 if views is None else as_indices(views))
        rows = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        found = self.keys[rows]
        if ((found // self.views != image) if views is None else (found != wanted)).any():
            raise IndexError("found images or views that were not loaded")
        return rows

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
