"""One shard of code files: a safetensors file of codes, labels and, where the data has them, source codes and captions.

Codes and source codes are in the smallest of uint8, uint16 and int32 that fits the codebook. Captions are UTF-8 bytes
one after another, and where each begins.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from vqgen.artifact import write_tensors
from vqgen.devices import advise_needed, advise_random
from vqgen.errors import UserError
from vqgen.files import open_regular
from vqgen.tokenizer.data.options import MAX_CAPTION

from .manifest import MANIFEST, REPAIR

# Codes or bytes processed at once, which bounds memory for shards of any size.
_CHUNK = 2**22
# Bytes between the beginnings of rows up to which they are read at once, with what is between them.
_NEAR = 2**14
BROKEN = "broken"
"""Key of `Shard.broken` in the metadata of a shard."""


@dataclass(frozen=True)
class Captions:
    """The captions of a shard, memory-mapped: the text of row i is `data[offsets[i]:offsets[i + 1]]`; "" is none."""

    path: Path
    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def read(self, row: int) -> str:
        """Return one caption. Raises `UserError` naming the shard where it is out of bounds, too long or no UTF-8."""
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        if not 0 <= start <= stop <= min(len(self.data), start + MAX_CAPTION):
            found = f"bytes {start} to {stop} of {len(self.data)}, at most {MAX_CAPTION} are possible"
            raise UserError(f"{self.path}: the caption of image {row} is {found}; {REPAIR}")
        try:
            return self.data[start:stop].tobytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: the caption of image {row} is no UTF-8 ({error}); {REPAIR}") from error

    def check(self) -> None:
        """Check all of them. Raises `UserError` naming the shard."""
        ends = int(self.offsets[0]), int(self.offsets[-1])
        if ends != (0, len(self.data)):
            found = f"from byte {ends[0]} to {ends[1]} of {len(self.data)}"
            raise UserError(f"{self.path}: caption_offsets lead {found}; {REPAIR}")
        for row in range(len(self.offsets) - 1):
            self.read(row)


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard, read when its arrays are accessed."""

    path: Path
    codes: NDArray[Any]
    """(n, views, h, w[, depth])"""
    labels: NDArray[np.int32]
    """(n,), -1 where an image has none."""
    source: NDArray[Any] | None = None
    """(n, views, h', w'[, depth])"""
    captions: Captions | None = None
    broken: int = 0
    """Images of a file of a stream that were left out as broken; those of other sources are counted by their index."""

    def read_at_random(self) -> None:
        """Have the system read only the pages that are accessed: without this, megabytes around each of them."""
        for array in (self.codes, self.labels, self.source):
            if array is not None:
                advise_random(array.ctypes.data, array.nbytes)

    def will_need(self, rows: NDArray[np.int64]) -> None:
        """Have the system begin to read some rows, ascending; those that are near one another at once."""
        for array in (self.codes, self.labels, self.source):
            if array is not None:
                size = array.nbytes // len(array)
                ends = np.flatnonzero(np.diff(rows) * size > _NEAR)
                for first, last in zip(rows[np.r_[0, ends + 1]].tolist(), rows[np.r_[ends, -1]].tolist()):
                    advise_needed(array.ctypes.data + first * size, (last + 1 - first) * size)

    def check_codes(self, codebook_size: int) -> None:
        """Raise `UserError`, naming the shard, for codes or source codes outside of the codebook."""
        check_range(self.path, "code", self.codes, 0, codebook_size)
        if self.source is not None:
            check_range(self.path, "source code", self.source, 0, codebook_size)


def code_dtype(codebook_size: int) -> type[np.integer[Any]]:
    """Return the smallest type on disk that holds the codes 0 .. codebook_size - 1."""
    return np.uint8 if codebook_size <= 2**8 else np.uint16 if codebook_size <= 2**16 else np.int32


def code_shape(grid: Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the shape of the codes of one image: (h, w), or (h, w, depth) where a position has several codes."""
    return (*grid, depth) if depth > 1 else tuple(grid)


def shard_name(number: int) -> str:
    return f"codes-{number:05d}.safetensors"


def write_shard(
    path: Path,
    codes: NDArray[Any],
    labels: NDArray[Any],
    codebook_size: int,
    source: NDArray[Any] | None = None,
    captions: Sequence[str] | None = None,
    broken: int = 0,
) -> None:
    """Write a shard atomically.

    Args:
        codes: (n, views, h, w[, depth]).
        labels: (n,), -1 for none.
        source: source codes (n, views, h', w'[, depth]) under the same codebook.
        captions: n texts, "" for none.
        broken: see `Shard`.

    Raises `ValueError` for codes outside 0 .. codebook_size - 1, another number of anything than of codes, and captions
    longer than `MAX_CAPTION` bytes; `UserError` where the file cannot be written.
    """
    tensors: dict[str, NDArray[Any]] = {"labels": labels.astype(np.int32)}
    for name, array in ("codes", codes), ("source", source):
        if array is None:
            continue
        if array.shape[:2] != codes.shape[:2]:
            raise ValueError(f"{name}: found (images, views) {array.shape[:2]}, codes have {codes.shape[:2]}")
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < codebook_size:
            raise ValueError(f"{name} span {array.min()} to {array.max()}, the codebook has {codebook_size}")
        tensors[name] = array.astype(code_dtype(codebook_size))
    if captions is not None:
        texts = [text.encode() for text in captions]
        longest = max(map(len, texts), default=0)
        if len(texts) != len(codes) or longest > MAX_CAPTION:
            raise ValueError(f"captions: found {len(texts)}, of up to {longest} bytes, for {len(codes)} images")
        tensors["caption_bytes"] = np.frombuffer(b"".join(texts), np.uint8).copy()
        tensors["caption_offsets"] = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    metadata = {BROKEN: str(broken)} if broken else None
    held = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    write_tensors(path, held, metadata)


def open_shard(
    path: Path,
    codebook_size: int,
    row: tuple[int, ...],
    count: int | None = None,
    source: tuple[int, ...] | None = None,
    captions: bool = False,
) -> Shard:
    """Memory-map a shard: its header and size are checked, its data is not read.

    Args:
        row: shape of one image's codes, (views, h, w[, depth]).
        count: images it must hold; None accepts any number.
        source: shape of one image's source codes, (views, h', w'[, depth]), where the shard must have some.
        captions: whether it must have captions.

    Raises `UserError` naming the file where it is missing, truncated or holds other tensors, shapes or types.
    """
    texts = ("caption_bytes", "caption_offsets") if captions else ()
    names = ("codes", "labels", *(("source",) if source else ()), *texts)
    try:
        open_regular(path).close()
        # torch closes the file after mapping it: thousands of shards need no file descriptors.
        with safe_open(path, framework="pt") as file:
            others = sorted(set(file.keys()) ^ set(names))
            held = {name: file.get_tensor(name).numpy() for name in names if name not in others}
            broken = (file.metadata() or {}).get(BROKEN, "0")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; restore it, or run vqgen-tokenize again to rewrite it") from None
    except (OSError, RuntimeError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is no complete shard of codes ({error}); {REPAIR}") from error
    if not re.fullmatch("[0-9]{1,12}", broken):
        raise UserError(f"{path} says that {broken[:100]!r} images are broken, expected a number; {REPAIR}")
    for name in others:
        found = "no" if name in names else "unexpected"
        raise UserError(f"{path} is no complete shard of codes: it has {found} {name}; {REPAIR}")
    n, dtype = (len(held["codes"]) if held["codes"].ndim else 0) if count is None else count, code_dtype(codebook_size)
    expected: dict[str, tuple[tuple[int, ...], Any]] = {"codes": ((n, *row), dtype), "labels": ((n,), np.int32)}
    if source:
        expected["source"] = (n, *source), dtype
    if captions:
        expected |= {
            "caption_offsets": ((n + 1,), np.int64),
            "caption_bytes": ((held["caption_bytes"].size,), np.uint8),
        }
    for name, (shape, kind) in expected.items():
        if held[name].shape != shape or held[name].dtype != kind:
            found = f"{name} {held[name].dtype} {held[name].shape}, expected {np.dtype(kind)} {shape}"
            raise UserError(f"{path} holds other codes: found {found}; {REPAIR}")
    texts = Captions(path, held["caption_bytes"], held["caption_offsets"]) if captions else None
    return Shard(path, held["codes"], held["labels"], held.get("source"), texts, int(broken))


def check_range(path: Path, what: str, values: NDArray[Any], first: int, limit: int) -> None:
    """Raise `UserError`, naming the shard, where values are not within first .. limit - 1; 10 GB/s and more."""
    info, flat = np.iinfo(values.dtype), values.reshape(-1)
    for start in range(0, 0 if first <= info.min and info.max < limit else len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        low = first if first <= info.min else int(piece.min())
        high = limit - 1 if info.max < limit else int(piece.max())
        if low < first or high >= limit:
            found = low if low < first else high
            raise UserError(f"{path} holds the {what} {found}, {MANIFEST} has {first} to {limit - 1}; {REPAIR}")


def used_codes(shard: Shard, codebook_size: int, depth: int) -> NDArray[np.bool_]:
    """Return which codes the images of a shard use, (depth, codebook_size). Raises `UserError` for codes outside of it.

    Source codes are checked, not counted.
    """
    used = np.zeros((depth, codebook_size), dtype=bool)
    shard.check_codes(codebook_size)
    flat = shard.codes.reshape(-1, depth)
    for start in range(0, len(flat), _CHUNK):
        piece = flat[start : start + _CHUNK]
        for level in range(depth):
            used[level, piece[:, level]] = True
    return used
