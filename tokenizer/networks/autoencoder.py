"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, appendix)."""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import ImageDecoder
from .group_norm import GroupNorm
from .options import VQGANConfig


class ResidualBlock(nn.Module):
    """Two of (norm, SiLU, 3x3 convolution), added to the input: (B, C, H, W) -> (B, C', H, W)."""

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
    """Scaled dot-product attention of query, key and value (B, L, C) -> (B, L, C)."""
    if query.device.type == "cpu" and query.shape[1] <= 128:
        # Three times faster than the gradient of torch's kernel for short sequences on a CPU. As in that kernel,
        # scores are not rounded to half precision.
        exact = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            scores = query.to(exact) * query.shape[-1] ** -0.5 @ key.to(exact).transpose(1, 2)
            return scores.softmax(dim=-1).to(value.dtype) @ value
    # torch would store all L x L scores for inputs that are not contiguous (CPU) or have no axis of heads (CUDA).
    query, key, value = (t.contiguous() for t in (query, key, value))
    if query.device.type == "cpu":
        return F.scaled_dot_product_attention(query, key, value)
    return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


class Downsample(nn.Module):
    """3x3 convolution with stride 2, padded right and bottom: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _block(channels: int, level: int, config: VQGANConfig) -> list[nn.Module]:
    """Return a residual block of a level, with attention after it where the level has it."""
    out = config.channels[level]
    block = ResidualBlock(channels, out, config.groups, config.dropout)
    return [block, Attention(out, config.groups)] if level in config.attention_levels else [block]


def _middle(channels: int, config: VQGANConfig) -> list[nn.Module]:
    """Return the blocks at the lowest resolution, which encoder and decoder build alike."""
    block = ResidualBlock(channels, channels, config.groups, config.dropout)
    if not config.attention:
        return [block]
    last = ResidualBlock(channels, channels, config.groups, config.dropout)
    return [block, Attention(channels, config.groups), last]


class Encoder(nn.Module):
    """Encode images (B, C, H, W) into latents (B, latent_dim, H/f, W/f), f the downsampling factor."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
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

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield name and module of each layer with weights, in order of computation."""
        yield from _with_weights(self.layers)


class Decoder(ImageDecoder):
    """Decode latents (B, latent_dim, h, w) into images (B, C, h*f, w*f); the last layer is linear."""

    def __init__(self, channels: int, config: VQGANConfig) -> None:
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

    @property
    def last_weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.last.weight)

    def forward(self, z: Tensor) -> Tensor:
        hidden = self.layers(z)
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # so that a gradient at `last_weight` is one of the last layer alone
        return self.unfold(self.last(hidden))

    def named_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield name and module of each layer with weights, in order of computation."""
        yield from _with_weights(self.layers)
        yield "last", self.last


def _with_weights(layers: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    return ((f"layers.{name}", layer) for name, layer in layers.named_children() if layer.state_dict())
