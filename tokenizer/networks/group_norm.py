"""Group norm followed by SiLU, with a fast path for half precision on CPUs."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Elements of a tile: 512 KiB in float32, so that the working tensors stay in a core's cache.
_TILE = 2**17


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu and He 2018), with `silu` followed by SiLU: (B, C, H, W) -> (B, C, H, W).

    Half-precision channels_last images on a CPU are computed in tiles in float32 (`TiledGroupNorm`), up to five times
    faster than torch's kernels. On other devices, and compiled, torch's kernels are used.
    """

    def __init__(self, groups: int, channels: int, silu: bool = True, eps: float = 1e-6) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, input: Tensor) -> Tensor:
        half = input.device.type == "cpu" and input.dtype in (torch.bfloat16, torch.float16)
        if half and input.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling():
            out = TiledGroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps, self.silu)
            return cast(Tensor, out)
        normed = super().forward(input)
        return F.silu(normed) if self.silu else normed

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, silu={self.silu}"


class TiledGroupNorm(torch.autograd.Function):
    """Group norm and SiLU on channels_last images of any floating dtype; half precision is computed in float32.

    Images are viewed as blocks (n, S, C) of S pixels: an image is one block, or several equal ones where it is larger
    than a tile. A tile is one or more blocks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        out = torch.empty_like(x)
        source, target = blocks(x), blocks(out)
        step = tile_length(source)
        work = source.new_empty((step, *source.shape[1:]), dtype=torch.promote_types(x.dtype, torch.float32))
        means, squares = [], []
        for given in source.split(step):
            value = work[: len(given)].copy_(given)
            means.append(value.mean(dim=1, keepdim=True))
            squares.append(value.sub_(means[-1]).square_().sum(dim=1, keepdim=True))
        mean, variance = _moments(torch.cat(means), torch.cat(squares), len(x), groups, source.shape[1])
        rstd = (variance + eps).rsqrt()
        scale = rstd * weight
        shift = bias - mean * scale
        for given, result, times, plus in zip(*(tensor.split(step) for tensor in (source, target, scale, shift))):
            value = torch.addcmul(plus, work[: len(given)].copy_(given), times, out=work[: len(given)])
            result.copy_(F.silu(value, inplace=True) if silu else value)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        out = torch.empty_like(x)
        source, target = blocks(x), blocks(out)
        given = blocks(grad_outputs[0].contiguous(memory_format=torch.channels_last))
        step = tile_length(source)
        shape = (step, *source.shape[1:])
        normed, active, inner = (source.new_empty(shape, dtype=mean.dtype) for _ in range(3))
        # First pass: the gradient before the SiLU, kept in `out`, and its sums, plain and times the normed value.
        sums, dots = [], []
        tensors = (source, given, target, rstd, -mean * rstd)
        for value, outer, result, times, plus in zip(*(tensor.split(step) for tensor in tensors)):
            n, a, i = normed[: len(value)], active[: len(value)], inner[: len(value)].copy_(outer)
            torch.addcmul(plus, n.copy_(value), times, out=n)
            if ctx.silu:
                torch.ops.aten.silu_backward.grad_input(i, torch.addcmul(bias, n, weight, out=a), grad_input=i)
            result.copy_(i)
            sums.append(i.sum(dim=1, keepdim=True))
            dots.append(n.mul_(i).sum(dim=1, keepdim=True))
        plain, dotted = torch.cat(sums), torch.cat(dots)
        # Then rstd * (weight * inner - mean(weight * inner) - normed * mean(weight * inner * normed)) per group.
        scale = rstd * weight
        count = x[0].numel() // ctx.groups
        slope = _group_sum(weight * dotted, len(x), ctx.groups) * rstd.square() / -count
        shift = _group_sum(weight * plain, len(x), ctx.groups) * rstd / -count - mean * slope
        tensors = (source, target, scale, slope, shift)
        for value, result, times, tilt, plus in zip(*(tensor.split(step) for tensor in tensors)):
            n, i = normed[: len(value)], inner[: len(value)].copy_(result)
            torch.addcmul(plus, n.copy_(value), tilt, out=n)
            result.copy_(n.addcmul_(i, times))
        by_weight, by_bias = (total.sum(dim=(0, 1)).to(weight.dtype) for total in (dotted, plain))
        return out, by_weight, by_bias, None, None, None


def blocks(images: Tensor) -> Tensor:
    """View channels_last images (B, C, H, W) as blocks (n, S, C) of at most a tile, as far as H*W can be halved."""
    channels, size = images.shape[1], images[0, 0].numel()
    while size * channels > _TILE and size % 2 == 0:
        size //= 2
    return images.permute(0, 2, 3, 1).view(-1, size, channels)


def tile_length(blocks: Tensor) -> int:
    """Return the number of blocks (n, S, C) in a tile."""
    return max(1, _TILE // blocks[0].numel())


def _group_sum(values: Tensor, batch: int, groups: int) -> Tensor:
    """Sum values of blocks (n, 1, C) over the blocks of an image and the channels of a group -> (n, 1, C)."""
    parts = values.view(batch, -1, groups, values.shape[2] // groups)
    return parts.sum(dim=(1, 3), keepdim=True).expand_as(parts).reshape(values.shape)


def _moments(means: Tensor, squares: Tensor, batch: int, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Combine the moments of blocks, all (n, 1, C), into mean and variance of each group (Chan et al. 1979).

    `squares` are sums of squared distances from the block's own mean over `size` positions, which keeps the variance
    exact where the mean is far from 0.
    """
    count = len(means) // batch * means.shape[2] // groups
    mean = _group_sum(means, batch, groups) / count
    spread = squares + size * (means - mean).square()
    return mean, _group_sum(spread, batch, groups) / (count * size)
