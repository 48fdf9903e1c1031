"""Pixels: conversion between uint8 and float in [-1, 1], decoding of image files, resizing and cropping."""

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

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MAX_ASPECT = 8  # images are first cropped to this multiple of the target's aspect ratio, which bounds memory


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 pixels of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float pixels in [-1, 1] (others are clamped) to uint8; inverts `to_float` on all 256 values."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class BrokenImage(Exception):
    """Raised where bytes cannot be decoded as an image; the message is the reason."""


def decode(data: bytes, channels: int) -> Tensor:
    """Decode an image file to uint8 (channels, h, w): EXIF orientation applied, transparency on white, 16 bits to 8.

    torchvision decodes JPEG and PNG; Pillow decodes palettes, CMYK and other formats. Raises `BrokenImage`.
    """
    if not data:
        raise BrokenImage("empty")
    try:
        image = _decode_torchvision(data)
        image = _decode_pillow(data) if image is None else image
    except (MemoryError, BrokenImage):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage("no known image format") from error
    except Exception as error:  # decoders of damaged data raise errors of any type
        reason = re.sub(r"^.*\.cpp:\d+, ", "", " ".join(str(error).split()))  # without torchvision's C++ source line
        raise BrokenImage(reason[:150] or type(error).__name__) from error
    if image.dtype == torch.uint16:
        image = ((image.to(torch.int32) * 255 + 32767) // 65535).to(torch.uint8)
    if image.shape[0] in (2, 4):
        alpha = image[-1:].to(torch.int32)
        image = ((image[:-1] * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)
    if image.shape[0] == 3 and channels == 1:
        # ITU-R 601 luma in integers with weights of sum 1: grey stored as RGB keeps its values.
        red, green, blue = image.to(torch.int32)
        image = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]
    return image.expand(channels, -1, -1)


def _decode_torchvision(data: bytes) -> Tensor | None:
    """Decode to uint8 or uint16 (1 to 4, h, w); None where torchvision lacks support: palettes, CMYK, tRNS chunks."""
    if data.startswith(PNG):
        # Header: bit depth, then colour type (3: palette). Transparency by key is a chunk before the pixels.
        if data[24:25] not in (b"\x08", b"\x10") or data[25:26] == b"\x03" or b"tRNS" in data[: data.find(b"IDAT")]:
            return None
    elif not data.startswith(JPEG):
        return None
    image = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), apply_exif_orientation=True)
    return None if data.startswith(JPEG) and image.shape[0] == 4 else image


def _decode_pillow(data: bytes) -> Tensor:
    """Decode the first frame to uint8 (1, 3 or 4, h, w) or uint16 (1, h, w)."""
    with Image.open(BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
    if image.mode == "F":
        raise BrokenImage("float pixels have no fixed range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise BrokenImage("32-bit pixels have no fixed range; convert it to 8 or 16 bits")
        return torch.from_numpy(pixels.astype(np.uint16))[None]
    mode = "RGBA" if image.has_transparency_data else "L" if image.mode in ("1", "L") else "RGB"
    return transforms.pil_to_tensor(image.convert(mode)).contiguous()


def fit(image: Tensor, size: Sequence[int], mode: Literal["crop", "pad"]) -> Tensor:
    """Resize uint8 (C, h, w) with antialiasing, keeping its aspect ratio.

    "pad": to exactly `size`, centred on black. "crop": to at least `size`, one side equal; the crop itself is left to
    `center_crop` or a random crop.
    """
    (height, width), (h, w) = size, image.shape[-2:]
    if mode == "crop":
        h, w = min(h, MAX_ASPECT * -(-w * height // width)), min(w, MAX_ASPECT * -(-h * width // height))
        image = center_crop(image, [h, w])
    scale = (max if mode == "crop" else min)(height / h, width / w)
    inner = [max(round(h * scale), 1), max(round(w * scale), 1)]
    image = transforms.resize(image, inner, antialias=True) if inner != [h, w] else image
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    if mode == "pad":
        image = transforms.pad(image, [left, top, width - inner[1] - left, height - inner[0] - top])
    return image


def center_crop(image: Tensor, size: Sequence[int]) -> Tensor:
    """Crop (..., h, w) to `size` about its centre; a view of the same memory."""
    if list(image.shape[-2:]) == list(size):
        return image
    top, left = ((have - want) // 2 for have, want in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]
