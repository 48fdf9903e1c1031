"""PatchGAN (Isola et al. 2017, appendix 6.1.2): one logit for every overlapping patch of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from vqgen.errors import UsageError

from .group_norm import GroupNorm


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> logits (B, 1, h, w); high means real.

    Group norm stands in the place of the paper's batch norm: the logits of an image then depend on no other image,
    so real and fake ones can share a pass, and processes need no common statistics.

    Args:
        width: channels of the first layer, doubled by each of `layers`, at most eightfold.
        spectral_norm: divide every convolution's weights by their largest singular value (Miyato et al. 2018). Its
            estimate is refined by each pass in training mode and lies in buffers; in evaluation mode it stands still.

    Raises:
        UsageError: `size` is too small for so many layers.
    """

    def __init__(self, channels: int, size: list[int], width: int, layers: int, spectral_norm: bool = False) -> None:
        super().__init__()
        # Each strided layer halves the side, two more 4x4 convolutions take one pixel each.
        if min(size) // 2**layers < 3:
            raise UsageError(
                f"--gan-layers: {layers} strided layers leave nothing of {size[0]}x{size[1]} pixels; use fewer"
            )
        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1)]
        now = width
        for index in range(1, layers + 1):
            out = width * min(2**index, 8)
            stride = 2 if index < layers else 1
            blocks += [nn.LeakyReLU(0.2), nn.Conv2d(now, out, 4, stride=stride, padding=1, bias=False)]
            blocks.append(GroupNorm(_groups(out), out, silu=False, eps=1e-5))
            now = out
        self.layers = nn.Sequential(*blocks)
        self.last = nn.Conv2d(now, 1, 4, padding=1)
        self.convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        if spectral_norm:
            for convolution in self.convolutions:
                parametrizations.spectral_norm(convolution)

    def forward(self, images: Tensor) -> Tensor:
        with parametrize.cached():
            # Singular values in float32: under autocast the products that estimate them would be rounded.
            with torch.autocast(images.device.type, enabled=False):
                for convolution in self.convolutions:
                    _ = convolution.weight
            return self.last(F.leaky_relu(self.layers(images), 0.2))


def _groups(channels: int) -> int:
    """The most groups up to 32 that divide `channels`."""
    return max(g for g in range(1, 33) if channels % g == 0)
