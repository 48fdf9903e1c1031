"""Code files: the grids of codes of a whole dataset, on disk, sharded and memory-mapped.

A folder holds `manifest.json` and `codes-00000.safetensors` ... A shard holds `codes` (n, views, h, w[, depth]) in the
smallest of uint8, uint16 and int32 that fits the codebook, and `labels` (n,) int32, -1 where an image has none. The
manifest is written last, so a folder that has one is complete. Shards are numbered consecutively over the splits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqgen.artifact import write_tensors
from vqgen.errors import UserError
from vqgen.files import read_json, write_json
from vqgen.tokenizer.data.options import Split

MANIFEST = "manifest.json"
FORMAT = 1
_REPAIR = "restore it, or delete it and run vqgen-tokenize again"
# Codes or bytes processed at once, which bounds memory for shards of any size.
_CHUNK = 2**22


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest: its file name, its images and the sha256 of the file."""

    file: str
    count: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """One split in the manifest: views of each image, images, and the shards in order."""

    views: int
    count: int
    shards: list[ShardEntry]


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`; `grid` in codes and `image_size` in pixels, [height, width]."""

    codebook_size: int
    grid: list[int]
    depth: int
    image_size: list[int]
    channels: int
    class_names: list[str] | None
    tokenizer_fingerprint: str
    data_fingerprint: str
    precision: str
    version: str
    splits: dict[str, SplitEntry]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, which makes the folder complete."""
        write_json(folder / MANIFEST, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check `manifest.json`. Raises `UserError` where it is missing, malformed or of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            state = f"holds no {MANIFEST}" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} is no folder of code files: it {state}; run vqgen-tokenize to the end")
        tree = read_json(path)
        found = tree.pop("format", None)
        if found != FORMAT:
            raise UserError(f"{path}: found format {found!r}, this version of vqgen reads {FORMAT}; tokenize again")
        try:
            splits = {
                name: SplitEntry(entry["views"], entry["count"], [ShardEntry(**shard) for shard in entry["shards"]])
                for name, entry in tree.pop("splits").items()
            }
            manifest = cls(**tree, splits=splits)
            manifest._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path} is malformed ({text}); tokenize again") from error
        return manifest

    def _check(self) -> None:
        """Raise `ValueError` or `TypeError` where a value cannot be used."""
        splits, shards = self.splits.values(), [shard for split in self.splits.values() for shard in split.shards]
        for sides in (self.grid, self.image_size):
            if len(sides) != 2:
                raise ValueError(f"{sides!r} is no [height, width]")
        numbers = [self.codebook_size, self.depth, self.channels, *self.grid, *self.image_size]
        for least, values in (1, [*numbers, *(s.views for s in splits)]), (0, [s.count for s in (*splits, *shards)]):
            for value in values:
                if type(value) is not int or value < least:
                    raise ValueError(f"found {value!r}, expected an integer of at least {least}")
        for shard in shards:  # no folder part: a manifest cannot point outside its folder
            if not isinstance(shard.file, str) or Path(shard.file).name != shard.file:
                raise ValueError(f"found {shard.file!r}, expected a file name")
        for name, split in self.splits.items():
            if sum(shard.count for shard in split.shards) != split.count:
                raise ValueError(f"the shards of split {name} do not add up to its count")


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


def checksum(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore it") from error
    return digest.hexdigest()


def verify_checksum(folder: Path, entry: ShardEntry) -> None:
    """Compare a shard's file with its sha256 in the manifest. Raises `UserError` where they differ."""
    path = folder / entry.file
    found = checksum(path)
    if found != entry.sha256:
        expected = str(entry.sha256)[:12]
        raise UserError(f"{path} was changed: found sha256 {found[:12]}, {MANIFEST} has {expected}; {_REPAIR}")


def used_codes(shard: Shard, codebook_size: int, depth: int) -> NDArray[np.bool_]:
    """Return which codes occur in a shard, (depth, codebook_size). Raises `UserError` for codes outside of it."""
    used = np.zeros((depth, codebook_size), dtype=bool)
    flat = shard.codes.reshape(-1, depth)
    for start in range(0, len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= codebook_size:
            raise UserError(f"{shard.path} has codes {low} to {high}, the codebook has {codebook_size}; tokenize again")
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
    differs from the manifest. Checksums are checked by `verify` only.
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
        """Class of every image (n,), -1 where it has none; read on first use."""
        parts = [shard.labels for shard in self._shards]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def gather(self, indices: ArrayLike, views: ArrayLike) -> Tensor:
        """Read the codes of view `views[i]` of image `indices[i]`: (m,), (m,) -> int64 (m, h, w[, depth]).

        Raises `IndexError` for an image or view that does not exist.
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
            out[part] = self._shards[number].codes[image[part] - self._starts[number], view[part]]
        return torch.from_numpy(out)

    def verify(self) -> None:
        """Check every sha256, code and label. Raises `UserError` naming the first bad shard."""
        classes = len(self.class_names) if self.class_names else None
        for entry, shard in zip(self._entry.shards, self._shards):
            verify_checksum(self.folder, entry)
            used_codes(shard, self.codebook_size, self.depth)
            if len(shard.labels) and (shard.labels.min() < -1 or (classes and shard.labels.max() >= classes)):
                found = f"{shard.labels.min()} to {shard.labels.max()}"
                raise UserError(f"{shard.path} holds labels {found}, {MANIFEST} has {classes} classes; tokenize again")
