"""vqgen-export: folders that transformers itself reads."""

import shutil

import pytest
import torch
from helpers.models import SIZE, make_prior
from transformers import AutoModelForCausalLM

import vqgen.prior.export.program as exporting
from vqgen.prior.model import Prior
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.model import Tokenizer


def test_a_tokenizer_of_another_prior_is_not_exported(cli, tmp_path):
    model, other = make_prior(tmp_path / "model"), make_prior(tmp_path / "other", depth=2)
    shutil.rmtree(model / "tokenizer")
    shutil.copytree(other / "tokenizer", model / "tokenizer")
    result = cli(exporting.main, "--model", model, "--output", tmp_path / "export")
    assert result.code == 1 and "the tokenizer that made the codes" in result.err
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_draws_what_we_draw_from_an_exported_folder(cli, tmp_path, backbone, depth):
    model = make_prior(tmp_path / "model", backbone, depth)
    result = cli(exporting.main, "--model", model, "--output", tmp_path / "export")
    assert result.code == 0, result.err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    generator = Generator.load(model, "cpu", "fp32")
    vocabulary = generator.prior.vocabulary
    greedy = generator.draw(range(3), settings=SamplingSettings(temperature=0))
    conditioning = generator.conditioning
    condition = conditioning.prefixes(conditioning.conditions(), range(3))
    illegal = [[i] for i in range(SIZE * depth, conditioning.size)]
    if depth == 1:  # generate knows no ranges of positions
        tokens = theirs.generate(condition, do_sample=False, bad_words_ids=illegal, pad_token_id=conditioning.null)
        assert tokens.shape == (3, 1 + vocabulary.length)
        assert torch.equal(vocabulary.to_codes(tokens[:, 1:]), greedy.codes)
    sequences = torch.cat([condition, vocabulary.to_tokens(greedy.codes)], 1)
    with torch.no_grad():
        torch.testing.assert_close(theirs(sequences).logits, generator.prior(sequences))
    assert Tokenizer.load(tmp_path / "export/tokenizer").fingerprint == generator.tokenizer.fingerprint
    card = (tmp_path / "export/README.md").read_text()
    assert str(generator.prior.fingerprint) in card and f"exactly {vocabulary.length} tokens" in card
    assert f"{SIZE * depth} shirt" in card


@pytest.mark.parametrize("depth", [1, 2])
def test_the_cards_program_runs(cli, tmp_path, depth):
    model = make_prior(tmp_path / "model", depth=depth)
    assert cli(exporting.main, "--model", model, "--output", tmp_path / "export", "--dtype", "bfloat16").code == 0
    card = (tmp_path / "export/README.md").read_text()
    program = card.split("```python\n")[1].split("```")[0].replace("FOLDER", str(tmp_path / "export"))
    made: dict = {}
    exec(program, made)
    assert made["images"].shape == (4, 3, 4, 6) and made["codes"].max() < SIZE
    assert next(made["prior"].parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_pair_in_16_bits_draws_what_the_rounded_pair_draws(cli, tmp_path, dtype):
    model = make_prior(tmp_path / "model", depth=2)
    result = cli(exporting.main, "--model", model, "--to", "vqgen", "--dtype", dtype, "--output", tmp_path / "small")
    assert result.code == 0, result.err
    for part in ("", "tokenizer"):
        sizes = [(folder / part / "model.safetensors").stat().st_size for folder in (tmp_path / "small", model)]
        assert sizes[0] < 0.75 * sizes[1]  # names and shapes weigh, too, in so small a model
    small, rounded = Generator.load(tmp_path / "small", "cpu", "fp32"), Generator.load(model, "cpu", "fp32")
    assert small.prior.fingerprint != rounded.prior.fingerprint
    assert small.tokenizer.fingerprint == small.prior.tokenizer_fingerprint != rounded.tokenizer.fingerprint
    kind = getattr(torch, dtype)
    for ours, theirs in ((small.prior, rounded.prior), (small.tokenizer, rounded.tokenizer)):
        for value, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert value.dtype == torch.float32 and torch.equal(value, other.to(kind).float())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert theirs.dtype == kind and "| prior | sha256 " in (tmp_path / "small/README.md").read_text()


def test_a_weight_too_large_for_its_type_is_refused(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    prior = Prior.load(model)
    with torch.no_grad():
        next(prior.backbone.parameters())[0, 0] = 1e6
    prior.save(tmp_path / "large", model / "tokenizer")
    result = cli(exporting.main, "--model", tmp_path / "large", "--dtype", "float16", "--output", tmp_path / "small")
    assert result.code == 2 and "--dtype" in result.err and "embed_tokens" in result.err and "bfloat16" in result.err
    assert not (tmp_path / "small").exists()


def test_exporting_replaces_nothing(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("mine")
    result = cli(exporting.main, "--model", model, "--output", tmp_path / "export")
    assert result.code == 2 and "--output" in result.err and "mine" in result.err
    assert [path.read_text() for path in (tmp_path / "export").iterdir()] == ["mine"]
