"""Recommended sampling settings: generation_config.json in a prior's folder, and what reads it."""

import json

import pytest
import torch
from helpers.models import SIZE, make_prior
from transformers import AutoModelForCausalLM

import vqgen.app.demo as demonstration
import vqgen.prior.export.program as exporting
import vqgen.sampling.sample as sampling
from vqgen.config_layers import MARK
from vqgen.prior.model import Prior
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings, combined, read_recommended, write_recommended
from vqgen.training.folder import run_folder

CHOSEN = SamplingSettings(temperature=0.7, min_p=0.1, guidance_scale=2.0, guidance_schedule="linear")


def recommending(folder, settings=CHOSEN):
    """A random prior whose folder recommends these settings."""
    model = make_prior(folder)
    write_recommended(model, settings, Prior.load(model).generation_config())
    return model


def drawn(folder):
    return json.loads((folder / "samples.json").read_text())


def test_the_generator_takes_what_is_recommended_where_nothing_is_given(tmp_path):
    generator = Generator.load(recommending(tmp_path / "model"), "cpu")
    names = {name: getattr(CHOSEN, name) for name in ("temperature", "min_p", "guidance_scale", "guidance_schedule")}
    assert generator.recommended.items() >= names.items()
    assert torch.equal(generator.sample(12, seed=3).codes, generator.draw(range(12), None, CHOSEN, seed=3).codes)
    plain = SamplingSettings()
    given = {name: getattr(plain, name) for name in names}
    assert torch.equal(generator.sample(12, **given).codes, generator.draw(range(12), None, plain).codes)
    # What it does not know is refused as before.
    with pytest.raises(TypeError, match="temprature"):
        generator.sample(1, temprature=1.0)


def test_the_program_takes_them_and_says_so(cli, tmp_path):
    model, words = recommending(tmp_path / "model"), ["--n", 6, "--device", "cpu"]
    result = cli(sampling.main, "--model", model, *words, "--output", tmp_path / "a", "--temperature", 0.9)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("settings:")]
    assert "--temperature 0.9" in line and "--min-p 0.1" in line and str(model / "generation_config.json") in line
    settings = drawn(tmp_path / "a")["settings"]
    assert settings == vars(SamplingSettings(0.9, min_p=0.1, guidance_scale=2.0, guidance_schedule="linear"))
    # The same settings, all of them given, continue that series; a configuration file is as good as an option.
    (tmp_path / "own.yaml").write_text("sampling: {temperature: 0.9, guidance_scale: 2.0}\n")
    config = ["--config", tmp_path / "own.yaml", "--min-p", 0.1, "--guidance-schedule", "linear"]
    assert "already" in cli(sampling.main, "--model", model, *words, "--output", tmp_path / "a", *config).out
    assert cli(sampling.main, "--model", model, *words, "--output", tmp_path / "a").code == 2


@pytest.mark.parametrize("content", [None, '{"temperature": 0.5, "do_sample": true}'])
def test_without_recommended_settings_sampling_is_plain(cli, tmp_path, content):
    model = make_prior(tmp_path / "model")
    if content:  # of transformers alone
        (model / "generation_config.json").write_text(content)
    result = cli(sampling.main, "--model", model, "--n", 3, "--output", tmp_path / "out", "--device", "cpu")
    assert result.code == 0 and "(recommended by" not in result.out, result.err
    assert drawn(tmp_path / "out")["settings"] == vars(SamplingSettings())


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"min_p": "a"}, ["min_p", "a"]),
        ({"top_p": float("nan")}, ["top-p", "nan"]),
        ({"vqgen": []}, ["vqgen", "[]"]),
        ({"vqgen": {"guidance_scale": True}}, ["guidance_scale", "True"]),
        ({"vqgen": {"guidence": 2}}, ["guidence"]),
        ({"vqgen": {"temperature": 2.0}}, ["vqgen.temperature"]),
        ({"vqgen": {"guidance_schedule": "linear"}}, ["guidance-schedule", "linear"]),
    ],
)
def test_a_file_with_other_values_is_one_line(cli, tmp_path, changed, found):
    model = recommending(tmp_path / "model")
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    result = cli(sampling.main, "--model", model, "--n", 3, "--output", tmp_path / "out")
    assert result.code == 1 and len(result.err.splitlines()) == 1, result.err
    assert all(part in result.err for part in [str(path), *found]), result.err
    assert not (tmp_path / "out").exists()


def test_given_settings_leave_out_what_depends_on_recommended_ones():
    recommended = {"guidance_scale": 4.0, "guidance_schedule": "power-cosine", "guidance_exponent": 2.0, "min_p": 0.1}
    assert combined({"guidance_scale": 1.0}, recommended) == SamplingSettings(min_p=0.1)
    linear = SamplingSettings(min_p=0.1, guidance_scale=4.0, guidance_schedule="linear")
    assert combined({"guidance_schedule": "linear"}, recommended) == linear
    assert combined({}, recommended) == SamplingSettings(**recommended)
    assert combined(vars(SamplingSettings()), recommended) == SamplingSettings()


def test_an_option_may_need_a_recommended_one(cli, tmp_path):
    words = ["--n", 3, "--device", "cpu", "--guidance-schedule", "cosine"]
    model = recommending(tmp_path / "model", SamplingSettings(guidance_scale=3.0))
    result = cli(sampling.main, "--model", model, *words, "--output", tmp_path / "a")
    assert result.code == 0 and drawn(tmp_path / "a")["settings"]["guidance_scale"] == 3
    result = cli(sampling.main, "--model", make_prior(tmp_path / "plain"), *words, "--output", tmp_path / "b")
    assert result.code == 2 and "--guidance-scale" in result.err


def test_guidance_is_left_out_where_images_have_no_class(cli, tmp_path):
    model = recommending(tmp_path / "model")
    words = ["--model", model, "--n", 2, "--device", "cpu"]
    assert cli(sampling.main, *words, "--output", tmp_path / "a").code == 0
    words += ["--init-image", tmp_path / "a" / "00000.png", "--keep-rows", 1]
    result = cli(sampling.main, *words, "--output", tmp_path / "b")
    assert result.code == 0, result.err
    settings = drawn(tmp_path / "b")["settings"]
    assert settings == vars(SamplingSettings(temperature=0.7, min_p=0.1))
    given = cli(sampling.main, *words, "--output", tmp_path / "c", "--guidance-scale", 2)
    assert given.code == 2 and "--guidance-scale" in given.err
    classes = cli(sampling.main, *words, "--output", tmp_path / "d", "--class", "bag")
    assert classes.code == 0 and drawn(tmp_path / "d")["settings"]["guidance_scale"] == 2


def test_transformers_draws_greedily_where_that_is_recommended(tmp_path):
    model = recommending(tmp_path / "model", SamplingSettings(temperature=0, guidance_scale=2.0))
    assert read_recommended(model)["temperature"] == 0 and Generator.load(model, "cpu").settings({}).temperature == 0
    theirs, prior = AutoModelForCausalLM.from_pretrained(model).eval(), Prior.load(model)
    condition = prior.conditioning.prefixes(prior.conditioning.conditions(), range(3))
    illegal = [[i] for i in range(SIZE, prior.conditioning.size)]
    tokens = theirs.generate(condition, bad_words_ids=illegal, pad_token_id=prior.conditioning.null)
    greedy = Generator.load(model, "cpu").draw(range(3), settings=SamplingSettings(temperature=0)).codes
    assert torch.equal(prior.vocabulary.to_codes(tokens[:, condition.shape[1] :]), greedy)


def test_transformers_reads_the_folder_and_draws_the_same_greedily(tmp_path):
    model = recommending(tmp_path / "model")
    theirs, prior = AutoModelForCausalLM.from_pretrained(model).eval(), Prior.load(model)
    config, length = theirs.generation_config, prior.vocabulary.length
    assert (config.temperature, config.min_p, config.top_k, config.do_sample) == (0.7, 0.1, 0, True)
    assert config.max_new_tokens == config.min_new_tokens == length
    condition = prior.conditioning.prefixes(prior.conditioning.conditions(), range(3))
    illegal = [[i] for i in range(SIZE, prior.conditioning.size)]
    tokens = theirs.generate(condition, do_sample=False, bad_words_ids=illegal, pad_token_id=prior.conditioning.null)
    greedy = Generator.load(model, "cpu").draw(range(3), settings=SamplingSettings(temperature=0)).codes
    assert torch.equal(prior.vocabulary.to_codes(tokens[:, condition.shape[1] :]), greedy)
    theirs.save_pretrained(model.parent / "saved")  # writes the file again
    assert read_recommended(model.parent / "saved") == read_recommended(model)


@pytest.mark.parametrize("to", ["vqgen", "transformers"])
def test_an_export_keeps_them(cli, tmp_path, to):
    model = recommending(tmp_path / "model")
    result = cli(exporting.main, "--model", model, "--to", to, "--output", tmp_path / "export")
    assert result.code == 0, result.err
    assert read_recommended(tmp_path / "export") == read_recommended(model)


def test_a_run_that_starts_anew_removes_them(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "generation_config.json").write_text("{}")
    assert folder / "generation_config.json" in run_folder(folder).own_files()


def test_the_demo_leaves_its_settings_in_the_folder_of_its_prior(cli, tmp_path, monkeypatch):
    demo, model = tmp_path / "demo", make_prior(tmp_path / "demo" / "prior")
    (model / "config.yaml").write_text(MARK)
    for name in ("tokenizer.train.train", "tokenizer.codes.writer.tokenize", "prior.train.train"):
        monkeypatch.setattr(f"vqgen.{name}", lambda config: None)
    monkeypatch.setattr("vqgen.evaluation.report.program.write_report", lambda config: None)
    assert cli(demonstration.main, "--output", demo).code == 0
    assert Generator.load(model, "cpu").settings({}) == SamplingSettings(**drawn(demo / "samples")["settings"])
    # Those of a search stay.
    write_recommended(model, CHOSEN, {})
    assert cli(demonstration.main, "--output", demo).code == 0
    assert Generator.load(model, "cpu").settings({}) == CHOSEN
