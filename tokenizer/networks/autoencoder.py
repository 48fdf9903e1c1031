"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, appendix), sized by a configuration."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.errors import UsageError
from vqgen.options import at_least

from .group_norm import GroupNorm


@dataclass
class ModelConfig:
    """Sizes of the encoder and the decoder."""

    width: int = 64
    """Channels of the finest level; level i has width x multipliers[i]."""
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Channel multiplier of each level; each level after the first halves height and width."""
    patch: int = 1
    """Pixels a side folded into channels before the first convolution and unfolded after the last: 2 or 4 saves the
    costly work at full resolution."""
    blocks: int = 2
    """Residual blocks a level in the encoder; the decoder has one more a level."""
    attention: bool = True
    """Self-attention at the lowest resolution, between the encoder's last two blocks and the decoder's first two."""
    attention_levels: list[int] = field(default_factory=list)
    """Levels (0 is the finest) with self-attention after each of their blocks besides."""
    latent_dim: int = 128
    """Channels between the encoder and the quantizer."""
    groups: int = 32
    """Groups of the group norm; must divide the channels of every level."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""

    def __post_init__(self) -> None:
        at_least(self, width=1, patch=1, blocks=1, latent_dim=1, groups=1)
        if not self.multipliers or min(self.multipliers) < 1:
            raise UsageError(f"--multipliers: found {self.multipliers}, expected positive integers, one a level")
        if any(not 0 <= level < len(self.multipliers) for level in self.attention_levels):
            raise UsageError(
                f"--attention-levels: found {self.attention_levels}, expected numbers from 0 to "
                f"{len(self.multipliers) - 1}, one less than there are --multipliers"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout: found {self.dropout}, expected 0 <= dropout < 1")
        for channels in self.channels:
            if channels % self.groups:
                raise UsageError(
                    f"--groups: {self.groups} does not divide {channels} channels "
                    f"(--width {self.width} x --multipliers {self.multipliers}); choose a common divisor"
                )

    @property
    def channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * m for m in self.multipliers]

    @property
    def factor(self) -> int:
        """How many pixels a side one code stands for."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


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
