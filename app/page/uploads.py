"""What visitors hand in: image files and painted masks, checked before anything is decoded."""

import base64
import binascii
from pathlib import Path

from torch import Tensor
from torchvision.io import encode_png

from vqgen.errors import UserError
from vqgen.files import read_bytes
from vqgen.tokenizer.data.decoding import BrokenImage, decode, read_size

from .program import MASK_BYTES, LimitConfig

PNG_URL = "data:image/png;base64,"


def read_upload(path: str | None, channels: int, limits: LimitConfig, drawn: bool = False) -> Tensor:
    """Read an uploaded image as uint8 (channels, h, w). Raises `UserError`.

    Args:
        drawn: whether a drawn image can be taken in place of an upload.
    """
    if not path:
        raise UserError(f"image: none was given; upload one{', or pick a drawn one' if drawn else ''}")
    most = int(limits.upload_megabytes * 2**20)
    try:
        data = read_bytes(Path(path), most)
    except FileNotFoundError as error:
        raise UserError(f"image: it was removed, as it is old; upload {'or draw ' if drawn else ''}it again") from error
    except OSError as error:
        raise UserError(f"image: it cannot be read, or has more than {limits.upload_megabytes:g} MB") from error
    return decoded(data, channels, limits, "image")


def decoded(data: bytes, channels: int, limits: LimitConfig, what: str) -> Tensor:
    """Decode an image file, of bounded size, as uint8 (channels, h, w). Raises `UserError`, which names `what`."""
    try:
        height, width, _ = read_size(data)
        if height * width > limits.upload_megapixels * 1e6:
            found = f"found {width}×{height} pixels, at most {limits.upload_megapixels:g} million are read"
            raise UserError(f"{what}: {found}; make it smaller")
        return decode(data, channels)
    except BrokenImage as error:
        raise UserError(f"{what}: it cannot be decoded ({error}); give a PNG, JPEG or WebP file") from error


def read_mask(url: str, limits: LimitConfig) -> Tensor:
    """Read a mask, a PNG as `data:` address or in base64 alone: bool (h, w), True where it is white.

    Raises `UserError`.
    """
    if len(url) > MASK_BYTES:
        raise UserError(f"mask: found {len(url)} characters, at most {MASK_BYTES} are read; give a smaller PNG")
    try:
        data = base64.b64decode(url.removeprefix(PNG_URL), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"mask: found {url[:30]!r}, expected a PNG in base64 after {PNG_URL!r}") from error
    return decoded(data, 1, limits, "mask")[0] > 127


def png_url(image: Tensor) -> str:
    """An image uint8 (1 or 3, H, W) as an address that holds it as PNG."""
    return as_url(encode_png(image.cpu()).numpy().tobytes())


def as_url(png: bytes) -> str:
    """A PNG as an address that holds it."""
    return PNG_URL + base64.b64encode(png).decode()
