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
    size = config.enlarged() if enlarged else config.size
    image = fit(decode(data, config.channels), size, config.fit)
    return image if enlarged else center_crop(image, size)


def augmented(image: np.ndarray, config: ImageConfig, seed: int) -> np.ndarray:
    """Crop a fitted image (C, h, w) to the configured size, shift it and mirror it, all by `seed`."""
    if config.random_crop > 0:
        height, width = config.size
        top = hash64("top", seed) % (image.shape[1] - height + 1)
        left = hash64("left", seed) % (image.shape[2] - width + 1)
        image = image[:, top : top + height, left : left + width]
    if config.random_shift > 0:
        rows, columns = (
            _shifted(side, hash64(axis, seed) % (2 * config.random_shift + 1) - config.random_shift)
            for side, axis in zip(config.size, ("down", "right"), strict=True)
        )
        image = image[:, rows[:, None], columns]
    return image[:, :, ::-1] if config.flip and flips(seed) else image


def _shifted(side: int, by: int) -> np.ndarray:
    """Which of `side` rows stand where, shifted by fewer than `side`; beyond the edge are those within, mirrored."""
    places = np.arange(side) + by
    return np.where(places < 0, -1 - places, np.where(places >= side, 2 * side - 1 - places, places))
