"""Degradations: what each does to real garments, that a seed decides all of it, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.tokenizer.codes.degrade import (
    DEGRADATIONS,
    MOST,
    alternatives,
    chain_among,
    degrade,
    keep_of,
    parse_degradations,
    source_seed,
)
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import DEMO

EVERY = ["downscale:4", "noise:0.2", "grey", "blur:2", "jpeg:10", "edges"]


@pytest.fixture(scope="module")
def garments() -> Tensor:
    """Twelve images, uint8 (12, 3, 24, 32), with a colour each."""
    grey = open_images(str(DEMO), "heldout", ImageConfig(size=[24, 32], channels=3)).__getitems__(range(12)).images
    tint = torch.from_numpy(np.random.default_rng(0).uniform(0.3, 1, (12, 3, 1, 1)))
    return (grey * tint).to(torch.uint8)


def apply(images: Tensor, *specs: str, seed: int = 0) -> Tensor:
    return degrade(images, parse_degradations(specs), [1000 * seed + i for i in range(len(images))])


def roughness(images: Tensor) -> float:
    """Mean absolute difference of neighbours in a row."""
    return float(images.float().diff(dim=-1).abs().mean())


@pytest.mark.parametrize("spec", EVERY)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_gives_other_images_of_the_same_shape(garments: Tensor, spec: str, channels: int) -> None:
    images = garments[:, :channels]
    if channels == 1 and spec == "grey":
        with pytest.raises(UsageError, match=r"--source grey.*1 channel"):
            apply(images, spec)
        return
    before = images.clone()
    found = apply(images, spec)
    assert found.shape == images.shape and found.dtype == torch.uint8 and torch.equal(images, before)
    assert (found != images).flatten(1).any(1).all()


def test_every_degradation_is_tested() -> None:
    assert {spec.partition(":")[0] for spec in EVERY} == DEGRADATIONS.keys()


@pytest.mark.parametrize("spec", [*EVERY, "downscale:1.5-8", "noise:0.05-0.4", "blur:0.5-5", "jpeg:5-60"])
def test_an_image_and_its_seed_decide_all(garments: Tensor, spec: str) -> None:
    """Whatever the batch, and however the memory is laid out."""
    (chain,) = [parse_degradations([spec])]
    seeds = list(range(len(garments)))
    whole = degrade(garments, chain, seeds)
    for i in (0, 7):
        assert torch.equal(degrade(garments[i : i + 1], chain, [i])[0], whole[i])
    last = garments.contiguous(memory_format=torch.channels_last)
    assert torch.equal(degrade(last, chain, seeds), whole)
    same = torch.equal(degrade(garments, chain, [seed + 1 for seed in seeds]), whole)
    assert same is not chain.random


def test_the_seed_of_an_image_gives_it_the_same_result_in_every_release() -> None:
    """A noise that changed would make code files that a run resumes other than those it began."""
    found = apply(torch.full((1, 1, 1, 4), 128, dtype=torch.uint8), "noise:0.1-0.2", seed=3)
    assert found.flatten().tolist() == [119, 79, 142, 143]


def test_noise_has_the_sigma_that_is_asked_for() -> None:
    grey = torch.full((4, 3, 64, 64), 128, dtype=torch.uint8)
    noise = (apply(grey, "noise:0.1").float() - 128) / 255
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02) and abs(float(noise.mean())) < 2e-3
    one, other = noise[0, 0].flatten(), noise[0, 1].flatten()
    assert abs(float((one * other).mean())) < 1e-3  # the channels have noise of their own


def test_strengths_of_a_range_are_drawn_evenly() -> None:
    flat = torch.full((400, 1, 16, 16), 128, dtype=torch.uint8)
    sigmas = (apply(flat, "noise:0.05-0.25").float() / 255).flatten(1).std(dim=1)
    for share in (0.1, 0.5, 0.9):
        assert float(sigmas.quantile(share)) == pytest.approx(0.05 + 0.2 * share, abs=0.025)


def test_whole_strengths_are_the_integers_with_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    kind = DEGRADATIONS["jpeg"]

    def note(image: Tensor, strength: float, _: np.random.Generator) -> Tensor:
        seen.append(strength)
        return image

    monkeypatch.setitem(DEGRADATIONS, "jpeg", replace(kind, apply=note))
    apply(torch.zeros((60, 1, 2, 2), dtype=torch.uint8), "jpeg:5-8")
    assert set(seen) == {5, 6, 7, 8} and all(isinstance(each, int) for each in seen)


def test_downscaling_keeps_what_is_flat_and_loses_detail(garments: Tensor) -> None:
    flat = torch.full((1, 3, 9, 7), 77, dtype=torch.uint8)
    assert torch.equal(apply(flat, "downscale:64"), flat)
    rough = [roughness(garments), *(roughness(apply(garments, f"downscale:{factor}")) for factor in (2, 4, 8))]
    assert rough == sorted(rough, reverse=True) and rough[-1] < 0.5 * rough[0]
    # A stripe a pixel wide is aliased by no factor: half of it is grey.
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 1, 16, 8)
    assert (apply(stripes, "downscale:4")[..., 4:-4].float() - 127.5).abs().max() < 12


def test_blur_is_wider_with_sigma_and_fits_into_small_images(garments: Tensor) -> None:
    rough = [roughness(garments), *(roughness(apply(garments, f"blur:{sigma}")) for sigma in (0.5, 1, 3))]
    assert rough == sorted(rough, reverse=True)
    dot = torch.zeros((1, 1, 33, 33), dtype=torch.uint8)
    dot[..., 16, 16] = 255
    peak = float(apply(dot, "blur:1").max()) / 255
    assert peak == pytest.approx(1 / (2 * math.pi), rel=0.05)
    assert apply(garments[..., :2, :1], "blur:20").shape == (12, 3, 2, 1)


def test_grey_has_the_luma_in_every_channel(garments: Tensor) -> None:
    found = apply(garments, "grey").float()
    assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    luma = (garments * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert (found[:, 0] - luma).abs().max() <= 1


def test_jpeg_is_worse_at_lower_quality(garments: Tensor) -> None:
    errors = [float((apply(garments, f"jpeg:{q}").float() - garments).square().mean()) for q in (95, 50, 10, 1)]
    assert errors == sorted(errors) and 0 < errors[0] < 30 < errors[-1]


def test_edges_are_white_where_black_meets_white(garments: Tensor) -> None:
    half = torch.zeros((1, 3, 8, 8), dtype=torch.uint8)
    half[..., 4:] = 255
    found = apply(half, "edges")
    assert (found[..., 3:5] == 255).all() and (found[..., :3] == 0).all() and (found[..., 5:] == 0).all()
    assert torch.equal(apply(half.mT.contiguous(), "edges"), found.mT)
    assert torch.equal(found[:, 0], found[:, 2])


def test_chains_are_applied_in_order(garments: Tensor) -> None:
    noisy = apply(garments, "downscale:4", "noise:0.2")
    assert roughness(noisy) > 2 * roughness(apply(garments, "noise:0.2", "downscale:4"))
    twice = apply(torch.full((1, 1, 64, 64), 128, dtype=torch.uint8), "noise:0.1", "noise:0.1").float()
    assert float(twice.std()) / 255 == pytest.approx(0.1 * math.sqrt(2), rel=0.05)  # noise of its own in each


@pytest.mark.parametrize(
    "spec",
    [
        "", ":", "noise", "noise:", "noise:x", "noise:0", "noise:1.1", "noise:-0.1", "noise:0.4-0.05", "noise:0.1-",
        "noise:0.1-2", "noise:1e-1", "noise:nan", "noise:0.1:2", "noise:0.1 ", "Noise:0.1", "grey:1", "grey:",
        "edges:2", "downscale:1", "downscale:65", "downscale:99999999999", "blur:0", "blur:21", "jpeg:0", "jpeg:101",
        "jpeg:7.5", "jpeg:1.5-3", "rain", "rain:3", "x" * 5000,
    ],
)  # fmt: skip
def test_other_specifications_are_one_line(spec: str) -> None:
    with pytest.raises(UsageError, match=r"^--source: found") as refused:
        parse_degradations(["blur:1", spec])
    text = str(refused.value)
    assert "\n" not in text and len(text) < 300 and spec[:40] in text and "expected" in text


def test_chains_are_bounded() -> None:
    assert len(parse_degradations(["noise:0.5"] * MOST).each) == MOST
    for specs in ([], ["grey"] * (MOST + 1)):
        with pytest.raises(UsageError, match="--source"):
            parse_degradations(specs)


def test_another_number_of_seeds_is_an_error(garments: Tensor) -> None:
    with pytest.raises(ValueError, match="12 images, 1"):
        degrade(garments, parse_degradations(["blur:1"]), [0])


def luma(images: Tensor) -> Tensor:
    return (images.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def test_what_grey_leaves_of_an_image_can_be_put_back(garments: Tensor) -> None:
    """The luma is that of the source, the colour that of what was drawn, in whatever range that leaves it."""
    keep = keep_of(["grey"])
    assert keep is not None
    grey, random = apply(garments, "grey"), torch.Generator().manual_seed(0)
    assert (keep(garments, grey).int() - garments.int()).abs().max() <= 1, "the truth stays the truth"
    drawn = torch.randint(256, garments.shape, dtype=torch.uint8, generator=random)
    for source in (grey, garments, drawn.flip(0), torch.zeros_like(grey), torch.full_like(grey, 255)):
        before = drawn.clone(), source.clone()
        found = keep(drawn, source)
        assert torch.equal(before[0], drawn) and torch.equal(before[1], source) and found.dtype == torch.uint8
        assert (luma(found) - luma(source)).abs().max() <= 0.51
        # The differences to the luma have the direction of those drawn: the hue is the same.
        ours, theirs = (images.float() - luma(images)[:, None] for images in (found, drawn))
        share = (ours * theirs).sum(1, keepdim=True) / theirs.square().sum(1, keepdim=True).clamp(min=1)
        assert (ours - share * theirs).abs().max() <= 1.1 and share.min() >= -0.1
    assert torch.equal(keep(grey, grey), grey)


def test_what_a_smaller_image_shows_is_given_back(garments: Tensor) -> None:
    """Made smaller, images are closer to their source by far; the detail stays, and the truth stays the truth."""
    keep = keep_of(["downscale:4"])
    assert keep is not None
    truth, noise = 64 + garments // 2, torch.rand(garments.shape, generator=torch.Generator().manual_seed(0))
    drawn = (96 + garments.roll(1, 0).float() / 4 + 30 * noise).to(torch.uint8)
    small = apply(truth, "downscale:4")
    found = keep(drawn, small)

    def far(images: Tensor) -> float:
        return float((apply(images, "downscale:4").float() - small.float()).square().mean())

    assert found.dtype == torch.uint8 and far(found) < 0.1 * far(drawn)
    assert roughness(found) > 0.8 * roughness(drawn)
    assert (keep(truth, small).int() - truth.int()).abs().max() <= 1


def test_only_a_degradation_that_leaves_something_as_it_was_gives_it_back() -> None:
    assert [spec for spec in EVERY if keep_of([spec])] == ["downscale:4", "grey"]
    for chain in ([], ["downscale:2", "grey"], ["grey", "jpeg:10"], ["sepia"], ["downscale:2-4"]):
        assert keep_of(chain) is None


def test_each_image_gets_one_of_the_alternatives(garments: Tensor) -> None:
    """Which one its seed decides; each is about as likely."""
    specs = ["grey", "or", "blur:1", "jpeg:10", "or", "noise:0.2"]
    images = garments.repeat(20, 1, 1, 1)
    seeds = [source_seed(0, place) for place in range(len(images))]
    found = degrade(images, parse_degradations(specs), seeds)
    chains = [degrade(images, parse_degradations(chain), seeds) for chain in alternatives(specs)]
    equal = torch.stack([(found == each).flatten(1).all(1) for each in chains])
    assert (equal.sum(0) == 1).all() and equal.float().mean(1).min() > 0.2
    assert parse_degradations(specs).random and not parse_degradations(["grey"]).random
    assert torch.equal(found[5], degrade(images[5:6], parse_degradations(specs), seeds[5:6])[0])


def test_chains_that_are_empty_or_too_many_are_refused() -> None:
    for given in ("or", "grey or", "or grey", "grey or or edges", "grey" + 8 * " or edges"):
        with pytest.raises(UsageError, match="--source"):
            parse_degradations(given.split())
    assert len(parse_degradations(["grey", *["or", "edges"] * 7]).chains) == 8
    assert keep_of(["grey", "or", "downscale:4"]) is None
    chains = [["sepia"], ["downscale:4", "grey"], ["downscale:4"]]
    assert chain_among(["downscale:4.0"], chains) == ["downscale:4"] and chain_among(["downscale:2"], chains) == []
