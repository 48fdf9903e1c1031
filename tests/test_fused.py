"""The joined training pass of a Llama on a CPU, against the network of transformers."""

import copy
import json
import math
import shutil

import pytest
import torch
from helpers.models import make_prior, small_prior, tokens_for, write_codes
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from vqgen.config import parse
from vqgen.prior import trainer
from vqgen.prior.backbone import fused
from vqgen.prior.model import Prior
from vqgen.prior.train import PriorTraining
from vqgen.prior.trainer import build


def network(heads: int = 4, layers: int = 2, width: int = 8) -> LlamaForCausalLM:
    """A Llama whose norms have weights of their own, so that an error in one shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=heads * width,
        intermediate_size=3 * heads * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    found = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in found.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return found


def with_gradients(of: nn.Module, logits: Tensor) -> list[Tensor]:
    """Logits, and the gradients of a loss that weighs each of them by its own factor."""
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    gradients = torch.autograd.grad((logits * factors).sum(), list(of.parameters()))
    return [logits.detach(), *gradients]


def error(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative distance of each tensor."""
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("tile", [1, 100, 2**18])
@pytest.mark.parametrize("batch, length, heads, layers", [(5, 17, 4, 2), (1, 1, 1, 1), (3, 33, 2, 3)])
def test_logits_and_gradients_are_those_of_transformers(monkeypatch, batch, length, heads, layers, tile):
    monkeypatch.setattr(fused, "_TILE", tile)
    plain = network(heads, layers).double()
    tokens = torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(0))
    wanted = with_gradients(plain, plain(input_ids=tokens, use_cache=False).logits)
    found = with_gradients(plain, fused.logits(plain, tokens, 0.0))
    # Cosines and sines are of float32 in both; without rotation to speak of the rest is exact.
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item() + 1e-12)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_transformers_is():
    plain = network(heads=8, layers=3)
    tokens = torch.randint(37, (16, 40), generator=torch.Generator().manual_seed(0))
    exact = with_gradients(plain, plain(input_ids=tokens, use_cache=False).logits)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = error(with_gradients(plain, plain(input_ids=tokens, use_cache=False).logits), exact)
        ours = error(with_gradients(plain, fused.logits(plain, tokens, 0.0)), exact)
    assert max(a / b for a, b in zip(ours, theirs, strict=True)) < 1.25
    assert max(ours) < 0.05


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(share):
    torch.manual_seed(0)
    kept, scale = fused._kept(torch.empty(1000, 999), share)
    assert kept is not None and set(kept.unique().tolist()) == {0, 1}
    count = kept.numel()
    spread = math.sqrt(share * (1 - share) / count)
    assert abs(kept.double().mean().item() - (1 - share)) < 4 * spread + 2**-17
    assert scale * (1 - share) == pytest.approx(1, rel=2**-16 / (1 - share))
    # Neighbours share 64 random bits: they are independent all the same.
    pairs = kept.flatten()[: count // 4 * 4].view(-1, 4).double() - (1 - share)
    covariances = (pairs.T @ pairs / len(pairs) - torch.eye(4) * share * (1 - share)).abs()
    assert covariances.max().item() < 5 / math.sqrt(len(pairs))


def test_dropout_is_none_without_a_share_and_never_of_everything():
    assert fused._kept(torch.empty(3, 3), 0.0) == (None, 1.0)
    kept, scale = fused._kept(torch.empty(3, 3), 1 - 1e-9)
    assert kept is not None and math.isfinite(scale)


@pytest.mark.parametrize("tile", [7, 2**18])
def test_dropped_sum_and_norm_have_the_gradients_of_the_formula(monkeypatch, tile):
    monkeypatch.setattr(fused, "_TILE", tile)
    torch.manual_seed(0)
    x, y = (torch.randn(2, 5, 6, dtype=torch.double, requires_grad=True) for _ in range(2))
    weight = torch.rand(6, dtype=torch.double, requires_grad=True)
    kept, scale = fused._kept(x, 0.4)
    assert kept is not None

    def joined(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return fused._AddNorm.apply(x, y, kept, scale, weight, 1e-6, torch.double)  # type: ignore[return-value]

    total = x + y * kept * scale
    normed = nn.functional.rms_norm(total, (6,), weight, 1e-6)
    torch.testing.assert_close(joined(x, y, weight), (total, normed))
    assert torch.autograd.gradcheck(joined, (x, y, weight))
    # Where only one of the two results has a gradient.
    assert torch.autograd.gradcheck(lambda *given: joined(*given)[0], (x, y, weight))
    assert torch.autograd.gradcheck(lambda *given: joined(*given)[1], (x, y, weight))


def test_every_branch_is_dropped_on_its_own(monkeypatch: pytest.MonkeyPatch):
    """The embeddings and both branches of each block, with the share of the model."""
    prior, shares, shapes = small_prior(dropout=0.25), [], []

    def note(like: torch.Tensor, dropout: float) -> tuple[torch.Tensor | None, float]:
        shares.append(dropout)
        shapes.append(like.shape)
        return torch.zeros_like(like, dtype=torch.int16), 1.0  # drops all

    monkeypatch.setattr(fused, "_kept", note)
    prior.fused, tokens = True, tokens_for(prior)
    dropped = prior(tokens)
    blocks = len(prior.backbone.model.layers)
    assert shares == [0.25] * (1 + 2 * blocks) and {len(shape) for shape in shapes} == {3}
    assert (dropped - dropped[:1, :1]).abs().max() < 1e-3, "nothing of the tokens is left"


def test_dropout_of_embeddings_has_its_share():
    """With all weights of the branches 0 the stream is that of the embeddings."""
    prior = small_prior(dropout=0.5)
    prior.fused = True
    tokens = tokens_for(prior, batch=2000)[:, :1]
    body = prior.backbone.model.layers
    for layer in body:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    nn.init.ones_(prior.backbone.model.embed_tokens.weight)
    nn.init.eye_(prior.backbone.lm_head.weight)
    assert 0.45 < (prior(tokens)[..., :12] == 0).float().mean().item() < 0.55


def test_the_same_random_state_gives_the_same_dropout_and_evaluation_has_none():
    prior = small_prior(dropout=0.3)
    prior.fused = True
    tokens = tokens_for(prior)
    torch.manual_seed(5)
    one, two = prior(tokens), prior(tokens)
    assert not torch.allclose(one, two)
    torch.manual_seed(5)
    assert torch.equal(prior(tokens), one)
    plain = copy.deepcopy(prior)
    plain.fused = False
    assert torch.equal(prior.eval()(tokens), plain.eval()(tokens))


def test_it_fits_a_llama_alone():
    assert fused.fits(small_prior().backbone)
    assert not any(fused.fits(small_prior(backbone).backbone) for backbone in ("qwen3", "gpt2"))
    grouped = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, vocab_size=9
    )
    assert not fused.fits(LlamaForCausalLM(grouped))


@pytest.mark.parametrize("most, expected", [((6, 7), True), ((5, 99), False), ((6, 6), False)])
def test_long_sequences_keep_no_attention_weights(tmp_path, monkeypatch, most, expected):
    """6 codes, 7 tokens with the class."""
    monkeypatch.setattr(trainer, "EAGER", most)
    found = trained_prior(tmp_path, monkeypatch, ["--precision", "bf16"])
    assert found.fused is expected
    assert (found.backbone.config._attn_implementation == "eager") is expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], True),
        (["--precision", "fp32"], False),
        (["--gradient-checkpointing"], False),
        (["--backbone", "qwen3"], False),
        (["--compile"], False),
    ],
)
def test_training_uses_it_where_it_can(tmp_path, monkeypatch, options, expected):
    words = [] if "--precision" in options else ["--precision", "bf16"]
    assert trained_prior(tmp_path, monkeypatch, [*words, *options]).fused is expected


def trained_prior(tmp_path, monkeypatch, options) -> Prior:
    """The prior of a trainer that has just been built; what it measures and saves is plain."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    make_prior(tmp_path / "prior")
    write_codes(tmp_path / "codes")
    manifest = tmp_path / "codes" / "manifest.json"
    stated = json.loads(manifest.read_text())
    stated["splits"]["heldout"] = stated["splits"]["train"]
    stated["tokenizer_fingerprint"] = Prior.load(tmp_path / "prior").tokenizer_fingerprint
    manifest.write_text(json.dumps(stated))
    shutil.copytree(tmp_path / "prior" / "tokenizer", tmp_path / "codes" / "tokenizer")
    words = ["--codes", str(tmp_path / "codes"), "--output", str(tmp_path / "run"), "--dim", "16", "--heads", "2"]
    built = build(parse(PriorTraining, [*words, "--layers", "1", *options]))
    assert built is not None
    _, made = built
    assert not made.average.training and not made.best.training
    return made.prior
