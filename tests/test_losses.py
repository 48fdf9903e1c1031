"""Distance of images by hand, and which parameters each term of a tokenizer's loss reaches."""

from pathlib import Path

import pytest
import torch

from vqgen.errors import UsageError
from vqgen.tokenizer.losses.adversarial import AdversarialTraining
from vqgen.tokenizer.losses.options import GanConfig, LossConfig
from vqgen.tokenizer.losses.reconstruction import reconstruction_loss
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.tokenizer.trainer import TokenizerTrainer, build
from vqgen.training.options import RunConfig

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
        model=VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4),
        quantizer=VQConfig(codebook_size=16, code_dim=4, codebook=codebook, kmeans_start=False, revive_after=0),
        gan=GanConfig(**{**gan, **options}),
        run=RunConfig(steps=4, batch_size=4, precision="fp32"),
    )
    config.images.size, config.images.channels, config.images.cache_mb = [16, 16], 1, 0
    built = build(config)
    assert built is not None
    return built[1]


def adversary(made: TokenizerTrainer) -> AdversarialTraining:
    assert made.gan is not None
    return made.gan


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
    """Parts of the tokenizer, and "discriminator", to which the named term gives a gradient that is not all 0."""
    for model in (made.tokenizer, adversary(made).discriminator):
        model.zero_grad(set_to_none=True)
    (images,) = made._tensors(next(made.batches))
    terms, total = made._losses(1, images, made.tokenizer(images))
    (total if term == "total" else terms[term]).backward()
    graded = {
        name for name, p in made.tokenizer.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)
    }
    found = {part for part in PARTS if any(name.startswith(part) for name in graded)}
    if any(p.grad is not None for p in adversary(made).discriminator.parameters()):
        found.add("discriminator")
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
    discriminator = adversary(ema).discriminator
    assert discriminator.training and all(parameter.requires_grad for parameter in discriminator.parameters())


def test_every_parameter_is_trained_by_the_total(gradient):
    reached(gradient, "total")
    assert [n for n, p in gradient.tokenizer.named_parameters() if p.grad is None] == []


def test_total_is_the_weighted_sum(ema):
    (images,) = ema._tensors(next(ema.batches))
    terms, total = ema._losses(1, images, ema.tokenizer(images))
    ratio = terms["adaptive_ratio"]
    expected = terms["reconstruction"] + terms["quantizer"] + 0.5 * ratio * terms["adversarial"]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(terms["gan_weight"], 0.5 * ratio)
    assert not ratio.requires_grad and ratio > 0


def test_codebook_and_discriminator_are_optimized_by_nobody_else(ema, gradient):
    def held(optimizer) -> set[int]:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}

    for made in (ema, gradient):
        assert held(made.optimizer) == {id(p) for p in made.tokenizer.parameters()}
        assert held(adversary(made).optimizer) == {id(p) for p in adversary(made).discriminator.parameters()}


def test_the_discriminator_learns_alone_before_the_decoder_feels_it(tmp_path):
    made = trainer(tmp_path, gan_start=1, gan_warmup=1)
    made.begin(0)
    assert not {"discriminator", "gan_weight"} & made.step(0).keys()
    assert not adversary(made).optimizer.state
    alone = made.step(1)
    assert "discriminator" in alone and "adversarial" not in alone and alone["gan_weight"] == 0
    assert adversary(made).optimizer.state
    both = made.step(2)
    assert {"discriminator", "adversarial"} <= both.keys() and both["gan_weight"] > 0


def test_the_discriminator_sees_the_reconstructions_of_before_the_update(tmp_path):
    """Detached, and those the decoder was trained on in the same step: no second forward pass."""
    made = trainer(tmp_path, gan_warmup=1)
    made.begin(0)
    seen = []
    made.tokenizer.decoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    adversary(made).discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    made.step(0)
    reconstructions, judged = seen
    assert reconstructions.requires_grad and not judged.requires_grad
    assert torch.equal(judged.chunk(2)[1], reconstructions)
    assert torch.equal(judged.chunk(2)[0], made.last_images)
