"""What an encoded image becomes at the configured size: decoded, fitted, and augmented by a seed."""

import numpy as np
from torch import Tensor

from vqgen.seeding import hash64

from .decoding import decode
from .options import ImageConfig
from .pixels import center_crop, fit


def flips(seed: int) -> bool:
    """Return whether an augmentation seed mirrors the image, where flips are configured."""
    return bool(hash64("flip", seed) & 1)


def fitted(data: bytes, config: ImageConfig, enlarged: bool) -> Tensor:
    """Decode an image to uint8 (C, H, W) of the configured size, or `enlarged` for a random crop of it.

    Raises `BrokenImage`.
    """
    factor = 1 + config.random_crop if enlarged else 1
    size = [round(side * factor) for side in config.size]
    image = fit(decode(data, config.channels), size, config.fit)
    return image if enlarged else center_crop(image, size)


def augmented(image: np.ndarray, config: ImageConfig, seed: int) -> np.ndarray:
    """Crop a fitted image (C, h, w) to the configured size, shift it and mirror it, all by `seed`."""
    if config.random_crop > 0:
        height, width = config.size
        top = hash64("top", seed) % (image.shape[1] - height + 1)
        left = hash64("left", seed) % (image.shape[2] - width + 1)
        image = image[:, top : top + height, left : left + width]
    if (most := config.random_shift) > 0:
        height, width = config.size
        down, right = (hash64(axis, seed) % (2 * most + 1) for axis in ("down", "right"))
        image = np.pad(image, ((0, 0), (most, most), (most, most)), mode="symmetric")
        image = image[:, down : down + height, right : right + width]
    return image[:, :, ::-1] if config.flip and flips(seed) else image
