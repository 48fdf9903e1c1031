"""PatchGAN discriminator (Isola et al. 2017, appendix 6.1.2): one logit for each overlapping patch of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .group_norm import GroupNorm
from .options import check_discriminator


class PatchDiscriminator(nn.Module):
    """Discriminate images (B, C, H, W) in [-1, 1] by logits (B, 1, h, w); high means real.

    Group norm replaces the paper's batch norm: the logits of an image depend on no other image, so real and fake
    images share a pass, and processes need no common statistics.

    Args:
        width: channels of the first layer, doubled by each of `layers`, at most eightfold.
        spectral_norm: divide every convolution's weights by their largest singular value (Miyato et al. 2018), whose
            estimate, in buffers, is refined by each pass in training mode.

    Raises:
        UsageError: `size` is too small for so many layers.
    """

    def __init__(self, channels: int, size: list[int], width: int, layers: int, spectral_norm: bool = False) -> None:
        super().__init__()
        check_discriminator(layers, size)
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
            # Compute the weights in float32: autocast would round the products that estimate singular values.
            with torch.autocast(images.device.type, enabled=False):
                for convolution in self.convolutions:
                    _ = convolution.weight
            return self.last(F.leaky_relu(self.layers(images), 0.2))


def _groups(channels: int) -> int:
    """Return the largest number of groups up to 32 that divides `channels`."""
    return max(g for g in range(1, 33) if channels % g == 0)
