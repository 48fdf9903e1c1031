"""vqgen-export: folders that transformers itself reads."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.models import SIZE, make_prior, make_square_prior, text_part
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import vqgen
import vqgen.prior.export.program as exporting
from vqgen.prior.export.card import task_of
from vqgen.prior.model import Prior
from vqgen.prior.parts.source import MaskedSource
from vqgen.prior.selection import BEST, NATS, NATS_OF_HOLES, best_validation
from vqgen.sampling import sample
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.shipped import SHIPPED


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


def test_a_prior_of_the_package_is_exported_by_its_name(cli, tmp_path, monkeypatch):
    model = make_prior(tmp_path / "model")
    monkeypatch.setitem(SHIPPED, "packaged", model)
    exported(cli, Path("packaged"), tmp_path / "export")
    assert Prior.load(tmp_path / "export").fingerprint == Prior.load(model).fingerprint


# ---- the model card ----


def exported(cli, model: Path, output: Path, *words: object) -> tuple[dict, str, str]:
    """Front matter and text of the card of an export, and what the program printed."""
    result = cli(exporting.main, "--model", model, "--output", output, *words)
    assert result.code == 0, result.err
    _, front, text = (output / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text, result.out


def test_both_layouts_are_model_folders_with_a_fingerprint_in_the_weights(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    for layout in ("transformers", "vqgen"):
        _, text, out = exported(cli, model, tmp_path / layout, "--to", layout)
        assert f"hf upload USERNAME/{layout} {tmp_path / layout}" in out.splitlines()[-1]
        prior = Generator.load(tmp_path / layout, "cpu", "fp32").prior
        assert prior.fingerprint == Prior.load(model).fingerprint
        with safe_open(tmp_path / layout / "model.safetensors", "pt") as file:
            known = {"format": "pt", "name": "vqgen prior", "version": vqgen.__version__}
            assert file.metadata() == {**known, "fingerprint": prior.fingerprint}
        assert prior.fingerprint in text


def test_the_card_states_what_is_given_and_nothing_else(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    front, text, _ = exported(cli, model, tmp_path / "plain")
    assert front.keys() == {"library_name", "pipeline_tag", "tags"} and "grid.png" not in text
    assert "nats_per_token" not in text and "--temperature" not in text
    words = ["--license", "cc-by-4.0", "--dataset", "uoft-cs/cifar10", "mnist"]
    front, text, _ = exported(cli, model, tmp_path / "stated", *words)
    assert (front["license"], front["datasets"]) == ("cc-by-4.0", ["uoft-cs/cifar10", "mnist"])
    assert "cc-by-4.0" in text and "uoft-cs/cifar10, mnist" in text
    for option, value in (("--license", "my own: licence"), ("--dataset", "/home/me/data/")):
        refused = cli(exporting.main, "--model", model, "--output", tmp_path / "no", option, value)
        assert refused.code == 2 and option in refused.err and len(refused.err.splitlines()) == 1


def test_metrics_are_those_of_these_weights(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    rows = [{"heldout/nats_per_token": nats, "step": step} for step, nats in ((1, 3.5), (2, 3.25), (3, 3.75))]
    lines = [json.dumps(row) for row in [*rows, {"step": 4, "train/loss": 1.0}]]
    (model / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "heldout/na']))
    receipt = {
        "kind": "vqgen receipt",
        "program": "likelihood",
        "options": {"split": "test"},
        "fingerprints": {"prior": Prior.load(model).fingerprint},
        "counts": {"images": 90},
        "metrics": {"perplexity": 26.25, "nats_by_class": {"shoe": 1.125}, "psnr": {"restored": 21.5}, "at": {"9": {}}},
        "environment": {},
    }
    (model / "likelihood.json").write_text(json.dumps(receipt))
    other = {**receipt, "fingerprints": {"prior": "0" * 64}, "metrics": {"perplexity": 17.75}}
    (model / "other.json").write_text(json.dumps(other))
    # Those of samples are of the decoder, too, which --tokenizer may have replaced.
    for name, decoder in ("former", "1" * 64), ("own", str(Prior.load(model).tokenizer_fingerprint)):
        fingerprints = receipt["fingerprints"] | {"tokenizer": decoder}
        about = {"program": "samples", "fingerprints": fingerprints, "metrics": {f"fd-{name}": 7.5}}
        (model / f"{name}.json").write_text(json.dumps(receipt | about))
    (model / "damaged.json").write_text('{"kind": ')
    _, text, _ = exported(cli, model, tmp_path / "longer")
    assert "validation images" not in text, "a run that goes on has other weights than those of its rows"
    (model / "finished.json").write_text('{"steps": 4}')
    _, text, _ = exported(cli, model, tmp_path / "export", "--dtype", "float16")
    assert "fd-own" in text and "fd-former" not in text
    table = [line for line in text.splitlines() if re.match(r"\| (nats_per_token|perplexity|nats_by_class) ", line)]
    assert len(table) == 2 and "3.25" in table[0] and "step 2" in table[0]
    assert "26.25" in table[1] and "test split" in table[1] and "90 images" in table[1]
    assert "1.125" not in text and "| psnr.restored | 21.5 |" in text
    assert "17.75" not in text and "float16" in text.split("## Metrics")[1].split("##")[0]


LINES = [
    "[" * 100_000,
    '{"step": 3, "heldout/nats_per_token": ' + "9" * 400 + "}",
    '{"step": 3, "heldout/nats_per_token": true}',
    '{"heldout/nats_per_token": 1.0}',
    "[1]",
    '{"step": 4, "heldout/na',
]


@pytest.mark.parametrize("value", ["null", '"nan"', '"x"', "true", "1e300", "[1]"])
def test_lines_of_a_history_that_are_no_metrics_are_left_out(cli, tmp_path, value):
    model = make_prior(tmp_path / "model")
    rows = [f'{{"step": 5, "heldout/{NATS}": 3.25, "heldout/bits_per_dimension": {value}}}', *LINES]
    if value in ("[1]", "1e300"):  # then the row is none
        rows.append(f'{{"step": 5, "heldout/{NATS}": 3.25}}')
    (model / "metrics.jsonl").write_text("\n".join(rows))
    (model / "finished.json").write_text('{"steps": 5}')
    _, text, _ = exported(cli, model, tmp_path / "export")
    assert f"| {NATS} | 3.25 | validation images, step 5 |" in text and "| bits_per_dimension |" not in text


def test_metrics_of_a_receipt_that_are_no_numbers_are_left_out(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    receipt = {"kind": "vqgen receipt", "program": "likelihood", "options": {}, "counts": {}}
    receipt["fingerprints"] = {"prior": Prior.load(model).fingerprint}
    receipt["metrics"] = {"perplexity": 26.25, "psnr": math.nan, "ssim": "x", "lpips": True}
    (model / "likelihood.json").write_text(json.dumps(receipt))
    _, text, _ = exported(cli, model, tmp_path / "export")
    assert "| perplexity | 26.25 |" in text and not re.search(r"\| (psnr|ssim|lpips) \|", text)


def test_the_validation_is_the_one_whose_weights_an_inpainting_run_saves(cli, tmp_path):
    model = make_square_prior(tmp_path / "model", MaskedSource(0.5))
    found = {1: (5.0, 6.0), 2: (5.1, 5.0), 3: (5.1, 5.0)}
    names = [f"heldout/{name}" for name in (NATS, NATS_OF_HOLES)]
    rows = [{"step": step, **dict(zip(names, values))} for step, values in found.items()]
    assert (best_validation(rows, 0.5) or {})["step"] == 2 and (best_validation(rows, 0.05) or {})["step"] == 1
    assert best_validation([{"step": 1}, {names[0]: math.nan}], 0.5) is None
    # What a run says that it saved counts, as where it went on with other images after step 1.
    told = [rows[0], {"step": 2, BEST: 5.1}, rows[1], {"step": 3, BEST: 5.05}, rows[2], {"step": 4, BEST: 1.0}]
    assert (best_validation([{"step": 1, BEST: 5.0}, *told], 0.05) or {})["step"] == 3
    (model / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (model / "finished.json").write_text('{"steps": 3}')
    _, text, _ = exported(cli, model, tmp_path / "export")
    assert f"| {NATS} | 5.1 | validation images, step 2 |" in text and f"| {NATS_OF_HOLES} | 5 |" in text


@pytest.mark.parametrize("unlabelled", [True, False])
def test_guidance_is_stated_where_the_prior_has_it(cli, tmp_path, unlabelled):
    model = make_prior(tmp_path / "model")
    about = json.loads((model / "vqgen.json").read_text()) | {"label_dropout": 0}
    (model / "vqgen.json").write_text(json.dumps(about | ({"unlabelled": True} if unlabelled else {})))
    _, text, _ = exported(cli, model, tmp_path / "export")
    assert (f"prefix [{SIZE + 3}] in place of" in text) == unlabelled != ("no guidance" in text)


def test_guidance_by_text_alone_is_stated(cli, tmp_path):
    model = make_square_prior(tmp_path / "model", text_part(["a shoe", "a bag"]), names=None)
    _, text, _ = exported(cli, model, tmp_path / "export")
    assert "absent part (above) in place of those of text" in text and "no guidance" not in text


def test_recommended_settings_are_passed_on_and_stated(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    settings = {"temperature": 0.875, "top_k": 0, "vqgen": {"guidance_scale": 2.5, "guidance_interval": [0.25, 1.0]}}
    (model / "generation_config.json").write_text(json.dumps(settings))
    for layout in ("transformers", "vqgen"):
        _, text, _ = exported(cli, model, tmp_path / layout, "--to", layout)
        assert "--temperature 0.875" in text and "--guidance-scale 2.5 --guidance-interval 0.25 1.0" in text
        written = json.loads((tmp_path / layout / "generation_config.json").read_text())
        assert settings.items() <= written.items() and written["max_new_tokens"] == 6


def test_recommended_settings_that_are_none_are_not_dropped_unsaid(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"vqgen": [1]}))
    refused = cli(exporting.main, "--model", model, "--output", tmp_path / "export")
    assert refused.code == 1 and "generation_config.json: found vqgen [1]" in refused.err
    assert not (tmp_path / "export").exists()


def test_the_grid_of_samples_of_this_prior_is_shown(cli, tmp_path):
    model, other = make_prior(tmp_path / "model"), make_prior(tmp_path / "other", "gpt2")
    assert cli(sample.main, "--model", model, "--n", 3, "--output", tmp_path / "samples", "--device", "cpu").code == 0
    _, text, _ = exported(cli, model, tmp_path / "export", "--samples", tmp_path / "samples")
    assert "(grid.png)" in text
    assert (tmp_path / "export/grid.png").read_bytes() == (tmp_path / "samples/grid.png").read_bytes()
    for words in (["--model", other, "--samples", tmp_path / "samples"], ["--model", model, "--samples", tmp_path]):
        refused = cli(exporting.main, *words, "--output", tmp_path / "no")
        assert refused.code == 1 and "--samples" in refused.err and len(refused.err.splitlines()) == 1
        assert not (tmp_path / "no").exists()


def test_the_task_is_that_of_the_parts(tmp_path):
    def task(*parts: str) -> str:
        made = SimpleNamespace(parts=[SimpleNamespace(name=name) for name in (*parts, "class")])
        made.paired_source = "source" if "source" in parts else None
        return task_of(SimpleNamespace(conditioning=made))  # type: ignore[arg-type]

    assert task() == "unconditional-image-generation" and task("text") == "text-to-image"
    assert task("source") == task("text", "source") == "image-to-image"


@pytest.mark.parametrize("to", ["transformers", "vqgen"])
def test_another_decoder_of_the_same_codes_takes_the_place(cli, tmp_path, to):
    model = make_prior(tmp_path / "model")
    tokenizer = Tokenizer.load(model / "tokenizer")
    with torch.no_grad():
        tokenizer.last_weight.mul_(2)
    tokenizer.save(tmp_path / "better")
    words = ["--model", model, "--tokenizer", tmp_path / "better", "--to", to, "--output"]
    assert cli(exporting.main, *words, tmp_path / "export").code == 0
    before, after = (Generator.load(folder, "cpu", "fp32").sample(2) for folder in (model, tmp_path / "export"))
    assert torch.equal(before.codes, after.codes) and not torch.equal(before.images, after.images)
    # Samples with the former decoder do not show what the folder draws.
    assert cli(sample.main, "--model", model, "--n", "1", "--output", tmp_path / "samples", "--device", "cpu").code == 0
    result = cli(exporting.main, *words, tmp_path / "again", "--samples", tmp_path / "samples")
    assert result.code == 1 and "--samples" in result.err and not (tmp_path / "again").exists()
    # Another encoder has other codes.
    with torch.no_grad():
        next(tokenizer.encoder.parameters()).mul_(2)
    tokenizer.save(tmp_path / "other")
    words[3] = tmp_path / "other"
    result = cli(exporting.main, *words, tmp_path / "again")
    assert result.code == 1 and str(tmp_path / "other") in result.err and not (tmp_path / "again").exists()
