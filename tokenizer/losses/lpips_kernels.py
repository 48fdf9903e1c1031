"""Features of a network that is not trained, and how far two images lie apart in them: what LPIPS is made of."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqgen.tokenizer.networks.group_norm import blocks, tile_length

# Positions of a map up to which a CPU convolves all images as one matrix.
_FEW = 16
# Added to the norm of a feature vector, as the `lpips` library does.
_EPS = 1e-10


def remembered(measure: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`measure(images)`, with its gradient computed at once and kept: going back through it again costs nothing.

    The adaptive weight of the adversarial loss needs the gradient of the other losses before the step does; and what
    a large network keeps for its gradient is free again when the decoder's turn comes.

    Args:
        measure: (B, C, H, W) -> (B,), each number of its own image alone, or (); nothing in it is trained.
    """
    kind = images.device.type
    # The gradient starts from 1 here; the scale of the loss, which keeps small ones alive in fp16, comes later.
    fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if fp16 or not (images.requires_grad and torch.is_grad_enabled()):
        return measure(images)
    return cast(Tensor, _Remembered.apply(images, measure))


class _Remembered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, measure: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            values = measure(leaf)
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        ctx.save_for_backward(gradient)
        return values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].view(-1, 1, 1, 1), None


class FixedConvolution(nn.Module):
    """A convolution whose weights never change: no gradient reaches them.

    On a CPU, oneDNN reads the weights anew for each image. Of maps of a few pixels, as 32-pixel images end in, the
    neighbourhoods of all images make one matrix instead.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        settings = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
        self.usual = settings == ((3, 3), (1, 1), (1, 1), (1, 1)) and convolution.groups == 1
        self._matrices: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        few = x.device.type == "cpu" and x[0, 0].numel() <= _FEW
        if not (few and self.usual) or torch.compiler.is_compiling():
            return self.convolution(x)
        weight, bias = self.convolution.weight, self.convolution.bias
        if not self._matrices:
            # The gradient of the input is the convolution with the weights turned about.
            both = weight, weight.flip(2, 3).transpose(0, 1)
            self._matrices = [w.permute(2, 3, 1, 0).flatten(0, 2).contiguous() for w in both]
        return cast(Tensor, _AsMatrix.apply(x.to(weight.dtype), bias, *self._matrices))


class _AsMatrix(torch.autograd.Function):
    """A 3x3 convolution, padded by 1: matrices (9C, C') for the result and (9C', C) for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return _neighbourhoods_times(x, forth).add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _neighbourhoods_times(grad_outputs[0], ctx.back), None, None, None


def _neighbourhoods_times(x: Tensor, matrix: Tensor) -> Tensor:
    """The 3x3 neighbourhoods of (B, C, H, W), 0 outside, times (9C, C') -> (B, C', H, W), channels_last."""
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    # Three columns side by side are one stretch of memory.
    image, row, column, _ = padded.stride()
    rows = padded.as_strided((batch, height, width, 3, 3 * channels), (image, row, column, row, 1))
    rows = rows.reshape(-1, 9 * channels)
    size = batch, matrix.shape[1], height, width
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    torch.mm(rows, matrix, out=out.permute(0, 2, 3, 1).view(len(rows), -1))
    return out


def difference(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1, for one layer: feature maps (B, C, H, W) twice and weights (C,) -> (B,).

    In the dtype of the weights. The gradient reaches `found` alone.
    """
    last = all(maps.is_contiguous(memory_format=torch.channels_last) for maps in (found, wanted))
    with torch.autocast(found.device.type, enabled=False):
        # Through the cache in tiles on a CPU, as group norm goes: see norm.py.
        if found.device.type == "cpu" and last and not torch.compiler.is_compiling():
            return cast(Tensor, _TiledDifference.apply(found, wanted, weight))
        pair = found.to(weight.dtype), wanted.detach().to(weight.dtype)
        one, two = (maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + _EPS) for maps in pair)
        return ((one - two).square() * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))


class _TiledDifference(torch.autograd.Function):
    """`difference` of channels_last maps."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
        pair = blocks(found), blocks(wanted)
        step = tile_length(pair[0])
        rooms = [weight.new_empty(step, *maps.shape[1:]) for maps in pair]
        scales: list[list[Tensor]] = [[], []]
        totals = []
        for tiles in zip(*(maps.split(step) for maps in pair)):
            units = []
            for tile, room, kept in zip(tiles, rooms, scales):
                unit = room[: len(tile)].copy_(tile)
                kept.append(torch.linalg.vector_norm(unit, dim=2, keepdim=True).add_(_EPS).reciprocal_())
                units.append(unit.mul_(kept[-1]))
            totals.append((units[0].sub_(units[1]).square_() @ weight).mean(dim=1))
        ctx.save_for_backward(found, wanted, weight, *(torch.cat(kept) for kept in scales))
        return torch.cat(totals).view(len(found), -1).mean(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found, wanted, weight, scale, other = ctx.saved_tensors
        out = torch.empty_like(found)
        source, target, result = blocks(found), blocks(wanted), blocks(out)
        step = tile_length(source)
        rooms = [weight.new_empty(step, *source.shape[1:]) for _ in range(2)]
        # 2 is of the square. One factor an image, for each of its blocks.
        factors = grad_outputs[0] * (2 / found[0, 0].numel())
        factors = factors.repeat_interleave(len(source) // len(found)).view(-1, 1, 1)
        tiles = zip(*(tensor.split(step) for tensor in (source, target, result, scale, other, factors)))
        for maps, aim, into, by, to, factor in tiles:
            unit, slope = rooms[0][: len(maps)].copy_(maps).mul_(by), rooms[1][: len(maps)].copy_(aim).mul_(to)
            torch.sub(unit, slope, out=slope).mul_(weight)
            # Of the gradient of a unit vector, only what is at right angles to it moves the vector.
            along = torch.linalg.vecdot(unit, slope).unsqueeze(2)
            into.copy_(slope.addcmul_(unit, along, value=-1).mul_(by * factor))
        return out, None, None
