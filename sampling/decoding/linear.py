"""Products of few rows with weights, in which a row has the same bits whatever rows are computed with it."""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .threads import one_thread

ROWS = 64
"""Most rows of one product on a CPU."""


class _Product:
    """Products with one weight, which is packed for oneDNN where that is faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.packed: Tensor | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            with suppress(AttributeError, RuntimeError):  # another torch, a processor without such products
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def product(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def sum(self, x: Tensor, y: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(y, x, self.packed, self.bias, "add")
        return torch.addmm(x, y, self.weight.t()) if self.bias is None else x + self.product(y)


@cache
def _sample(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> tuple[_Product, Tensor, Tensor, Tensor]:
    """A product with a weight of `shape`, `ROWS` rows for it, and its results for these, by `product` and by `sum`.

    Each sum is 0 but for its rounding: in others the order shows in one of 10,000 numbers rounded to bfloat16.
    """
    random = torch.Generator().manual_seed(0)
    outer, inner = shape
    half = torch.randn(outer + ROWS, inner // 2, generator=random).to(dtype)
    order = torch.randperm(inner, generator=random)
    both = torch.cat([half, half, half.new_zeros(len(half), inner % 2)], 1)
    both[:outer, : inner // 2] *= -1
    weight, y = both[:, order].split([outer, ROWS])
    made = _Product(weight.contiguous(), half.new_zeros(outer) if biased else None)
    return made, y, made.product(y), made.sum(half.new_zeros(ROWS, outer), y)


@cache
def _fitting(rows: int, shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> int:
    """The least number, from `rows` to `ROWS`, of rows in whose product each has the bits that it has among `ROWS`.

    On one thread of a CPU: kernels differ in the order of their sums.
    """
    with one_thread():
        made, y, product, total = _sample(shape, biased, dtype)
        for count in range(rows, ROWS):
            x = y.new_zeros(count, shape[0])
            parts = slice(count), slice(ROWS - count, ROWS)
            if all(torch.equal(made.product(y[part]), product[part]) for part in parts) and all(
                torch.equal(made.sum(x, y[part]), total[part]) for part in parts
            ):
                return count
        return ROWS


class Linear(_Product):
    """y = x W^T + b on (N, in), for a weight (out, in).

    On one thread of a CPU the bits of a row do not depend on the others. In bfloat16 oneDNN packs the weight into
    blocks for every product, which at few rows costs as much as the product. Here it is packed once, by the operators
    of frozen compiled graphs where torch has them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        # On other devices a product takes all rows.
        self._most = ROWS if weight.device.type == "cpu" else sys.maxsize
        self._fits = {ROWS: ROWS}

    def __call__(self, x: Tensor) -> Tensor:
        return self._by_rows(self.product, x)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x + linear(y) in one pass."""
        return self._by_rows(self.sum, x, y)

    def _by_rows(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply `function` to at most `ROWS` rows at a time on a CPU, and to as many that their bits are the same."""
        count = inputs[0].shape[0]
        if self._fits.get(count) == count:
            return function(*inputs)
        if count > self._most:
            parts = zip(*(x.split(ROWS) for x in inputs), strict=True)
            return torch.cat([self._by_rows(function, *part) for part in parts])
        if count not in self._fits:
            shape, biased = tuple(self.weight.shape), self.bias is not None
            alone = self.weight.device.type != "cpu"
            self._fits[count] = count if alone else _fitting(count, shape, biased, self.weight.dtype)  # type: ignore[arg-type]
            return self._by_rows(function, *inputs)
        return function(*(F.pad(x, (0, 0, 0, self._fits[count] - count)) for x in inputs))[:count]
