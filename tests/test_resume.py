"""A run that was stopped, however, ends as if it had not been: real processes, killed and signalled."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import (
    PRIOR,
    TOKENIZE,
    TOKENIZER,
    at_row,
    fail_after_signal,
    in_checkpoint,
    in_step,
    killed_module,
    rows,
    run,
    signal_group,
    start,
    start_module,
    steps,
    tree,
    weights,
    write_images,
)
from safetensors.torch import load_file

from vqgen.prior import train as train_prior
from vqgen.tokenizer import train as train_tokenizer
from vqgen.tokenizer.model import Tokenizer

# Everything that has a state: discriminator and its optimizer, averages, dropout, augmentation, revival, accumulation.
STAGE_ONE = (
    "--data demo --channels 1 --size 16 --flip --random-crop 0.25 --width 8 --multipliers 1 2 --groups 4 "
    "--blocks 1 --latent-dim 8 --dropout 0.2 --codebook-size 64 --code-dim 4 --revive-after 2 "
    "--gan-weight 0.5 --gan-start 1 --gan-warmup 1 --gan-ramp 3 --gan-width 8 --gan-layers 2 --lr 3e-3 "
    "--lr-warmup 3 --batch-size 8 --accumulate 2 --steps 12 --validation-images 16 --precision fp32 "
    "--log-every 1 --validate-every 5 --checkpoint-every 4"
).split()
STAGE_TWO = (
    "--dim 16 --layers 1 --heads 2 --dropout 0.2 --label-dropout 0.3 --patience 2 --preview-images 10 --ema-decay 0.5 "
    "--batch-size 8 --accumulate 2 --steps 60 --precision fp32 --log-every 1 --validate-every 3 --checkpoint-every 4 "
    "--lr 6 --lr-warmup 30"  # the rate rises until the loss does, too: early stopping has something to do
).split()


def same(folder: Path, reference: Path) -> None:
    """The two runs ended alike: the model, every checkpoint they both kept, and the history but for its timing."""
    assert weights(folder) == weights(reference)
    assert rows(folder) == rows(reference)
    last = steps(reference)[-1]
    assert steps(folder)[-1] == last
    for path in (reference / f"checkpoints/step-{last:08d}").glob("*.safetensors"):
        assert path.read_bytes() == (folder / path.relative_to(reference)).read_bytes(), path.name
    assert not list(folder.rglob("*.part"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("one") / "reference"
    run(TOKENIZER, *STAGE_ONE, "--output", folder).ok()
    return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, one: Path) -> Path:
    """Code files with two views and labels, of 120 of the demo's images."""
    folder = tmp_path_factory.mktemp("codes")
    write_images(folder / "images", 120)
    words = ["--tokenizer", one, "--data", folder / "images", "--views", 2, "--flip", "--holdout", 0.2]
    run(TOKENIZE, *words, "--output", folder / "codes").ok()
    return folder / "codes"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, codes: Path) -> Path:
    """A prior run that nothing disturbed; it ends by early stopping."""
    folder = tmp_path_factory.mktemp("two") / "reference"
    ended = run(PRIOR, "--codes", codes, *STAGE_TWO, "--output", folder).ok()
    assert "stopped early" in ended.err
    return folder


def test_the_reference_uses_what_is_to_be_resumed(one: Path, two: Path) -> None:
    train = [row for row in rows(one) if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert {"train/discriminator", "train/adversarial", "train/adaptive_ratio"} <= train[-1].keys()
    for row in train:
        parts = [row[f"train/{part}_grad_norm"] for part in ("encoder", "quantizer", "decoder")]
        assert math.hypot(*parts) == pytest.approx(row["train/grad_norm"], rel=1e-4), "the parts are the whole"
        assert row["train/images"] == 8 * row["step"]
        assert all(0 <= row.get(f"train/discriminator_{images}_accuracy", 0) <= 1 for images in ("real", "fake"))
    revived = [row["train/codes_revived"] for row in train]
    assert max(revived) > 0 and all(count % 1 == 0 for count in revived), "of both parts of a step, not their mean"
    checkpoint = one / "checkpoints/step-00000012"
    modules = {path.stem for path in checkpoint.glob("*.safetensors")}
    assert modules == {"tokenizer", "average", "discriminator"}
    optimizers = torch.load(checkpoint / "optimizers.pt", weights_only=True)
    assert len(optimizers["discriminator"]["state"]) > 0
    # No code is idle for longer than --revive-after allows, though no batch uses them all: some were revived.
    idle = load_file(checkpoint / "tokenizer.safetensors")["quantizer.codebook.idle"]
    assert idle.max() < 2
    assert max(row["train/usage"] for row in train) < 1
    average, now = (load_file(checkpoint / f"{name}.safetensors") for name in ("average", "tokenizer"))
    assert not torch.equal(average["module.decoder.last.weight"], now["decoder.last.weight"])
    state = json.loads((sorted((two / "checkpoints").glob("step-*"))[-1] / "state.json").read_text())
    assert state["extra"]["stale"] == 2
    assert "best" in {path.stem for path in (two / "checkpoints").glob("step-*/*.safetensors")}


@pytest.mark.slow
def test_tokenizer_killed_as_python_dash_m(tmp_path: Path, one: Path) -> None:
    folder = tmp_path / "run"
    killed = killed_module(TOKENIZER, 6, *STAGE_ONE, "--output", folder)
    assert killed.code == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    resumed = start_module(TOKENIZER, *STAGE_ONE, "--output", folder).wait().ok()
    assert "resuming from" in resumed.err and "step-00000004" in resumed.err
    same(folder, one)


@pytest.mark.slow
def test_tokenizer_killed_early_in_a_checkpoint_and_again(tmp_path: Path, one: Path) -> None:
    words = [*STAGE_ONE, "--output", tmp_path / "run"]
    folder = tmp_path / "run"
    # Before the first checkpoint: it starts anew.
    assert run(TOKENIZER, *words, hook=at_row(3)).code == -signal.SIGKILL
    assert steps(folder) == []
    # With half of a checkpoint on disk: that one does not count.
    assert run(TOKENIZER, *words, hook=in_checkpoint(8)).code == -signal.SIGKILL
    assert steps(folder) == [4]
    assert list((folder / "checkpoints").glob(".*.part/*/optimizers.pt"))
    # Again, between two checkpoints, with half a row of history left.
    assert run(TOKENIZER, *words, hook=at_row(11)).code == -signal.SIGKILL
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "train/lo')
    assert steps(folder) == [4, 8]
    run(TOKENIZER, *words).ok()
    same(folder, one)


def test_tokenizer_stopped_by_signals(tmp_path: Path, one: Path) -> None:
    words, folder = [*STAGE_ONE, "--output", tmp_path / "run"], tmp_path / "run"
    stopped = run(TOKENIZER, *words, hook=in_step(3, signal.SIGTERM))
    assert stopped.code == 128 + signal.SIGTERM
    at = steps(folder)[-1]
    assert at == 3, "no step of a checkpoint"
    assert f"stopped by a signal after step {at}, saved" in stopped.err
    assert max(row["step"] for row in rows(folder)) == at
    interrupted = run(TOKENIZER, *words, hook=at_row(10, signal.SIGINT))
    assert interrupted.code == 128 + signal.SIGINT
    assert "after step 10, saved" in interrupted.err and steps(folder)[-1] == 10
    run(TOKENIZER, *words).ok()
    same(folder, one)


def test_rows_of_several_steps_survive_a_signal(tmp_path: Path, one: Path) -> None:
    """A row is a mean over --log-every steps, those before a stop included."""
    words, folder = [*STAGE_ONE, "--log-every", 6, "--output", tmp_path / "run"], tmp_path / "run"
    assert run(TOKENIZER, *words, hook=in_step(4, signal.SIGTERM)).code == 128 + signal.SIGTERM
    assert steps(folder) == [4] and rows(folder) == []
    run(TOKENIZER, *words).ok()
    assert weights(folder) == weights(one)
    single = {row["step"]: row["train/loss"] for row in rows(one) if "train/loss" in row}
    found = {row["step"]: row["train/loss"] for row in rows(folder) if "train/loss" in row}
    assert found == {last: pytest.approx(sum(single[s] for s in range(last - 5, last + 1)) / 6) for last in (6, 12)}


def test_prior_killed_and_stopped(tmp_path: Path, codes: Path, two: Path) -> None:
    words, folder = ["--codes", codes, *STAGE_TWO, "--output", tmp_path / "run"], tmp_path / "run"
    last = steps(two)[-1]
    assert last >= 9
    assert run(PRIOR, *words, hook=at_row(6)).code == -signal.SIGKILL
    assert steps(folder) == [4]
    assert run(PRIOR, *words, hook=in_checkpoint(last)).code == -signal.SIGKILL
    assert steps(folder)[-1] < last
    interrupted = run(PRIOR, *words, hook=at_row(last - 1, signal.SIGTERM))
    assert interrupted.code == 143 and steps(folder)[-1] == last - 1
    run(PRIOR, *words).ok()
    same(folder, two)


def test_prior_in_bfloat16_killed(tmp_path: Path, codes: Path) -> None:
    """On CPUs that has a training pass of its own, which draws its dropout itself."""
    short = {"fp32": "bf16", "60": "10"}
    words = ["--codes", codes, *(short.get(word, word) for word in STAGE_TWO), "--output"]
    run(PRIOR, *words, tmp_path / "whole").ok()
    assert run(PRIOR, *words, tmp_path / "run", hook=at_row(6)).code == -signal.SIGKILL
    assert steps(tmp_path / "run") == [4]
    run(PRIOR, *words, tmp_path / "run").ok()
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_prior_killed_as_python_dash_m(tmp_path: Path, codes: Path, two: Path) -> None:
    words, folder = ["--codes", codes, *STAGE_TWO, "--output", tmp_path / "run"], tmp_path / "run"
    for step in (3, 6):
        assert killed_module(PRIOR, step, *words).code == -signal.SIGKILL
    start_module(PRIOR, *words).wait().ok()
    same(folder, two)


@pytest.mark.slow
def test_an_interrupt_from_the_keyboard_saves_with_workers_too(tmp_path: Path, one: Path) -> None:
    """A terminal interrupts the processes that decode images as well."""
    words, folder = [*STAGE_ONE, "--workers", 1, "--cache-mb", 0, "--output", tmp_path / "run"], tmp_path / "run"
    for step in (2, 7):
        ended = start_module(TOKENIZER, *words).signal(signal.SIGINT, folder, step, group=True)
        assert ended.code == 128 + signal.SIGINT and "saved" in ended.last, ended.err
    run(TOKENIZER, *words).ok()
    same(folder, one)


@pytest.mark.slow
def test_a_signal_to_the_group_in_the_middle_of_a_step(tmp_path: Path, one: Path) -> None:
    """The workers outlive it, the step is completed and saved, and the workers end with the run."""
    words = [*STAGE_ONE, "--workers", 1, "--cache-mb", 0, "--output", tmp_path / "run"]
    started = start(TOKENIZER, *words, hook=signal_group(6))
    ended = started.wait()
    assert ended.code == 128 + signal.SIGTERM and steps(tmp_path / "run")[-1] == 6, ended.err
    with pytest.raises(ProcessLookupError):
        os.killpg(started.process.pid, 0)
    run(TOKENIZER, *words).ok()
    same(tmp_path / "run", one)


def test_a_step_that_fails_is_never_saved(tmp_path: Path, one: Path) -> None:
    """Not even where a signal came before."""
    words = [*STAGE_ONE, "--output", tmp_path / "run"]
    ended = run(TOKENIZER, *words, hook=fail_after_signal(6))
    assert ended.code not in (0, 128 + signal.SIGTERM) and "a fault in the middle" in ended.err
    assert steps(tmp_path / "run") == [4]
    run(TOKENIZER, *words).ok()
    same(tmp_path / "run", one)


def test_a_run_that_is_lengthened(tmp_path: Path, one: Path) -> None:
    """The learning rate goes on without a jump, killed or not, and also from a checkpoint of version 0.1."""
    whole, killed, old = (tmp_path / name for name in ("whole", "killed", "old"))
    for folder in (whole, killed, old):
        shutil.copytree(one, folder)
    words = [*STAGE_ONE, "--steps", 24, "--keep-checkpoints", 9, "--output"]
    said = run(TOKENIZER, *words, whole).ok().err
    assert "--steps" in said and "12 steps" in said and "24" in said
    rates = {row["step"]: row["train/lr"] for row in rows(whole) if "train/lr" in row}
    assert list(rates) == list(range(1, 25)) and rates[12] == rates[24] == 0
    assert max(abs(rates[s + 1] - rates[s]) for s in range(1, 24)) <= 3e-3 / 3 * 1.0001
    assert max(rates[s] for s in range(13, 25)) > 3e-4, "the new steps learn"
    # The discriminator's rate is the same share of its peak.
    states = torch.load(whole / "checkpoints/step-00000016/optimizers.pt", weights_only=True)
    assert states["discriminator"]["param_groups"][0]["lr"] / 1e-4 == pytest.approx(rates[15] / 3e-3)

    for row in (14, 18):
        assert run(TOKENIZER, *words, killed, hook=at_row(row)).code == -signal.SIGKILL
    assert "planned" not in run(TOKENIZER, *words, killed).ok().err
    same(killed, whole)

    state = old / "checkpoints/step-00000012/state.json"
    content = json.loads(state.read_text())
    del content["extra"]["plan"], content["files"], content["sha256"]
    state.write_text(json.dumps(content))
    assert "--steps" in run(TOKENIZER, *words, old).ok().err
    assert weights(old) == weights(whole)


ADVERSARY = (
    "--gan-loss non-saturating --gan-spectral-norm --gan-lecam 0.3 --gan-augment color translation cutout --gan-start 6"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ADVERSARY,
        "--precision bf16",
        "--codebook gradient --no-kmeans-start --accumulate 1",
        "--workers 1",
    ],
)
def test_tokenizer_killed_in_other_settings(tmp_path: Path, changes: str) -> None:
    words = [*STAGE_ONE, *changes.split(), "--output"]
    run(TOKENIZER, *words, tmp_path / "whole").ok()
    assert run(TOKENIZER, *words, tmp_path / "run", hook=at_row(7)).code == -signal.SIGKILL
    run(TOKENIZER, *words, tmp_path / "run").ok()
    same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run(tmp_path: Path, one: Path, cli: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one, folder)
    words = [*STAGE_ONE, "--output", folder]
    before = tree(folder)

    again = cli(train_tokenizer.main, *words, "--log-with", "tensorboard", "--keep-checkpoints", 5).ok()
    assert "is finished" in again.last
    fewer = cli(train_tokenizer.main, *words, "--steps", 7).ok()
    assert "is finished" in fewer.last
    cli(train_tokenizer.main, *words, "--lr", 0.5).refused(1, "--lr", "0.003", "0.5", "--overwrite")
    cli(train_tokenizer.main, *words, "--no-flip").refused(1, "--flip", "True", "False")
    assert tree(folder) == before, "a finished run was touched"

    # An unfinished one cannot end before the step it has reached.
    half = tmp_path / "half"
    shutil.copytree(one, half)
    for name in ("finished.json", "vqgen.json"):
        (half / name).unlink()
    ended = cli(train_tokenizer.main, *STAGE_ONE, "--output", half, "--steps", 7)
    ended.refused(1, "--steps", "7", "step-00000012")

    # What does not change the result may change when it goes on.
    more = ["--steps", 14, "--log-every", 2, "--checkpoint-every", 13, "--workers", 0, "--cache-mb", 0]
    run(TOKENIZER, *words, *more).ok()
    assert [row["step"] for row in rows(folder) if "train/loss" in row] == [*range(1, 13), 14]
    assert steps(folder) == [13, 14]
    assert weights(folder) != weights(one)

    # The model alone, without what resuming needs, is finished still, and not trained over.
    shutil.rmtree(folder / "checkpoints")
    before = tree(folder)
    assert "is finished" in cli(train_tokenizer.main, *words).ok().last
    cli(train_tokenizer.main, *words, "--steps", 20).refused(1, str(folder), "no checkpoint", "--overwrite")
    assert tree(folder) == before, "what is refused changes nothing"

    (folder / "notes.txt").write_text("mine")
    run(TOKENIZER, *words, "--overwrite").ok()
    same(folder, one)
    assert (folder / "notes.txt").read_text() == "mine"

    # Its own configuration goes on with it, also one that an earlier version wrote, with --overwrite in it.
    saved = folder / "config.yaml"
    assert "overwrite: false" in saved.read_text()
    saved.write_text(saved.read_text().replace("overwrite: false", "overwrite: true"))
    longer = run(TOKENIZER, "--config", saved, "--steps", 13).ok()
    assert "resuming" in longer.err and rows(folder)[0]["step"] == 1 and steps(folder)[-1] == 13
    assert run(TOKENIZER, "--config", saved, "--steps", 20, hook=at_row(15)).code == -signal.SIGKILL
    assert not (folder / "finished.json").exists() and (folder / "model.safetensors").exists()


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, one: Path, codes: Path) -> None:
    foreign = tmp_path / "foreign"
    (foreign / "images").mkdir(parents=True)
    (foreign / "images" / "holiday.png").write_bytes(b"a picture")
    (foreign / "model.safetensors").write_bytes(b"a model")
    for theirs in ({}, {"config.yaml": "model: resnet\n"}):
        for name, text in theirs.items():
            (foreign / name).write_text(text)
        before = tree(foreign)
        for words in ([], ["--overwrite"]):
            run(TOKENIZER, *STAGE_ONE, "--output", foreign, *words).refused(
                2, "--output", str(foreign), "choose another"
            )
            assert tree(foreign) == before

    # The other stage's run is something else, too, and so are code files.
    for words in ([], ["--overwrite"]):
        for folder in (one, codes):
            before = tree(folder)
            run(PRIOR, "--codes", codes, *STAGE_TWO, "--output", folder, *words).refused(2, "--output", str(folder))
            assert tree(folder) == before


def test_a_mistake_at_the_start_can_be_mended(tmp_path: Path) -> None:
    """A run that never began leaves nothing that would refuse the right options."""
    folder = tmp_path / "run"
    run(TOKENIZER, *STAGE_ONE, "--data", tmp_path / "nothing", "--output", folder).refused(1, str(tmp_path / "nothing"))
    assert run(TOKENIZER, *STAGE_ONE, "--lr", 1, "--output", folder, hook=at_row(2)).code == -signal.SIGKILL
    run(TOKENIZER, *STAGE_ONE, "--steps", 1, "--output", folder).ok()
    assert [row["step"] for row in rows(folder)] == [1, 1]


def test_a_prior_that_stopped_early_goes_on_with_more_patience(tmp_path: Path, codes: Path, two: Path) -> None:
    folder = tmp_path / "prior"
    shutil.copytree(two, folder)
    words = [*STAGE_TWO, "--codes", codes, "--output", folder]
    words[words.index("--patience") + 1] = "4"
    before = steps(folder)[-1]
    run(PRIOR, *words).ok()
    assert steps(folder)[-1] > before


def test_a_prior_that_stopped_early_is_finished_without_its_checkpoints(tmp_path: Path, codes: Path, two: Path) -> None:
    folder = tmp_path / "prior"
    shutil.copytree(two, folder)
    shutil.rmtree(folder / "checkpoints")
    before, words = tree(folder), [*STAGE_TWO, "--codes", codes, "--output", folder]
    for more in ([], ["--patience", 1], ["--steps", 70]):
        assert "is finished" in run(PRIOR, *words, *more).ok().last
        assert tree(folder) == before
    for patience in (0, 4):
        run(PRIOR, *words, "--patience", patience).refused(1, str(folder), "no checkpoint", "--overwrite")
    # A record of an earlier version does not tell; its checkpoints do.
    shutil.copytree(two / "checkpoints", folder / "checkpoints")
    (folder / "finished.json").write_text(json.dumps({"steps": steps(two)[-1]}))
    assert "stopped early" in run(PRIOR, *words).ok().err and weights(folder) == weights(two)


def test_a_prior_goes_on_with_codes_of_its_own_tokenizer_alone(tmp_path: Path, one: Path) -> None:
    write_images(tmp_path / "images", 60)
    make = ["--data", tmp_path / "images", "--holdout", 0.2, "--output", tmp_path / "codes", "--overwrite"]
    words = [*STAGE_TWO, "--codes", tmp_path / "codes", "--output", tmp_path / "prior", "--steps"]
    run(TOKENIZE, *make, "--tokenizer", one).ok()
    run(PRIOR, *words, 3).ok()

    write_images(tmp_path / "images", 80)  # further ones
    run(TOKENIZE, *make, "--tokenizer", one).ok()
    assert "codes of other images" in run(PRIOR, *words, 6).ok().err
    assert "codes of other images" not in run(PRIOR, *words, 9).ok().err
    trained, other = weights(tmp_path / "prior"), Tokenizer.load(one)
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1)
    other.save(tmp_path / "other")
    run(TOKENIZE, *make, "--tokenizer", tmp_path / "other").ok()
    run(PRIOR, *words, 12).refused(1, "--codes", "tokenizer", "--overwrite")
    assert weights(tmp_path / "prior") == trained


def test_a_prior_that_is_shortened_to_its_checkpoint_is_validated(tmp_path: Path, codes: Path) -> None:
    """Otherwise what is saved would be the weights before training."""
    words = [
        *STAGE_TWO,
        "--codes",
        codes,
        "--output",
        tmp_path / "run",
        "--lr",
        0.01,
        "--validate-every",
        50,
        "--steps",
    ]
    assert run(PRIOR, *words, 60, hook=at_row(6)).code == -signal.SIGKILL
    assert steps(tmp_path / "run") == [4] and not [row for row in rows(tmp_path / "run") if "heldout/gap" in row]
    config = (tmp_path / "run" / "config.yaml").read_text()
    run(PRIOR, *words, 3).refused(1, "--steps", "further")
    assert (tmp_path / "run" / "config.yaml").read_text() == config, "what is refused changes nothing"
    run(PRIOR, *words, 4).ok()
    assert [row["step"] for row in rows(tmp_path / "run") if "heldout/gap" in row] == [4]
    # Killed before it was finished it ends alike.
    state = json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())
    assert state["extra"]["best"] < math.inf
    average = load_file(tmp_path / "run/checkpoints/step-00000004/average.safetensors")
    saved = load_file(tmp_path / "run/model.safetensors")
    name = "model.norm.weight"
    (trained,) = (tensor for key, tensor in average.items() if key.endswith(name))
    assert torch.equal(saved[name], trained)


@pytest.mark.slow
def test_a_tokenizer_says_that_its_images_are_others(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 60)
    words = ["--data", tmp_path / "images", *STAGE_ONE[2:], "--holdout", 0.2, "--output", tmp_path / "run", "--steps"]
    run(TOKENIZER, *words, 2).ok()
    assert "other images" not in run(TOKENIZER, *words, 3).ok().err
    write_images(tmp_path / "images", 80)
    assert "other images" in run(TOKENIZER, *words, 4).ok().err
    assert "other images" not in run(TOKENIZER, *words, 5).ok().err


def test_the_objective_is_what_was_asked_for(tmp_path: Path, codes: Path, cli: Any) -> None:
    """Each of its options changes the first steps' loss, or adds a term of its own."""
    found = {}
    for option in ("", "--label-dropout 0.9", "--token-corruption 0.9", "--label-smoothing 0.3", "--z-loss 0.1"):
        folder = tmp_path / (option.split(" ")[0] or "plain")
        words = (
            "--dim 16 --layers 1 --heads 2 --dropout 0 --batch-size 8 --steps 3 --precision fp32 --log-every 1".split()
        )
        words += ["--preview-images", 0, *option.split(), "--codes", codes, "--output", folder]
        cli(train_prior.main, *words).ok()
        found[folder.name] = [row for row in rows(folder) if "train/loss" in row]
    plain = found.pop("plain")
    for option, other in found.items():
        assert len(other) == len(plain) == 3
        assert set(other[0]) != set(plain[0]) or other[-1]["train/loss"] != plain[-1]["train/loss"], option
