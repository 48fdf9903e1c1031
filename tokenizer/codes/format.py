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

# Codes or bytes processed at once when a whole folder is read; bounds memory for shards of any size.
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
                name: SplitEntry(
                    _count(entry["views"], least=1),
                    _count(entry["count"]),
                    [ShardEntry(_file_name(s["file"]), _count(s["count"]), str(s["sha256"])) for s in entry["shards"]],
                )
                for name, entry in tree.pop("splits").items()
            }
            manifest = cls(**tree, splits=splits)
            for number in (manifest.codebook_size, manifest.depth, manifest.channels):
                _count(number, least=1)
            for sides in (manifest.grid, manifest.image_size):
                if len(sides) != 2:
                    raise ValueError(f"{sides!r} is no [height, width]")
                for side in sides:
                    _count(side, least=1)
            for name, split in splits.items():
                if sum(shard.count for shard in split.shards) != split.count:
                    raise ValueError(f"the shards of split {name} do not add up to its count")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path} is malformed ({text}); tokenize again") from error
        return manifest


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard: codes (n, views, h, w[, depth]) and labels (n,), read when they are accessed."""

    path: Path
    codes: NDArray[Any]
    labels: NDArray[np.int32]


def _count(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"found {value!r}, expected an integer of at least {least}")
    return value


def _file_name(name: Any) -> str:
    """Check that a name has no folder part, so that a manifest cannot point outside its folder."""
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"found {name!r}, expected a file name")
    return name


def code_dtype(codebook_size: int) -> type[np.integer[Any]]:
    """Return the smallest type on disk that holds the codes 0 .. codebook_size - 1."""
    return np.uint8 if codebook_size <= 2**8 else np.uint16 if codebook_size <= 2**16 else np.int32


def code_shape(grid: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the shape of the codes of one image: (h, w), or (h, w, depth) where a position has several codes."""
    height, width = grid
    return (height, width, depth) if depth > 1 else (height, width)


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
        raise UserError(
            f"{path} is no complete shard of codes ({error}); restore it, or delete it and run vqgen-tokenize again"
        ) from error
    expected = (*(codes.shape[:1] if count is None else (count,)), *row)
    for name, array, shape, dtype in (
        ("codes", codes, expected, code_dtype(codebook_size)),
        ("labels", labels, expected[:1], np.int32),
    ):
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path}: found {name} {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}; "
                "the file belongs to other codes: restore it, or delete it and run vqgen-tokenize again"
            )
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
        raise UserError(
            f"{path} has sha256 {found[:12]}, but {MANIFEST} names {entry.sha256[:12]}; the file was changed or "
            "damaged: restore it, or delete it and run vqgen-tokenize again"
        )


def used_codes(shard: Shard, codebook_size: int, depth: int) -> NDArray[np.bool_]:
    """Return which codes occur in a shard, (depth, codebook_size). Raises `UserError` for codes outside of it."""
    used = np.zeros((depth, codebook_size), dtype=bool)
    flat = shard.codes.reshape(-1, depth)
    for start in range(0, len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= codebook_size:
            code = low if low < 0 else high
            raise UserError(f"{shard.path} holds code {code}, the codebook has {codebook_size}; tokenize again")
        for level in range(depth):
            used[level, piece[:, level]] = True
    return used


class CodeFiles:
    """The codes of one split of a folder, memory-mapped: opening reads headers only, whatever the size.

    Args:
        folder: written by vqgen-tokenize.
        split: "train", "heldout" or, where the data has one, "test".

    Raises `UserError` naming the file where the folder is unfinished, a shard is missing or truncated, or its header
    differs from the manifest. Checksums are checked by `verify` only.
    """

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.read(self.folder)
        if split not in self.manifest.splits:
            found = ", ".join(self.manifest.splits)
            raise UserError(f"{self.folder / MANIFEST} has no split {split}, it has {found}; tokenize data that has it")
        self._entry = self.manifest.splits[split]
        self._shards = [
            open_shard(self.folder / shard.file, self.codebook_size, self._row, shard.count)
            for shard in self._entry.shards
        ]
        self._starts = np.cumsum([0, *(shard.count for shard in self._entry.shards)])

    def __reduce__(self):
        # Another process maps the files itself instead of receiving copies.
        return CodeFiles, (self.folder, self.split)

    def __len__(self) -> int:
        """Number of images."""
        return self._entry.count

    @property
    def views(self) -> int:
        """Grids of codes of each image: view 0 of the image as it is, further ones of augmented copies."""
        return self._entry.views

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        height, width = self.manifest.grid
        return height, width

    @property
    def depth(self) -> int:
        """Codes per position."""
        return self.manifest.depth

    @property
    def codebook_size(self) -> int:
        return self.manifest.codebook_size

    @property
    def class_names(self) -> list[str] | None:
        return self.manifest.class_names

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.manifest.tokenizer_fingerprint

    @property
    def data_fingerprint(self) -> str:
        return self.manifest.data_fingerprint

    @property
    def channels(self) -> int:
        """Channels of the encoded images."""
        return self.manifest.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the encoded images, in pixels."""
        height, width = self.manifest.image_size
        return height, width

    @property
    def _row(self) -> tuple[int, ...]:
        return (self.views, *code_shape(self.grid, self.depth))

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
                raise IndexError(
                    f"{self.folder}: found {what} {values.min()} to {values.max()}, expected below {limit}"
                )
        out = np.empty((len(image), *self._row[1:]), dtype=np.int64)
        shard_of = np.searchsorted(self._starts, image, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        # Split where another shard begins, so that each shard is indexed once.
        for part in np.split(order, np.flatnonzero(np.diff(shard_of[order])) + 1):
            if len(part):
                number = shard_of[part[0]]
                out[part] = self._shards[number].codes[image[part] - self._starts[number], view[part]]
        return torch.from_numpy(out)

    def verify(self) -> None:
        """Read all files and check every sha256, every code and every label.

        Raises `UserError` naming the first bad shard.
        """
        classes = len(self.class_names) if self.class_names else None
        for entry, shard in zip(self._entry.shards, self._shards):
            verify_checksum(self.folder, entry)
            used_codes(shard, self.codebook_size, self.depth)
            if len(shard.labels) and (shard.labels.min() < -1 or (classes and shard.labels.max() >= classes)):
                raise UserError(
                    f"{shard.path} holds labels {shard.labels.min()} to {shard.labels.max()}, but {MANIFEST} names "
                    f"{classes} classes; tokenize again"
                )
