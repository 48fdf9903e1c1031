"""The rules and the plan of vqgen-train, with what a trial measures made up."""

import json
import math
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vqgen.app import planner, rules, trial
from vqgen.app import survey as surveys
from vqgen.app.configurations import Configurations
from vqgen.app.machine import Machine
from vqgen.app.made_up import write_codes
from vqgen.app.plan import MOST_SECONDS, TRIAL, Expected, Plan, Request, Row, saved_plan
from vqgen.app.planner import Planner
from vqgen.app.survey import Survey, look
from vqgen.app.trial import Measured, Stage, tried
from vqgen.config import parse
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.tasks.options import SettingsConfig
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.train import PriorTraining
from vqgen.sampling.sample import SampleConfig
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.data.sources import open_source
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.train import TokenizerTraining

PHOTOS = Survey(1000, 50, 0, 0, 0, 0, 480, 640, 480, 3, 0.0)
REQUEST = Request("photos", None, None, True, None, None, [], [], [], [])
CPU = Machine("2 CPU threads", False, 8e9)


# ---- rules ----


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([rules.FEW, rules.MANY]))
def test_the_grid_has_at_most_so_many_codes_and_not_far_fewer(rows: int, columns: int, most: int) -> None:
    size, factor = [8 * rows, 8 * columns], rules.factor([8 * rows, 8 * columns], most)
    codes = size[0] * size[1] / factor**2
    assert factor in (4, 8, 16, 32)
    assert codes <= most or factor == 32
    assert codes > most / 4 or factor == 4


@given(st.integers(1, 10**10), st.integers(1, 10**10))
def test_more_tokens_never_make_a_codebook_or_a_prior_smaller(one: int, two: int) -> None:
    less, more = sorted((one, two))
    assert rules.codebook_size(less) <= rules.codebook_size(more)
    assert rules.prior_for(less) <= rules.prior_for(more)
    assert rules.codebook_size(less) in [2**n for n in range(8, 15)]


def test_the_rules_give_what_the_models_they_come_from_have() -> None:
    demo, cifar, imagenet = 8550 * 64, 50_000 * 64, 1_281_167 * 256
    assert (rules.codebook_size(demo), rules.codebook_size(imagenet)) == (512, 16384)
    assert rules.PRIORS[rules.prior_for(demo)].dim == 256
    assert rules.PRIORS[rules.prior_for(cifar)].dim == 384
    assert rules.PRIORS[rules.prior_for(imagenet)].dim == 1024


def test_images_are_not_enlarged() -> None:
    assert [rules.image_side(side) for side in (10, 28, 32, 63, 64, 160, 255, 4000)] == [
        32,
        32,
        32,
        32,
        64,
        128,
        128,
        256,
    ]


@given(st.floats(1, 1e6), st.floats(0, 1e6), st.floats(1e-3, 1e4), st.floats(0, 300))
def test_the_time_is_shared_without_rest(total: float, encoding: float, longest: float, search: float) -> None:
    found = rules.share_time(total, encoding, longest, search)
    if found is None:
        least, most = rules.DRAWING
        assert encoding + search + min(max(least, total / 20), most) > total / 2
    else:
        shares = (found.tokenizer, found.encoding, found.prior, found.settings, found.drawing)
        assert sum(shares) == pytest.approx(total) and found.settings == search
        assert min(found.tokenizer, found.prior) > 0 and found.prior <= found.tokenizer + 1e-6 * total
        assert found.prior <= longest * (1 + 1e-9)


@given(st.integers(1, len(rules.PRIORS) - 1), st.integers(1, 10**9))
def test_priors_that_could_not_see_enough_are_passed_over(index: int, tokens: int) -> None:
    found, weights = rules.smaller(index, tokens), [prior.weights for prior in rules.PRIORS]
    assert found < index
    for passed in range(found + 1, index):  # even twice as fast as its weights say
        assert 2 * tokens * weights[index] / weights[passed] < weights[passed] / 2


def test_decoding_takes_a_part_of_the_search() -> None:
    plain = rules.search(3600, 0.1, 10, True, 10) or pytest.fail()
    slow = rules.search(3600, 0.1, 10, True, 10, 60.0) or pytest.fail()
    assert slow.seconds == plain.seconds and slow.images < plain.images and slow.steps < plain.steps
    assert rules.search(3600, 0.1, 10, True, 10, 179.0) is None


# ---- survey ----


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_a_survey_finds_sizes_colours_classes_and_captions(tmp_path: Path) -> None:
    for index in range(40):
        size = (50, 40) if index % 4 else (500, 400)
        save(tmp_path / ("a" if index % 2 else "b") / f"{index}.png", Image.new("RGB", size, (index, index, index)))
    (tmp_path / "a" / "broken.png").write_bytes(b"no image")
    (tmp_path / "a" / "1.txt").write_text("a grey square")
    found = look(str(tmp_path), "txt")
    assert (found.height, found.width, found.side, found.channels, found.classes) == (40, 50, 40, 1, 2)
    assert found.train + found.heldout == 41 and found.captions + len(found.prompts) == 1
    assert found.unreadable in (0, pytest.approx(1 / found.train)) and found.decoding > 0
    save(tmp_path / "b" / "0.png", Image.new("RGB", (50, 40), (200, 0, 0)))
    for name in "2", "4", "6":
        save(tmp_path / "b" / f"{name}.png", Image.new("RGB", (50, 40), (200, 0, 0)))
    assert look(str(tmp_path), None).channels == 3


def test_imports_are_not_timed_as_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(4):
        save(tmp_path / f"{index}.png", Image.new("RGB", (50, 40)))
    source, calls = open_source(str(tmp_path), "train", 0.5), list[str]()
    monkeypatch.setattr(surveys, "fit", lambda *_: calls.append("fit"))
    monkeypatch.setattr(surveys, "time", SimpleNamespace(perf_counter=lambda: calls.append("clock") or 0.0))
    assert surveys._decoding(source) == 0.0 and calls == ["fit", *["clock", "fit", "clock"] * len(source)]


def test_a_survey_of_nothing_that_can_be_read_is_refused(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="--data"):
        look(str(tmp_path), None)


# ---- plans ----


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """What was tried; a trial takes a time in proportion to the pixels, or to the weights and codes."""
    found: list[Stage] = []

    def measure(stage: Stage) -> Measured:
        found.append(stage)
        tokenizer = parse(TokenizerTraining, stage.tokenizer)
        if not stage.prior:
            pixels = math.prod(tokenizer.images.size) * tokenizer.run.batch_size
            memory = 4e9 * pixels / 2**16 / tokenizer.run.accumulate
            return Measured(
                1.0, pixels / 1e5, 5.0, tokenizer.run.batch_size, 8, memory, 1e8, encoded=200.0, judged=pixels / 1e5
            )
        prior = parse(PriorTraining, [*stage.prior, "--codes", "codes"])
        weights = 12 * prior.model.dim**2 * prior.model.layers
        made = Measured(1.0, weights * 64 / 1e8, 1.0, prior.run.batch_size, 20, 1e9, 0.0)
        return replace(made, drawn=10.0, drawing_memory=1.2e9)

    monkeypatch.setattr(planner, "tried", measure)
    return found


def plan(
    output: Path, minutes: float, request: Request = REQUEST, survey: Survey = PHOTOS, machine: Machine = CPU
) -> dict[str, Expected]:
    return Planner(request, survey, machine, time.perf_counter() + 60 * minutes, output).plan()[1]


def read(output: Path) -> tuple[TokenizerTraining, TokenizeConfig, PriorTraining]:
    files = {name: ["--config", str(output / "plan" / f"{name}.yaml")] for name in ("tokenizer", "codes", "prior")}
    codes = parse(TokenizeConfig, files["codes"])
    return parse(TokenizerTraining, files["tokenizer"]), codes, parse(PriorTraining, [*files["prior"], "--codes", "c"])


def test_a_plan_keeps_to_the_time(tmp_path: Path, trials: list[Stage]) -> None:
    for minutes in (10, 60, 600):
        began = time.perf_counter()
        expected = plan(tmp_path, minutes)
        planning = time.perf_counter() - began
        assert 60 * minutes - planning <= sum(found.seconds for found in expected.values()) <= 60 * minutes
        assert expected["tokenizer"].steps > 0 and expected["prior"].steps > 0
        # One process does all: what the tokenizer keeps is added to what comes later.
        assert (expected["prior"].memory, expected["samples"].memory) == (1.1e9, 1.3e9)


def test_little_time_makes_images_smaller(tmp_path: Path, trials: list[Stage]) -> None:
    sides = []
    for minutes in (6, 60, 6000):
        plan(tmp_path, minutes)
        tokenizer, _, _ = read(tmp_path)
        sides.append(tokenizer.images.size[0])
        assert rules.FEW <= math.prod(tokenizer.images.size) / tokenizer.model.factor**2 <= rules.MANY
    assert sides[0] < sides[1] <= sides[2] == 256


@pytest.mark.slow
def test_samples_that_larger_images_rule_out_are_no_reason_against_smaller_ones(
    tmp_path: Path, trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, tried = planner.tried, set()

    def refusing(stage: Stage) -> Measured:
        side = parse(TokenizerTraining, stage.tokenizer).images.size[0]
        tried.add(side) if stage.prior else None
        return replace(measure(stage), refused="--size: found 96 96 (made up)" if stage.prior and side > 64 else "")

    monkeypatch.setattr(planner, "tried", refusing)
    survey = replace(PHOTOS, height=128, width=128, side=128)
    for minutes in range(4, 60):  # the least time in which a prior of 128 pixels is tried
        with suppress(UsageError):
            plan(tmp_path, minutes, survey=survey)
        if 128 in tried:
            break
    assert read(tmp_path)[0].images.size == [64, 64] and {64, 128} <= tried
    with pytest.raises(UsageError, match="--size: found 96 96"):
        plan(tmp_path, 6000, survey=survey)


def test_what_the_user_says_is_kept(tmp_path: Path, trials: list[Stage]) -> None:
    request = replace(REQUEST, size=[64, 96], channels=1, flip=False, tokenizer=["--codebook-size", "300"])
    plan(tmp_path, 60, request, replace(PHOTOS, train=100_000))
    tokenizer, codes, _ = read(tmp_path)
    assert tokenizer.images.size == [64, 96] and tokenizer.images.channels == 1
    assert not tokenizer.images.flip and not codes.images.flip
    assert all(stage.tokenizer[-2:] == ["--codebook-size", "300"] for stage in trials)


def test_the_prior_is_tried_with_the_source_of_the_encoding(tmp_path: Path, trials: list[Stage]) -> None:
    plan(tmp_path, 60, replace(REQUEST, codes=["--source=grey"]))
    assert {str(parse(TokenizeConfig, stage.codes).source) for stage in trials if stage.prior} == {"['grey']"}


def test_memory_splits_steps_into_parts(tmp_path: Path, trials: list[Stage]) -> None:
    plan(tmp_path, 600, replace(REQUEST, size=[128, 128]), machine=replace(CPU, memory=3e9))
    tokenizer, _, _ = read(tmp_path)
    assert tokenizer.run.accumulate > 1
    with pytest.raises(UserError, match="--size"):
        plan(tmp_path, 600, replace(REQUEST, size=[128, 128]), machine=replace(CPU, memory=3e7))


def test_given_parts_of_a_step_are_kept_where_memory_is_short(tmp_path: Path, trials: list[Stage]) -> None:
    request = replace(REQUEST, size=[128, 128], tokenizer=["--accumulate=2"])
    with pytest.raises(UserError, match="--size"):
        plan(tmp_path, 600, request, machine=replace(CPU, memory=3e7))
    assert len(trials) == 1


def test_the_plan_goes_by_what_is_given(tmp_path: Path, trials: list[Stage]) -> None:
    many = replace(PHOTOS, train=50_000, side=32)
    sizes = []
    for words in ([], ["--multipliers=1,2,4,4"], ["--quantizer=residual", "--depth=4"]):
        plan(tmp_path, 6000, replace(REQUEST, tokenizer=words), many)
        sizes.append(read(tmp_path)[2].model.dim)
    assert sizes[1] < sizes[0] < sizes[2], "of 4, 64 and 256 codes an image"
    request = replace(REQUEST, tokenizer=["--steps=200000"], prior=["--steps=100"])
    expected, tried = plan(tmp_path, 60, request, many), trials[-1]
    assert (expected["tokenizer"].steps, expected["prior"].steps) == (200_000, 100)
    found = planner.tried(tried)
    assert expected["prior"].seconds == pytest.approx(found.start + 100 * found.step + found.validations)
    assert 5 < expected["prior"].minutes < 40, "its share, where they are not given any more"
    assert read(tmp_path)[2].model.dropout == 0, "it passes over the images less than once"
    assert plan(tmp_path, 60, replace(REQUEST, prior=["--steps=2000000000"]), many)["prior"].seconds == MOST_SECONDS
    expected = plan(tmp_path, 60, replace(REQUEST, prior=["--epochs=2"]), many)
    assert expected["prior"].steps == math.ceil(2 * 50_000 / read(tmp_path)[2].run.batch_size)


def test_given_views_are_planned(tmp_path: Path, trials: list[Stage]) -> None:
    million, seconds = replace(PHOTOS, train=1_000_000), []
    for words in ([], ["--views=4"]):
        seconds.append(plan(tmp_path, 60_000, replace(REQUEST, codes=words), million)["codes"].seconds)
        found = parse(TokenizeConfig, ["--config", str(tmp_path / "plan" / "codes.yaml"), *words])
        assert found.images.augments == (found.views > 1) == bool(words)
        assert "views: 1" in (tmp_path / "plan" / "codes.yaml").read_text(), (
            "the option may be left out until the stage begins"
        )
    assert seconds[1] == pytest.approx(4 * seconds[0], rel=0.01)


def test_without_weights_there_is_no_perceptual_loss_and_with_them_there_is(
    tmp_path: Path, trials: list[Stage]
) -> None:
    plan(tmp_path, 60)
    tokenizer, _, _ = read(tmp_path)
    assert tokenizer.loss.perceptual_weights is None and not tokenizer.gan.gan_weight
    plan(tmp_path, 60, replace(REQUEST, perceptual_weights="weights.safetensors"))
    tokenizer, _, _ = read(tmp_path)
    assert tokenizer.loss.perceptual_weights == "weights.safetensors" and tokenizer.loss.perceptual_weight
    assert tokenizer.gan.gan_weight


def test_few_images_get_more_views_and_dropout_than_many(tmp_path: Path, trials: list[Stage]) -> None:
    plan(tmp_path, 600)
    _, few, prior = read(tmp_path)
    plan(tmp_path, 60_000, survey=replace(PHOTOS, train=1_000_000))
    _, many, large = read(tmp_path)
    assert few.views > many.views == 1 and prior.model.dropout > large.model.dropout
    assert large.model.dim > prior.model.dim


def test_the_more_passes_the_more_dropout(tmp_path: Path, trials: list[Stage]) -> None:
    found = []
    for minutes in (20, 240, 6000):
        expected = plan(tmp_path, minutes, survey=replace(PHOTOS, train=15_000))
        prior = read(tmp_path)[2]
        passes = expected["prior"].steps * prior.run.batch_size / 15_000
        assert prior.model.dropout == rules.dropout(passes)
        found.append(prior.model.dropout)
    assert found == sorted(found) and found[0] == 0 < found[1] < found[2] == rules.MOST_DROPOUT


def test_fewer_views_are_encoded_where_that_takes_long(tmp_path: Path, trials: list[Stage]) -> None:
    seen = []
    for minutes in (12, 30, 600):
        plan(tmp_path, minutes, survey=replace(PHOTOS, train=15_000))
        seen.append(read(tmp_path)[1].views)
    assert seen == [1, 2, 4]


def test_a_short_training_gets_a_small_codebook(tmp_path: Path, trials: list[Stage]) -> None:
    sizes = []
    for minutes in (14, 6000):
        plan(tmp_path, minutes, survey=replace(PHOTOS, train=60_000, side=32))
        sizes.append(read(tmp_path)[0].quantizer.codes)
    assert sizes[0] < sizes[1] == 4096


def test_few_images_are_no_reason_for_few_steps(tmp_path: Path, trials: list[Stage]) -> None:
    expected = plan(tmp_path, 600, survey=replace(PHOTOS, train=50, heldout=3))
    assert expected["prior"].steps >= 600
    assert read(tmp_path)[0].images.size[0] > 32


def test_guidance_is_planned_where_images_of_a_class_are_drawn(tmp_path: Path, trials: list[Stage]) -> None:
    found = []
    classes, captions = replace(PHOTOS, classes=3), replace(PHOTOS, captions=900)
    undropped, untold = (replace(REQUEST, prior=[f"--{name}-dropout=0"]) for name in ("label", "text"))
    prompted = replace(captions, prompts=("a shirt", "no"))
    given = [(classes, REQUEST), (prompted, REQUEST), (captions, REQUEST), (PHOTOS, REQUEST), (classes, undropped)]
    sourced = replace(REQUEST, samples=["--source-image=a.png"])
    for survey, request in [*given, (prompted, untold), (classes, sourced)]:
        plan(tmp_path, 60, request, survey)
        file = ["--config", str(tmp_path / "plan" / "samples.yaml")]
        found.append(parse(SampleConfig, file).sampling.guidance_scale)
    assert min(found[:2]) > 1 and found[2:] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("classes", "samples", "prior", "guided"),
    [
        (0, ["--prompt=a red apple"], [], True),
        (0, ["--prompt-file=my.txt"], [], True),
        (0, ["--prompt=a red apple"], ["--text-dropout=0"], False),
        (3, ["--prompt=a red apple"], ["--label-dropout=0"], True),
        (3, ["--prompt=a red apple"], ["--text-dropout=0"], False),  # its images have no class
        (3, ["--prompt=a red apple", "--class=cat"], ["--text-dropout=0"], True),
        (3, ["--prompt=a red apple"], ["--text-length=0"], False),
        (3, ["--init-image=a.png", "--prompt-file=my.txt"], [], True),
        (3, ["--init-image=a.png"], [], False),
        (3, ["--num-per-class=2"], ["--text-dropout=0"], True),
    ],
)
def test_guidance_is_planned_by_what_the_images_have(
    tmp_path: Path, trials: list[Stage], classes: int, samples: list[str], prior: list[str], guided: bool
) -> None:
    survey = replace(PHOTOS, classes=classes, captions=900, prompts=("a shirt", "no"))
    plan(tmp_path, 60, replace(REQUEST, text_column="text", samples=samples, prior=prior), survey)
    file = ["--config", str(tmp_path / "plan" / "samples.yaml")]
    assert parse(SampleConfig, file).sampling.guidance_scale == (2 if guided else 1)


@pytest.mark.parametrize("minutes", [12, 60])
def test_a_number_for_each_class_takes_the_place_of_that_of_all(
    tmp_path: Path, trials: list[Stage], minutes: float
) -> None:
    survey = replace(PHOTOS, classes=3, heldout=60, judged=3)
    for samples, numbers in (([], (64, None)), (["--num-per-class=9"], (None, 9))):
        (output := tmp_path / str(len(samples))).mkdir()
        expected = plan(output, minutes, replace(REQUEST, size=[32, 32], samples=samples), survey)
        assert ("settings" in expected) == (minutes > 12)
        found = parse(SampleConfig, ["--config", str(output / "plan" / "samples.yaml"), *samples])
        assert (found.n, found.num_per_class) == numbers


def test_samples_are_drawn_of_heldout_captions(tmp_path: Path, trials: list[Stage]) -> None:
    survey = replace(PHOTOS, classes=3, judged=3, captions=900, prompts=("a shirt", "no", "3", "*: 'a'"))
    file = ["--config", str(tmp_path / "plan" / "samples.yaml")]
    assert "settings" not in plan(tmp_path, 600, replace(REQUEST, text_column="text", size=[32, 32]), survey)
    assert parse(SampleConfig, file).prompts == list(survey.prompts)
    for own in ("--prompt-file=my.txt", "--class=cat"):
        plan(tmp_path, 600, replace(REQUEST, text_column="text", samples=[own]), survey)
        assert parse(SampleConfig, file).prompts is None
    # Settings are not searched by samples without captions, but for a prior that reads none.
    small = replace(REQUEST, text_column="text", size=[32, 32], samples=["--class=cat"])
    assert "settings" not in plan(tmp_path, 600, small, survey)
    assert "reads captions" in Configurations(small, survey, CPU, tmp_path).unsearched()
    assert "settings" in plan(tmp_path, 600, replace(small, prior=["--text-length=0"]), survey)


def test_a_survey_counts_classes_with_enough_heldout_images(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 4), ("c", 6)):
        for index in range(count):
            for split in ("train", "val"):
                save(tmp_path / split / name / f"{index}.png", Image.new("RGB", (8, 8)))
    assert look(str(tmp_path), None).judged == 2


def test_settings_are_searched_where_classes_and_time_allow_it(tmp_path: Path, trials: list[Stage]) -> None:
    small = replace(REQUEST, size=[32, 32])

    def found(survey: Survey, minutes: float = 60, request: Request = small) -> Any:
        (output := tmp_path / "run").mkdir()
        expected = plan(output, minutes, request, survey)
        assert sum(each.seconds for each in expected.values()) <= 60 * minutes
        file, samples = output / "plan" / "settings.yaml", ["--config", str(output / "plan" / "samples.yaml")]
        fixed = bool(parse(SampleConfig, samples).given_settings)
        search = ["--config", str(file), "--model", "prior"]
        config = parse(SettingsConfig, search) if file.exists() else None
        assert (config is not None) == ("settings" in expected) == (not fixed)
        shutil.rmtree(output)
        return config

    classes = replace(PHOTOS, classes=3, heldout=60, judged=3)
    config = found(classes)
    assert len(config.guidance_scale) > 1 and config.n >= 60 and config.classifier_steps >= 100
    assert found(classes, 600).n > config.n, "more time, more samples"
    undropped = found(classes, request=replace(small, prior=["--label-dropout=0"]))
    assert undropped.guidance_scale == [1] and len(undropped.temperature) > 1
    assert found(classes, 12) is None, "too little time"
    assert found(PHOTOS).guidance_scale == [1], "no classes"
    assert found(replace(PHOTOS, heldout=49)) is None
    assert found(replace(classes, judged=2)) is not None, "one class is too rare"
    assert found(replace(classes, judged=1)) is None
    assert found(replace(classes, classes=10, judged=5)) is not None
    assert found(replace(classes, classes=10, judged=4)) is None
    assert found(classes, request=replace(small, samples=["--temperature=0.9"])) is None
    assert found(classes, request=replace(small, samples=["--n=9"])) is not None
    assert found(classes, request=replace(small, codes=["--source=grey"])) is None


def test_a_plan_without_steps_is_refused(tmp_path: Path, trials: list[Stage]) -> None:
    with pytest.raises(UsageError, match=r"--minutes: .* give (\d+) or more") as refused:
        plan(tmp_path, 1.4)
    enough = int(str(refused.value).split()[-3])
    assert 2 <= enough < 5 and plan(tmp_path, enough)["tokenizer"].steps >= planner.LEAST


def test_a_trial_out_of_memory_splits_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "tried", lambda stage: None)
    with pytest.raises(UserError, match="--size"):
        plan(tmp_path, 600, replace(REQUEST, tokenizer=["--batch-size=6"]))
    found = parse(TokenizerTraining, ["--config", str(tmp_path / "plan" / "tokenizer.yaml")])
    assert found.run.accumulate == 6, "in the end one image a part"


def test_images_that_take_too_long_to_encode_are_refused(tmp_path: Path, trials: list[Stage]) -> None:
    many = replace(PHOTOS, train=1_000_000)
    with pytest.raises(UsageError, match=r"--minutes: .* give (\d+) or more") as refused:
        plan(tmp_path, 20, survey=many)
    enough = int(str(refused.value).split()[-3])
    assert plan(tmp_path, enough, survey=many)["tokenizer"].seconds > 0
    with pytest.raises(UsageError, match="--minutes"):
        plan(tmp_path, 0.9 * enough, survey=many)


def test_a_size_that_fits_no_grid_is_refused(tmp_path: Path, trials: list[Stage]) -> None:
    with pytest.raises(UsageError, match="--size"):
        plan(tmp_path, 20, replace(REQUEST, size=[65, 64]))
    assert not trials


@pytest.mark.parametrize(("side", "factor"), [(72, 8), (88, 8), (104, 8), (120, 8), (36, 4)])
def test_a_size_that_fits_one_grid_alone_is_planned_with_it(
    tmp_path: Path, trials: list[Stage], side: int, factor: int
) -> None:
    assert plan(tmp_path, 4, replace(REQUEST, size=[side, side]), replace(PHOTOS, train=5000))
    tokenizer, _, _ = read(tmp_path)
    assert (tokenizer.images.size, tokenizer.model.factor) == ([side, side], factor)


def test_the_downsampling_that_is_given_decides_which_grids_fit(tmp_path: Path, trials: list[Stage]) -> None:
    request = replace(REQUEST, size=[72, 72], tokenizer=["--patch=2"])
    for minutes, factor in (600, 4), (4, 8):  # 18x18 codes, and 9x9 where the time is too short for these
        plan(tmp_path, minutes, request, replace(PHOTOS, train=5000))
        assert parse(TokenizerTraining, trials[0].tokenizer).model.factor == factor


def test_an_option_of_the_tokenizer_that_fits_no_size_is_named(tmp_path: Path, trials: list[Stage]) -> None:
    with pytest.raises(UsageError, match=r"--size: 64x64 .*--tokenizer (patch|multipliers)="):
        plan(tmp_path, 20, replace(REQUEST, size=[64, 64], tokenizer=["--patch=3"]))


def test_images_that_are_slow_to_decode_are_planned_for(tmp_path: Path, trials: list[Stage]) -> None:
    survey = replace(PHOTOS, train=4000)
    quick = plan(tmp_path, 60, REQUEST, survey)["codes"].seconds
    views = read(tmp_path)[1].views
    slow = plan(tmp_path, 60, REQUEST, replace(survey, decoding=0.02))["codes"].seconds
    assert views > 1 and slow == pytest.approx(quick + 0.02 * (2 * 4000 + 50), rel=1e-6), "each of two kinds once"


def test_no_prior_is_tried_where_encoding_takes_too_long(tmp_path: Path, trials: list[Stage]) -> None:
    request = replace(REQUEST, size=[64, 64])
    with pytest.raises(UserError, match="encoding the images takes about"):
        plan(tmp_path, 10, request, replace(PHOTOS, train=100_000, decoding=0.02))
    assert trials and not any(stage.prior for stage in trials)


def test_the_prior_gets_what_the_stages_before_it_left(tmp_path: Path) -> None:
    expected = {n: Expected(s, 0.0, 0) for n, s in {"tokenizer": 500, "codes": 50, "prior": 500, "samples": 60}.items()}
    made = Plan(REQUEST, 20, None, [Row("size", "64", "")], expected, {"plan": 60.0, "tokenizer": 500.0, "codes": 50.0})
    assert made.settled().prior_minutes == pytest.approx((1200 - 610 - 60 - TRIAL) / 60, abs=1e-3)
    late = replace(made, spent={"plan": 60.0, "tokenizer": 5000.0, "codes": 50.0}).settled()
    assert late.prior_minutes == pytest.approx(made.expected["prior"].minutes / 2, abs=1e-3)
    longer = made.settled().lengthened(30)
    assert longer.prior_minutes == pytest.approx(made.settled().prior_minutes + 10)  # type: ignore[operator]
    trained = replace(made, expected={**expected, "prior": Expected(TRIAL + 600, 0.0, 50)})
    assert trained.lengthened(30).expected["prior"].steps == 100
    assert made.lengthened(30).settled().prior_minutes == pytest.approx(longer.prior_minutes)
    made.save(tmp_path)
    assert saved_plan(tmp_path) == made, "also without a search, as a former version made it"
    searching = {name: found for name, found in expected.items() if name != "samples"}
    searching |= {"settings": Expected(30.0, 0.0, 0), "samples": expected["samples"]}
    with_search = replace(made, expected=searching)
    assert with_search.settled().prior_minutes == pytest.approx(made.settled().prior_minutes - 0.5)
    for changed in ({"rows": []}, {"expected": {}}, {"prior_minutes": -5.0}, {"minutes": -1}):
        record = json.loads((tmp_path / "plan" / "plan.json").read_text())
        (tmp_path / "other" / "plan").mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / "plan" / "plan.json").write_text(json.dumps({**record, **changed}))
        with pytest.raises(UserError, match=r"plan\.json"):
            saved_plan(tmp_path / "other")


@pytest.mark.parametrize("text", ["", "[]", '{"minutes": 3}', '{"request": 1}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json"):
        saved_plan(tmp_path)


# ---- trials ----

TINY = "--data demo --channels 1 --size 16 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 "
TINY += "--no-attention --codebook-size 16 --batch-size 8 --validation-images 16"


def test_a_trial_measures_both_trainings() -> None:
    stage = Stage(TINY.split(), [], [], [100, 16], list("0123456789"), None)
    found = tried(stage)
    assert found.step > 0 and found.encoded > 0 and found.judged > 0 and found.batch == 8
    assert found.memory > 1e8 and 0 < found.kept < found.memory
    words = "--dim 16 --layers 1 --heads 2 --batch-size 4 --validation-images 16 --preview-images 0".split()
    found = tried(replace(stage, prior=words, samples=["--n=3", "--guidance-scale=2"]))
    assert found.step > 0 and found.batch == 4 and found.steps(100) > 0
    assert found.drawn > 0 and found.drawing_memory >= found.memory > 1e8


def test_a_trial_draws_of_captions(tmp_path: Path) -> None:
    for index in range(60):
        save(tmp_path / f"{index}.png", Image.new("RGB", (16, 16), (4 * index, 0, 0)))
        (tmp_path / f"{index}.txt").write_text(f"{'dark' if index < 30 else 'light'} red")
    survey = look(str(tmp_path), "txt")
    assert set(survey.prompts) <= {"dark red", "light red"} and len(survey.prompts) == len(set(survey.prompts)) > 0
    words = "--dim 16 --layers 1 --heads 2 --batch-size 4 --validation-images 16 --preview-images 0".split()
    samples = [f"--prompt={text}" for text in survey.prompts]
    images = [survey.train, survey.heldout]
    tokenizer = TINY.replace("--data demo", f"--data {tmp_path}").split()
    found = tried(Stage(tokenizer, words, [*samples, "--n=3", "--guidance-scale=2"], images, [], "txt"))
    assert found is not None and found.drawn > 0


def test_a_trial_draws_of_captions_that_are_longer_than_what_is_read(tmp_path: Path, monkeypatch) -> None:
    for index in range(30):
        save(tmp_path / "images" / f"{index}.png", Image.new("RGB", (16, 16), (index, 0, 0)))
        (tmp_path / "images" / f"{index}.txt").write_text(" ".join(str(index * k) for k in range(1, 90)))
    monkeypatch.setattr(trial, "_training", lambda config, build: Measured(1, 1, 1, 4, 1, 1, 1))
    tokenizer = TINY.replace("--data demo", f"--data {tmp_path / 'images'}").split()
    samples = [f"--prompt={text}" for text in look(str(tmp_path / "images"), "txt").prompts]
    stage = Stage(tokenizer, "--dim 16 --layers 1 --heads 2".split(), [*samples, "--n=1"], [28, 2], [], "txt")
    assert trial._prior(stage, tmp_path / "codes").drawn > 0


def test_a_trial_counts_the_validations_that_the_user_asks_for(tmp_path: Path) -> None:
    """All of them: a plan that has time for a fifth of them would not end in time."""
    asked, free = (
        trial._tokenizer(Stage([*TINY.split(), *w], [], [], [28, 2], [], None)) for w in (["--validate-every=7"], [])
    )
    assert (asked.every, free.every) == (7, None)
    found = Measured(start=1.0, step=0.1, validation=2.0, batch=4, validations=5, memory=1e9, kept=0.0, every=10)
    assert found.steps(100.0) == 330  # 1 s to start, 33 s of steps and 33 validations
    assert found.seconds(330) == pytest.approx(100.1)
    assert replace(found, every=None).steps(100.0) == 890


@pytest.mark.parametrize("source", ["--source=noise:0.2", "--source-data=partners"])
def test_a_trial_has_the_source_that_the_encoding_gives(tmp_path: Path, source: str) -> None:
    words = "--dim 16 --layers 1 --heads 2 --batch-size 4 --validation-images 16 --preview-images 0".split()
    prior = [*words, "--source-dropout=0", "--steps=4"]
    samples = ["--n=3", "--guidance-scale=2", "--class=cat", "--source-image=a.png"]
    stage = Stage(TINY.split(), prior, samples, [100, 16], ["cat", "dog"], None, [source])
    found = trial._prior(stage, tmp_path / "codes")
    assert found.step > 0 and found.drawn > 0
    files = CodeFiles(tmp_path / "codes", "train")
    assert Conditioning.for_files(files).length == 64 + 1
    assert not torch.equal(files.gather([0], [0]).long(), files.gather_source([0], [0]))


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch, samples: str, prior: str, codes: str, **stage: Any) -> float:
    """Images a second in a trial with these words."""
    monkeypatch.setattr(trial, "_training", lambda config, build: Measured(1, 1, 1, 4, 1, 1, 1))
    words = f"--dim 16 --layers 1 --heads 2 {prior}".split()
    given, names = ["--batch-size=2", *samples.split()], ["cat", "dog", "hen"]
    found = Stage(TINY.split(), words, given, [28, 4], names, None, codes.split(), **stage)
    measured = trial._prior(found, folder / "codes")
    measured.check_drawn()
    return measured.drawn


@pytest.mark.parametrize(
    ("samples", "prior", "codes"),
    [
        ("--init-image=a.png --box=8,8,8,8 --source-guidance-scale=1.5", "--inpainting=0.3", ""),
        ("--init-image=a.png --mask=b.png --class=cat --guidance-scale=2", "--inpainting=0.3", ""),
        ("--init-image=a.png --vary=0.5 --source-guidance-scale=2", "--inpainting=0.3", "--source=grey"),
        ("--init-image=a.png --extend=4,0,0,2 --source-guidance-scale=2", "--inpainting=0.3", ""),
        ("--size=20,24 --source-guidance-scale=2", "--inpainting=0.3", ""),
        ("--init-image=a.png --keep-rows=3", "", "--source=grey"),
        ("--source-image=a.png,b.png --source-guidance-scale=2", "--label-dropout=0.2", "--source=grey"),
        ("--class=cat,dog --num-per-class=1 --layout=folders --guidance-scale=2", "", ""),
    ],
)
def test_a_trial_draws_what_vqgen_sample_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: str, prior: str, codes: str
) -> None:
    assert drawn(tmp_path, monkeypatch, samples, prior, codes) > 0


@pytest.mark.parametrize(
    ("samples", "prior", "codes", "named"),
    [
        ("", "--source-dropout=0", "--source=grey", "--source-image: .*--samples source-image="),
        ("--init-image=a.png", "--source-dropout=0", "--source=grey", "--init-image: "),
        ("--init-image=a.png", "--label-dropout=0", "", "--class: .*--label-dropout 0"),
        ("--init-image=a.png --guidance-scale=2", "", "", "--guidance-scale: "),
        ("--source-guidance-scale=2", "", "--source=grey", "--source-guidance-scale: "),
        ("--source-image=a.png", "", "", "--source-image: "),
        ("--init-image=a.png --vary=0.5", "", "", "--inpainting"),
        ("--init-image=a.png --extend=3,0,0,0", "--inpainting=0.3", "", "--extend: "),
        ("--prompt=cat", "", "", "--prompt: .*--text-column"),
        ("--class=cat,cow", "", "", "--class: .*cow"),
    ],
)
def test_a_trial_refuses_what_vqgen_sample_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: str, prior: str, codes: str, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        drawn(tmp_path, monkeypatch, samples, prior, codes)


def test_a_trial_has_images_without_a_class_where_the_data_have(tmp_path: Path, monkeypatch) -> None:
    for index in range(9):
        folders = tmp_path / "data" / "train", tmp_path / "data" / "train" / "ab"[index % 2], tmp_path / "data" / "val"
        for folder in folders:
            save(folder / f"{index}.png", Image.new("RGB", (16, 16), (index, 0, 0)))
    survey = look(str(tmp_path / "data"), None)
    assert survey.unlabelled and survey.class_names == ("a", "b")
    assert drawn(tmp_path, monkeypatch, "--init-image=a.png", "--label-dropout=0", "", unlabelled=True) > 0


@pytest.mark.parametrize("option", ["label-dropout", "text-dropout"])
def test_a_trial_refuses_options_of_conditions_that_the_data_lacks(tmp_path: Path, option: str) -> None:
    """Not only the stage, after hours of the tokenizer."""
    stage = Stage(TINY.split(), [f"--{option}=0.5", "--steps=4"], [], [20, 4], 0, None)
    with pytest.raises(UsageError, match=f"--{option}: found 0.5.*--prior {option}="):
        trial._prior(stage, tmp_path / "codes")


@pytest.mark.parametrize("holdout", ["0.01", "0.3"])
def test_a_trial_has_captions_whatever_is_held_out(tmp_path: Path, holdout: str) -> None:
    (tmp_path / "images").mkdir()
    for index in range(30):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text(f"number {index}")
    words = [*TINY.split(), "--data", str(tmp_path / "images"), "--channels", "3", "--holdout", holdout]
    write_codes(Stage(words, [], [], [28, 2], [], "txt"), tmp_path / "codes")
    assert CodeFiles(tmp_path / "codes", "train").captions([27])[0].startswith("number ")


def test_a_trial_has_captions_where_the_first_images_have_none(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "images").mkdir()
    for index in range(30):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "images" / f"{index:02d}.png")
        (tmp_path / "images" / f"{index:02d}.txt").write_text("late" if index > 20 else "")
    monkeypatch.setattr("vqgen.app.made_up.MOST_IMAGES", 4)
    words = [*TINY.split(), "--data", str(tmp_path / "images"), "--channels", "3"]
    write_codes(Stage(words, [], [], [28, 2], [], "txt"), tmp_path / "codes")
    assert CodeFiles(tmp_path / "codes", "train").captions([0, 3]) == ["late", "late"]


def test_a_trial_that_fails_ends_the_program(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tried(Stage([*TINY.split(), "--groups", "3"], [], [], [1, 1], [], None))
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert "--groups" in said and said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_trial_that_is_killed_needs_less_memory(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    real = subprocess.Popen

    def killed(words: list[str], **options: object) -> subprocess.Popen[bytes]:
        program = f"import os; os.kill(os.getpid(), {int(number)})"
        return real([words[0], "-c", program], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", killed)
    stage = Stage(TINY.split(), [], [], [1, 1], [], None)
    if number == signal.SIGKILL:
        assert tried(stage) is None
    else:
        with pytest.raises(SystemExit) as ended:
            tried(stage)
        assert ended.value.code == 128 + number
