"""Code files: the grids of codes of a whole dataset, on disk, sharded and memory-mapped.

A folder holds `manifest.json` and `codes-00000.safetensors` ... A shard holds `codes` (n, views, h, w[, depth]),
`labels` (n,), -1 where an image has none, and, where the manifest says so, captions and `source`
(n, views, h', w'[, depth]), the codes of another image. The manifest is written last, so a folder that has one is
complete. Shards are numbered consecutively over the splits. Everything about the format is imported from here.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vqgen.errors import UserError
from vqgen.files import cache_folder, checksum, is_file, write_text
from vqgen.tokenizer.data.options import Split

from .loaded import LoadedRows, as_indices
from .manifest import (
    FORMAT,
    MANIFEST,
    REPAIR,
    Manifest,
    ShardEntry,
    Side,
    SourceRecord,
    SplitEntry,
    verify_checksum,
    verify_checksums,
)
from .shard import (
    MAX_CAPTION,
    Shard,
    check_range,
    code_dtype,
    code_shape,
    open_shard,
    shard_name,
    used_codes,
    write_shard,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "MAX_CAPTION",
    "REMEMBERED",
    "CodeFiles",
    "Manifest",
    "Shard",
    "ShardEntry",
    "Side",
    "SourceRecord",
    "SplitEntry",
    "check_range",
    "checksum",
    "code_dtype",
    "code_shape",
    "open_shard",
    "shard_name",
    "used_codes",
    "verify_checksum",
    "verify_checksums",
    "write_shard",
]

REMEMBERED = 2**28
"""Bytes of codes from which on the check of shards, a quarter of a second or more, is remembered."""


AT_ONCE = 64
"""Shards whose headers are checked when a folder is opened; of further ones, that they are there and long enough."""
MOST_OPEN = 8192
"""Shards that are memory-mapped at a time: a process can have 65,530 mappings, two for each shard."""


class CodeFiles:
    """The codes of one split of a folder, memory-mapped: opening reads headers only, whatever the size.

    Args:
        folder: written by vqgen-tokenize.
        split: "train", "heldout" or, where the data has one, "test".

    Attributes:
        views: grids of codes of each image: view 0 of the image as it is, further ones of augmented copies.
        grid, depth: rows and columns of codes, and codes per position.
        image_size, channels: height and width in pixels, and channels of the encoded images.
        codebook_size, class_names, tokenizer_fingerprint, data_fingerprint: as in the manifest.
        source: what the source codes are, None where there are none.
        has_source, has_captions: whether there are source codes, and captions.

    Raises `UserError` naming the file where the folder is unfinished, a shard is missing or truncated, or its header
    differs from the manifest. What the shards hold is checked by `check` and `verify`.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder, self.split = Path(folder), split
        manifest = self.manifest = Manifest.read(self.folder)
        if split not in manifest.splits:
            found = ", ".join(manifest.splits)
            raise UserError(f"{self.folder / MANIFEST} has no split {split}, it has {found}; tokenize data that has it")
        self._entry = manifest.splits[split]
        self.views, self.depth, self.codebook_size = self._entry.views, manifest.depth, manifest.codebook_size
        self.grid = manifest.grid[0], manifest.grid[1]
        self.image_size = manifest.image_size[0], manifest.image_size[1]
        self.channels, self.class_names = manifest.channels, manifest.class_names
        self.tokenizer_fingerprint, self.data_fingerprint = manifest.tokenizer_fingerprint, manifest.data_fingerprint
        self.source, self.has_captions = manifest.source, manifest.captions
        self.has_source = self.source is not None
        row, shards = (self.views, *code_shape(self.grid, self.depth)), self._entry.shards
        source = (self.views, *code_shape(self.source.grid, self.depth)) if self.source else None
        self._rows = row, source
        self._dtype = np.dtype(code_dtype(self.codebook_size))
        self._bytes = len(self) * math.prod(row) * self._dtype.itemsize
        self._large = self._bytes > psutil.virtual_memory().total // 2  # it does not stay in memory
        self._opened: dict[int, Shard] = {}
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])
        for number in range(min(len(shards), AT_ONCE)):
            self._shard(number)
        for entry in shards[AT_ONCE:]:
            self._check_size(entry)

    def __reduce__(self):
        # Another process maps the files itself instead of receiving copies.
        return CodeFiles, (self.folder, self.split)

    def __len__(self) -> int:
        """Number of images."""
        return self._entry.count

    def _shard(self, number: int) -> Shard:
        """Shard `number`, memory-mapped; at most `MOST_OPEN` are at a time."""
        if (found := self._opened.get(number)) is None:
            while len(self._opened) >= MOST_OPEN:
                del self._opened[next(iter(self._opened))]
            entry, (row, source) = self._entry.shards[number], self._rows
            path = self.folder / entry.file
            found = open_shard(path, self.codebook_size, row, entry.count, source, self.has_captions)
            if self._large:
                found.read_at_random()
            self._opened[number] = found
        return found

    def _check_size(self, entry: ShardEntry) -> None:
        """Raise `UserError` where a shard is missing or too short for its codes; its header is read when it is used."""
        path, least = self.folder / entry.file, self._bytes // max(len(self), 1) * entry.count
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {REPAIR}") from error
        if size < least:
            raise UserError(f"{path} is no complete shard of codes: it has {size} bytes, its codes {least}; {REPAIR}")

    def _every_shard(self) -> Iterator[Shard]:
        return map(self._shard, range(len(self._entry.shards)))

    @property
    def unlabelled(self) -> bool:
        """Whether an image has no class; reads all labels, a shard at a time. Raises `UserError` as `labels` does."""
        return any([(self._labels_of(shard, slice(None)) < 0).any() for shard in self._every_shard()])

    def gather_labels(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Read the classes of images, -1 where one has none: (m,) -> (m,). Raises as `gather` does."""
        image = as_indices(indices)
        out = np.empty(len(image), dtype=np.int64)
        for shard, rows, part in self._located(image):
            out[part] = self._labels_of(shard, rows)
        return out

    def _labels_of(self, shard: Shard, rows: NDArray[np.int64] | slice) -> NDArray[np.int32]:
        found = shard.labels[rows]
        check_range(shard.path, "label", found, -1, len(self.class_names) if self.class_names else 2**31)
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image (n,), -1 where it has none; read on first use.

        Raises `UserError` naming the shard where one is not among the classes.
        """
        parts = [self._labels_of(shard, slice(None)) for shard in self._every_shard()]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def gather(self, indices: ArrayLike, views: ArrayLike) -> Tensor:
        """Read the codes of view `views[i]` of image `indices[i]`: (m,), (m,) -> int64 (m, h, w[, depth]).

        Raises `IndexError` for an image or view that does not exist, `UserError` for codes outside the codebook.
        """
        return self._gather("code", lambda shard: shard.codes, self.grid, indices, views)

    def gather_source(self, indices: ArrayLike, views: ArrayLike) -> Tensor:
        """Read source codes as `gather` reads codes: (m,), (m,) -> int64 (m, h', w'[, depth]).

        Raises `UserError` also where the folder has none.
        """
        if self.source is None:
            raise UserError(f"{self.folder} has no source codes; make some by vqgen-tokenize with --source")
        return self._gather("source code", lambda shard: shard.source, self.source.grid, indices, views)

    def _gather(
        self,
        what: str,
        array_of: Callable[[Shard], NDArray[Any] | None],
        grid: Sequence[int],
        indices: ArrayLike,
        views: ArrayLike,
    ) -> Tensor:
        """Read rows of one array of the shards, see `gather`."""
        image, view = np.broadcast_arrays(as_indices(indices), as_indices(views))
        self._check_indices("view", view, self.views)
        out = np.empty((len(image), *code_shape(grid, self.depth)), dtype=np.int64)
        for shard, rows, part in self._located(image):
            array = array_of(shard)
            assert array is not None  # what the manifest has, `open_shard` has found
            out[part] = array[rows, view[part]]
        if out.size and not 0 <= int(out.min()) <= int(out.max()) < self.codebook_size:  # once for all of the shards
            for shard, _, part in self._located(image):
                check_range(shard.path, what, out[part], 0, self.codebook_size)
        return torch.from_numpy(out)

    def captions(self, indices: ArrayLike) -> list[str]:
        """Read the captions of images, "" for none: (m,) -> m texts.

        Raises `IndexError` for an image that does not exist, `UserError` for captions that are damaged, or where the
        folder has none.
        """
        if not self.has_captions:
            raise UserError(f"{self.folder} has no captions; make some by vqgen-tokenize from data with captions")
        image = as_indices(indices)
        texts = [""] * len(image)
        for shard, rows, part in self._located(image):
            assert shard.captions is not None
            for place, row in zip(part, rows):
                texts[place] = shard.captions.read(int(row))
        return texts

    def load(self, indices: ArrayLike, views: ArrayLike) -> LoadedRows:
        """Read all there is of view `views[i]` of image `indices[i]`: (m,), (m,), in any order. Raises as `gather`.

        Where the files are larger than memory, rows that are near one another are read at once.
        """
        image, view = as_indices(indices), as_indices(views)
        self._check_indices("view", view, self.views)
        order = np.argsort(image, kind="stable")
        image, view = image[order], view[order]
        if self._large:
            for shard, rows, _ in self._located(image):
                shard.will_need(rows)
        labels, texts = np.empty(len(image), np.int64), list[str]()
        codes, source = (None if row is None else np.empty((len(image), *row[1:]), self._dtype) for row in self._rows)
        for shard, rows, part in self._located(image):
            here = slice(part[0], part[-1] + 1)  # `image` ascends
            for what, array, out in ("code", shard.codes, codes), ("source code", shard.source, source):
                if array is not None and out is not None:
                    flat = array.reshape(-1, *array.shape[2:])
                    np.take(flat, rows * self.views + view[here], 0, out[here], "clip")  # "raise" copies once more
                    check_range(shard.path, what, out[here], 0, self.codebook_size)
            labels[here] = self._labels_of(shard, rows)
            texts += [shard.captions.read(row) for row in rows.tolist()] if shard.captions else []
        assert codes is not None
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        return LoadedRows(places, codes, labels, source, texts if self.has_captions else None)

    def _located(self, image: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each shard that holds some of these images, their rows in it, and their places in `image`."""
        self._check_indices("image", image, len(self))
        order = np.argsort(image, kind="stable")
        bounds = np.searchsorted(image[order], self._starts)
        for number in np.flatnonzero(np.diff(bounds)).tolist():
            part = order[bounds[number] : bounds[number + 1]]
            yield self._shard(number), image[part] - self._starts[number], part

    def _check_indices(self, what: str, values: NDArray[np.int64], limit: int) -> None:
        if values.size and not 0 <= values.min() <= values.max() < limit:
            found = f"{what} {values.min()} to {values.max()}"
            raise IndexError(f"{self.folder}: found {found}, expected below {limit}")

    def verify(self) -> None:
        """Check every sha256, code, label and caption. Raises `UserError` naming the first bad shard."""
        for entry in self._entry.shards:
            verify_checksum(self.folder, entry)
        for shard in self._every_shard():
            shard.check_codes(self.codebook_size)
            if shard.captions:
                shard.captions.check()
            self._labels_of(shard, slice(None))

    def check(self) -> None:
        """Do what `verify` does, unless these very files were found whole before. Raises `UserError`.

        It takes about a second for a gigabyte. That larger files are whole is remembered in the user's cache, until
        one of them changes.
        """
        kept = self._checked_before() if self._bytes >= REMEMBERED else None
        if kept and is_file(kept):
            return
        self.verify()
        if kept:
            with suppress(UserError):  # e.g. no home folder to write to
                write_text(kept, f"{self.folder.absolute()} {self.split}\n")

    def _checked_before(self) -> Path:
        """The file that says that these very files were checked: by size, inode and times of each."""
        digest = hashlib.sha256(repr((self.manifest, self.split)).encode())
        for entry in self._entry.shards:
            found = os.stat(self.folder / entry.file)
            times = found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns
            digest.update(repr(times).encode())
        return Path(os.path.expanduser(cache_folder())) / "codes" / digest.hexdigest()
