"""Pixels: the one pair of functions that knows their range, and from an encoded image to pixels of the right size.

Images are float (B, C, H, W) in [-1, 1] inside, uint8 outside.
"""

import re
from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import functional as transforms

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
# An image longer than this many targets is cut to its middle before it is enlarged, which bounds memory.
LONGEST = 8


def to_float(images: Tensor) -> Tensor:
    """uint8 pixels, any shape, to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float pixels in [-1, 1] (values beyond are clamped) to uint8; the inverse of `to_float` on all 256 values."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class BrokenImage(Exception):
    """The bytes are no image that can be shown; the message says why."""


def decode(data: bytes, channels: int) -> Tensor:
    """Encoded bytes to uint8 (channels, h, w): upright by EXIF, on white where transparent, 16 bits scaled to 8.

    torchvision decodes JPEG and PNG; what it has no true pixels for (palettes, CMYK, other formats) Pillow does.
    Raises `BrokenImage`.
    """
    if not data:
        raise BrokenImage("empty")
    try:
        image = _decode_torchvision(data)
        if image is None:
            image = _decode_pillow(data)
    except (MemoryError, BrokenImage):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("no known image format") from error
    except Exception as error:  # decoders of damaged data raise nearly anything
        reason = re.sub(r"^.*\.cpp:\d+, ", "", " ".join(str(error).split()))  # without torchvision's line of C++
        raise BrokenImage(reason[:150] or type(error).__name__) from error
    if image.dtype == torch.uint16:
        image = ((image.to(torch.int32) * 255 + 32767) // 65535).to(torch.uint8)
    if image.shape[0] in (2, 4):
        alpha = image[-1:].to(torch.int32)
        image = ((image[:-1] * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    if image.shape[0] == 3 and channels == 1:
        # ITU-R 601 luma in integers whose weights add up to one: a grey stored as RGB keeps its values.
        red, green, blue = image.to(torch.int32)
        image = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]
    return image.expand(channels, -1, -1)


def _decode_torchvision(data: bytes) -> Tensor | None:
    """uint8 or uint16 (1 to 4, h, w); None where torchvision would give palette indices, inks or no transparency."""
    if data.startswith(PNG):
        # Header: bit depth, then colour type (3: palette). Transparency by key is a chunk before the pixels.
        if data[24:25] not in (b"\x08", b"\x10") or data[25:26] == b"\x03" or b"tRNS" in data[: data.find(b"IDAT")]:
            return None
    elif not data.startswith(JPEG):
        return None
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), apply_exif_orientation=True)
    return None if data.startswith(JPEG) and image.shape[0] == 4 else image


def _decode_pillow(data: bytes) -> Tensor:
    """uint8 (1, 3 or 4, h, w) or uint16 (1, h, w): the first frame of whatever Pillow reads."""
    with Image.open(BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BrokenImage("32-bit pixels have no fixed range; convert it to 8 or 16 bits")
        return torch.from_numpy(pixels.astype(np.uint16))[None]
    if image.mode == "F":
        raise BrokenImage("float pixels have no fixed range; convert it to 8 or 16 bits")
    transparent = image.has_transparency_data
    image = image.convert("RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB")
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def fit(image: Tensor, size: Sequence[int], mode: Literal["crop", "pad"]) -> Tensor:
    """Resize uint8 (C, h, w) with antialiasing, keeping its aspect ratio.

    "pad": exactly `size`, centred on black. "crop": at least `size`, one side equal to it; what is over stays.
    """
    (height, width), (h, w) = size, image.shape[-2:]
    if mode == "crop":
        h, w = min(h, LONGEST * -(-w * height // width)), min(w, LONGEST * -(-h * width // height))
        image = centre(image, [h, w])
    scale = (max if mode == "crop" else min)(height / h, width / w)
    inner = [max(round(h * scale), 1), max(round(w * scale), 1)]
    image = transforms.resize(image, inner, antialias=True) if inner != [h, w] else image
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    if mode == "pad":
        image = transforms.pad(image, [left, top, width - inner[1] - left, height - inner[0] - top])
    return image


def centre(image: Tensor, size: Sequence[int]) -> Tensor:
    if list(image.shape[-2:]) == list(size):
        return image
    top, left = ((have - want) // 2 for have, want in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]
