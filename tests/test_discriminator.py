"""What the discriminator sees of an image, and the norms of its weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqgen.tokenizer.losses.diffaugment import diff_augment
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator

# ---- differentiable augmentation ----

PARTS = ("color", "translation", "cutout")
SHAPES = [(3, 16, 16), (1, 28, 28), (3, 24, 40), (3, 9, 13)]


def images(channels: int, height: int, width: int, count: int = 32) -> Tensor:
    """Images without a pixel that is 0."""
    drawn = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return drawn + drawn.sign() * 1e-3


def augmented(real: Tensor, *policy, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return diff_augment(real, policy)


def test_without_a_policy_nothing_is_touched():
    real = images(3, 16, 16).bfloat16()
    assert diff_augment(real, []) is real


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", [*[(part,) for part in PARTS], PARTS])
def test_it_depends_on_the_seed_and_the_image_alone(shape, policy):
    real = images(*shape)
    found = augmented(real, *policy)
    assert found.shape == real.shape and found.dtype == torch.float32
    assert torch.equal(found, augmented(real, *policy))
    assert not torch.equal(found, augmented(real, *policy, seed=1))
    # Image by image: the same picture twice is not changed in the same way twice.
    same = augmented(real[:1].expand(8, -1, -1, -1), *policy)
    assert len({tuple(image.flatten().tolist()) for image in same}) > 4
    # Shown in half precision, as a decoder under autocast gives it, it is computed in float32.
    half = augmented(real.bfloat16(), *policy)
    assert half.dtype == torch.float32 and torch.equal(half, augmented(real.bfloat16().float(), *policy))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", [*[(part,) for part in PARTS], PARTS])
def test_gradients_pass_through(shape, policy):
    """Each part is affine in the image, so that a difference of outputs is the derivative exactly."""
    real = images(*shape).requires_grad_()
    direction = torch.randn(real.shape, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((augmented(real, *policy) * weights).sum(), real)
    with torch.no_grad():
        moved = augmented(real + direction, *policy) - augmented(real, *policy)
    torch.testing.assert_close((gradient * direction).sum(), (moved * weights).sum(), rtol=1e-3, atol=1e-2)
    assert gradient.flatten(1).abs().sum(1).gt(0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_translation_moves_by_up_to_an_eighth_and_fills_with_zero(shape):
    real = images(*shape, count=200)
    found = augmented(real, "translation")
    _, height, width = shape
    most = round(height / 8), round(width / 8)
    shifts = set()
    for before, after in zip(real, found):
        kept = after[0] != 0
        rows, columns = kept.any(1).nonzero().flatten(), kept.any(0).nonzero().flatten()
        assert kept.sum() == len(rows) * len(columns), "what is left is no rectangle"
        window = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # A rectangle that touches the upper edge has moved up, or stayed.
        down = int(rows[0]) or int(rows[-1]) + 1 - height
        right = int(columns[0]) or int(columns[-1]) + 1 - width
        top, left = max(0, -down), max(0, -right)
        assert torch.equal(window, before[:, top : top + len(rows), left : left + len(columns)])
        assert abs(down) <= most[0] and abs(right) <= most[1]
        shifts.add((down, right))
    assert {down for down, _ in shifts} == set(range(-most[0], most[0] + 1))
    assert {right for _, right in shifts} == set(range(-most[1], most[1] + 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_cutout_empties_a_rectangle_of_half_of_each_side(shape):
    real = images(*shape, count=200)
    found = augmented(real, "cutout")
    _, height, width = shape
    heights, widths = set(), set()
    for before, after in zip(real, found):
        hole = (after == 0).all(0)
        assert torch.equal(torch.where(hole, before, after), before)
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns) > 0
        inside = rows[0] > 0 and rows[-1] < height - 1
        assert len(rows) == height // 2 if inside else len(rows) <= height // 2
        heights.add(len(rows))
        widths.add(len(columns))
    assert max(heights) == height // 2 and max(widths) == width // 2
    assert min(heights) < height // 2 and min(widths) < width // 2  # its middle may lie near the edge


def test_color_keeps_to_its_ranges():
    """Read back from an image of two grey levels: contrast from their distance, brightness from their mean."""
    real = torch.zeros(2000, 3, 8, 8)
    real[:, :, :4] = 0.5
    found = augmented(real, "color")
    assert torch.equal(found.amin(1), found.amax(1)), "a grey image took on colour"
    upper, lower = found[:, 0, 0, 0], found[:, 0, 7, 7]
    contrast, brightness = (upper - lower) / 0.5, (upper + lower) / 2 - 0.25
    for values, low, high in ((contrast, 0.5, 1.5), (brightness, -0.5, 0.5)):
        assert low - 1e-5 <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high + 1e-5
        torch.testing.assert_close(values.mean(), torch.tensor((low + high) / 2), atol=0.03, rtol=0)
    # Saturation: the distance of one channel from the mean of all, less what contrast does to it.
    real = torch.zeros(2000, 3, 8, 8)
    real[:, 0] = 0.5
    torch.manual_seed(0)
    contrast = torch.rand(3, 2000, 1, 1, 1)[2].flatten() + 0.5
    found = augmented(real, "color")
    saturation = (found[:, 0] - found[:, 1])[:, 0, 0] / 0.5 / contrast
    assert -1e-5 <= saturation.min() < 0.01 and 1.99 < saturation.max() <= 2 + 1e-5


# ---- spectral norm ----


def norms(discriminator: PatchDiscriminator) -> list[float]:
    """The largest singular value of each convolution's weights, as the convolution sees them."""
    with torch.no_grad():
        return [float(torch.linalg.matrix_norm(c.weight.flatten(1), 2)) for c in discriminator.convolutions]


def buffers(discriminator: PatchDiscriminator) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in discriminator.named_buffers()}


def test_spectral_norm_makes_the_largest_singular_value_one():
    torch.manual_seed(0)
    plain = PatchDiscriminator(3, [16, 16], 8, 2)
    assert not buffers(plain) and not any(norm == pytest.approx(1, rel=0.05) for norm in norms(plain))
    normed = PatchDiscriminator(3, [16, 16], 8, 2, spectral_norm=True)
    with torch.no_grad():
        for convolution in normed.convolutions:
            convolution.parametrizations.weight.original.mul_(7).add_(0.01)
        for _ in range(100):
            normed(images(3, 16, 16, 2))
    assert len(norms(normed)) == 4 and norms(normed) == pytest.approx([1.0] * 4, rel=1e-3)


def test_the_estimate_moves_once_a_pass_in_training_and_stands_still_in_evaluation():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, [16, 16], 8, 2, spectral_norm=True)
    with torch.no_grad():
        for convolution in discriminator.convolutions:
            convolution.parametrizations.weight.original.normal_()
    before, seen = buffers(discriminator), []
    norm = discriminator.convolutions[1].parametrizations.weight[0]
    norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    discriminator.eval()(images(3, 16, 16, 2))
    assert all(torch.equal(value, before[name]) for name, value in buffers(discriminator).items())
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator.train()(images(3, 16, 16, 2))
    moved = {name for name, value in buffers(discriminator).items() if not torch.equal(value, before[name])}
    one_row = {"last.parametrizations.weight.0._u"}  # its singular vector is 1 or -1
    assert moved | one_row == before.keys()
    assert logits.dtype == torch.bfloat16 and seen == [False, False], "estimated in half precision, or twice a pass"


def test_what_it_has_estimated_comes_back_with_its_weights(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    def trained(seed: int) -> PatchDiscriminator:
        torch.manual_seed(seed)
        made = PatchDiscriminator(3, [16, 16], 8, 2, spectral_norm=True).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return made

    first, second = trained(0), trained(1)
    save_file({name: value.contiguous() for name, value in first.state_dict().items()}, tmp_path / "x.safetensors")
    second.load_state_dict(load_file(tmp_path / "x.safetensors"))
    for _ in range(3):
        assert torch.equal(second(images(3, 16, 16, 2)), first(images(3, 16, 16, 2)))
