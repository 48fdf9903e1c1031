"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, appendix), sized by a configuration."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .group_norm import GroupNorm
from .options import ModelConfig


class ResidualBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, added to the input: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(self.norm1(x))
        hidden = self.conv2(self.dropout(self.norm2(hidden)))
        return self.shortcut(x) + hidden


class Attention(nn.Module):
    """Single-head self-attention over all positions, added to the input: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, silu=False)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.flatten(2).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=1))
        mixed = _attend(query, key, value)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention: (B, L, C) three times -> (B, L, C)."""
    if query.device.type == "cpu" and query.shape[1] <= 128:
        # The gradient of torch's kernel takes a CPU three times as long as that of a small matrix of weights. As there,
        # what the softmax is taken of is not rounded to half precision.
        exact = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            scores = query.to(exact) * query.shape[-1] ** -0.5 @ key.to(exact).transpose(1, 2)
            return scores.softmax(dim=-1).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value)


class Downsample(nn.Module):
    """3x3 convolution with stride 2, padded right and below: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _block(channels: int, level: int, config: ModelConfig) -> list[nn.Module]:
    """A residual block of a level, and the attention after it where the level has it."""
    out = config.channels[level]
    block = ResidualBlock(channels, out, config.groups, config.dropout)
    return [block, Attention(out, config.groups)] if level in config.attention_levels else [block]


def _middle(channels: int, config: ModelConfig) -> list[nn.Module]:
    """The blocks at the lowest resolution, shared in shape by encoder and decoder."""
    block = ResidualBlock(channels, channels, config.groups, config.dropout)
    if not config.attention:
        return [block]
    last = ResidualBlock(channels, channels, config.groups, config.dropout)
    return [block, Attention(channels, config.groups), last]


class Encoder(nn.Module):
    """Images to latents: (B, C, H, W) -> (B, latent_dim, H/f, W/f), f the downsampling factor."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        folded, width = channels * config.patch**2, config.channels[0]
        layers: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(folded, width, 3, padding=1)]
        for level, out in enumerate(config.channels):
            if level:
                layers.append(Downsample(width))
            for _ in range(config.blocks):
                layers += _block(width, level, config)
                width = out
        layers += _middle(width, config)
        layers += [GroupNorm(config.groups, width), nn.Identity()]
        layers.append(nn.Conv2d(width, config.latent_dim, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """Latents to images: (B, latent_dim, h, w) -> (B, C, h*f, w*f); the last layer is linear."""

    def __init__(self, channels: int, config: ModelConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_dim, width, 3, padding=1), *_middle(width, config)]
        for level, out in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                layers += _block(width, level, config)
                width = out
            if level:
                layers.append(Upsample(width))
        layers += [GroupNorm(config.groups, width), nn.Identity()]
        self.layers = nn.Sequential(*layers)
        self.last = nn.Conv2d(width, channels * config.patch**2, 3, padding=1)
        self.unfold = nn.PixelShuffle(config.patch)

    def forward(self, z: Tensor) -> Tensor:
        return self.unfold(self.last(self.layers(z)))
