"""LPIPS as computed here against the `lpips` library's own passes, and the parts it is computed with."""

import copy

import pytest
import torch
from helpers.realdata import backbone
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vqgen.tokenizer.losses import lpips_kernels as features
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.losses.lpips_kernels import FixedConvolution, difference, with_cached_gradient
from vqgen.tokenizer.networks import group_norm as norm


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return made.contiguous(memory_format=torch.channels_last)


def pair(batch: int, height: int, width: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Smooth pictures in [-1, 1] and the same with some noise."""
    coarse = noise(batch, channels, 4, 4)
    targets = nn.functional.interpolate(coarse, (height, width), mode="bilinear").tanh()
    return (targets + 0.2 * noise(batch, channels, height, width, seed=1)).clamp(-1, 1), targets


@pytest.fixture(scope="module", params=["alex", "vgg"])
def distance(request) -> PerceptualDistance:
    return PerceptualDistance(request.param, str(backbone(request.param)))


def with_gradient(function, images: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The distances, and the gradient of a sum of them that weighs each image differently."""
    images = images.detach().requires_grad_()
    found = function(images, *others).flatten()
    (gradient,) = torch.autograd.grad((found * torch.arange(1, len(found) + 1)).sum(), images)
    return found.detach(), gradient


def assert_near(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], error: float) -> None:
    torch.testing.assert_close(found[0], expected[0].to(found[0].dtype), atol=error, rtol=error)
    largest = expected[1].abs().max().item()
    assert largest > 0
    torch.testing.assert_close(found[1], expected[1].to(found[1].dtype), atol=error * largest, rtol=0)


# ---- LPIPS ----


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_distances_and_gradients_are_the_librarys(distance, size, layout):
    distance = distance.to(memory_format=layout)
    images, targets = (t.contiguous(memory_format=layout) for t in pair(3, *size))
    assert_near(with_gradient(distance, images, targets), with_gradient(distance.distance, images, targets), 1e-5)


def test_grey_images_too(distance):
    images, targets = pair(2, 32, 32, channels=1)
    library = with_gradient(lambda x, y: distance.distance(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)), images, targets)
    assert_near(with_gradient(distance, images, targets), library, 1e-5)


def test_bfloat16_is_as_near_to_float32_as_the_library_is(distance):
    distance = distance.to(memory_format=torch.channels_last)
    images, targets = pair(4, 32, 32)
    exact = with_gradient(distance.distance, images, targets)

    def error(function) -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16):
            found = with_gradient(function, images, targets)
        assert found[1].dtype == torch.float32
        return tuple(((one - other).norm() / other.norm()).item() for one, other in zip(found, exact))

    ours, theirs = error(distance), error(distance.distance)
    assert ours[0] < 1.2 * theirs[0] + 1e-3 and ours[1] < 1.2 * theirs[1]
    # Twice alike; and outside autocast float32 again, not what autocast left behind.
    assert error(distance) == ours
    assert_near(with_gradient(distance, images, targets), exact, 1e-5)


def test_the_targets_take_no_gradient_and_are_not_kept(distance):
    images, targets = (t.requires_grad_() for t in pair(2, 32, 32))
    distance(images, targets).sum().backward()
    assert targets.grad is None and images.grad is not None

    def kept(targets: Tensor) -> int:
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            distance(images, targets)
        return len(tensors)

    assert kept(targets) == kept(targets.detach()) > 0
    with torch.no_grad():
        found = distance(images, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, distance(images, targets).detach())


def test_what_is_made_for_speed_is_no_part_of_the_state(distance):
    before = set(distance.state_dict())
    images, targets = pair(2, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = distance(images, targets)
    assert set(distance.state_dict()) == before == {f"distance.{k}" for k in distance.distance.state_dict()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy.deepcopy(distance)(images, targets), expected)


# ---- the distance of two feature maps ----


def formula(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """The library's `normalize_tensor`, heads and mean."""
    one, two = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (found, wanted))
    return nn.functional.conv2d((one - two).square(), weight.view(1, -1, 1, 1)).mean((2, 3)).flatten()


@given(
    batch=st.integers(1, 4),
    channels=st.integers(2, 9),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    tile=st.sampled_from([1, 20, 100, 2**17]),
    channels_last=st.booleans(),
)
def test_difference_is_the_formula(batch, channels, height, width, tile, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    one, two = (
        noise(batch, channels, height, width, seed=seed, dtype=torch.float64).contiguous(memory_format=layout)
        for seed in (0, 1)
    )
    weight = torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before, norm._TILE = norm._TILE, tile
    try:
        found = with_gradient(difference, one, two, weight)
    finally:
        norm._TILE = before
    assert_near(found, with_gradient(formula, one, two, weight), 1e-7)  # 1e-10 beside the norm counts here


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_feature_vectors_of_zero_give_finite_gradients(layout):
    """As ReLU makes them. The library's root has no finite gradient there; its ReLU hides that."""
    one, two = (noise(2, 8, 4, 4, seed=seed).relu().contiguous(memory_format=layout) for seed in (0, 1))
    one[:, :, :2], two[:, :, 1:3] = 0, 0
    found, gradient = with_gradient(difference, one, two, torch.ones(8))
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
    with_relu = with_gradient(lambda x, y, w: difference(x.relu(), y, w), one, two, torch.ones(8))[1]
    assert (with_relu[:, :, :2] == 0).all()


# ---- convolutions with fixed weights ----


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (4, 4), (3, 5), (2, 8), (9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_maps_are_convolved_the_same(size, dtype):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 10, 3, padding=1).requires_grad_(False).to(dtype)
    x = noise(3, 6, *size, dtype=dtype)
    assert_near(
        with_gradient(lambda x: FixedConvolution(plain)(x).square().sum((1, 2, 3)), x),
        with_gradient(lambda x: plain(x).square().sum((1, 2, 3)), x),
        1e-5,
    )


def test_an_activation_may_overwrite_the_result_and_other_kernels_stay_as_they_are():
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    x = noise(2, 4, 3, 3)
    fixed = nn.Sequential(FixedConvolution(plain), nn.ReLU(inplace=True))
    assert_near(
        with_gradient(lambda x: fixed(x).sum((1, 2, 3)), x),
        with_gradient(lambda x: plain(x).relu().sum((1, 2, 3)), x),
        1e-5,
    )
    for options in (
        {"padding": 0},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 1},
        {"groups": 2, "padding": 1},
    ):
        other = nn.Conv2d(4, 4, 3, **options).requires_grad_(False)
        assert torch.equal(FixedConvolution(other)(x), other(x))


# ---- remembered gradients ----


def test_a_remembered_gradient_is_the_gradient_and_is_computed_once():
    passes = []
    weight = noise(1, 3, 4, 4)

    def measure(x: Tensor) -> Tensor:
        passes.append(len(x))
        return (x.square() * weight).sum((1, 2, 3)).sin()

    x = noise(3, 3, 4, 4).requires_grad_()
    values = with_cached_gradient(measure, 2 * x)
    for scale in (1.0, 3.0):
        upstream = scale * torch.arange(3)
        (gradient,) = torch.autograd.grad(values, x, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad((2 * x).square().mul(weight).sum((1, 2, 3)).sin(), x, upstream)
        torch.testing.assert_close(gradient, expected)
    assert passes == [3]
    # One number for all images, as a mean is.
    (gradient,) = torch.autograd.grad(with_cached_gradient(lambda x: measure(x).mean(), x) * 5, x)
    (expected,) = torch.autograd.grad(measure(x).mean() * 5, x)
    torch.testing.assert_close(gradient, expected)


def test_without_a_gradient_there_is_nothing_to_remember(monkeypatch):
    monkeypatch.setattr(features._CachedGradient, "apply", lambda *_: pytest.fail("remembered"))
    x = noise(1, 3, 4, 4)
    assert not with_cached_gradient(lambda x: x.sum(), x).requires_grad
    with torch.no_grad():
        assert not with_cached_gradient(lambda x: x.sum(), x.clone().requires_grad_()).requires_grad
    # fp16 needs the scale of the loss from the very beginning.
    with torch.autocast("cpu", torch.float16):
        assert with_cached_gradient(lambda x: x.sum(), x.clone().requires_grad_()).requires_grad
