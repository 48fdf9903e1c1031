"""Steps of training and of drawing give a device work without waiting for it: they read and copy no values.

On CUDA torch reports each synchronisation; on a CPU the operators are watched that would cause one.
"""

import shutil
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SIZE, codes_for, make_prior, small_prior, tokens_for
from helpers.quantizers import latents, quantizer_options
from helpers.waiting import watched

from vqgen.config import parse
from vqgen.prior.backbone.network import attend_unmasked
from vqgen.prior.train import PriorTraining
from vqgen.prior.trainer import PriorTrainer
from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.sampling.decoding.generate import decode_n, image_uniforms, prefill
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.quantizers import QUANTIZERS, quantizer_for
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.tokenizer.trainer import build
from vqgen.training.run import Run

TINY = "--width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 --workers 0 --validation-images 20"
GAN = "--gan-weight 0.5 --gan-start 0 --gan-warmup 0 --gan-ramp 0 --gan-width 8 --gan-layers 2"
ON_THE_HOST = ("dead.any()", "get_last_lr", "average.n_averaged")
"""What is read on the host: on a CPU whether codes are dead; the learning rate; how often weights were averaged."""


@pytest.fixture(autouse=True)
def late(trained_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave non-finite values to be looked for where a run logs."""
    record = Run.backward

    def later(self: Run, *args: Any) -> None:
        self.finite.immediate = False
        record(self, *args)

    monkeypatch.setattr(Run, "backward", later)


def waits_of(trainer: Any, device: str, steps: int = 2) -> list[str]:
    """What waits in steps that neither log nor read images."""
    trainer.begin(0)
    trainer.batches = repeat(next(trainer.batches))
    trainer.step(0)
    trainer.step(1)
    with watched(device) as found:
        for step in range(2, 2 + steps):
            trainer.step(step)
    return beside_host(found)


def beside_host(found: list[str]) -> list[str]:
    return [each for each in found if not any(text in each for text in ON_THE_HOST)]


@pytest.mark.parametrize("words", ["", GAN, f"{GAN} --gan-augment color translation cutout --gan-lecam 0.1"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_of_the_tokenizer(tmp_path: Path, device: str, words: str, optimizer: str) -> None:
    given = f"--data demo --channels 1 --size 16 {TINY} {words} --batch-size 8 --steps 40 --precision fp32"
    words_of = [*given.split(), "--optimizer", optimizer, "--output", str(tmp_path / "run")]
    built = build(parse(TokenizerTraining, words_of))
    assert built
    assert waits_of(built[1], device) == []


@pytest.mark.parametrize("words", ["", "--inpainting 0.5 --token-corruption 0.1 --accumulate 2", "--backbone gpt2"])
def test_a_step_of_the_prior(tmp_path: Path, device: str, words: str) -> None:
    model = make_prior(tmp_path / "prior")
    codes = codes_for(tmp_path / "codes", model)
    shutil.copytree(model / "tokenizer", codes / "tokenizer")
    given = f"{words} --dim 16 --layers 1 --heads 2 --batch-size 4 --steps 40 --precision fp32"
    config = parse(PriorTraining, ["--codes", str(codes), *given.split(), "--output", str(tmp_path / "run")])
    images = CodeFiles(codes, "train")
    trainer = PriorTrainer(Run(config.output, config, config.run, False), config, images, images)
    attend_unmasked(trainer.prior.backbone)  # as on CUDA
    (tmp_path / "run").mkdir()
    assert waits_of(trainer, device) == []


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_step_of_a_quantizer(device: str, kind: str) -> None:
    torch.manual_seed(0)
    quantizer = quantizer_for(6, quantizer_options(kind, code_dim=4)).to(device)
    z = latents().to(device).requires_grad_()
    for warm in (True, False):
        with watched(device) as found:
            out = quantizer(z)
            (out.loss + out.z_q.square().mean()).backward()
        assert warm or beside_host(found) == []


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
def test_attention_without_a_mask_is_causal(device: str, backbone: str) -> None:
    prior = small_prior(backbone).eval().to(device)
    tokens = tokens_for(prior).to(device)
    expected = prior(tokens)
    attend_unmasked(prior.backbone)
    torch.testing.assert_close(prior(tokens), expected)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % SIZE
    assert torch.equal(prior(changed)[:, :-1], prior(tokens)[:, :-1])
    first = tokens[:, :1]
    greedy = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    found = prior.backbone.generate(first, attention_mask=torch.ones_like(first), **greedy)  # type: ignore[operator]
    assert torch.equal(prior(found)[:, :-1].argmax(-1), found[:, 1:])


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.01}, {"guidance_scale": 2.0}]
)
def test_drawing(device: str, settings: dict[str, float]) -> None:
    prior, chosen = small_prior().eval().to(device), SamplingSettings(**settings)  # type: ignore[arg-type]
    conditioning, length = prior.conditioning, prior.vocabulary.length
    decoder, scales = CachedTransformer(prior.backbone, length), [2.0] if chosen.guidance_scale > 1 else []
    legal = [prior.vocabulary.allowed(position) for position in range(length)]
    prompt = conditioning.prefixes(conditioning.conditions(), range(3)).repeat(1 + len(scales), 1).to(device)
    uniforms = image_uniforms(0, range(3), length).to(device)
    with torch.inference_mode():
        for _ in range(2):
            with watched(device) as found:
                logits = prefill(decoder, prompt, legal[0])
                decode_n(decoder, logits, legal, uniforms, chosen, scales)
    assert len(found) == 1 and "isfinite" in found[0], "more than the one look at the whole, after the loop"


def test_what_waits_is_seen(device: str) -> None:
    values = torch.arange(3.0, device=device)
    for wait in (
        lambda: values.sum().item(),
        lambda: values[values > 0],
        lambda: bool(values.any()),
        lambda: values.new_tensor([1.0]),
        lambda: torch.tensor(2.0, device=device),
    ):
        with watched(device) as found:
            wait()
        assert len(found) >= 1
    with watched(device) as found:
        torch.where(values > 1, values, 0).cumsum(0).index_select(0, values.long())
        values.new_full((), 3.0)
    assert found == []
