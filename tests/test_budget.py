"""A budget of minutes or epochs in place of a number of steps."""

import dataclasses
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.models import SIZE, make_prior, write_codes
from hypothesis import given
from hypothesis import strategies as st
from processes import weights

from vqgen.config import parse
from vqgen.config_layers import MARK
from vqgen.errors import UsageError
from vqgen.files.yaml_text import read_yaml
from vqgen.prior.model import Prior
from vqgen.prior.train import PriorTraining, main
from vqgen.prior.trainer import PriorTrainer
from vqgen.tokenizer.codes.format import Manifest
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.tokenizer.train import main as train_tokenizer
from vqgen.training import budget
from vqgen.training.budget import Trial, scaled

SMALL = ["--dim", 16, "--layers", 1, "--heads", 2, "--batch-size", 4, "--preview-images", 0, "--patience", 0]


def words(tmp_path: Path, *further: Any) -> list[Any]:
    codes = tmp_path / "codes"
    if not codes.exists():
        codes.mkdir()
        write_codes(codes, size=SIZE)
        model, manifest = make_prior(tmp_path / "of"), Manifest.read(codes)
        shutil.copytree(model / "tokenizer", codes / "tokenizer")
        mark = str(Prior.load(model).tokenizer_fingerprint)
        splits = {"train": manifest.splits["train"], "heldout": manifest.splits["train"]}
        dataclasses.replace(manifest, tokenizer_fingerprint=mark, splits=splits).write(codes)
    return ["--codes", tmp_path / "codes", "--output", tmp_path / "run", *SMALL, *further]


def saved(tmp_path: Path) -> dict[str, Any]:
    tree = read_yaml(tmp_path / "run" / "config.yaml")
    return {**tree, **tree["run"], **tree["optimizer"]}


def test_what_is_counted_in_steps_changes_in_proportion(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run: {steps: 1000}")
    config = parse(TokenizerTraining, ["--data", "demo", "--config", str(tmp_path / "run.yaml"), "--lr-warmup", "7"])
    assert config.run.validate_every == 500 and config.gan.gan_start == 5000 and config.quantizer.revive_after == 100  # type: ignore[attr-defined]
    found = scaled(config, 200)
    assert found.run.validate_every == 100 and found.gan.gan_start == 1000 and found.gan.gan_ramp == 200
    assert found.quantizer.revive_after == 20 and found.run.checkpoint_every == 100  # type: ignore[attr-defined]
    assert found.optimizer.lr_warmup == 7, "the command line said so"
    assert found.run.steps == 200
    assert 1 - found.optimizer.ema_decay == pytest.approx(5 * (1 - config.optimizer.ema_decay))
    assert found.optimizer.lr == config.optimizer.lr and found.run.keep_checkpoints == config.run.keep_checkpoints


def test_a_preset_is_scaled_and_a_share_stays() -> None:
    config = parse(TokenizerTraining, ["--data", "demo", "--config", "demo-tokenizer", "--gan-start", "0.5"])
    found = scaled(config, 600, validations=1)
    assert (found.run.steps, found.optimizer.lr_warmup, found.run.validate_every) == (600, 60, 600)
    assert found.gan.gan_start == 0.5 and found.optimizer.ema_decay == config.optimizer.ema_decay


@pytest.mark.parametrize("length", ["--epochs", "--minutes", "--steps"])
def test_options_that_nothing_reads_are_refused_beside_a_length(
    length: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Also by the trial that minutes begin with, and by a number of steps on the command line."""
    small = "--size 16 --channels 1 --width 8 --multipliers 1 2 --blocks 1 --groups 4 --latent-dim 8".split()
    data = ["--data", "demo", *small, "--output", tmp_path / "tokenizer"]
    for program, base, option in (
        (train_tokenizer, data, ("--shuffle-buffer", 99)),
        (main, words(tmp_path), ("--text-dropout", 0.5)),
    ):
        result = cli(program, *base, *option, length, 1)
        assert result.code == 2 and option[0] in result.err, result.err


@given(
    start=st.floats(0, 100), step=st.floats(1e-3, 10), validation=st.floats(0, 100), seconds=st.floats(1, 1e5),
    validations=st.integers(1, 50),
)  # fmt: skip
def test_a_run_keeps_to_its_time(
    start: float, step: float, validation: float, seconds: float, validations: int
) -> None:
    steps, affordable = Trial(start, step, validation).steps(seconds, validations)
    assert 1 <= affordable <= validations
    if steps >= 1:
        assert start + steps * step + affordable * validation <= seconds * (1 + 1e-9)
        assert start + (steps + 1) * step + affordable * validation >= seconds * (1 - 1e-9) or steps > 10**9


def test_a_longer_run_saves_and_logs_as_often() -> None:
    config = parse(TokenizerTraining, ["--data", "demo", "--steps", "10000"])
    found = scaled(config, 200_000)
    assert found.run.checkpoint_every == config.run.checkpoint_every and found.run.log_every == config.run.log_every
    assert found.run.validate_every == 20 * config.run.validate_every


@given(
    step=st.floats(1e-2, 10), reading=st.floats(0, 1), cached=st.integers(0, 2000), batch=st.integers(1, 64),
    seconds=st.floats(1, 2000),
)  # fmt: skip
def test_images_are_read_when_a_step_needs_them(
    step: float, reading: float, cached: int, batch: int, seconds: float
) -> None:
    """Those that no step reaches take no time."""
    trial = Trial(1.0, step, 0.0, reading, cached, batch)
    steps, _ = trial.steps(seconds, 1)

    def taken(steps: int) -> float:
        return 1.0 + steps * step + reading * min(cached, steps * batch)

    assert taken(steps) == pytest.approx(1.0 + steps * step + trial.read_in(steps))
    assert steps <= 0 or taken(steps) <= seconds * (1 + 1e-9)
    assert steps < 0 or taken(steps + 1) >= min(seconds, taken(steps + 1)) >= seconds * (1 - 1e-9)


@given(
    start=st.floats(0, 100), step=st.floats(1e-3, 10), validation=st.floats(0, 100), seconds=st.floats(1, 1e5),
    every=st.integers(1, 10**6),
)  # fmt: skip
def test_all_validations_at_a_given_interval_are_counted(
    start: float, step: float, validation: float, seconds: float, every: int
) -> None:
    def taken(steps: int) -> float:
        return start + steps * step + math.ceil(steps / every) * validation

    steps, validations = Trial(start, step, validation).steps(seconds, 3, every)
    assert steps >= 0 and validations == math.ceil(steps / every)
    assert steps == 0 or taken(steps) <= seconds * (1 + 1e-9)
    assert taken(steps + 1) >= seconds * (1 - 1e-9)


def test_an_interval_of_the_command_line_counts_in_minutes(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "measured", lambda *_given: Trial(1.0, 2.9, 2.9))
    assert cli(main, *words(tmp_path, "--minutes", 1, "--validate-every", 1)).code == 0
    assert saved(tmp_path)["steps"] == 10 and saved(tmp_path)["validate_every"] == 1
    assert cli(main, *words(tmp_path, "--minutes", 1, "--overwrite")).code == 0
    assert saved(tmp_path)["steps"] == 16 and saved(tmp_path)["validate_every"] == 4


def test_epochs_become_steps(tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert cli(main, *words(tmp_path, "--epochs", 3)).code == 0
    images = 9
    found = saved(tmp_path)
    assert found["steps"] == math.ceil(3 * images / 4) and found["epochs"] == 3
    assert found["validate_every"] == 1 and found["lr_warmup"] == 1


def test_minutes_are_measured_once(tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trials = []

    def trial(*_given: Any) -> Trial:
        trials.append(1)
        return Trial(1.0, 5.9, 0.0)

    monkeypatch.setattr(budget, "measured", trial)
    assert cli(main, *words(tmp_path, "--minutes", 1, "--lr-warmup", 2)).code == 0
    assert saved(tmp_path)["steps"] == 10 and saved(tmp_path)["lr_warmup"] == 2
    first = weights(tmp_path / "run")
    assert cli(main, *words(tmp_path, "--minutes", 1, "--lr-warmup", 2)).code == 0
    assert weights(tmp_path / "run") == first and trials == [1]
    result = cli(main, *words(tmp_path, "--minutes", 2, "--lr-warmup", 2))
    assert result.code == 0 and "20 steps" in result.err and saved(tmp_path)["steps"] == 20
    assert trials == [1] and weights(tmp_path / "run") != first


def test_a_run_that_is_not_resumed_has_its_own_steps(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first checkpoint it begins anew, whatever its options were."""
    with monkeypatch.context() as patch:
        patch.setattr(PriorTrainer, "step", lambda *_: sys.exit(9))
        assert cli(main, *words(tmp_path, "--epochs", 3)).code == 9
    assert saved(tmp_path)["steps"] == math.ceil(3 * 9 / 4)
    assert cli(main, *words(tmp_path, "--epochs", 3, "--batch-size", 3)).code == 0
    assert saved(tmp_path)["steps"] == 9


@pytest.mark.parametrize("budget_of", ["epochs", "minutes"])
def test_a_smaller_budget_is_refused_by_its_name(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, budget_of: str
) -> None:
    monkeypatch.setattr(budget, "measured", lambda *_given: Trial(1.0, 8.4, 0.0))
    assert cli(main, *words(tmp_path, f"--{budget_of}", 3)).code == 0
    (tmp_path / "run" / "finished.json").unlink()
    result = cli(main, *words(tmp_path, f"--{budget_of}", 0.01))
    line = result.err.splitlines()[-1]
    assert result.code == 1 and f"--{budget_of}: found 0.01" in line and "--steps" not in line
    line = cli(main, *words(tmp_path, "--steps", 1)).err.splitlines()[-1]
    assert "--steps: found 1, but" in line and budget_of not in line


def test_a_run_with_one_budget_goes_on_with_the_other(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "measured", lambda *_given: Trial(1.0, 5.9, 0.0))
    assert cli(main, *words(tmp_path, "--minutes", 1)).code == 0
    before = saved(tmp_path)
    assert before["steps"] == 10
    for option, value, steps in ("epochs", 8, 18), ("minutes", 2, 20):
        result = cli(main, *words(tmp_path, f"--{option}", value))
        assert result.code == 0 and f"{steps} steps" in result.err, result.err
        found = saved(tmp_path)
        assert found["steps"] == steps and found[option] == value
        assert [found[name] for name in ("lr_warmup", "validate_every", "ema_decay")] == [
            before[name] for name in ("lr_warmup", "validate_every", "ema_decay")
        ]


def test_a_run_of_an_earlier_version_goes_on_with_options_that_nothing_reads(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    option = ("--text-dropout", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr("vqgen.prior.trainer.refuse_unused", lambda *_: None)
        assert cli(main, *words(tmp_path, *option, "--steps", 2)).code == 0
    monkeypatch.setattr(Trial, "steps", lambda *_: (6, 1))
    result = cli(main, *words(tmp_path, *option, "--minutes", 30))
    assert result.code == 0 and saved(tmp_path)["steps"] == 6, result.err


def test_a_decay_that_the_user_chose_stays(tmp_path: Path) -> None:
    files = {"own": "optimizer: {ema_decay: 0.9}", "run": f"{MARK}optimizer: {{ema_decay: 0.9}}"}
    files["plan"] = "# Planned by vqgen-train for 'x'; change it.\noptimizer: {ema_decay: 0.9}"
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for stated, kept in (
        (["--config", str(tmp_path / "own.yaml")], True),
        (["--ema-decay", "0.9"], True),
        (["--config", "demo-tokenizer"], False),
        (["--config", str(tmp_path / "run.yaml")], False),
        (["--config", str(tmp_path / "plan.yaml")], False),
        ([], False),
    ):
        config = parse(TokenizerTraining, ["--data", "demo", *stated])
        assert (scaled(config, 5).optimizer.ema_decay == config.optimizer.ema_decay) == kept, stated


@pytest.mark.parametrize("length", ["--steps", "--epochs"])
def test_what_the_command_line_gave_is_known_whatever_the_length(tmp_path: Path, length: str) -> None:
    """Options without effect are refused by it."""
    words = ["--data", "demo", "--output", str(tmp_path / "run"), "--shuffle-buffer", "20", length, "2"]
    found = budget.settled(parse(TokenizerTraining, words), lambda _config: None, lambda: 100)
    assert {"shuffle_buffer", length[2:]} <= found.given


@pytest.mark.parametrize("budget_of", ["epochs", "minutes"])
def test_a_run_with_a_budget_is_lengthened_by_steps(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, budget_of: str
) -> None:
    monkeypatch.setattr(budget, "measured", lambda *_given: Trial(1.0, 8.4, 0.0))  # seven steps, as in three epochs
    assert cli(main, *words(tmp_path, f"--{budget_of}", 3 if budget_of == "epochs" else 1)).code == 0
    before = saved(tmp_path)
    for steps in (14, 14, 21):  # once more it is finished
        result = cli(main, *words(tmp_path, "--steps", steps))
        assert result.code == 0, result.err
        found = saved(tmp_path)
        assert found["steps"] == steps and ("resuming" in result.err or "is finished" in result.err)
        kept = ("lr_warmup", "validate_every", "checkpoint_every", "log_every", "ema_decay")
        assert [found[name] for name in kept] == [before[name] for name in kept]
    assert found[budget_of] == pytest.approx(3 * before[budget_of])
    # The budget goes on from there, and what is given is still compared.
    assert cli(main, *words(tmp_path, f"--{budget_of}", 4 * before[budget_of])).code == 0
    assert saved(tmp_path)["steps"] == 4 * before["steps"]
    result = cli(main, *words(tmp_path, "--steps", 30, "--lr-warmup", 5))
    assert result.code == 1 and "--lr-warmup" in result.err


def test_steps_of_the_command_line_come_before_a_budget_in_a_file(tmp_path: Path, cli: Callable[..., Any]) -> None:
    (tmp_path / "run.yaml").write_text("run: {epochs: 50}\noptimizer: {lr_warmup: 7}")
    result = cli(main, *words(tmp_path, "--config", tmp_path / "run.yaml", "--steps", 3))
    assert result.code == 0, result.err
    found = saved(tmp_path)
    assert (found["steps"], found["epochs"], found["lr_warmup"]) == (3, None, 7)


def test_a_budget_takes_the_place_of_another_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {epochs: null, minutes: 50}")
    config = parse(TokenizerTraining, ["--data", "demo", "--config", str(file), "--epochs", "5"])
    assert (config.run.minutes, config.run.epochs) == (None, 5)
    (tmp_path / "later.yaml").write_text("run: {epochs: 3, minutes: null}")
    config = parse(
        TokenizerTraining, ["--data", "demo", "--config", str(file), "--config", str(tmp_path / "later.yaml")]
    )
    assert (config.run.minutes, config.run.epochs) == (None, 3)
    for words in (["--epochs", "5", "--minutes", "1"], ["--config", str(file), "--epochs", "5", "--minutes", "1"]):
        with pytest.raises(UsageError, match="give one of them"):
            parse(TokenizerTraining, ["--data", "demo", *words])


def test_all_processes_end_a_trial_by_the_clock_of_the_main_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after(steps: int) -> Callable[..., bool]:
        left = iter([False] * (steps - 4) + [True])
        return lambda _own: next(left)

    nothing, steps = SimpleNamespace(check=lambda: None, num_processes=2, free_memory=lambda: None), list[int]()
    run = SimpleNamespace(device=torch.device("cpu"), finite=nothing, accelerator=nothing)
    trainer = SimpleNamespace(begin=lambda _: None, loading=lambda: 0.0, validate=lambda _: {}, examples=8, validated=8)
    trainer.step = steps.append
    config = parse(PriorTraining, ["--codes", str(tmp_path)])
    for wanted, seconds in ((6, 0.0), (9, 1e9)):  # by its own clock it would take 4 or 30 steps
        monkeypatch.setattr(budget, "on_main", after(wanted))
        steps.clear()
        budget.measured(config, lambda _config: (run, trainer), seconds=seconds)  # type: ignore[arg-type,return-value]
        assert len(steps) == wanted


@pytest.mark.parametrize(("flags", "compiled"), [([], False), (["--no-compile"], False), (["--compile"], True)])
def test_a_trial_is_compiled_only_where_that_is_asked_for(tmp_path: Path, flags: list[str], compiled: bool) -> None:
    """A run of 10,000 steps is compiled on CUDA unasked, which takes longer than all steps of the trial."""

    class Built(Exception):
        pass

    def build(config: Any) -> Any:
        raise Built(config.run.compile)

    with pytest.raises(Built) as built:
        budget.measured(parse(PriorTraining, ["--codes", str(tmp_path), *flags]), build)
    assert built.value.args == (compiled,)


def test_a_trial_leaves_the_run_as_it_is(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a budget that was measured give the weights of a run that was told these steps."""
    measured = budget.measured

    def trial(*given: Any) -> Trial:
        measured(*given)  # it is real; how long it took decides nothing
        return Trial(0.2, 0.05, 0.1)

    monkeypatch.setattr(budget, "measured", trial)
    assert cli(main, *words(tmp_path, "--minutes", 0.02, "--log-every", 5, "--seed", 3)).code == 0
    found, first = saved(tmp_path), weights(tmp_path / "run")
    told = ["--steps", found["steps"], "--lr-warmup", found["lr_warmup"], "--ema-decay", found["ema_decay"]]
    told += ["--validate-every", found["validate_every"], "--log-every", 5, "--seed", 3]
    again = words(tmp_path, *told)
    again[again.index("--output") + 1] = tmp_path / "told"
    assert cli(main, *again).code == 0
    assert weights(tmp_path / "told") == first


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--minutes", 1, "--epochs", 1], "--epochs"),
        (["--minutes", 1, "--steps", 5], "--steps"),
        (["--minutes", 0], "--minutes"),
        (["--epochs", "nan"], "--epochs"),
        (["--minutes", 1e-6], "--minutes"),
    ],
)
def test_a_budget_that_holds_no_step_is_refused(
    tmp_path: Path, cli: Callable[..., Any], given: list[Any], named: str
) -> None:
    result = cli(main, *words(tmp_path, *given))
    assert result.code == 2 and result.err.count("\n") == 1 and named in result.err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_warm_up_longer_than_half_is_shortened(tmp_path: Path, cli: Callable[..., Any]) -> None:
    result = cli(main, *words(tmp_path, "--steps", 6, "--lr-warmup", 5))
    assert result.code == 0 and len([line for line in result.err.splitlines() if "--lr-warmup" in line]) == 1
