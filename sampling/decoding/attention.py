"""Keys and values of a batch in one block, and attention of its next tokens to them.

`Fused` is the plain version, for every device and number format. `Products` computes the same by two batched products,
where the fused kernel of a processor prepares a product for every head of every sequence.
"""

import math
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .threads import one_thread

GROWTH = 32
"""Positions by which `Products` extends what it reads."""
EXTENTS = GROWTH, 3 * GROWTH
"""Those at which products are tried before they are used."""


class Fused:
    """Attention by `F.scaled_dot_product_attention`; keys and values (2, rows, positions, heads, d).

    Args:
        positions: most tokens of a sequence.
        like: a tensor whose device and number format they have.
    """

    def __init__(self, rows: int, positions: int, heads: int, width: int, like: Tensor) -> None:
        self.kept = like.new_zeros(2, rows, positions, heads, width)

    def __call__(self, qkv: Tensor, first: int) -> Tensor:
        """Keep keys and values of tokens `first` and on.

        `qkv` (rows, T, 3 * heads, d) has the queries, keys and values of all heads; the result is (rows, T, heads, d).
        """
        q, k, v = qkv.chunk(3, 2)
        last = first + q.shape[1]
        keys, values = self.kept
        keys[:, first:last] = k
        values[:, first:last] = v
        seen = keys[:, :last].transpose(1, 2), values[:, :last].transpose(1, 2)
        return F.scaled_dot_product_attention(q.transpose(1, 2), *seen, _causal(q, first)).transpose(1, 2)


class Products:
    """Attention of one token by batched products; several tokens as in `Fused`.

    Keys and values lie in the order in which the products read them: (2, rows * heads, extent, d), where `extent` grows
    with the tokens. What lies beyond them is 0 and masked.
    """

    def __init__(self, rows: int, positions: int, heads: int, width: int, like: Tensor) -> None:
        self.kept = like.new_zeros(2, rows * heads * positions * width)
        self.shape, self.positions = (rows, heads, width), positions
        self._open(0)

    def __call__(self, qkv: Tensor, first: int) -> Tensor:
        """Keep keys and values of tokens `first` and on.

        `qkv` (rows, T, 3 * heads, d) has the queries, keys and values of all heads; the result is (rows, T, heads, d).
        """
        rows, heads, width = self.shape
        count = qkv.shape[1]
        last = first + count
        if not first or last > self.extent:
            self._extend(first, last)
        if count == 1:
            self._places[:, :, :, first] = qkv.view(rows, 3, heads, width)[:, 1:]
            q = qkv[:, 0, :heads].reshape(rows * heads, 1, width)
            return attend(q, self._keys, self._values, last).view(rows, 1, heads, width)
        q, k, v = qkv.transpose(1, 2).chunk(3, 1)
        keys, values = (part[:, :, :last] for part in self._places.unbind(1))
        keys[:, :, first:] = k
        values[:, :, first:] = v
        return F.scaled_dot_product_attention(q, keys, values, _causal(qkv, first)).transpose(1, 2)

    def _extend(self, first: int, last: int) -> None:
        """Make room for tokens before `last` and keep those before `first`."""
        before = self._places[:, :, :, :first].clone()
        self._open(min(-(-last // GROWTH) * GROWTH, self.positions))
        self._places[:, :, :, :first] = before
        self._places[:, :, :, first:] = 0  # what a former batch left there may not be finite

    def _open(self, extent: int) -> None:
        rows, heads, width = self.shape
        n = rows * heads
        self.extent, opened = extent, self.kept[:, : n * extent * width]
        self._keys, self._values = opened.view(2, n, extent, width)
        self._places = opened.view(2, rows, heads, extent, width).transpose(0, 1)


def attend(q: Tensor, keys: Tensor, values: Tensor, last: int) -> Tensor:
    """Attention of one query (n, 1, d) each to the first `last` of keys and values (n, extent, d) -> (n, 1, d)."""
    hidden = _hidden(keys.shape[1], last, q.dtype)
    scores = torch.baddbmm(hidden, q, keys.transpose(1, 2), alpha=1 / math.sqrt(q.shape[-1]))
    return torch.bmm(scores.softmax(-1), values)


@lru_cache(4096)
def _hidden(extent: int, last: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, extent): 0 before `last`, then -inf."""
    found = torch.zeros(1, 1, extent, dtype=dtype)
    found[..., last:] = -math.inf
    return found


def _causal(q: Tensor, first: int) -> Tensor | None:
    """Which keys each of the queries (rows, T, heads, d) from position `first` on sees; None for all."""
    count = q.shape[1]
    return torch.ones(count, first + count, dtype=torch.bool, device=q.device).tril(first) if count > 1 else None


@cache
def attention_of(heads: int, width: int, dtype: torch.dtype, device: torch.device) -> type[Fused] | type[Products]:
    """The faster of the two here: `Products` in bfloat16 on a processor without tiles (AMX), where they are exact.

    There the fused kernel takes 10 times as long for 64 sequences.
    """
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)  # private in some versions of torch
    if device.type != "cpu" or dtype != torch.bfloat16 or tiles is None or tiles():
        return Fused
    return Products if _exact(heads, width, dtype) else Fused


def _exact(heads: int, width: int, dtype: torch.dtype) -> bool:
    """Whether on one thread of this CPU the bits of a sequence in the two products are the same in every batch.

    Sums are 0 but for their rounding, so that another order shows.
    """
    random, most = torch.Generator().manual_seed(0), 129

    def cancelling(*shape: int) -> tuple[Tensor, Tensor]:
        """Factors (n, 1, size), (n, size, columns) of such sums."""
        n, size, columns = shape
        left, right = (torch.randn(n, *of, generator=random) for of in ((1, size // 2), (size // 2, columns)))
        order = torch.randperm(size // 2 * 2, generator=random)
        pair = torch.cat([left, left], 2)[..., order], torch.cat([right, -right], 1)[:, order]
        return F.pad(pair[0], (0, size % 2)).to(dtype), F.pad(pair[1], (0, 0, 0, size % 2)).to(dtype)

    def same(extent: int) -> bool:
        q, keys = cancelling(most * heads, width, extent)
        weights, values = cancelling(most * heads, extent, width)
        keys = keys.transpose(1, 2).contiguous().transpose(1, 2)  # as `attend` has them
        hidden = _hidden(extent, extent, dtype)

        def products(part: slice) -> Tensor:
            scores = torch.baddbmm(hidden, q[part], keys[part], alpha=1 / math.sqrt(width))
            return torch.cat([scores, torch.bmm(weights[part], values[part])], -1)

        whole = products(slice(None))
        sizes = [rows * heads for rows in (1, 2, 3, 5, 8, 17, 32, 64)]
        return all(torch.equal(products(slice(-size, None)), whole[-size:]) for size in sizes)

    with one_thread():
        return all(same(extent) for extent in EXTENTS)
