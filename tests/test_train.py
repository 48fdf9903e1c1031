"""vqgen-train: the whole path in tiny size on real images, its interruptions, and what it refuses."""

import dataclasses
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image
from processes import tree, weights

from vqgen.app import planner, stages, train
from vqgen.app.demo import main as demo
from vqgen.app.plan import TRIAL, Expected, Plan, Row, saved_plan, written
from vqgen.app.stages import words_of
from vqgen.app.train import main
from vqgen.app.trial import Measured, Stage
from vqgen.config import parse
from vqgen.errors import UserError
from vqgen.sampling.settings import read_recommended
from vqgen.tokenizer.data.sources import open_source

TOKENIZER = "steps=3 width=8 groups=4 latent-dim=8 no-attention codebook-size=16 batch-size=8".split()
TOKENIZER += ["validation-images=16"]
PRIOR = "steps=3 dim=16 layers=1 heads=2 batch-size=8 validation-images=16 preview-images=0".split()
CODES, SAMPLES = ["views=1"], ["n=4"]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    """What was tried, in no time."""
    found: list[Stage] = []

    def measure(stage: Stage) -> Measured:
        found.append(stage)
        made = Measured(1.0, 0.1, 1.0, 8, 8, 1e9, 1e8)
        further = {"drawn": 10.0, "drawing_memory": 1.2e9} if stage.prior else {"encoded": 1000.0, "judged": 0.1}
        return dataclasses.replace(made, **further)

    monkeypatch.setattr(planner, "tried", measure)
    return found


def words(output: Path, *further: Any) -> list[Any]:
    given = {"--tokenizer": TOKENIZER, "--codes": CODES, "--prior": PRIOR, "--samples": SAMPLES}
    options = [word for name, values in given.items() for word in (name, *values)]
    return ["--data", "demo", "--output", output, "--minutes", 20, *options, *further]


@pytest.mark.parametrize("samples", ["init-image=typo.png keep-rows=2", "init-image=a.png mask=typo.png"])
def test_images_that_are_missing_are_refused_before_the_trials(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch, samples: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"")
    option = "--mask" if "mask" in samples else "--init-image"
    result = cli(main, "--data", "demo", "--output", "run", "--samples", *samples.split())
    assert result.code == 1 and f"{option}: typo.png" in result.err and f"--samples {option[2:]}=" in result.err
    assert not trials


def test_images_that_are_missing_are_refused_where_samples_are_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run that gets more minutes draws again after hours; one that is only looked at does not."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.json").write_text("{}")
    given = ["--data", "demo", "--output", str(tmp_path), "--samples", "init-image=typo.png", "keep-rows=2"]
    longer, same = (parse(train.TrainConfig, [*given, "--minutes", minutes]) for minutes in ("30", "20"))
    monkeypatch.setattr("vqgen.app.plan.saved_plan", lambda _: SimpleNamespace(minutes=20, replaced=[]))
    monkeypatch.setattr(train, "continued", lambda *_: "went on")
    assert train.made_or_found(same) == "went on"
    with pytest.raises(UserError, match=r"--init-image: typo\.png"):
        train.made_or_found(longer)


def test_the_whole_path_from_images_to_images(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, prior = tmp_path / "run", stages.STAGES["prior"]

    def interrupted(_config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.STAGES, "prior", dataclasses.replace(prior, run=interrupted))
    assert cli(main, *words(run)).code == 130
    monkeypatch.setitem(stages.STAGES, "prior", prior)
    tokenizer, planned = weights(run / "tokenizer"), len(trials)
    made = saved_plan(run) or pytest.fail()
    assert planned >= 2 and {"tokenizer", "codes", "prior"} <= set(made.spent) and made.prior_minutes
    result = cli(main, *words(run))
    assert result.code == 0, result.err
    assert weights(run / "tokenizer") == tokenizer and len(trials) == planned, "it went on"
    assert {"samples/grid.png", "report.html", "plan/plan.json", "prior/model.safetensors"} <= set(tree(run))
    assert len(list((run / "samples").glob("0*.png"))) == 4
    assert str(run / "samples" / "grid.png") in result.out
    # Once more: nothing is done again.
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    assert cli(main, *words(run)).code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    # Another request is not mixed into this run.
    for further, named in ((["--size", 64], "--size"), (["--no-flip"], "--flip"), (["--samples", "n=5"], "--samples")):
        result = cli(main, *words(run), *further)
        assert (result.code, result.err.count("\n")) == (2, 1) and named in result.err and "--overwrite" in result.err
    assert "--flip: found False, the run in" in cli(main, *words(run), "--no-flip").err
    assert (
        f"remove {run / 'prior'} and what was made after it, or --overwrite"
        in cli(main, *words(run), "--prior", "dim=32").err
    )
    result = cli(main, *words(run), "--minutes", 10)
    assert result.code == 2 and "--minutes" in result.err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.slow
def test_images_of_an_interrupted_drawing_are_replaced_where_they_are_others(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other weights, as of a prior that was then trained for longer, or of other settings."""
    samples, record = tmp_path / "samples", tmp_path / "samples" / "samples.partial.json"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("vqgen.sampling.write_samples.write_grid", interrupted)
        assert cli(main, *words(tmp_path)).code == 130
        begun = json.loads(record.read_text())
        record.write_text(json.dumps(begun | {"prior_fingerprint": "0" * 64}))
        assert cli(main, *words(tmp_path)).code == 130
    assert json.loads(record.read_text())["prior_fingerprint"] == begun["prior_fingerprint"]
    result = cli(main, *words(tmp_path), "--samples", "n=3", "seed=1")
    assert result.code == 0, result.err
    drawn = json.loads((samples / "samples.json").read_text())
    assert (drawn["seed"], len(list(samples.glob("0*.png")))) == (1, 3)
    # Finished ones are kept.
    before = tree(samples)
    assert cli(main, *words(tmp_path), "--samples", "n=3", "seed=2").code == 2
    assert tree(samples) == before


@pytest.mark.slow
def test_settings_are_searched_and_drawn_with(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = planner.tried
    monkeypatch.setattr(planner, "tried", lambda stage: dataclasses.replace(measure(stage), drawn=1000.0))
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    file, prior = tmp_path / "plan" / "settings.yaml", tmp_path / "prior"
    values = yaml.safe_load(file.read_text())
    assert values["n"] == 500 and "sampling" not in yaml.safe_load((file.parent / "samples.yaml").read_text())
    values |= {"n": 20, "classifier_steps": 3, "guidance_scale": [1.5], "min_p": [0.1, 0.25]}
    file.write_text(file.read_text().splitlines()[0] + "\n" + yaml.safe_dump(values))
    draw = stages.STAGES["samples"]

    def interrupted(_config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.STAGES, "samples", dataclasses.replace(draw, run=interrupted))
    assert cli(main, *words(tmp_path)).code == 130
    found = read_recommended(prior)
    assert found["guidance_scale"] == 1.5 and found["min_p"] in (0.1, 0.25)
    receipt = json.loads((prior / "settings.json").read_text())
    assert len(receipt["metrics"]["classifier_accuracy"]) == 2
    monkeypatch.setitem(stages.STAGES, "samples", draw)
    before = (prior / "settings.json").stat().st_mtime_ns
    result = cli(main, *words(tmp_path))
    assert result.code == 0, result.err
    assert (prior / "settings.json").stat().st_mtime_ns == before, "it went on"
    drawn = json.loads((tmp_path / "samples" / "samples.json").read_text())["settings"]
    assert drawn.items() >= found.items()
    assert "settings" in (saved_plan(tmp_path) or pytest.fail()).spent


@pytest.mark.slow
def test_samples_are_drawn_of_captions(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    (data := tmp_path / "data").mkdir()
    for index in range(60):
        Image.new("RGB", (32, 32), (4 * index, 0, 0)).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text(f"{index} of 60 reds")
    given = ["--data", data, "--text-column", "txt"]
    result = cli(main, *words(tmp_path / "run"), *given)
    assert result.code == 0, result.err
    captions = yaml.safe_load((tmp_path / "run" / "plan" / "samples.yaml").read_text())["prompt"]
    drawn = json.loads((tmp_path / "run" / "samples" / "samples.json").read_text())
    assert len(captions) == 3 and all(text.endswith(" of 60 reds") for text in captions)
    assert [image["text"] for image in drawn["images"]] == [*captions, captions[0]]
    assert drawn["settings"]["guidance_scale"] == 2
    # Nor of captions where the prior is to read none.
    given += ["--prior", "text-length=0"]
    result = cli(main, *words(tmp_path / "without"), *given)
    assert result.code == 0, result.err
    assert "prompt" not in yaml.safe_load((tmp_path / "without" / "plan" / "samples.yaml").read_text())


def test_given_settings_are_not_searched_again(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = planner.tried
    monkeypatch.setattr(planner, "tried", lambda stage: dataclasses.replace(measure(stage), drawn=1000.0))

    def reached(_config: Any) -> None:
        raise AssertionError

    for name in ("tokenizer", "codes", "prior"):
        monkeypatch.setitem(stages.STAGES, name, dataclasses.replace(stages.STAGES[name], run=lambda _config: None))
    monkeypatch.setitem(stages.STAGES, "settings", dataclasses.replace(stages.STAGES["settings"], run=reached))
    monkeypatch.setitem(
        stages.STAGES, "samples", dataclasses.replace(stages.STAGES["samples"], run=lambda _config: None)
    )
    monkeypatch.setattr("vqgen.app.stages.write_page", lambda output: output)
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    assert "settings" in (saved_plan(tmp_path) or pytest.fail()).expected
    (tmp_path / "tokenizer").mkdir()
    given = [word if word != "n=4" else "temperature=0.8" for word in words(tmp_path)]
    assert cli(main, *given).code == 0


@pytest.mark.slow
def test_an_interrupted_overwrite_goes_on_without_it(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(main, *words(tmp_path)).code == 0
    prior = stages.STAGES["prior"]

    def interrupted(_config: Any) -> None:
        raise KeyboardInterrupt

    seed = [word if word != "n=4" else "n=3" for word in words(tmp_path, "--size", 32)]
    seed[seed.index("steps=3")] = "steps=4"
    monkeypatch.setitem(stages.STAGES, "prior", dataclasses.replace(prior, run=interrupted))
    assert cli(main, *seed, "--overwrite").code == 130
    tokenizer = weights(tmp_path / "tokenizer")
    assert (saved_plan(tmp_path) or pytest.fail()).replaced == ["prior", "samples"]
    assert "--minutes: found 30" in cli(main, *seed, "--minutes", 30).err, "the prior has its steps"
    assert (saved_plan(tmp_path) or pytest.fail()).replaced == ["prior", "samples"]
    monkeypatch.setitem(stages.STAGES, "prior", prior)
    result = cli(main, *seed)
    assert result.code == 0, result.err
    assert weights(tmp_path / "tokenizer") == tokenizer and len(list((tmp_path / "samples").glob("0*.png"))) == 3


@pytest.mark.slow
def test_a_killed_overwrite_goes_on_without_it(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained in place of an earlier run is not removed, either, where nothing was recorded at the end."""
    assert cli(main, *words(tmp_path)).code == 0
    prior = stages.STAGES["prior"]

    def dead(*_: Any) -> None:
        raise KeyboardInterrupt

    def killed(config: Any) -> None:
        prior.run(config)
        monkeypatch.setattr(Plan, "save", dead)
        dead()

    with monkeypatch.context():
        monkeypatch.setitem(stages.STAGES, "prior", dataclasses.replace(prior, run=killed))
        save = Plan.save
        assert cli(main, *words(tmp_path), "--overwrite").code == 130
    monkeypatch.setattr(Plan, "save", save)
    monkeypatch.setitem(stages.STAGES, "prior", prior)
    assert "prior" in (saved_plan(tmp_path) or pytest.fail()).replaced
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "prior").rglob("*.safetensors")}
    result = cli(main, *words(tmp_path))
    assert result.code == 0, result.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "prior").rglob("*.safetensors")} == kept
    assert "prior" not in (saved_plan(tmp_path) or pytest.fail()).replaced


def test_options_of_a_stage_may_change_until_it_begins(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]
) -> None:
    wrong = [word if word != "n=4" else "class=99" for word in words(tmp_path)]
    result = cli(main, *wrong)
    assert result.code == 2 and "--class" in result.err
    assert cli(main, *words(tmp_path)).code == 0


def test_what_is_not_of_a_plan_is_left_alone(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    (tmp_path / "link").mkdir()
    for name, text in (("tokenizer.yaml", "mine: 1"), ("plan.json", '{"my": "plan"}')):
        (run := tmp_path / name.replace(".", "-") / "plan").mkdir(parents=True)
        (run / name).write_text(text)
        for further in ([], ["--overwrite"]):
            result = cli(main, *words(run.parent, *further))
            assert (result.code, result.err.count("\n")) == (2, 1) and "--output" in result.err
        assert [path.name for path in run.iterdir()] == [name] and (run / name).read_text() == text
    (linked := tmp_path / "linked").mkdir()
    (linked / "plan").symlink_to(tmp_path / "link")
    (tmp_path / "file").write_text("mine")
    for output in (linked, tmp_path / "file", tmp_path / "file" / "run"):
        result = cli(main, *words(output, "--plan"))
        assert result.code in (1, 2) and "Traceback" not in result.err and "defect" not in result.err
    assert not list((tmp_path / "link").iterdir()) and not trials


def test_the_output_does_not_become_data(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    result = cli(main, "--data", tmp_path, "--output", tmp_path / "run")
    assert result.code == 2 and "--output" in result.err and not list(tmp_path.iterdir())


def test_broken_images_are_found_before_training(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / f"{index}.png")
    for index in range(5):
        (tmp_path / f"broken{index}.png").write_bytes(b"no image")
    output = tmp_path.with_name("run-" + tmp_path.name)
    result = cli(main, "--data", tmp_path, "--output", output, "--plan")
    assert result.code == 1 and "max-broken" in result.err and not trials
    for index in range(40, 99):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / f"{index}.png")
    for index in range(1, 5):
        (tmp_path / f"broken{index}.png").unlink()
    result = cli(main, "--data", tmp_path, "--output", output, "--minutes", 20, "--plan")
    assert result.code == 0, "one of a hundred"
    for index in range(1, 5):
        (tmp_path / f"broken{index}.png").write_bytes(b"no image")
    for allowed in ("max-broken=0.2", "max_broken=0.3"):
        given = ["--data", tmp_path, "--output", output, "--minutes", 20, "--plan", "--tokenizer", allowed]
        assert cli(main, *given).code == 0
        assert allowed.replace("-", "_").replace("=", ": ") in (output / "plan" / "codes.yaml").read_text()


def test_the_search_skips_as_many_broken_images_as_the_encoding(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = planner.tried
    monkeypatch.setattr(planner, "tried", lambda stage: dataclasses.replace(measure(stage), drawn=1000.0))
    given = words(tmp_path, "--plan")
    given[given.index("views=1")] = "max-broken=0.125"
    assert cli(main, *given).code == 0
    assert "max_broken: 0.125" in (tmp_path / "plan" / "settings.yaml").read_text()
    assert "max_broken: 0.125" not in (tmp_path / "plan" / "codes.yaml").read_text()


def test_files_of_others_are_found_before_training(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]
) -> None:
    for name in ("tokenizer", "codes", "prior", "samples"):
        (folder := tmp_path / f"of-{name}" / name).mkdir(parents=True)
        (folder / "main.py").write_text("mine")
        for program, given in ((main, words(folder.parent)), (demo, ["--output", folder.parent])):
            for further in ([], ["--overwrite"]):
                result = cli(program, *given, *further)
                assert result.code == 2 and str(folder) in result.err and result.err.count("\n") == 1
        assert [path.name for path in folder.iterdir()] == ["main.py"] and not trials


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    result = cli(main, "--data", "x" * 300, "--output", tmp_path / "run")
    assert result.code in (1, 2) and "--data" in result.err and "defect" not in result.err


def test_more_minutes_are_the_priors(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, tokenizer = words(tmp_path), stages.STAGES["tokenizer"]
    place = given.index("--prior") + 1 + PRIOR.index("steps=3")
    lengthless = [*given[:place], *given[place + 1 :]]

    def interrupted(_config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(stages.STAGES, "tokenizer", dataclasses.replace(tokenizer, run=interrupted))
    assert cli(main, *lengthless, "--plan").code == 0
    made = dataclasses.replace(saved_plan(tmp_path) or pytest.fail(), prior_minutes=8.0)
    made.save(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    # With --plan it is shown, and not saved: it could not be undone.
    result = cli(main, *lengthless, "--plan", "--minutes", 30)
    assert result.code == 0 and "--minutes 18" in result.out and saved_plan(tmp_path) == made
    assert cli(main, *lengthless, "--minutes", 30).code == 130
    longer = saved_plan(tmp_path) or pytest.fail()
    assert (longer.minutes, longer.prior_minutes) == (30, 18)
    assert longer.expected["tokenizer"] == made.expected["tokenizer"]
    assert longer.expected["prior"].steps > made.expected["prior"].steps
    result = cli(main, *given, "--minutes", 40)
    assert result.code == 2 and "--minutes: found 40" in result.err, "the prior has its steps"


@pytest.fixture
def interrupted(trials: list[Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let settings be searched, and the tokenizer be interrupted."""
    measure = planner.tried

    def stop(config: Any) -> None:
        config.output.mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(planner, "tried", lambda stage: dataclasses.replace(measure(stage), drawn=1000.0))
    monkeypatch.setattr("vqgen.app.survey._decoding", lambda _source: 1e-4)  # the same in every plan
    monkeypatch.setitem(stages.STAGES, "tokenizer", dataclasses.replace(stages.STAGES["tokenizer"], run=stop))


def test_a_run_keeps_its_minutes_where_none_are_given(
    tmp_path: Path, cli: Callable[..., Any], interrupted: None
) -> None:
    assert cli(main, *words(tmp_path)).code == 130
    before = saved_plan(tmp_path) or pytest.fail()
    given = words(tmp_path)
    place = given.index("--minutes")
    result = cli(main, *given[:place], *given[place + 2 :])
    assert result.code == 130 and before.minutes == 20
    assert dataclasses.replace(saved_plan(tmp_path) or pytest.fail(), spent={}) == dataclasses.replace(before, spent={})


def test_a_prior_that_was_trained_by_its_printed_command_is_not_lengthened(tmp_path: Path) -> None:
    for name, seconds in ("tokenizer", 900.0), ("prior", 300.0):
        (tmp_path / name).mkdir()
        (tmp_path / name / "machine.json").write_text(json.dumps({"sessions": [{"seconds": seconds}]}))
    expected = {name: Expected(600.0, 0.0, 0) for name in ("tokenizer", "codes", "prior", "samples")}
    request = parse(train.TrainConfig, ["--data", "demo"]).request()
    plan = Plan(request, 60, None, [Row("size", "64", "")], expected, {"plan": 60.0, "codes": 600.0})
    share = plan.expected["prior"].minutes
    assert plan.settled(stages.times_of(tmp_path)).prior_minutes == pytest.approx(share, abs=1e-3)
    waits = dataclasses.replace(plan, replaced=["prior"])  # of an earlier run
    left = (3600 - 60 - 900 - 600 - 600 - TRIAL) / 60
    assert waits.settled(stages.times_of(tmp_path)).prior_minutes == pytest.approx(min(left, 2 * share), abs=1e-3)
    shutil.rmtree(tmp_path / "prior")  # the tokenizer was killed, or trained by hand
    plan = dataclasses.replace(plan, minutes=40)
    left = (2400 - 60 - 900 - 600 - 600 - TRIAL) / 60
    assert plan.settled(stages.times_of(tmp_path)).prior_minutes == pytest.approx(max(left, share / 2), abs=1e-3)


def test_a_folder_called_demo_is_not_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    for data, found in (("./demo", "./demo"), ("demo/", "./demo"), ("demo", "demo"), ("./other", "./other")):
        assert parse(train.TrainConfig, ["--data", data]).request().data == found


def test_a_drawing_that_has_begun_is_not_replaced_again(tmp_path: Path) -> None:
    request = parse(train.TrainConfig, ["--data", "demo"]).request()
    expected = {name: Expected(600.0, 0.0, 0) for name in ("tokenizer", "codes", "prior", "samples")}
    plan = Plan(request, 60, None, [Row("size", "64", "")], expected, {})
    since = time.time()
    plan = dataclasses.replace(plan, replaced=["samples"], removing={"samples": since})
    (tmp_path / "samples").mkdir()
    begun = tmp_path / "samples" / "samples.partial.json"
    begun.touch()
    os.utime(begun, (0, 0))  # of the run that is replaced
    plan.forget_removed(tmp_path, "samples")
    assert plan.replaced == ["samples"]
    os.utime(begun, (since + 1, since + 1))
    plan.forget_removed(tmp_path, "samples")
    assert plan.replaced == []


def test_another_request_has_the_usual_minutes(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    given = ["--data", "demo", "--output", tmp_path, "--plan"]
    for further, minutes in ((["--minutes", 20], 20), ([], 20), (["--size", 16], 60)):
        assert cli(main, *given, *further).code == 0
        assert (saved_plan(tmp_path) or pytest.fail()).minutes == minutes


@pytest.mark.parametrize("made", ["nothing", "others"])
def test_partners_that_are_missing_are_refused_before_the_trials(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], made: str
) -> None:
    for index in range(30):
        for folder in ("photos", "others") if made == "others" else ("photos",):
            path = tmp_path / folder / f"{folder}-{index}.png"
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (32, 32), (8 * index, 0, 0)).save(path)
    given = ["--data", tmp_path / "photos", "--output", tmp_path / "run", "--minutes", 20]
    result = cli(main, *given, "--codes", f"source-data={tmp_path / 'others'}")
    assert result.code == 1 and "--source-data" in result.err and "--codes source-data=" in result.err, result.err
    assert result.err.count("\n") == 1 and not trials
    if made == "others":  # now each has one, and options that the plan has views for are no error
        for path in (tmp_path / "others").iterdir():
            path.rename(path.with_name(path.name.replace("others", "photos")))
        words = [f"source-data={tmp_path / 'others'}", "random-shift=4"]
        assert cli(main, *given, "--plan", "--codes", *words).code == 0


def test_files_follow_options_of_later_stages(tmp_path: Path, cli: Callable[..., Any], interrupted: None) -> None:
    def planned(output: Path, *given: Any) -> dict[str, Any]:
        assert cli(main, *words(output), *given).code == 130
        return {file.stem: yaml.safe_load(file.read_text()) for file in (output / "plan").glob("*.yaml")}

    def begun(name: str) -> Path:
        output = tmp_path / name
        assert cli(main, *words(output), "--no-flip", "--plan").code == 0
        assert yaml.safe_load((output / "plan" / "settings.yaml").read_text())["flip"] is False
        planned(output)
        return output

    undropped, sourced = ["--prior", *PRIOR, "label-dropout=0"], ["--codes", "source=grey"]
    output = begun("one")
    assert len(planned(output)["settings"]["guidance_scale"]) > 1
    found = planned(output, *undropped)
    assert found["settings"] == planned(tmp_path / "other", *undropped)["settings"]
    assert found["settings"]["guidance_scale"] == [1] and found["settings"]["classifier_steps"] > 0
    assert len(planned(output)["settings"]["guidance_scale"]) > 1, "and back"
    found = planned(output, *sourced, *undropped)
    assert "settings" not in (saved_plan(output) or pytest.fail()).stages
    assert found["samples"]["sampling"] == {"min_p": 0.05}
    assert planned(output, *sourced)["samples"]["sampling"]["guidance_scale"] == 2
    assert planned(output, "--codes", "views=8")["codes"]["images"]["flip"] is True
    assert planned(output)["samples"] == {"n": 64}
    assert "settings" in (saved_plan(output) or pytest.fail()).stages, "and back"
    # With --plan they are shown, and nothing is saved; nor where a stage cannot read them.
    before = tree(output / "plan")
    result = cli(main, *words(output, "--plan"), *sourced)
    assert result.code == 0 and "--codes gives a source" in result.out and "vqgen-eval settings" not in result.out
    result = cli(main, *words(output), "--prior", *PRIOR, "dim=17")
    assert result.code == 2 and "--prior heads=" in result.err and result.err.count("\n") == 1
    assert tree(output / "plan") == before
    # Files that were edited stay.
    file = begun("two") / "plan" / "settings.yaml"
    file.write_text(file.read_text().replace("n: 500", "n: 20"))
    assert len(planned(tmp_path / "two", *undropped)["settings"]["guidance_scale"]) > 1


def test_given_steps_and_views_may_be_left_out_until_their_stage(
    tmp_path: Path, cli: Callable[..., Any], interrupted: None
) -> None:
    lengthless = [word for word in PRIOR if word != "steps=3"]
    assert cli(main, *words(tmp_path)).code == 130
    short = saved_plan(tmp_path) or pytest.fail()
    assert cli(main, *words(tmp_path), "--prior", *lengthless, "--codes", "max-broken=0.1").code == 130
    longer = saved_plan(tmp_path) or pytest.fail()
    assert longer.expected["prior"].seconds > 200 > 20 > short.expected["prior"].seconds
    assert longer.expected["prior"].steps > 1000
    settled = dataclasses.replace(longer, spent={"tokenizer": 60.0}).settled()
    assert (settled.prior_minutes or 0) > 3
    codes = yaml.safe_load((tmp_path / "plan" / "codes.yaml").read_text())
    assert codes["views"] > 1 and codes["images"]["flip"] is True


def test_what_is_held_out_is_the_runs_in_the_search(
    tmp_path: Path, cli: Callable[..., Any], interrupted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    plan, file = saved_plan(tmp_path) or pytest.fail(), tmp_path / "plan" / "settings.yaml"
    assert "holdout" not in yaml.safe_load(file.read_text())
    found: list[Any] = []
    monkeypatch.setattr("vqgen.evaluation.program.settings", lambda config: found.append(config.holdout))
    monkeypatch.setattr(stages, "settings_are_found", lambda _prior: False)
    file.write_text(file.read_text() + "holdout: 0.05\n")
    for formerly_planned in (False, True):
        if formerly_planned:
            dataclasses.replace(plan, written=written(tmp_path)).save(tmp_path)
        stages.STAGES["settings"](words_of(plan, tmp_path, "settings"), "4/5")
    assert found == [0.05, None]


def test_prompts_that_are_not_read_whole_are_kept_where_they_were_edited(
    tmp_path: Path, cli: Callable[..., Any], interrupted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    plan, file = saved_plan(tmp_path) or pytest.fail(), tmp_path / "plan" / "samples.yaml"
    drawn: list[Any] = []
    prior = SimpleNamespace(conditioning=SimpleNamespace(text=SimpleNamespace(readable=lambda texts: texts[:1])))
    monkeypatch.setattr("vqgen.prior.model.Prior.load", lambda _folder: prior)
    monkeypatch.setattr("vqgen.sampling.write_samples.write_samples", lambda config: drawn.append(config.prompt))
    for name, found in (("samples_are_drawn", False), ("recommend", None)):
        monkeypatch.setattr(stages, name, lambda *_, found=found: found)
    file.write_text(file.read_text() + "prompt: [red, a very long caption]\n")
    for planned in (False, True):
        if planned:
            dataclasses.replace(plan, written=written(tmp_path)).save(tmp_path)
        stages.STAGES["samples"](words_of(plan, tmp_path, "samples"), "5/5")
    assert drawn == [["red", "a very long caption"], ["red"]]


def test_both_stages_hold_out_the_same_images(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    given = words(tmp_path / "run", "--plan", "--tokenizer", *TOKENIZER, "holdout=0.01")
    result = cli(main, *given)
    assert (result.code, result.err.count("\n")) == (2, 1) and "--codes" in result.err and "0.01" in result.err
    assert not trials
    assert cli(main, *given, "--codes", *CODES, "holdout=0.01").code == 0


def test_what_is_given_to_hold_out_is_surveyed(
    tmp_path: Path, cli: Callable[..., Any], interrupted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data := tmp_path / "data").mkdir()
    for index in range(60):
        Image.new("RGB", (32, 32), (4 * index, 0, 0)).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text(f"{index} of 60 reds")
    output, holdout = tmp_path / "run", ["holdout=0.3"]
    given = [*words(output, "--data", data, "--text-column", "txt"), "--tokenizer", *TOKENIZER, *holdout]
    result = cli(main, *given, "--codes", *CODES, *holdout, "--plan")
    heldout = open_source(str(data), "heldout", 0.3).labels.size
    assert 10 < heldout < 30 and f"{60 - heldout} to train on, {heldout} held out" in result.out

    def prompts() -> list[str]:
        return yaml.safe_load((output / "plan" / "samples.yaml").read_text())["prompt"]

    # Also where options of later stages change the files of a run that has begun.
    assert len(prompts()) == heldout
    (output / "tokenizer").mkdir()
    assert cli(main, *given, "--codes", "views=2", *holdout).code == 130
    assert len(prompts()) == heldout
    result = cli(main, *words(output), "--overwrite", "--tokenizer", "holdout=2", "--codes", "holdout=2")
    assert result.code == 2 and "--tokenizer holdout=" in result.err


def test_a_plan_is_printed_with_command_lines_and_nothing_else_is_done(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], programs: dict[str, Any]
) -> None:
    result = cli(main, *words(tmp_path, "--plan"))
    assert result.code == 0
    lines = [shlex.split(line) for line in result.out.splitlines() if line.startswith("vqgen-")]
    planned = [stages.STAGES[name] for name in (saved_plan(tmp_path) or pytest.fail()).expected]
    found = {line[0]: stage for line, stage in zip(lines, planned)}
    assert [line[0] for line in lines] == [stage.program for stage in planned]
    for line in lines:
        found[line[0]].parsed(line[1:])
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} <= {"plan", ".vqgen.lock"}
    # Nothing has begun: another request makes another plan.
    assert cli(main, *words(tmp_path, "--plan", "--size", 64)).code == 0
    assert (saved_plan(tmp_path) or pytest.fail()).request.size == [64, 64]


def test_a_file_of_the_plan_may_be_edited_before_its_stage(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]
) -> None:
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    plan: Plan = saved_plan(tmp_path) or pytest.fail()
    file = tmp_path / "plan" / "prior.yaml"
    file.write_text(file.read_text().replace("patience: 5", "patience: 3"))
    assert stages.STAGES["prior"].parsed(words_of(plan, tmp_path, "prior")).patience == 3
    edited, count = file.read_text(), len(trials)
    for text in ("run: [", "- run"):
        file.write_text(text)
        result = cli(main, *words(tmp_path, "--plan"))
        assert result.code and result.err.count("\n") == 1 and str(file) in result.err
    file.write_text(edited)
    # Another request would replace it.
    for further in (["--size", 64], ["--minutes", 30]):
        result = cli(main, *words(tmp_path, "--plan", *further))
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert str(file) in result.err and "--overwrite" in result.err
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    assert file.read_text() == edited and len(trials) == count
    assert cli(main, *words(tmp_path, "--plan", "--size", 64, "--overwrite")).code == 0
    assert "patience: 5" in file.read_text()


def test_epochs_in_a_file_of_the_plan_take_the_place_of_its_minutes(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]
) -> None:
    given = [word for word in words(tmp_path, "--plan") if not str(word).startswith("steps=")]
    assert cli(main, *given).code == 0
    plan: Plan = saved_plan(tmp_path) or pytest.fail()
    prior = tmp_path / "plan" / "prior.yaml"
    assert "--minutes" in words_of(plan, tmp_path, "prior")
    tree = yaml.safe_load(prior.read_text())
    tree.setdefault("run", {})["epochs"] = 2
    prior.write_text(yaml.safe_dump(tree))
    assert stages.STAGES["prior"].parsed(words_of(plan, tmp_path, "prior")).run.epochs == 2


@pytest.mark.parametrize(("option", "value"), [("steps", 1000), ("minutes", 7.0), ("epochs", 2)])
def test_a_length_in_a_file_of_the_plan_takes_the_place_of_its_minutes(
    tmp_path: Path, cli: Callable[..., Any], interrupted: None, option: str, value: float
) -> None:
    given = [word for word in words(tmp_path) if not str(word).startswith("steps=")]
    assert cli(main, *given, "--plan").code == 0
    plan = saved_plan(tmp_path) or pytest.fail()
    for name in ("tokenizer", "prior"):
        file = tmp_path / "plan" / f"{name}.yaml"
        assert "--minutes" in words_of(plan, tmp_path, name)
        tree = yaml.safe_load(file.read_text())
        tree["run"][option] = value
        file.write_text(file.read_text().splitlines()[0] + "\n" + yaml.safe_dump(tree))
        found = stages.STAGES[name].parsed(words_of(plan, tmp_path, name))
        assert getattr(found.run, option) == value and "minutes" not in found.given
        # Former versions did not tell which steps were planned, and gave the minutes of the plan.
        former = words_of(dataclasses.replace(plan, lengths={}), tmp_path, name)
        assert ("--minutes" in former) == (option != "epochs")
    assert cli(main, *given).code == 130
    result = cli(main, *given, "--minutes", 30)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--minutes: found 30" in result.err and str(tmp_path / "plan" / "prior.yaml") in result.err
    # Another edited option leaves the minutes of the plan.
    file.write_text(file.read_text().replace(f"{option}: {value}", "").replace("patience: 5", "patience: 3"))
    assert "--minutes" in words_of(plan, tmp_path, "prior")


def test_a_plan_that_cannot_be_made_leaves_the_former_one(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    (tmp_path / "tokenizer").mkdir()
    before, make = tree(tmp_path / "plan"), planner.Planner.plan

    def failing(self: planner.Planner) -> Any:
        make(self)  # its configurations are written
        raise planner.TooSlow("--minutes: only 3 steps would fit into the time, not 20")

    monkeypatch.setattr(planner.Planner, "plan", failing)
    result = cli(main, *words(tmp_path, "--plan", "--size", 64, "--overwrite"))
    assert result.code == 2 and "--minutes" in result.err and tree(tmp_path / "plan") == before
    monkeypatch.setattr(planner.Planner, "plan", make)
    # Nor one that a stage cannot read.
    result = cli(main, *words(tmp_path, "--plan", "--overwrite", "--samples", "n=0"))
    assert result.code == 2 and "--n" in result.err and tree(tmp_path / "plan") == before
    # Nor one that is only looked at, while the folder holds a run.
    result = cli(main, *words(tmp_path, "--plan", "--size", 64, "--overwrite"))
    assert result.code == 0 and "64" in result.out and "not saved" in result.err
    assert ".yaml" not in result.out, "its command lines would be of the files of the other plan"
    assert tree(tmp_path / "plan") == before and (tmp_path / "tokenizer").is_dir()
    (tmp_path / "tokenizer").rmdir()
    assert cli(main, *words(tmp_path, "--plan", "--size", 64, "--overwrite")).code == 0
    made = saved_plan(tmp_path) or pytest.fail()
    assert made.request.size == [64, 64] and made.replaced == []


def test_an_error_of_a_stage_says_how_to_set_its_option(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_config: Any) -> None:
        raise UserError("--validation-images: found 16, expected more")

    assert cli(main, *words(tmp_path, "--plan")).code == 0
    file = tmp_path / "plan" / "prior.yaml"
    file.write_text(file.read_text().replace("patience: 5", "patience: -5"))
    result = cli(main, *words(tmp_path))
    assert result.code == 2 and "--prior patience=" in result.err and result.err.count("\n") == 1
    file.write_text(file.read_text().replace("patience: -5", "patience: 5"))
    monkeypatch.setitem(stages.STAGES, "tokenizer", dataclasses.replace(stages.STAGES["tokenizer"], run=failing))
    result = cli(main, *words(tmp_path))
    assert result.code == 1 and "vqgen-train: --tokenizer validation-images=" in result.err
    (tmp_path / "tokenizer").mkdir()  # a run that has begun keeps its options
    result = cli(main, *words(tmp_path))
    assert result.code == 1 and f"remove {tmp_path / 'tokenizer'}, then --tokenizer validation-images=" in result.err


def test_a_budget_is_left_to_who_gives_another(tmp_path: Path, cli: Callable[..., Any], trials: list[Stage]) -> None:
    assert cli(main, *words(tmp_path, "--plan")).code == 0
    plan = saved_plan(tmp_path) or pytest.fail()
    assert "--minutes" not in words_of(plan, tmp_path, "prior")
    request = dataclasses.replace(plan.request, prior=["--dim=32"])
    assert "--minutes" in words_of(dataclasses.replace(plan, request=request), tmp_path, "prior")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--tokenizer", "widht=8"], "--width"),
        (["--prior", "--dim"], "--prior"),
        (["--tokenizer", "size=64"], "size"),
        (["--prior", "output=elsewhere"], "output"),
        (["--codes", "config=x.yaml"], "config"),
        (["--codes", "verify"], "vqgen-train sets this option itself"),
        (["--prior", "steps=500", "epochs=3"], "--prior: found steps and epochs"),
        (["--size", 64, 64, 64], "--size"),
        (["--channels", 2], "--channels"),
        (["--minutes", 0], "--minutes"),
        (["--data", "missing-folder/"], "missing-folder"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, cli: Callable[..., Any], trials: list[Stage], given: list[Any], named: str
) -> None:
    result = cli(main, "--data", "demo", "--output", tmp_path / "run", *given)
    assert result.code in (1, 2) and named in result.err
    assert "Traceback" not in result.err and not trials
    assert not (tmp_path / "run" / "plan" / "plan.json").exists()


def test_several_processes_are_told_what_to_launch(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = cli(main, "--data", "demo", "--output", tmp_path)
    assert result.code == 2 and "--plan" in result.err and not list(tmp_path.iterdir())


def test_a_damaged_plan_is_named(tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "plan.json").write_text(json.dumps({"request": {}, "minutes": "many"}))
    result = cli(main, "--data", "demo", "--output", tmp_path)
    assert result.code == 1 and "plan.json" in result.err and result.err.count("\n") == 1
