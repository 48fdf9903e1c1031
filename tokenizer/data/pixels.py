"""Pixels: conversion between uint8 and float in [-1, 1], resizing and cropping."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ASPECT = 8  # images are first cropped to this multiple of the target's aspect ratio, which bounds memory


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 pixels of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Convert float pixels in [-1, 1] (others are clamped) to uint8; inverts `to_float` on all 256 values."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def fit(image: Tensor, size: Sequence[int], mode: Literal["crop", "pad"]) -> Tensor:
    """Resize uint8 or float (C, h, w) with antialiasing, keeping its aspect ratio.

    "pad": to exactly `size`, centred on black. "crop": to at least `size`, one side equal; the crop itself is left to
    `center_crop` or a random crop.
    """
    (height, width), (h, w) = size, image.shape[-2:]
    if mode == "crop":
        h, w = min(h, MAX_ASPECT * -(-w * height // width)), min(w, MAX_ASPECT * -(-h * width // height))
        image = center_crop(image, [h, w])
    from torchvision.transforms.v2 import functional as transforms  # a second that drawing images does not need

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


def image_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Images uint8 (B, C, h, w) as one image in colour (3, H, W), in rows of `columns`, with white lines between them
    and around; a single one as it is."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    if len(images) == 1:
        return images[0]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 255)
    tiles = F.pad(torch.cat([images, blank]), (padding, 0, padding, 0), value=255)
    _, channels, height, width = tiles.shape
    tiles = tiles.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return F.pad(tiles.reshape(channels, rows * height, columns * width), (0, padding, 0, padding), value=255)
