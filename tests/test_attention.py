"""Attention of the next token to the cache: both versions against float64, and each sequence alone."""

import pytest
import torch
from torch import Tensor

from vqgen.sampling.decoding.attention import GROWTH, Fused, Products, attention_of

POSITIONS = 3 * GROWTH - 5
pytestmark = pytest.mark.usefixtures("one_thread")
kinds = pytest.mark.parametrize("kind", [Fused, Products])


def inputs(rows: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """Queries, keys and values (3, rows, POSITIONS, heads, d), with one query far from the others."""
    found = torch.randn(3, rows, POSITIONS, heads, width, generator=torch.Generator().manual_seed(0))
    found[0, :, POSITIONS // 2] *= 20
    return found.to(dtype)


def fed(kind: type[Fused] | type[Products], given: Tensor, pieces: list[int]) -> Tensor:
    """Results (rows, positions, heads, d) of tokens fed in pieces."""
    _, rows, _, heads, width = given.shape
    attention, first, found = kind(rows, POSITIONS, heads, width, given), 0, []
    attention.kept.fill_(torch.nan)  # what a former batch left matters to none
    for piece in pieces:
        qkv = torch.cat(given[:, :, first : first + piece].unbind(), 2)
        found.append(attention(qkv, first).clone())
        first += piece
    return torch.cat(found, 1)


@kinds
@pytest.mark.parametrize("pieces", [[1] * POSITIONS, [GROWTH] + [1] * (POSITIONS - GROWTH), [3, 40] + [1] * 48])
@pytest.mark.parametrize(("heads", "width"), [(6, 64), (3, 20), (1, 48)])
def test_it_is_attention_to_all_before(kind, heads, width, pieces):
    given = inputs(5, heads, width, torch.float32)
    q, k, v = given.double()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
    hidden = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).triu(1)
    wanted = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    count = sum(pieces)
    torch.testing.assert_close(fed(kind, given, pieces), wanted[:, :count].float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "width"), [(6, 64), (3, 64), (2, 18), (1, 64)])
def test_products_in_bfloat16_are_as_good_and_exact(heads, width):
    """Their error is at most three times that of the fused kernel: scores are rounded to bfloat16."""
    kind = attention_of(heads, width, torch.bfloat16, torch.device("cpu"))
    given, pieces = inputs(64, heads, width, torch.bfloat16), [1] * POSITIONS
    true, fused, found = fed(Fused, given.float(), pieces), fed(Fused, given, pieces), fed(kind, given, pieces)
    bad, good = ((x.float() - true).square().mean().sqrt() for x in (found, fused))
    assert bad < 3 * good + 1e-6
    for rows in (1, 2, 7, 16, 33, 63):
        for part in (slice(rows), slice(64 - rows, 64)):
            assert torch.equal(fed(kind, given[:, part], pieces), found[part]), (rows, part)


def test_other_formats_and_devices_keep_the_plain_version():
    assert attention_of(6, 64, torch.float32, torch.device("cpu")) is Fused
    assert attention_of(6, 64, torch.bfloat16, torch.device("meta")) is Fused
