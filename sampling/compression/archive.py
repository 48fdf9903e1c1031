"""The file of compressed images: a header in JSON, then the words of the range coder.

`VQGENRC1`, the length of the header (uint32), the header (deflated: names and sizes of small images take nearly as many
bytes as their codes), uint32 words of one stream after another, and the CRC-32 of all that; integers are little-endian.
A stream holds the codes of `ROWS` windows.
"""

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le, MaxLen
from numpy.typing import NDArray

from vqgen.errors import UserError
from vqgen.files import as_record, atomic_path, parse_json, read_bytes

MAGIC = b"VQGENRC1"
ROWS = 64
"""Windows whose codes share a stream; both sides compute them together."""
MAX_ARCHIVE = 2**31
"""Most bytes of a file; a larger one is neither written nor read."""
MAX_HEADER = 2**26
"""Most bytes of a header once inflated: a million images."""
MAX_PIXELS = 2**27
"""Most pixels of an image, more than any that is decoded from a file."""
Probabilities = Literal["exact", "rounded", "histogram"]
MAX_SIDE = 2**16
"""Most pixels of a side of an image."""
_Side = Annotated[int, Ge(1), Le(MAX_SIDE)]
_Count = Annotated[int, Ge(0), Le(2**32)]


@dataclass(frozen=True)
class Picture:
    """An image: its name and its size in pixels."""

    name: Annotated[str, MaxLen(4000)]
    height: _Side
    width: _Side


@dataclass(frozen=True)
class Stream:
    """One stream of the range coder: its uint32 words, and the CRC-32 of its codes (int32, little-endian)."""

    words: _Count
    crc32: _Count


@dataclass(frozen=True)
class Header:
    """What is needed to restore the images, and who wrote them."""

    version: str
    prior: str
    tokenizer: str
    probabilities: Probabilities
    rows: Annotated[int, Ge(1), Le(2**12)]
    machine: str
    """Processor, number format, threads and libraries of the writer, whose rounding the probabilities have."""
    pictures: list[Picture]
    streams: list[Stream]


def crc_of(codes: NDArray[np.int64]) -> int:
    """CRC-32 of codes."""
    return zlib.crc32(np.ascontiguousarray(codes, "<i4").tobytes())


def file_names(pictures: list[Picture]) -> list[str]:
    """The PNG files that pictures are restored to, below a folder. Raises `ValueError` for names that leave it."""
    found: dict[str, str] = {}
    for picture in pictures:
        path = PurePosixPath(picture.name)
        plain = path.parts and not path.is_absolute() and ".." not in path.parts and "\\" not in picture.name
        plain = plain and picture.name.encode(errors="replace").decode() == picture.name  # else it is no UTF-8
        if not plain or any(part.startswith(".") or len(part.encode()) > 240 for part in path.parts):
            raise ValueError(f"{picture.name!r} is no name of a file inside a folder")
        name = path.with_suffix(".png").as_posix()
        if name.casefold() in found:
            raise ValueError(f"{picture.name!r} and {found[name.casefold()]!r} would be the same file")
        found[name.casefold()] = picture.name
    for picture in pictures:
        for folder in PurePosixPath(picture.name).parents:
            if (name := folder.as_posix().casefold()) in found:
                raise ValueError(f"{found[name]!r} would be a file where {picture.name!r} needs a folder")
    return [PurePosixPath(picture.name).with_suffix(".png").as_posix() for picture in pictures]


def write_archive(path: Path, header: Header, streams: list[NDArray[np.uint32]]) -> int:
    """Write the file atomically; returns its size in bytes. Raises `UserError` for more than is read again."""
    text = json.dumps(asdict(header), ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise UserError(
            f"{path}: names and sizes take {len(text)} bytes, at most {MAX_HEADER}; compress fewer at a time"
        )
    text = zlib.compress(text, 9)
    parts = [MAGIC, len(text).to_bytes(4, "little"), text, *(words.astype("<u4").tobytes() for words in streams)]
    size = sum(map(len, parts)) + 4
    if size > MAX_ARCHIVE:
        raise UserError(f"{path} would have {size} bytes, at most {MAX_ARCHIVE} are read; compress fewer at a time")
    data = b"".join(parts)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    return size


def _inflated(data: bytes) -> bytes:
    """Undo `zlib.compress`. Raises `ValueError`, also where there would be more than `MAX_HEADER` bytes."""
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(data, MAX_HEADER)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflate.eof or inflate.unused_data:
        raise ValueError(f"it does not end where it should, after at most {MAX_HEADER} bytes")
    return text


def read_archive(path: Path) -> tuple[Header, list[NDArray[np.uint32]]]:
    """Read the header and the words of each stream. Raises `UserError` where the file is damaged or something else."""
    try:
        data = read_bytes(path, MAX_ARCHIVE)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name what vqgen-compress wrote") from error
    length = int.from_bytes(data[8:12], "little")
    if data[:8] != MAGIC or len(data) < 16 + length:
        raise UserError(f"{path} is no whole archive of vqgen-compress; restore it")
    if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise UserError(f"{path} is damaged: its CRC is another; restore it")
    data = data[:-4]
    try:
        header, start = as_record(path, parse_json(_inflated(data[12 : 12 + length])), Header), 12 + length
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has no readable header ({error}); restore it") from error
    streams = []
    for stream in header.streams:
        if start + 4 * stream.words > len(data):
            raise UserError(f"{path} is cut off in its codes; restore it")
        streams.append(np.frombuffer(data, "<u4", stream.words, start).astype(np.uint32))
        start += 4 * stream.words
    if start != len(data):
        raise UserError(f"{path} has {len(data) - start} bytes too many; restore it")
    if not header.pictures:
        raise UserError(f"{path} holds no images; restore it")
    large = next((p for p in header.pictures if p.height * p.width > MAX_PIXELS), None)
    if large:
        raise UserError(
            f"{path}: {large.name!r} has {large.height}x{large.width} pixels, at most {MAX_PIXELS} are restored"
        )
    try:
        file_names(header.pictures)
    except ValueError as error:
        raise UserError(f"{path}: {error}; restore it") from error
    return header, streams
