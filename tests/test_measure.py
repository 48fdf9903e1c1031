"""vqgen-likelihood and vqgen-export: figures against a naive loop, and folders that transformers itself reads."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from processes import run
from test_prior import NAMES, write_codes
from torchvision.io import decode_image
from transformers import AutoModelForCausalLM

import vqgen.prior.export as exporting
import vqgen.prior.measure as measuring
from vqgen.prior.conditioning import Classes, Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import ModelConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import QuantizerConfig

SIZE = 12


def make_prior(folder: Path, backbone="llama", depth=1, names=NAMES) -> Path:
    """A random prior of 2x3 codes with its tokenizer."""
    torch.manual_seed(0)
    model = ModelConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    kind = {"quantizer": "residual", "depth": depth} if depth > 1 else {}
    tokenizer = Tokenizer(TokenizerConfig([4, 6], 3, model, QuantizerConfig(codebook_size=SIZE, code_dim=4, **kind)))
    mark = tokenizer.save(folder / "made-of")
    conditioning = Conditioning(Vocabulary(SIZE, depth, (2, 3)), [Classes(len(names or []), names)])
    prior = Prior(PriorConfig(backbone, dim=16, layers=2, heads=2), conditioning, (3, 4, 6), mark)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    prior.save(folder, folder / "made-of")
    return folder


def codes_for(folder: Path, model: Path, **options) -> Path:
    """Code files as if of this prior's tokenizer."""
    folder.mkdir()
    write_codes(folder, size=SIZE, **options)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = Prior.load(model).tokenizer_fingerprint
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def naive(prior: Prior, row: list[int]) -> list[float]:
    """-log p of each code of a sequence by a full softmax over one prefix at a time."""
    found = []
    for position in range(1, len(row)):
        with torch.no_grad():
            scores = prior(torch.tensor([row[:position]]))[0, -1].double().tolist()
        found.append(math.log(sum(math.exp(score) for score in scores)) - scores[row[position]])
    return found


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("unconditional", [False, True])
def test_figures_are_those_of_a_naive_loop(cli, tmp_path, depth, unconditional):
    model = make_prior(tmp_path / "model", depth=depth)
    labels = torch.tensor([0, 1, 2, 0, -1, 2, 2, 0, 1]).numpy()
    folder = codes_for(tmp_path / "codes", model, depth=depth, labels=labels)
    words = ["--model", model, "--codes", folder, "--split", "train", "--batch-size", 4]
    result = cli(measuring.main, *words, *(["--unconditional"] if unconditional else []))
    assert result.code == 0, result.err
    output = model / ("likelihood-train-unconditional" if unconditional else "likelihood-train")
    found = json.loads((output / "likelihood.json").read_text())

    prior, files = Prior.load(model), CodeFiles(folder, "train")
    vocabulary = prior.vocabulary
    codes = torch.as_tensor(files.gather(range(9), [0] * 9)).long()  # type: ignore[arg-type]
    given = torch.full((9,), -1) if unconditional else torch.from_numpy(labels)
    tokens = torch.cat([prior.conditioning.classes.of_labels(given)[:, None], vocabulary.to_tokens(codes)], 1)
    each = torch.tensor([naive(prior, row) for row in tokens.tolist()])
    mean = each.mean().item()
    assert found["nats_per_token"] == pytest.approx(mean, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["bits_per_dimension"] == pytest.approx(mean * 6 * depth / math.log(2) / 72, rel=1e-5)
    grid = each.mean(0).view(2, 3, depth).permute(2, 0, 1).squeeze(0)
    torch.testing.assert_close(torch.tensor(found["nats_by_position"]), grid, rtol=1e-4, atol=1e-4)
    groups = (
        {"no class": range(9)}
        if unconditional
        else {**dict(zip(NAMES, ([0, 3, 7], [1, 8], [2, 5, 6]))), "no class": [4]}
    )
    assert {name: entry["images"] for name, entry in found["by_class"].items()} == {
        k: len(v) for k, v in groups.items()
    }
    for name, rows in groups.items():
        own = each[list(rows)].mean().item()
        assert found["by_class"][name]["nats_per_token"] == pytest.approx(own, rel=1e-5)
    picture = decode_image(str(output / "positions.png"))
    assert picture.shape == (3, 48, 72 * depth + 6 * (depth - 1))
    assert f"{mean:.4f} nats per token" in result.out


def test_the_map_is_dark_where_values_are_low():
    picture = measuring.heat_map(torch.tensor([[0.0, 1.0], [3.0, 2.0]])).float().mean(0)
    cells = picture.view(2, 24, 2, 24).mean((1, 3)).flatten()[[0, 1, 3, 2]]
    assert cells.tolist() == sorted(cells.tolist()) and cells[3] > 200 > 30 > cells[0]
    assert measuring.heat_map(torch.ones(2, 2)).unique().numel() == 2  # no difference, one colour


def test_other_codes_are_refused(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    folder = codes_for(tmp_path / "codes", model)
    (other := tmp_path / "other").mkdir()
    write_codes(other, size=SIZE)
    for words, part in (
        (["--codes", other, "--split", "train"], "holds codes of the tokenizer ffffffffffff"),
        (["--codes", folder], "holds no heldout images"),
        (["--codes", folder, "--batch-size", 0], "--batch-size: found 0"),
        (["--codes", tmp_path / "nowhere"], "nowhere"),
        (["--codes", folder, "--model", tmp_path / "nowhere"], "nowhere"),
    ):
        result = cli(measuring.main, "--model", model, *words)
        assert result.code and part in result.err and len(result.err.strip().splitlines()) == 1, result.err
    renamed = codes_for(tmp_path / "renamed", model, names=["a", "b", "c"])
    words = ["--model", model, "--codes", renamed, "--split", "train"]
    assert "has the classes a, b, c, the prior has shirt" in cli(measuring.main, *words).err
    assert cli(measuring.main, *words, "--unconditional").code == 0


def test_every_precision_measures(tmp_path):
    model = make_prior(tmp_path / "model")
    codes_for(tmp_path / "codes", model)
    words = ["--model", model, "--codes", tmp_path / "codes", "--split", "train", "--n", 5, "--precision", "bf16"]
    run("vqgen.prior.measure", *words).ok()  # a process of its own: Accelerate's state is global
    found = json.loads((model / "likelihood-train-5-bf16/likelihood.json").read_text())
    assert found["precision"] == "bf16" and found["images"] == 5


def test_a_tokenizer_of_another_prior_is_not_exported(cli, tmp_path):
    model, other = make_prior(tmp_path / "model"), make_prior(tmp_path / "other", depth=2)
    shutil.rmtree(model / "tokenizer")
    shutil.copytree(other / "tokenizer", model / "tokenizer")
    result = cli(exporting.main, "--model", model, "--output", tmp_path / "export")
    assert result.code == 1 and "name the tokenizer that made the codes" in result.err
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
    result = cli(exporting.main, "--model", model, "--output", tmp_path / "export")
    assert result.code == 2 and "exists; choose another" in result.err
    assert not list((tmp_path / "export").iterdir())
