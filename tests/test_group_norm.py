"""Group norm with SiLU in tiles: the formula by torch's operators, whatever the layout, the dtype and the tile."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vqgen.tokenizer.networks import group_norm as norm
from vqgen.tokenizer.networks.group_norm import GroupNorm, TiledGroupNorm


def images(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    return made.to(dtype).contiguous(memory_format=torch.channels_last)


def layer(groups: int, channels: int, silu: bool = True, dtype: torch.dtype = torch.float32) -> GroupNorm:
    made = GroupNorm(groups, channels, silu).to(dtype)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
    torch.nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(2))
    return made


def plain(x: Tensor, made: GroupNorm) -> Tensor:
    normed = F.group_norm(x, made.num_groups, made.weight, made.bias, made.eps)
    return F.silu(normed) if made.silu else normed


def tiled(x: Tensor, made: GroupNorm) -> Tensor:
    out = TiledGroupNorm.apply(x, made.weight, made.bias, made.num_groups, made.eps, made.silu)
    assert isinstance(out, Tensor)
    return out


def with_gradients(function, x: Tensor, made: GroupNorm) -> list[Tensor]:
    """The result, and the gradients of the images, the weight and the bias for a fixed gradient of the result."""
    x = x.detach().requires_grad_()
    out = function(x, made)
    outer = images(*x.shape, dtype=out.dtype, seed=3)
    return [out, *torch.autograd.grad(out, (x, made.weight, made.bias), outer)]


@given(
    batch=st.integers(1, 5),
    groups=st.sampled_from([1, 2, 4]),
    each=st.integers(1, 4),
    height=st.integers(2, 9),
    width=st.integers(1, 9),
    tile=st.sampled_from([1, 16, 100, 2**17]),
    silu=st.booleans(),
)
def test_tiles_give_the_formula(batch, groups, each, height, width, tile, silu):
    x = images(batch, groups * each, height, width, dtype=torch.float64)
    made = layer(groups, groups * each, silu, torch.float64)
    before, norm._TILE = norm._TILE, tile
    try:
        found = with_gradients(tiled, x, made)
    finally:
        norm._TILE = before
    for one, other in zip(found, with_gradients(plain, x, made)):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("shape", [(3, 32, 8, 8), (1, 64, 48, 48), (2, 64, 33, 65)])
@pytest.mark.parametrize("silu", [True, False])
def test_float32_to_1e5(shape, silu):
    made = layer(16, shape[1], silu)
    found, expected = (with_gradients(f, images(*shape), made) for f in (tiled, plain))
    for one, other in zip(found[:2], expected[:2]):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for one, other in zip(found[2:], expected[2:]):  # sums over thousands of positions
        torch.testing.assert_close(one, other, atol=1e-5 * shape[2] * shape[3] ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_the_truth_as_torch_is(dtype):
    """Against float64 of the same numbers; and the layer does take the tiles for it."""
    x, made = images(4, 32, 24, 24, dtype=dtype, mean=0.5), layer(8, 32)
    truth = with_gradients(plain, x.double(), copy.deepcopy(made).double())
    found = with_gradients(lambda x, made: made(x), x, made)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    torch.testing.assert_close(found, with_gradients(tiled, x, made), atol=0, rtol=0)
    errors = [
        [(t.double() - right).norm().item() for t, right in zip(given, truth)]
        for given in (found, with_gradients(plain, x, made))
    ]
    for error, torchs in zip(*errors):
        assert error <= 1.05 * torchs
    # Nothing but the result is rounded.
    assert errors[0][0] <= 1.05 * (truth[0].to(dtype).double() - truth[0]).norm().item()


def test_a_mean_far_from_zero_loses_nothing():
    """Mean of squares less square of mean would have no digit left here."""
    x = images(2, 8, 48, 48, mean=3000.0)
    made = layer(2, 8)
    exact = plain(x.double(), copy.deepcopy(made).double())
    torch.testing.assert_close(tiled(x, made).double(), exact, atol=2e-3, rtol=1e-3)


def test_every_other_layout_and_dtype_gives_the_same_values():
    made = layer(4, 16)
    x = images(2, 16, 6, 10, dtype=torch.bfloat16)
    fast = with_gradients(lambda x, made: made(x), x, made)
    assert fast[0].is_contiguous(memory_format=torch.channels_last)
    assert fast[1].is_contiguous(memory_format=torch.channels_last)
    slow = with_gradients(lambda x, made: made(x), x.contiguous(), made)
    torch.testing.assert_close(fast, slow, atol=0.05, rtol=0.02)
    single = with_gradients(lambda x, made: made(x), x.float(), made)
    torch.testing.assert_close([t.float() for t in fast], single, atol=0.05, rtol=0.02)


def test_a_gradient_of_any_layout_is_taken():
    x, made = images(2, 8, 4, 6, dtype=torch.float64).requires_grad_(), layer(2, 8, dtype=torch.float64)
    outer = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    layouts = [outer, outer.contiguous(memory_format=torch.channels_last), outer.mT.contiguous().mT]
    found = [torch.autograd.grad(tiled(x, made), x, layout)[0] for layout in layouts]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # One number for all, as the gradient of a sum has it.
    one, other = (torch.autograd.grad(f(x, made).sum(), x)[0] for f in (tiled, plain))
    torch.testing.assert_close(one, other)


def test_it_is_the_same_bit_for_bit_again():
    x, made = images(4, 32, 32, 32, dtype=torch.bfloat16), layer(8, 32)
    first, second = (with_gradients(lambda x, made: made(x), x, made) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_names_and_copies_are_those_of_torchs_layer():
    made = layer(4, 16)
    theirs = torch.nn.GroupNorm(4, 16, eps=1e-6)
    theirs.load_state_dict(made.state_dict())
    x = images(2, 16, 5, 5)
    torch.testing.assert_close(copy.deepcopy(made)(x), F.silu(theirs(x)))
    made.silu = False
    torch.testing.assert_close(made(x), theirs(x))
