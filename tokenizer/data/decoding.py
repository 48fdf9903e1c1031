"""Decoding of image files with Pillow: upright, transparency on white, 16 bits to 8."""

import ctypes
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from vqgen.errors import UserError

# The formats of `SUFFIXES`, the commonest first. Some of Pillow's other plugins run external programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MAX_SCANS = 20
"""A JPEG of the largest size has at most this many scans, a smaller one proportionally more: it bounds the time."""
# What Pillow raises on damaged data; a warning where Python runs with -W error.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError),
    *(MemoryError, RuntimeError, AssertionError, struct.error, zlib.error, Image.DecompressionBombError, Warning),
)

# Pillow warns of damaged metadata, in a large dataset thousands of times; damaged pixels are errors.
warnings.filterwarnings("ignore", module=r"PIL\.")
with suppress(AttributeError, OSError):  # where libtiff is a part of Pillow, its functions cannot be reached
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)  # it prints errors that Pillow raises as well


class BrokenImage(Exception):
    """Raised where bytes cannot be decoded as an image; the message is the reason."""


def decode(data: bytes, channels: int) -> Tensor:
    """Decode an image file to uint8 (channels, h, w); of an animation the first frame.

    EXIF orientation is applied, transparency shows white, 16 bits are rounded to 8. Raises `BrokenImage`.
    """
    with _opened(data) as image:
        wide = _sixteen_bits(image, data)
        pixels = _eight_bits(image, channels) if wide is None else _rounded(wide)
        orientation = _orientation(image)
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:].astype(np.uint16)  # the sums below stay under 2**16
        pixels = ((pixels[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if pixels.shape[2] == 3 and channels == 1:
        # ITU-R 601 luma in integers with weights of sum 1, as in Pillow: grey stored as RGB keeps its values.
        red, green, blue = np.moveaxis(pixels.astype(np.uint32), 2, 0)
        pixels = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(np.uint8)[..., None]
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1))
    if orientation > 1:
        tensor = _upright(tensor, orientation)
    return tensor if len(tensor) == channels else tensor.expand(channels, -1, -1)


def read_size(data: bytes) -> tuple[int, int, bool]:
    """Height and width of an image file when shown upright, and whether it is grey. Raises `BrokenImage`."""
    with _opened(data) as image:
        width, height = image.size
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFF itself
        grey = image.mode in ("1", "L", "I;16")
    return (width, height, grey) if turned else (height, width, grey)


@contextmanager
def _opened(data: bytes) -> Iterator[ImageFile.ImageFile]:
    """Open an image file of at most `PIL.Image.MAX_IMAGE_PIXELS`; errors of decoding inside raise `BrokenImage`."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise UserError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on, which hides broken images; set it to False")
    if not data:
        raise BrokenImage("empty")
    if data.startswith(PNG):
        _check_chunks(data)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise BrokenImage(f"{image.height}x{image.width} pixels, of which at most {limit} are decoded")
            if data.startswith(JPEG) and limit and (scans := data.count(b"\xff\xda")) * pixels > MAX_SCANS * limit:
                raise BrokenImage(f"{scans} scans of {image.height}x{image.width} pixels; save it again")
            yield image
    except UnidentifiedImageError as error:
        raise BrokenImage("no known image format") from error
    except _DAMAGED as error:
        raise BrokenImage(" ".join(str(error).split())[:150] or type(error).__name__) from error


def _check_chunks(data: bytes) -> None:
    """Compare the checksum of every chunk of a PNG file: Pillow skips those of the pixels. Raises `BrokenImage`."""
    at, kind = len(PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at) if at + 8 <= len(data) else (len(data), kind)
        end = at + 8 + length
        if end + 4 > len(data):
            raise BrokenImage("truncated")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BrokenImage(f"wrong checksum of the chunk at byte {at}")
        at = end + 4


def _sixteen_bits(image: ImageFile.ImageFile, data: bytes) -> np.ndarray | None:
    """Pixels of 16 bits, uint16 (h, w, 1 to 4); None where the image has 8 bits or fewer."""
    # Pillow reduces colours and grey with alpha in PNG to their high bytes, so they are read as bytes here.
    raw = image.tile[0].args if image.format == "PNG" and image.tile else None
    if raw == "LA;16B":
        image.tile = [image.tile[0]._replace(args="RGBA")]
        return np.asarray(image).view(">u2").astype(np.uint16)
    if raw in ("RGB;16B", "RGBA;16B"):
        with Image.open(BytesIO(data), formats=["PNG"]) as other:
            other.tile = [other.tile[0]._replace(args=raw[:-1] + "L")]
            wide = np.asarray(image).astype(np.uint16) << 8 | np.asarray(other)
    elif image.mode == "F":
        raise BrokenImage("float pixels have no fixed range; convert it to 8 or 16 bits")
    elif image.mode.startswith("I"):
        wide = np.asarray(image)[..., None]
        wider = image.format == "TIFF" and image.mode == "I"  # 32 bits, or 16 with a sign
        if wider or wide.min() < 0 or wide.max() > 65535:
            raise BrokenImage("pixels of 32 bits, or with a sign, have no fixed range; convert it to 8 or 16 bits")
        wide = wide.astype(np.uint16)
    else:
        return None
    if (key := image.info.get("transparency")) is not None:
        shown = (wide != np.asarray(key)).any(2, keepdims=True)
        wide = np.concatenate((wide, np.where(shown, 65535, 0).astype(np.uint16)), 2)
    return wide


def _rounded(wide: np.ndarray) -> np.ndarray:
    """16 bits to 8."""
    return ((wide.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _eight_bits(image: ImageFile.ImageFile, channels: int) -> np.ndarray:
    """Pixels uint8 (h, w, 1, 3 or 4) of an image of at most 8 bits."""
    image.load()
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    shown = image if image.mode == mode else image.convert(mode)
    if mode == "RGB" and channels == 1:
        shown = shown.convert("L")
    return np.frombuffer(bytearray(shown.tobytes()), np.uint8).reshape(image.height, image.width, -1)


def _orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation from 1 to 8; 1 where it is missing or damaged, as in viewers."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGED:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Turn or mirror (..., h, w) by its EXIF orientation."""
    image = image.mT if orientation >= 5 else image
    return image.flip([axis for axis, values in ((-2, (3, 4, 7, 8)), (-1, (2, 3, 6, 7))) if orientation in values])
