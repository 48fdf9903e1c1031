"""Code files: the grids of codes of a whole dataset, on disk, sharded and memory-mapped.

A folder holds `manifest.json` and `codes-00000.safetensors` ... A shard holds `codes` (n, views, h, w[, depth]) in the
smallest of uint8, uint16 and int32 that fits the codebook, and `labels` (n,) int32, -1 where an image has none. The
manifest is written last, so a folder that has one is complete. Shards are numbered consecutively over the splits.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval, Len
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqgen.artifact import write_tensors
from vqgen.errors import UserError
from vqgen.files import checksum, is_file, open_regular, read_json, read_record, write_json, write_text
from vqgen.tokenizer.data.options import Split

MANIFEST = "manifest.json"
FORMAT = 1
_REPAIR = "restore it, or delete it and run vqgen-tokenize again"
# Codes or bytes processed at once, which bounds memory for shards of any size.
_CHUNK = 2**22
REMEMBERED = 2**28
"""Bytes of codes from which on the check of shards, a quarter of a second or more, is remembered."""


Side = Annotated[int, Interval(ge=1, le=2**16)]
_Count = Annotated[int, Interval(ge=0, le=2**40)]


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest: its file name, its images and the sha256 of the file."""

    file: str
    count: _Count
    sha256: str

    def __post_init__(self) -> None:
        # No folder part: a manifest cannot point outside its folder.
        if not re.fullmatch(r"[^./\\][^/\\]*", self.file) or len(self.file.encode()) > 255:
            raise ValueError(f"{self.file[:80]!r} is no file name")


@dataclass(frozen=True)
class SplitEntry:
    """One split in the manifest: views of each image, images, and the shards in order."""

    views: Annotated[int, Interval(ge=1, le=1000)]
    count: _Count
    shards: list[ShardEntry]

    def __post_init__(self) -> None:
        if sum(shard.count for shard in self.shards) != self.count:
            raise ValueError(f"the shards do not add up to the count {self.count}")


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`; `grid` in codes and `image_size` in pixels, [height, width]."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    codebook_size: Annotated[int, Interval(ge=1, le=2**24)]
    grid: Annotated[list[Side], Len(2, 2)]
    depth: Annotated[int, Interval(ge=1, le=256)]
    image_size: Annotated[list[Side], Len(2, 2)]
    channels: Annotated[int, Interval(ge=1, le=1000)]
    class_names: Annotated[list[str], Len(0, 2**24)] | None
    tokenizer_fingerprint: str
    data_fingerprint: str
    precision: str
    version: str
    splits: dict[Split, SplitEntry]
    format: int = FORMAT

    def __post_init__(self) -> None:
        factors = {divmod(pixels, codes) for pixels, codes in zip(self.image_size, self.grid)}
        if len(factors) > 1 or any(rest for _, rest in factors):
            raise ValueError(f"image_size {self.image_size} is no multiple of grid {self.grid}")

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, which makes the folder complete."""
        write_json(folder / MANIFEST, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check `manifest.json`. Raises `UserError` where it is missing, malformed or of another format."""
        path = folder / MANIFEST
        if not is_file(path):
            state = f"holds no {MANIFEST}" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} is no folder of code files: it {state}; run vqgen-tokenize to the end")
        found = read_json(path).get("format")
        if found != FORMAT:
            raise UserError(f"{path}: found format {found!r}, this version of vqgen reads {FORMAT}; tokenize again")
        return read_record(path, cls)


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard: codes (n, views, h, w[, depth]) and labels (n,), read when they are accessed."""

    path: Path
    codes: NDArray[Any]
    labels: NDArray[np.int32]


def code_dtype(codebook_size: int) -> type[np.integer[Any]]:
    """Return the smallest type on disk that holds the codes 0 .. codebook_size - 1."""
    return np.uint8 if codebook_size <= 2**8 else np.uint16 if codebook_size <= 2**16 else np.int32


def code_shape(grid: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the shape of the codes of one image: (h, w), or (h, w, depth) where a position has several codes."""
    return (*grid, depth) if depth > 1 else tuple(grid)


def shard_name(number: int) -> str:
    return f"codes-{number:05d}.safetensors"


def write_shard(path: Path, codes: NDArray[Any], labels: NDArray[Any], codebook_size: int) -> None:
    """Write codes (n, views, h, w[, depth]) and labels (n,) as one shard, atomically.

    Raises `ValueError` for codes outside 0 .. codebook_size - 1, `UserError` where the file cannot be written.
    """
    if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise ValueError(f"codes span {codes.min()} to {codes.max()}, the codebook has {codebook_size}")
    tensors = {"codes": codes.astype(code_dtype(codebook_size)), "labels": labels.astype(np.int32)}
    write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()})


def open_shard(path: Path, codebook_size: int, row: tuple[int, ...], count: int | None = None) -> Shard:
    """Memory-map a shard: its header and size are checked, its data is not read.

    Args:
        row: shape of one image's codes, (views, h, w[, depth]).
        count: images it must hold; None accepts any number.

    Raises `UserError` naming the file where it is missing, truncated or of another shape or type.
    """
    try:
        open_regular(path).close()
        # torch closes the file after mapping it: thousands of shards need no file descriptors.
        with safe_open(path, framework="pt") as file:
            codes, labels = (file.get_tensor(name).numpy() for name in ("codes", "labels"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; restore it, or run vqgen-tokenize again to rewrite it") from None
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is no complete shard of codes ({error}); {_REPAIR}") from error
    shape = (len(codes) if count is None else count, *row)
    for array, wanted, dtype in (codes, shape, code_dtype(codebook_size)), (labels, shape[:1], np.int32):
        if array.shape != wanted or array.dtype != dtype:
            found, expected = f"{array.dtype} {array.shape}", f"{np.dtype(dtype)} {wanted}"
            raise UserError(f"{path} holds other codes: found {found}, expected {expected}; {_REPAIR}")
    return Shard(path, codes, labels)


def verify_checksum(folder: Path, entry: ShardEntry) -> None:
    """Compare a shard's file with its sha256 in the manifest. Raises `UserError` where they differ."""
    path = folder / entry.file
    found = checksum(path)
    if found != entry.sha256:
        expected = str(entry.sha256)[:12]
        raise UserError(f"{path} was changed: found sha256 {found[:12]}, {MANIFEST} has {expected}; {_REPAIR}")


def verify_checksums(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` where a shard is not the one that was written."""
    for split in manifest.splits.values():
        for entry in split.shards:
            verify_checksum(folder, entry)


def check_range(path: Path, what: str, values: NDArray[Any], first: int, limit: int) -> None:
    """Raise `UserError`, naming the shard, where values are not within first .. limit - 1; 10 GB/s and more."""
    info, flat = np.iinfo(values.dtype), values.reshape(-1)
    for start in range(0, 0 if first <= info.min and info.max < limit else len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        low, high = int(piece.min()), int(piece.max())
        if low < first or high >= limit:
            found = low if low < first else high
            raise UserError(f"{path} holds the {what} {found}, {MANIFEST} has {first} to {limit - 1}; {_REPAIR}")


def used_codes(shard: Shard, codebook_size: int, depth: int) -> NDArray[np.bool_]:
    """Return which codes occur in a shard, (depth, codebook_size). Raises `UserError` for codes outside of it."""
    used = np.zeros((depth, codebook_size), dtype=bool)
    check_range(shard.path, "code", shard.codes, 0, codebook_size)
    flat = shard.codes.reshape(-1, depth)
    for start in range(0, len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        for level in range(depth):
            used[level, piece[:, level]] = True
    return used


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
        self._code_shape, shards = code_shape(self.grid, self.depth), self._entry.shards
        row = (self.views, *self._code_shape)
        self._shards = [open_shard(self.folder / s.file, self.codebook_size, row, s.count) for s in shards]
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])

    def __reduce__(self):
        # Another process maps the files itself instead of receiving copies.
        return CodeFiles, (self.folder, self.split)

    def __len__(self) -> int:
        """Number of images."""
        return self._entry.count

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image (n,), -1 where it has none; read on first use.

        Raises `UserError` naming the shard where one is not among the classes.
        """
        classes = len(self.class_names) if self.class_names else 2**31
        for shard in self._shards:
            check_range(shard.path, "label", shard.labels, -1, classes)
        parts = [shard.labels for shard in self._shards]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def gather(self, indices: ArrayLike, views: ArrayLike) -> Tensor:
        """Read the codes of view `views[i]` of image `indices[i]`: (m,), (m,) -> int64 (m, h, w[, depth]).

        Raises `IndexError` for an image or view that does not exist, `UserError` for codes outside the codebook.
        """
        image, view = np.broadcast_arrays(np.asarray(indices, np.int64), np.asarray(views, np.int64))
        for values, limit, what in ((image, len(self), "image"), (view, self.views, "view")):
            if values.size and not 0 <= values.min() <= values.max() < limit:
                found = f"{what} {values.min()} to {values.max()}"
                raise IndexError(f"{self.folder}: found {found}, expected below {limit}")
        out = np.empty((len(image), *self._code_shape), dtype=np.int64)
        shard_of = np.searchsorted(self._starts, image, side="right") - 1
        for number in np.unique(shard_of):
            part = shard_of == number
            shard = self._shards[number]
            found = shard.codes[image[part] - self._starts[number], view[part]]
            check_range(shard.path, "code", found, 0, self.codebook_size)
            out[part] = found
        return torch.from_numpy(out)

    def verify(self) -> None:
        """Check every sha256, code and label. Raises `UserError` naming the first bad shard."""
        for entry in self._entry.shards:
            verify_checksum(self.folder, entry)
        for shard in self._shards:
            check_range(shard.path, "code", shard.codes, 0, self.codebook_size)
        _ = self.labels

    def check(self) -> None:
        """Do what `verify` does, unless these very files were found whole before. Raises `UserError`.

        It takes about a second for a gigabyte. That larger files are whole is remembered in the user's cache, until
        one of them changes.
        """
        kept = self._checked_before() if sum(s.codes.nbytes for s in self._shards) >= REMEMBERED else None
        if kept and is_file(kept):
            return
        self.verify()
        if kept:
            with suppress(UserError):  # e.g. no home folder to write to
                write_text(kept, f"{self.folder.absolute()} {self.split}\n")

    def _checked_before(self) -> Path:
        """The file that says that these very files were checked: by size, inode and times of each."""
        digest = hashlib.sha256(repr((self.manifest, self.split)).encode())
        for shard in self._shards:
            found = os.stat(shard.path)
            times = found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns
            digest.update(repr(times).encode())
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(cache) / "vqgen" / "codes" / digest.hexdigest()
