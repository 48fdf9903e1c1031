"""Loss terms against values computed by hand, their schedule, and which parameters each of them reaches."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vqgen.errors import UsageError
from vqgen.health import pinned_discriminator
from vqgen.run import RunConfig
from vqgen.tokenizer.layers import ModelConfig
from vqgen.tokenizer.losses import (
    GanConfig,
    LossConfig,
    adaptive_ratio,
    discriminator_hinge,
    generator_hinge,
    reconstruction_loss,
)
from vqgen.tokenizer.quantize import QuantizerConfig
from vqgen.tokenizer.train import TokenizerTrainer, TokenizerTraining, build

# ---- values by hand ----


def test_reconstruction_by_hand():
    images = torch.tensor([[[[0.5, -1.0]]], [[[1.0, 0.0]]]])
    targets = torch.tensor([[[[0.0, 1.0]]], [[[1.0, -0.5]]]])
    assert reconstruction_loss(images, targets, "l2") == pytest.approx((0.25 + 4 + 0 + 0.25) / 4)
    assert reconstruction_loss(images, targets, "l1") == pytest.approx((0.5 + 2 + 0 + 0.5) / 4)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_reconstruction_is_taken_in_float32(kind):
    images = torch.full((1, 1, 64, 64), 1.0, dtype=torch.bfloat16)
    targets = torch.full((1, 1, 64, 64), 0.99)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reconstruction_loss(images, targets, kind)
    assert loss.dtype == torch.float32
    assert loss == pytest.approx(0.01 if kind == "l1" else 1e-4, rel=1e-4)


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.5, 1.0])
    assert discriminator_hinge(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3))
    assert generator_hinge(fake) == pytest.approx((3.0 + 0.5 - 1.0) / 3)


def test_hinge_bounds_are_those_that_health_watches():
    always = discriminator_hinge(torch.full((4,), 5.0), torch.full((4,), -5.0))
    nothing = discriminator_hinge(torch.zeros(4), torch.zeros(4))
    assert always == 0 and nothing == 1
    for bound in (always, nothing):
        assert pinned_discriminator([{"train/discriminator": float(bound)}] * 5) is not None
    between = discriminator_hinge(torch.full((4,), 0.5), torch.full((4,), -0.5))
    assert pinned_discriminator([{"train/discriminator": float(between)}] * 5) is None


def test_hinge_gradients_push_the_right_way():
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    discriminator_hinge(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # a step down makes real higher and fake lower
    fake.grad = None
    generator_hinge(fake).backward()
    assert (fake.grad < 0).all()


# ---- the adaptive weight ----


def ratio(reconstruction: list[float], adversarial: list[float], largest: float) -> float:
    """The ratio for two parameters and losses with these gradients."""
    last = nn.Parameter(torch.tensor([2.0, -3.0]))
    losses = [(last * torch.tensor(gradient)).sum() for gradient in (reconstruction, adversarial)]
    found = adaptive_ratio(losses[0], losses[1], last, largest)
    assert not found.requires_grad and last.grad is None
    torch.stack(losses).sum().backward()  # the graph is still there for the real backward pass
    return float(found)


def test_adaptive_ratio_by_hand():
    assert ratio([3.0, 4.0], [0.0, 2.0], 100.0) == pytest.approx(5 / 2.0001)
    assert ratio([0.6, 0.8], [30.0, 40.0], 100.0) == pytest.approx(1 / 50.0001)


def test_adaptive_ratio_is_clamped_and_finite():
    assert ratio([3.0, 4.0], [0.0, 0.0], 100.0) == 100
    assert ratio([3.0, 4.0], [1.0, 0.0], 2.5) == 2.5
    assert ratio([0.0, 0.0], [1.0, 0.0], 100.0) == 0
    assert ratio([3e30, 0.0], [1e-30, 0.0], 100.0) == 100


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e15])
def test_adaptive_ratio_under_autocast(scale):
    """Squares of such gradients leave the range of half precision; the ratio must not."""
    torch.manual_seed(0)
    last = nn.Conv2d(8, 3, 3, padding=1)
    judge = nn.Conv2d(3, 1, 3)
    features, target = torch.randn(2, 8, 16, 16), torch.rand(2, 3, 16, 16)

    def losses() -> tuple[Tensor, Tensor]:
        images = last(features)
        return scale * reconstruction_loss(images, target, "l2"), scale * generator_hinge(judge(images))

    exact = adaptive_ratio(*losses(), last.weight, 1e4)
    with torch.autocast("cpu", torch.bfloat16):
        found = adaptive_ratio(*losses(), last.weight, 1e4)
    assert found.dtype == torch.float32 and torch.isfinite(found)
    assert 0 < found < 1e4 and found == pytest.approx(float(exact), rel=0.05)


# ---- the schedule ----


def test_adversarial_schedule():
    gan = GanConfig(gan_weight=0.8, gan_start=100, gan_warmup=50, gan_ramp=40)
    assert [gan.trains(step) for step in (0, 99, 100, 10_000)] == [False, False, True, True]
    assert {gan.weight(step) for step in range(150)} == {0.0}
    ramp = [gan.weight(step) for step in range(150, 190)]
    assert ramp == pytest.approx([0.8 * (i + 1) / 40 for i in range(40)])
    assert {gan.weight(step) for step in (189, 190, 1000, 10**6)} == {0.8}


def test_adversarial_schedule_off_and_without_ramp():
    off = GanConfig(gan_start=0, gan_warmup=0, gan_ramp=0)
    assert off.gan_weight == 0 and not off.trains(10**6) and off.weight(10**6) == 0
    sudden = GanConfig(gan_weight=0.5, gan_start=0, gan_warmup=0, gan_ramp=0)
    assert sudden.trains(0) and sudden.weight(0) == 0.5


@pytest.mark.parametrize(
    "option",
    ["gan_weight", "gan_start", "gan_warmup", "gan_ramp", "gan_adaptive_max", "gan_lr", "gan_width", "gan_layers"],
)
def test_impossible_gan_options_are_named(option):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: found -1"):
        GanConfig(**{option: -1})


def test_impossible_loss_options_are_named():
    with pytest.raises(UsageError, match="--perceptual-weight: found -1"):
        LossConfig(perceptual_weight=-1)
    # LPIPS never runs silently without its weights.
    with pytest.raises(UsageError, match="--perceptual-weights is needed"):
        LossConfig(perceptual_weight=1.0)


# ---- which parameters a term reaches ----


def trainer(folder: Path, codebook: str = "ema", **options) -> TokenizerTrainer:
    """The trainer of a tiny VQGAN on the demo images, whose adversarial term is on from the first step."""
    gan = {"gan_weight": 0.5, "gan_start": 0, "gan_warmup": 0, "gan_ramp": 0, "gan_width": 4, "gan_layers": 1}
    config = TokenizerTraining(
        data="demo",
        output=folder / "run",
        model=ModelConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4),
        quantizer=QuantizerConfig(codebook_size=16, code_dim=4, codebook=codebook, kmeans_start=False, revive_after=0),
        gan=GanConfig(**{**gan, **options}),
        run=RunConfig(steps=4, batch_size=4, precision="fp32"),
    )
    config.images.size, config.images.channels, config.images.cache_mb = [16, 16], 1, 0
    built = build(config)
    assert built is not None
    return built[1]


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("ema"))
    made.begin(0)
    return made


@pytest.fixture(scope="module")
def gradient(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("gradient"), "gradient")
    made.begin(0)
    return made


PARTS = ("encoder", "quantizer.project_in", "quantizer.codebook", "quantizer.project_out", "decoder")


def reached(made: TokenizerTrainer, term: str) -> set[str]:
    """Parts of the tokenizer, and "judge", to which the named term gives a gradient that is not all 0."""
    for model in (made.tokenizer, made.judge):
        model.zero_grad(set_to_none=True)
    (images,) = made._tensors(next(made.batches))
    terms, total = made._losses(1, images, made.tokenizer(images))
    (total if term == "total" else terms[term]).backward()
    graded = {
        name for name, p in made.tokenizer.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }
    found = {part for part in PARTS if any(name.startswith(part) for name in graded)}
    if any(p.grad is not None for p in made.judge.parameters()):
        found.add("judge")
    return found


THROUGH = {"encoder", "quantizer.project_in", "quantizer.project_out", "decoder"}


@pytest.mark.parametrize(
    ("term", "ema_parts", "gradient_parts"),
    [
        ("reconstruction", THROUGH, THROUGH),
        ("quantizer", {"encoder", "quantizer.project_in"}, {"encoder", "quantizer.project_in", "quantizer.codebook"}),
        ("adversarial", THROUGH, THROUGH),
        ("total", THROUGH, {*THROUGH, "quantizer.codebook"}),
    ],
)
def test_where_gradients_go(ema, gradient, term, ema_parts, gradient_parts):
    assert reached(ema, term) == ema_parts
    assert reached(gradient, term) == gradient_parts


def test_the_decoder_step_freezes_the_discriminator_only_for_its_own_pass(ema):
    reached(ema, "total")
    assert all(parameter.requires_grad for parameter in ema.judge.parameters())


def test_every_parameter_is_trained_by_the_total(gradient):
    reached(gradient, "total")
    assert [n for n, p in gradient.tokenizer.named_parameters() if p.grad is None] == []


def test_total_is_the_weighted_sum(ema):
    (images,) = ema._tensors(next(ema.batches))
    terms, total = ema._losses(1, images, ema.tokenizer(images))
    ratio = terms["adaptive_ratio"]
    expected = terms["reconstruction"] + terms["quantizer"] + 0.5 * ratio * terms["adversarial"]
    torch.testing.assert_close(total, expected)
    assert not ratio.requires_grad and ratio > 0


def test_the_discriminator_step_leaves_the_tokenizer_alone(ema):
    ema.tokenizer.zero_grad(set_to_none=True)
    (images,) = ema._tensors(next(ema.batches))
    tokenizer = {name: value.clone() for name, value in ema.tokenizer.state_dict().items()}
    with torch.no_grad():
        fakes = ema.tokenizer.eval()(images).images
    ema.tokenizer.train()
    # Under the schedule's warm-up the first learning rate is 0; this test needs a step that moves.
    for group in ema.judge_optimizer.param_groups:
        group["lr"] = 1e-3
    judge = [parameter.detach().clone() for parameter in ema.judge.parameters()]
    logged = ema._judge_step([images], [fakes])
    assert all(parameter.grad is None for parameter in ema.tokenizer.parameters())
    assert all(torch.equal(value, tokenizer[name]) for name, value in ema.tokenizer.state_dict().items())
    assert all((old != new).any() for old, new in zip(judge, ema.judge.parameters()))
    assert 0 < logged["discriminator"] < 2


def test_codebook_and_discriminator_are_optimized_by_nobody_else(ema, gradient):
    def held(optimizer) -> set[int]:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    for made in (ema, gradient):
        assert held(made.optimizer) == {id(p) for p in made.tokenizer.parameters()}
        assert held(made.judge_optimizer) == {id(p) for p in made.judge.parameters()}


def test_the_discriminator_learns_alone_before_the_decoder_feels_it(tmp_path):
    made = trainer(tmp_path, gan_start=1, gan_warmup=1)
    made.begin(0)
    assert "discriminator" not in made.step(0) and made.judge_schedule.last_epoch == 0
    alone = made.step(1)
    assert "discriminator" in alone and "adversarial" not in alone and made.judge_schedule.last_epoch == 1
    both = made.step(2)
    assert "discriminator" in both and "adversarial" in both
