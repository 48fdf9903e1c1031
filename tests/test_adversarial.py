"""The adversarial loss: both players' terms by hand, the adaptive weight, the schedule, what it remembers, and two
processes."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from processes import ranks
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from vqgen.errors import UsageError
from vqgen.tokenizer.losses.adversarial import (
    AdversarialTraining,
    LeCam,
    adaptive_ratio,
    blind_loss,
    discriminator_loss,
    generator_loss,
)
from vqgen.tokenizer.losses.options import GanConfig
from vqgen.tokenizer.losses.reconstruction import reconstruction_loss
from vqgen.tokenizer.networks.autoencoder import Decoder
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.train import main as train
from vqgen.training.checkpoint import load_checkpoint, save_checkpoint
from vqgen.training.finite import NonFinite
from vqgen.training.health import pinned_discriminator
from vqgen.training.options import OptimizerConfig, RunConfig
from vqgen.training.run import Run

KINDS = ("hinge", "vanilla", "non-saturating")

# ---- values by hand ----


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, -0.5, 1.0])
    assert discriminator_loss("hinge", real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3))
    assert generator_loss("hinge", fake) == pytest.approx((3.0 + 0.5 - 1.0) / 3)


@pytest.mark.parametrize("kind", ["vanilla", "non-saturating"])
def test_the_discriminator_of_vanilla_and_non_saturating_is_a_classifier(kind):
    torch.manual_seed(0)
    real, fake = 3 * torch.randn(2, 4, 1, 5, 5)
    labels = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    expected = F.binary_cross_entropy_with_logits(torch.cat([real, fake]), labels)
    torch.testing.assert_close(discriminator_loss(kind, real, fake), expected)


def test_the_decoders_losses_differ_where_it_wins():
    """The mean logit always pulls as hard; cross-entropy lets go of what passes for real."""
    logits = torch.tensor([-4.0, 0.0, 4.0], requires_grad=True)
    pulls = {kind: torch.autograd.grad(generator_loss(kind, logits), logits)[0] * -3 for kind in KINDS}
    torch.testing.assert_close(pulls["hinge"], torch.ones(3))
    torch.testing.assert_close(pulls["vanilla"], torch.ones(3))
    torch.testing.assert_close(pulls["non-saturating"], 1 - torch.sigmoid(logits.detach()))
    as_real = F.binary_cross_entropy_with_logits(logits, torch.ones(3))
    torch.testing.assert_close(generator_loss("non-saturating", logits), as_real)


def test_vanilla_is_the_divergence_of_fake_from_real():
    """At the best discriminator for p (real) and q (fake) over three images; the best is found by training it."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    logits = torch.zeros(3, requires_grad=True)
    copies = [torch.arange(3).repeat_interleave((10 * weights).round().int()) for weights in (p, q)]
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = discriminator_loss("vanilla", logits[copies[0]], logits[copies[1]])
        loss.backward()
        return loss

    optimizer.step(closure)
    divergence = (q * (q / p).log()).sum()
    torch.testing.assert_close(generator_loss("vanilla", logits.detach()[copies[1]]), divergence, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_push_the_right_way(kind):
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    discriminator_loss(kind, real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()  # a step down makes real higher and fake lower
    fake.grad = None
    generator_loss(kind, fake).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_taken_in_float32(kind):
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4096).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses = discriminator_loss(kind, real, fake), generator_loss(kind, fake)
    exact = discriminator_loss(kind, real.double(), fake.double()), generator_loss(kind, fake.double())
    for loss, expected in zip(losses, exact):
        assert loss.dtype == torch.float32
        assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bounds_are_those_that_health_watches(kind):
    always = float(discriminator_loss(kind, torch.full((4,), 50.0), torch.full((4,), -50.0)))
    nothing = float(discriminator_loss(kind, torch.zeros(4), torch.zeros(4)))
    assert always == pytest.approx(0, abs=1e-6) and nothing == pytest.approx(blind_loss(kind))
    for loss, remedy in ((always, "--gan-augment"), (nothing, "raise --gan-lr")):
        found = pinned_discriminator([{"train/discriminator": loss}] * 5, kind, blind_loss(kind))
        assert found is not None and kind in found.measured and remedy in found.remedy
    between = float(discriminator_loss(kind, torch.full((4,), 0.5), torch.full((4,), -0.5)))
    for loss in (between, 0.025 * blind_loss(kind), 0.99 * blind_loss(kind)):
        assert pinned_discriminator([{"train/discriminator": loss}] * 5, kind, blind_loss(kind)) is None
    # Each loss has its own bound: what says nothing under one is at work under the other.
    other = "vanilla" if kind == "hinge" else "hinge"
    assert pinned_discriminator([{"train/discriminator": nothing}] * 5, other, blind_loss(other)) is None


# ---- the adaptive weight ----


def ratio(reconstruction: list[float], adversarial: list[float], largest: float, scale: float = 1.0) -> float:
    """The ratio for two parameters and losses with these gradients."""
    last = nn.Parameter(torch.tensor([2.0, -3.0]))
    losses = [(last * torch.tensor(gradient)).sum() for gradient in (reconstruction, adversarial)]
    found = adaptive_ratio(losses[0], losses[1], last, largest, scale=scale)
    assert not found.requires_grad and last.grad is None
    torch.stack(losses).sum().backward()  # the graph is still there for the real backward pass
    return float(found)


def test_adaptive_ratio_by_hand():
    assert ratio([3.0, 4.0], [0.0, 2.0], 100.0) == pytest.approx(5 / 2.0001)
    assert ratio([0.6, 0.8], [30.0, 40.0], 100.0) == pytest.approx(1 / 50.0001)
    assert ratio([3.0, 4.0], [0.0, 2.0], 100.0, scale=2.0**16) == pytest.approx(5 / 2.0001)


def test_adaptive_ratio_is_clamped():
    assert ratio([3.0, 4.0], [0.0, 0.0], 100.0) == 100
    assert ratio([3.0, 4.0], [1.0, 0.0], 2.5) == 2.5
    assert ratio([0.0, 0.0], [1.0, 0.0], 100.0) == 0
    assert ratio([0.0, 0.0], [0.0, 0.0], 100.0) == 0


def test_adaptive_ratio_of_extreme_gradients():
    """Their squares leave the range of float32."""
    assert ratio([3e30, 4e30], [0.0, 2e30], 100.0) == pytest.approx(2.5)
    assert ratio([3e30, 0.0], [1e-30, 0.0], 100.0) == 100
    assert ratio([1e-30, 0.0], [3e30, 0.0], 100.0) == pytest.approx(0, abs=1e-30)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_gives_no_weight(bad):
    assert ratio([1.0, bad], [1.0, 1.0], 100.0) == 0
    assert ratio([1.0, 1.0], [bad, 1.0], 100.0) == 0
    assert ratio([bad, 1.0], [bad, 1.0], 100.0) == 0


@given(st.lists(st.floats(width=32), min_size=4, max_size=4), st.floats(0, 1e4))
@example([0.0, 1.0, 0.0, 0.0], 4.0138574699544513e-44)  # rounded up by more than a hundredth in float32
def test_adaptive_ratio_is_always_a_number_in_range(values, largest):
    assert 0 <= ratio(values[:2], values[2:], largest) <= float(torch.tensor(largest))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e15, 1e30])
def test_adaptive_ratio_under_autocast(scale):
    torch.manual_seed(0)
    last = nn.Conv2d(8, 3, 3, padding=1)
    discriminator = nn.Conv2d(3, 1, 3)
    features, target = torch.randn(2, 8, 16, 16), torch.rand(2, 3, 16, 16)

    def losses() -> tuple[Tensor, Tensor]:
        images = last(features)
        return scale * reconstruction_loss(images, target, "l2"), scale * generator_loss("hinge", discriminator(images))

    exact = adaptive_ratio(*losses(), last.weight, 1e4)
    with torch.autocast("cpu", torch.bfloat16):
        found = adaptive_ratio(*losses(), last.weight, 1e4)
    assert found.dtype == torch.float32 and torch.isfinite(found)
    assert 0 < found < 1e4 and found == pytest.approx(float(exact), rel=0.05)


# ---- the schedule and its options ----


def test_the_weight_over_time():
    gan = GanConfig(gan_weight=0.8, gan_start=100, gan_warmup=50, gan_ramp=40)
    assert gan.start(10**6) == 100
    assert {gan.weight(since) for since in range(-100, 50)} == {0.0}
    assert [gan.weight(since) for since in range(50, 90)] == pytest.approx([0.8 * (i + 1) / 40 for i in range(40)])
    assert {gan.weight(since) for since in (89, 90, 1000, 10**6)} == {0.8}
    sudden = GanConfig(gan_weight=0.5, gan_warmup=0, gan_ramp=0)
    assert sudden.weight(0) == 0.5 and sudden.weight(-1) == 0


def test_the_start_as_a_share_of_the_run():
    gan = GanConfig(gan_start=0.25)
    assert gan.start(1000) == 250 and gan.start(10) == 2
    assert GanConfig(gan_start=0).start(1000) == 0 and GanConfig(gan_start=1).start(1000) == 1
    assert GanConfig(gan_start=300.0).start(1000) == 300


NAMES = ("gan_weight", "gan_start", "gan_warmup", "gan_ramp", "gan_adaptive_max", "gan_lr", "gan_width", "gan_layers")
NAMES += ("gan_lecam",)


@pytest.mark.parametrize("option", NAMES)
def test_impossible_options_are_named(option):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: found -1"):
        GanConfig(**{option: -1})
    if isinstance(getattr(GanConfig(), option), float):
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: found nan"):
            GanConfig(**{option: math.nan})


@pytest.mark.parametrize("start", [1.5, 5000.25])
def test_a_start_that_is_no_step_and_no_share_is_refused(start):
    with pytest.raises(UsageError, match=f"--gan-start: found {start}"):
        GanConfig(gan_start=start)


# ---- what is remembered ----


def test_lecam_by_hand():
    lecam = LeCam()
    lecam.real.fill_(0.5)
    lecam.fake.fill_(-0.25)
    real, fake = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([-1.0, 0.0], requires_grad=True)
    penalty = lecam(real, fake)
    assert penalty.detach() == pytest.approx((1.25**2 + 3.25**2) / 2 + (1.5**2 + 0.5**2) / 2)
    penalty.backward()
    assert (real.grad > 0).all() and (fake.grad < 0).all()  # a step down draws the two together
    assert not any(buffer.requires_grad for buffer in lecam.buffers())


def test_lecam_anchors_follow_the_means():
    lecam = LeCam()
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0), 0)
    assert lecam.real == pytest.approx(1.8) and lecam.fake == pytest.approx(-0.9)
    for since in range(1, 3000):
        lecam.update(torch.tensor(4.0), torch.tensor(1.0), since)
    assert lecam.real == pytest.approx(4.0, abs=1e-4) and lecam.fake == pytest.approx(1.0, abs=1e-4)
    lecam.update(torch.tensor(0.0), torch.tensor(0.0), 10**6)
    assert lecam.real == pytest.approx(4.0 * 0.99, abs=1e-4)  # the published decay


# ---- the discriminator of a run ----


class Players:
    """A decoder of one layer and its adversary, who meet without a tokenizer."""

    def __init__(self, folder: Path, steps: int = 12, accumulate: int = 1, batch: int = 4, **options) -> None:
        gan = {"gan_weight": 0.5, "gan_start": 0, "gan_warmup": 0, "gan_ramp": 0, "gan_width": 4, "gan_layers": 1}
        self.config = GanConfig(**{**gan, **options})
        precision = "bf16" if "bf16" in folder.name else "fp32"
        settings = RunConfig(steps=steps, batch_size=batch, precision=precision, accumulate=accumulate)
        self.run = Run(folder, self.config, settings, False)
        torch.manual_seed(0)
        discriminator = PatchDiscriminator(3, [16, 16], 4, 1, self.config.gan_spectral_norm)
        self.decoder = nn.Conv2d(3, 3, 3, padding=1)
        self.extra: dict = {}
        optimizer = OptimizerConfig(lr_warmup=0)
        self.adversary = AdversarialTraining(self.run, self.config, optimizer, discriminator, self.extra)
        self.optimizer = torch.optim.SGD(self.decoder.parameters(), 0.1)

    def state(self) -> dict[str, Tensor]:
        """All that has to be the same: weights and buffers of both."""
        found = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()}
        for name, module in self.adversary.modules.items():
            found |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        return {name: value.detach().clone() for name, value in found.items()}

    def step(self, step: int) -> dict[str, Tensor]:
        """One step of both, on images that depend on its number and the process alone; what was logged."""
        accelerator = self.run.accelerator
        share = self.run.micro_batch * self.run.settings.accumulate
        everything = torch.rand(4 * share, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
        reals = everything[accelerator.process_index * share :][:share].chunk(self.run.settings.accumulate)
        torch.manual_seed(1000 * step + accelerator.process_index)
        logged, fakes = {}, []
        for real in reals:
            fake = self.decoder(0.5 * real)
            reconstruction = reconstruction_loss(fake, real, "l2")
            terms, weighted = self.adversary.terms(step, fake, reconstruction, self.decoder.weight)
            (reconstruction + weighted).backward()
            fakes.append(fake.detach())
            logged |= terms
        for parameter in self.decoder.parameters():
            parameter.grad = self.adversary._mean(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        logged |= self.adversary.step(step, list(reals), fakes)
        return {name: value.detach() for name, value in logged.items()}


def test_the_decoders_pass_moves_nothing_of_the_discriminator(tmp_path):
    """No weight, no gradient, no estimate of spectral norm, no anchor."""
    made = Players(tmp_path, gan_spectral_norm=True, gan_lecam=0.1)
    made.step(0)
    before = made.state()
    real = torch.rand(4, 3, 16, 16)
    fake = made.decoder(real)
    terms, weighted = made.adversary.terms(1, fake, reconstruction_loss(fake, real, "l2"), made.decoder.weight)
    weighted.backward()
    assert terms["adversarial"].requires_grad and made.decoder.weight.grad.abs().sum() > 0
    parameters = list(made.adversary.discriminator.parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)
    assert made.adversary.discriminator.training
    assert all(torch.equal(value, before[name]) for name, value in made.state().items())


def test_the_discriminators_step_moves_all_of_it_and_nothing_else(tmp_path):
    made = Players(tmp_path, gan_spectral_norm=True, gan_lecam=0.1, gan_lr=1e-2)
    real = torch.rand(4, 3, 16, 16)
    fake = made.decoder(real).detach()
    before = made.state()
    for step in range(2):
        logged = made.adversary.step(step, [real], [fake])
    assert all(parameter.grad is None for parameter in made.decoder.parameters())
    unmoved = {name for name, value in made.state().items() if torch.equal(value, before[name])}
    # A matrix of one row has the left singular vector 1.
    assert unmoved == {"decoder.weight", "decoder.bias", "discriminator.last.parametrizations.weight.0._u"}
    assert 0 < logged["discriminator"] < 2 and logged["discriminator_grad_norm"] > 0
    assert not logged["discriminator"].requires_grad


def test_both_passes_see_through_the_same_augmentation(tmp_path):
    """Real images and reconstructions, and the decoder's gradient: all with a hole."""
    made = Players(tmp_path, gan_augment=["cutout"])
    seen = []
    made.adversary.discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    made.step(0)
    decoders, discriminators = seen
    assert len(decoders) == 4 and decoders.requires_grad
    assert len(discriminators) == 8 and not discriminators.requires_grad
    for image in torch.cat(seen):
        assert 0 < (image == 0).all(0).sum() <= 64


@pytest.mark.parametrize("kind", KINDS)
def test_a_discriminator_learns_to_tell_and_a_decoder_to_pass(tmp_path, kind):
    """The discriminator alone drives its loss down; the decoder alone, against it as it then is, its own."""
    made = Players(tmp_path, steps=60, gan_loss=kind, gan_lr=1e-2, gan_warmup=60)
    figures = [made.step(step) for step in range(60)]
    assert figures[-1]["discriminator"] < 0.7 * blind_loss(kind) < figures[0]["discriminator"]
    assert figures[-1]["discriminator_real"] > figures[-1]["discriminator_fake"]
    inputs, losses = torch.rand(4, 3, 16, 16), []
    for _ in range(20):
        fake = made.decoder(inputs)
        terms, weighted = made.adversary.terms(120, fake, reconstruction_loss(fake, inputs, "l2"), made.decoder.weight)
        weighted.backward()
        made.optimizer.step()
        made.optimizer.zero_grad()
        losses.append(terms["adversarial"])
    assert losses[-1] < losses[0]


def test_lecam_keeps_the_logits_together(tmp_path):
    gaps = []
    for weight in (0.0, 1.0):
        made = Players(tmp_path / str(weight), steps=40, gan_lecam=weight, gan_lr=1e-2, gan_warmup=40)
        logged = [made.step(step) for step in range(40)][-1]
        gaps.append(logged["discriminator_real"] - logged["discriminator_fake"])
    assert 0 < gaps[1] < 0.5 * gaps[0]


def test_lecam_anchors_slow_down_over_the_run(tmp_path, monkeypatch):
    """By the steps since the discriminator began."""
    seen: list[int] = []
    monkeypatch.setattr(LeCam, "update", lambda self, real, fake, since: seen.append(since))
    made = Players(tmp_path, steps=6, gan_lecam=0.1, gan_start=2)
    for step in range(6):
        made.step(step)
    assert seen == [0, 1, 2, 3]


def test_accumulated_parts_are_one_batch(tmp_path):
    """To the discriminator; in the decoder's pass each part has an adaptive ratio of its own."""
    found = []
    for parts in (1, 2):
        made = Players(tmp_path / str(parts), batch=8, accumulate=parts, gan_adaptive=False, gan_lecam=0.3)
        for step in range(3):
            real, fake = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            logged = made.adversary.step(step, list(real.chunk(parts)), list(fake.chunk(parts)))
        found.append({**logged, **made.adversary.modules["lecam"].state_dict()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_rate_follows_that_of_the_tokenizer(tmp_path):
    """Whenever it began: at its peak --gan-lr, and gone at the end of the run."""
    made = Players(tmp_path, steps=10, gan_start=4, gan_lr=3e-3)
    rates = []
    for step in range(10):
        made.step(step)
        rates.append(made.adversary.optimizer.param_groups[0]["lr"])
    expected = [3e-3 * 0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(4, 10)]
    assert rates[4:] == pytest.approx(expected)


# ---- bad numbers ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_discriminator_does_not_learn_from_bad_numbers(tmp_path, kind, bad):
    made = Players(tmp_path, gan_loss=kind, gan_lecam=0.1)
    before = made.state()
    real = torch.rand(4, 3, 16, 16)
    fake = real.clone()
    fake[0, 0, 0, 0] = bad
    with pytest.raises(NonFinite):
        made.adversary.step(0, [real], [fake])
    assert all(torch.equal(value, before[name]) for name, value in made.state().items())


def test_a_hinge_loss_of_zero_does_not_hide_an_infinite_logit(tmp_path):
    made = Players(tmp_path)
    made.adversary.discriminator.last.bias.data.fill_(math.inf)
    real = torch.rand(4, 3, 16, 16)
    with pytest.raises(NonFinite, match="discriminator_real"):
        made.adversary.step(0, [real], [real])


def test_a_decoder_is_told_of_an_adversary_gone_bad(tmp_path):
    made = Players(tmp_path)
    made.adversary.discriminator.last.bias.data.fill_(math.nan)
    real = torch.rand(4, 3, 16, 16)
    fake = made.decoder(real)
    reconstruction = reconstruction_loss(fake, real, "l2")
    terms, weighted = made.adversary.terms(0, fake, reconstruction, made.decoder.weight)
    with pytest.raises(NonFinite, match="adversarial"):
        made.run.backward(terms, reconstruction + weighted)


def test_the_scale_of_fp16_does_not_change_the_weight(tmp_path):
    """It is a tensor, so that no value is read, and it is in both gradients."""
    found = []
    for scale in (None, 1024.0):
        made = Players(tmp_path / str(scale))
        made.run.accelerator.scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(1)
        real = torch.rand(4, 3, 16, 16)
        fake = made.decoder(real)
        terms, _ = made.adversary.terms(0, fake, (fake - real).abs().mean(), made.decoder.weight)
        found.append(terms["adaptive_ratio"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e15, 1e30])
def test_the_weight_is_a_number_whatever_the_losses(tmp_path, size):
    """Under bf16 autocast, with the decoder's gradient at the ends of what floats hold."""
    made = Players(tmp_path / "bf16", gan_weight=0.8, gan_adaptive_max=10.0)
    assert made.run.accelerator.mixed_precision == "bf16"
    real = torch.rand(4, 3, 16, 16)
    fake = made.decoder(real)
    terms, weighted = made.adversary.terms(0, fake, size * (fake - real).abs().mean(), made.decoder.weight)
    assert 0 <= terms["adaptive_ratio"] <= 10 and terms["gan_weight"] == 0.8 * terms["adaptive_ratio"]
    assert terms["adaptive_ratio"] == (10 if size > 1 else pytest.approx(0, abs=1e-20))
    assert terms["gan_weight"].dtype == torch.float32 and torch.isfinite(weighted)


# ---- the start ----


def test_more_steps_do_not_put_off_what_has_begun(tmp_path):
    """A resumed run may be longer; a share of it is then later."""
    made = Players(tmp_path, steps=20, gan_start=0.5)
    assert made.adversary.since(9) < 0 and made.adversary.since(10) == 0
    longer = Players(tmp_path / "longer", steps=200, gan_start=0.5)
    assert longer.adversary.since(20) < 0
    longer.extra.update(made.extra)
    assert longer.adversary.since(20) == 10


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"gan_start": 15, "gan_warmup": 5}, True),
        ({"gan_start": 0.9, "gan_warmup": 2}, True),
        ({"gan_start": 14, "gan_warmup": 5}, False),
        ({"gan_start": 0.5, "gan_warmup": 5}, False),
    ],
)
def test_a_run_too_short_to_feel_it_is_told(tmp_path, capsys, options, warned):
    Players(tmp_path, steps=20, **options).adversary.begin()
    warning = capsys.readouterr().err
    assert ("--gan-weight" in warning and "20" in warning) == warned


# ---- stopped and resumed, and two processes ----

EVERYTHING = {
    "gan_loss": "non-saturating",
    "gan_spectral_norm": True,
    "gan_lecam": 0.3,
    "gan_augment": ["color", "translation", "cutout"],
    "gan_start": 0.5,
    "gan_warmup": 1,
    "gan_ramp": 4,
    "gan_lr": 3e-3,
}


@pytest.mark.parametrize("at", [4, 7, 9])
def test_resumed_it_goes_on_bit_for_bit(tmp_path, at):
    """From before the start, from within the warm-up, and from when all is at work."""
    whole, first, second = (Players(tmp_path / name, **EVERYTHING) for name in ("a", "b", "c"))
    figures = [whole.step(step) for step in range(12)]
    assert whole.extra == {"gan_began": 6} and "lecam" in figures[6] and "adversarial" in figures[7]

    def held(made: Players) -> tuple[dict, dict]:
        return {**made.adversary.modules, "decoder": made.decoder}, {**made.adversary.optimizers, "sgd": made.optimizer}

    for step in range(at):
        first.step(step)
    path = save_checkpoint(tmp_path / "checkpoints", at, *held(first), first.extra, 1)
    second.step(0)  # what it held before is replaced
    second.extra.update(load_checkpoint(path, *held(second))["extra"])
    for step in range(at, 12):
        logged = second.step(step)
        assert logged.keys() == figures[step].keys()
        assert all(torch.equal(value, figures[step][name]) for name, value in logged.items()), step
    assert second.extra == whole.extra
    for name, value in second.state().items():
        assert torch.equal(value, whole.state()[name]), name


def _play(rank: int, folder: str, environments: list[dict[str, str]]) -> None:
    """Both players on one process of two; what was logged and all states go to a file of its own."""
    os.environ |= environments[rank]
    found = {}
    for name, options in {"everything": EVERYTHING, "plain": {"gan_augment": []}}.items():
        made = Players(Path(folder) / name, batch=8, **options)
        assert isinstance(made.adversary.model, nn.parallel.DistributedDataParallel)
        figures = [made.step(step) for step in range(12)]
        found[name] = {"figures": figures, "state": made.state(), "extra": made.extra}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("both")
    start_processes(_play, (str(folder), ranks(2)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["everything", "plain"])
def test_two_processes_agree(both, name):
    """On the weight, on the start, on every estimate and anchor, though each sees images of its own."""
    ours, theirs = (found[name] for found in both)
    assert ours["extra"] == theirs["extra"] == {"gan_began": 6 if name == "everything" else 0}
    for key, value in ours["state"].items():
        assert torch.equal(value, theirs["state"][key]), key
    for step, (one, two) in enumerate(zip(ours["figures"], theirs["figures"])):
        assert one.keys() == two.keys()
        for key in {"adaptive_ratio", "gan_weight"} & one.keys():
            assert torch.equal(one[key], two[key]), (step, key)
        assert all(one[key] != two[key] for key in {"adversarial", "discriminator"} & one.keys()), step
    assert "adaptive_ratio" in ours["figures"][-1]


def test_two_processes_play_as_one(both, tmp_path):
    """The ratio is that of the whole batch."""
    single = Players(tmp_path, batch=8)
    two = both[0]["plain"]
    for step in range(12):
        logged = single.step(step)
        torch.testing.assert_close(two["figures"][step]["adaptive_ratio"], logged["adaptive_ratio"], rtol=1e-3, atol=0)
    for name, value in single.state().items():
        torch.testing.assert_close(two["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_adaptive_weight_runs_the_last_layer_backwards_alone(compiled: bool) -> None:
    """Also where the network is compiled, in which a graph runs backwards as a whole."""
    torch.manual_seed(0)
    config = VQGANConfig(width=8, multipliers=[1, 2], groups=4, blocks=1, latent_dim=4, attention_levels=[])
    decoder = Decoder(3, config)
    if compiled:
        decoder.compile(backend="aot_eager")
    images = decoder(torch.randn(2, 4, 4, 4))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        adaptive_ratio(images.square().mean(), images.mean(), decoder.last_weight, 100.0)
    runs = [event.count for event in profile.key_averages() if event.key == "aten::convolution_backward"]
    assert runs == [2]


# ---- options ----


@pytest.mark.parametrize(
    ("options", "named", "needed"),
    [
        ("--gan-start 100", "--gan-start", "--gan-weight"),
        ("--gan-weight 0 --gan-spectral-norm", "--gan-spectral-norm", "--gan-weight"),
        (
            "--gan-weight 0.5 --gan-layers 1 --no-gan-adaptive --gan-adaptive-max 9",
            "--gan-adaptive-max",
            "--gan-adaptive",
        ),
        ("--perceptual-net alex", "--perceptual-net", "--perceptual-weights"),
        ("--entropy-temperature 0.1", "--entropy-temperature", "--entropy-weight"),
        ("--quantizer gumbel --entropy-weight 0 --entropy-diversity 3", "--entropy-diversity", "--entropy-weight"),
        ("--codebook gradient --codebook-decay 0.9", "--codebook-decay", "--codebook ema"),
    ],
)
def test_options_without_an_effect_are_refused_in_a_new_run(
    tmp_path: Path, cli, options: str, named: str, needed: str
) -> None:
    result = cli(train, "--data", "demo", "--size", 16, *options.split(), "--output", tmp_path / "run")
    assert result.code == 2 and f"{named}: has no effect without {needed}" in result.err
    assert not (tmp_path / "run").exists()


def test_a_codebook_size_beside_levels_is_refused(tmp_path: Path, cli) -> None:
    options = "--quantizer fsq --levels 5 5 --codebook-size 64".split()
    result = cli(train, "--data", "demo", "--size", 16, *options, "--output", tmp_path / "run")
    assert result.code == 2 and "--codebook-size: has no effect beside --levels" in result.err
    assert not (tmp_path / "run").exists()
