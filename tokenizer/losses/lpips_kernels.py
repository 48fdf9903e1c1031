"""Fast parts of LPIPS: frozen convolutions, the distance of feature maps, and a gradient computed once."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqgen.tokenizer.networks.group_norm import blocks, tile_length

# Largest feature map, in pixels, that a CPU convolves as one matrix product over all images.
_SMALL_MAP = 16
# Added to the norm of a feature vector, as in the `lpips` library.
_EPS = 1e-10


def with_cached_gradient(measure: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Compute `measure(images)` and its gradient at once, and keep the gradient for every later backward pass.

    The adaptive weight of the adversarial loss runs a second backward pass, and the memory that a large network needs
    for its gradient is free again before the decoder's backward pass.

    Args:
        measure: (B, C, H, W) -> (B,), each number a function of its own image, or (); it has no trained parameters.
    """
    kind = images.device.type
    # This gradient starts from 1: fp16 would need the loss scale, which is applied later, to keep small numbers.
    fp16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    if fp16 or not (images.requires_grad and torch.is_grad_enabled()):
        return measure(images)
    return cast(Tensor, _CachedGradient.apply(images, measure))


class _CachedGradient(torch.autograd.Function):
    """`with_cached_gradient` as an autograd function."""

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
    """A convolution with frozen weights, which receive no gradient.

    On a CPU, oneDNN reads the weights again for each image. For small feature maps, as the last ones of 32-pixel
    images, one matrix product over the neighbourhoods of all images is faster.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution
        settings = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation
        self.is_3x3 = settings == ((3, 3), (1, 1), (1, 1), (1, 1)) and convolution.groups == 1
        self._matrices: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        small = x.device.type == "cpu" and x[0, 0].numel() <= _SMALL_MAP
        if not (small and self.is_3x3) or torch.compiler.is_compiling():
            return self.convolution(x)
        weight, bias = self.convolution.weight, self.convolution.bias
        if not self._matrices:
            # The gradient of the input is a convolution with the flipped weights.
            filters = weight, weight.flip(2, 3).transpose(0, 1)
            self._matrices = [w.permute(2, 3, 1, 0).flatten(0, 2).contiguous() for w in filters]
        return cast(Tensor, _AsMatrix.apply(x.to(weight.dtype), bias, *self._matrices))


class _AsMatrix(torch.autograd.Function):
    """A 3x3 convolution with padding 1, by matrices (9C, C') for the result and (9C', C) for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, matrix: Tensor, backward_matrix: Tensor) -> Tensor:
        ctx.backward_matrix = backward_matrix
        return _neighbourhoods_times(x, matrix).add_(bias[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _neighbourhoods_times(grad_outputs[0], ctx.backward_matrix), None, None, None


def _neighbourhoods_times(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply the zero-padded 3x3 neighbourhoods of (B, C, H, W) by (9C, C') -> (B, C', H, W), channels_last."""
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, height + 2, width + 2, channels)
    padded[:, 1:-1, 1:-1] = x.permute(0, 2, 3, 1)
    # Three neighbouring columns are contiguous in memory.
    image, row, column, _ = padded.stride()
    rows = padded.as_strided((batch, height, width, 3, 3 * channels), (image, row, column, row, 1))
    rows = rows.reshape(-1, 9 * channels)
    size = batch, matrix.shape[1], height, width
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    torch.mm(rows, matrix, out=out.permute(0, 2, 3, 1).view(len(rows), -1))
    return out


def difference(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Distance of two feature maps (B, C, H, W) with channel weights (C,): Zhang et al. 2018, eq. 1, one layer -> (B,).

    Computed in the data type of the weights; only `found` receives a gradient.
    """
    last = all(maps.is_contiguous(memory_format=torch.channels_last) for maps in (found, wanted))
    with torch.autocast(found.device.type, enabled=False):
        # In tiles that fit a CPU core's cache, as in group_norm.py.
        if found.device.type == "cpu" and last and not torch.compiler.is_compiling():
            return cast(Tensor, _TiledDifference.apply(found, wanted, weight))
        pair = found.to(weight.dtype), wanted.detach().to(weight.dtype)
        one, two = (maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + _EPS) for maps in pair)
        return ((one - two).square() * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))


class _TiledDifference(torch.autograd.Function):
    """`difference` of channels_last feature maps, in tiles."""

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
        # The 2 is the derivative of the square. One factor an image, repeated for each of its blocks.
        factors = grad_outputs[0] * (2 / found[0, 0].numel())
        factors = factors.repeat_interleave(len(source) // len(found)).view(-1, 1, 1)
        tiles = zip(*(tensor.split(step) for tensor in (source, target, result, scale, other, factors)))
        for maps, aim, into, by, to, factor in tiles:
            unit, slope = rooms[0][: len(maps)].copy_(maps).mul_(by), rooms[1][: len(maps)].copy_(aim).mul_(to)
            torch.sub(unit, slope, out=slope).mul_(weight)
            # A normalized vector changes only by the part of its gradient that is orthogonal to it.
            along = torch.linalg.vecdot(unit, slope).unsqueeze(2)
            into.copy_(slope.addcmul_(unit, along, value=-1).mul_(by * factor))
        return out, None, None
