"""PNG files that a program wrote earlier: whether they are still what was written."""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Literal

from PIL import Image

from .read import read_bytes

_LARGEST = 2**28  # bytes of an image that is verified
_CHANNELS = {(8, 0, 0): 1, (8, 2, 0): 3}
"""Depth, colour type and interlacing of the images that vqgen writes -> bytes a pixel: grey and colour of 8 bits."""
_CHUNKS = {b"IHDR", b"IDAT", b"IEND"}
"""Kinds of chunks that it writes: others, as EXIF, may change how the image is read."""


def png_state(path: Path, sha256: str | None, size: tuple[int, int] | None) -> Literal["ours", "damaged", "other"]:
    """Whether a file is the image that was drawn, of this checksum or (width, height), where they are known.

    "damaged" is what no program writes, "other" a whole PNG of another checksum, size or kind.
    """
    try:
        data = read_bytes(path, _LARGEST)
        if sha256 is not None and hashlib.sha256(data).hexdigest() == sha256:
            return "ours"
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            found = image.size
            image.verify()  # the CRC of every chunk; IndexError where none holds pixels
        pixels, kinds, end = _pixels(data)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError):
        return "damaged"
    if sha256 is not None:
        return "damaged" if hashlib.sha256(data[:end]).hexdigest() == sha256 else "other"
    channels = _CHANNELS.get((data[24], data[25], data[28]))
    if channels is None or size not in (None, found) or kinds != _CHUNKS:
        return "other"
    wanted = found[1] * (1 + found[0] * channels)
    return "ours" if end == len(data) and _inflates_to(pixels, wanted) else "damaged"


def _pixels(data: bytes) -> tuple[bytes, set[bytes], int]:
    """The compressed pixels of a PNG whose chunks are intact, the kinds of these, and the place behind the last one."""
    at, parts, kinds, kind = 8, list[bytes](), set[bytes](), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        kinds.add(kind)
        if kind == b"IDAT":
            parts.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    return b"".join(parts), kinds, at


def _inflates_to(stream: bytes, wanted: int) -> bool:
    """Whether compressed pixels are `wanted` bytes.

    Decoders do not tell: they fill up what is missing, and leave out the rest.
    """
    inflater = zlib.decompressobj()
    try:
        return len(inflater.decompress(stream, wanted + 1)) == wanted and inflater.eof
    except zlib.error:
        return False
