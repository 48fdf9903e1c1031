"""DiffAugment (Zhao et al. 2020): random, differentiable changes of the discriminator's inputs.

With few images a discriminator overfits to them. Here it sees real and reconstructed images only after the same kind
of random changes, through which the decoder's gradient passes. The strengths are those of the paper's section 3.3.
Random numbers come from torch's global generator and differ for every image.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import Augmentation


def diff_augment(images: Tensor, policy: Sequence[Augmentation]) -> Tensor:
    """Augment images (B, C, H, W) in [-1, 1] by each part of `policy` in order; float32, same shape.

    An empty policy returns the images unchanged.
    """
    for name in policy:
        images = _AUGMENTATIONS[name](images.float())
    return images


def _color(images: Tensor) -> Tensor:
    """Change brightness by -0.5 to 0.5, then saturation by a factor of 0 to 2, then contrast by one of 0.5 to 1.5."""
    brightness, saturation, contrast = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    images = images + (brightness - 0.5)
    images = torch.lerp(images.mean(1, keepdim=True), images, 2 * saturation)
    return torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast + 0.5)


def _translation(images: Tensor) -> Tensor:
    """Shift by up to an eighth of each side; the uncovered border is 0."""
    for dim in (2, 3):
        side = images.shape[dim]
        most = round(side / 8)
        shifts = torch.randint(-most, most + 1, (len(images), 1), device=images.device)
        index = torch.arange(side, device=images.device) + most + shifts  # (B, side) into the padded side
        padded = F.pad(images, (0, 0, most, most) if dim == 2 else (most, most))
        images = torch.take_along_dim(padded, index[:, None, :, None] if dim == 2 else index[:, None, None, :], dim)
    return images


def _cutout(images: Tensor) -> Tensor:
    """Set a rectangle of half of each side, centred anywhere in the image, to 0."""
    inside = []
    for side in images.shape[2:]:
        middle = torch.randint(0, side, (len(images), 1), device=images.device)
        first = middle - side // 4
        position = torch.arange(side, device=images.device)
        inside.append((position >= first) & (position < first + side // 2))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill(hole, 0)


_AUGMENTATIONS: dict[Augmentation, Callable[[Tensor], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
