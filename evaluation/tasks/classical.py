"""What restoration is compared with: a classical method, and the colourfulness of an image."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SEARCHED = 10
"""Pixels on each side in which non-local means looks for similar patches."""


def non_local_means(images: Tensor, sigma: float) -> Tensor:
    """Denoise uint8 images (B, C, H, W) by non-local means (Buades, Coll and Morel 2011, "Non-local means denoising").

    A pixel becomes the mean of those around it, weighted by exp(-max(d - 2 sigma^2, 0) / h^2), where d is the mean
    square difference of the patches about both. Sides of patches and h follow the authors' table for colour images; the
    window is always the one that it has for the least noise (21x21), as images here are small.

    Args:
        sigma: standard deviation of the noise, of 255.
    """
    radius, h = next(
        (r, c * sigma) for most, r, c in ((25, 1, 0.55), (55, 2, 0.4), (math.inf, 3, 0.35)) if sigma <= most
    )
    height, width = images.shape[2:]
    radius = min(radius, min(height, width) - 1)  # as far as an image can be mirrored
    reach = min(SEARCHED, min(height, width) - 1 - radius)
    values = images.float()
    around = F.pad(values, [reach + radius] * 4, mode="reflect")
    patches = F.pad(values, [radius] * 4, mode="reflect")
    total, weights = torch.zeros_like(values), values.new_zeros(len(values), 1, height, width)
    for top in range(2 * reach + 1):
        for left in range(2 * reach + 1):
            moved = around[..., top : top + height + 2 * radius, left : left + width + 2 * radius]
            error = (patches - moved).square().mean(1, keepdim=True)
            distance = F.avg_pool2d(error, 2 * radius + 1, stride=1)
            weight = torch.exp(-(distance - 2 * sigma**2).clamp_min(0) / h**2)
            total += weight * moved[..., radius : radius + height, radius : radius + width]
            weights += weight
    return (total / weights).round().to(torch.uint8)


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness (Hasler and Suesstrunk 2003, metric M3) of uint8 images (B, 3, H, W) -> (B,); 0 for grey."""
    red, green, blue = images.double().cpu().flatten(2).unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])  # (2, B, pixels)
    deviation = opponents.std(2, unbiased=False).square().sum(0).sqrt()
    return deviation + 0.3 * opponents.mean(2).square().sum(0).sqrt()
