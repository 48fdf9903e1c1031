"""What goes wrong ends a run with one line that names it, and loses nothing that was saved."""

import json
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import TOKENIZER, Ended, in_step, rows, run, steps, tree, weights, write_images
from safetensors.torch import load_file

from vqgen.errors import UserError
from vqgen.prior import train as train_prior
from vqgen.tokenizer import trainer
from vqgen.tokenizer.data.dataset import training_batches
from vqgen.tokenizer.data.sources import open_source
from vqgen.tokenizer.train import main
from vqgen.training.checkpoint import check_checkpoint, load_checkpoint, save_checkpoint

TINY = (
    "--data demo --channels 1 --size 16 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 "
    "--codebook-size 32 --code-dim 4 --batch-size 8 --steps 6 --validation-images 16 --precision fp32 --log-every 1 "
    "--validate-every 4 --checkpoint-every 2"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(TOKENIZER, *TINY, "--keep-checkpoints", 9, "--output", folder).ok()
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that a test may fill."""
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path, room: int) -> Path:
    """Leave `room` bytes on a file system; the file that takes the rest comes back."""
    ballast = place / "ballast"
    free = shutil.disk_usage(place).free
    ballast.write_bytes(bytes(max(0, free - room)))
    return ballast


def finite(folder: Path) -> None:
    """Every tensor of a checkpoint loads and is finite."""
    files = sorted(folder.glob("*.safetensors"))
    assert {"tokenizer.safetensors", "average.safetensors"} <= {path.name for path in files}
    for path in files:
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values()), path
    torch.load(folder / "optimizers.pt", weights_only=True)
    json.loads((folder / "state.json").read_text())


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*TINY, "--lr", "1e19", "--lr-warmup", 0, "--grad-clip", 0, "--checkpoint-every", 1, "--output", folder]
    line = run(TOKENIZER, *words).refused(1, "not finite: ", "loss", "it began in the output of encoder.", "lower --lr")
    last = folder / f"checkpoints/step-{steps(folder)[-1]:08d}"
    assert f"last good checkpoint: {last}" in line
    finite(last)
    assert not (folder / "model.safetensors").exists()
    run(TOKENIZER, *words, "--checkpoint-every", 9, "--overwrite").refused(1, "no checkpoint was saved")
    assert steps(folder) == []


def test_a_trial_whose_loss_is_not_finite(tmp_path: Path) -> None:
    options = [word for word in TINY if word not in ("--steps", "6")]
    words = [*options, "--lr", "1e19", "--lr-warmup", 0, "--grad-clip", 0, "--minutes", 1, "--output", tmp_path / "run"]
    run(TOKENIZER, *words).refused(1, "not finite: ", "in the trial", "lower --lr")


def deferred() -> None:
    """As on an accelerator: the device is read where the run logs, validates or saves."""
    from vqgen.training.finite import FiniteCheck

    init = FiniteCheck.__init__

    def start(self: FiniteCheck, *args: Any) -> None:
        init(self, *args)
        self.immediate = False

    FiniteCheck.__init__ = start  # type: ignore[method-assign]


def deferred_and_stopped() -> None:
    deferred()
    in_step(4, signal.SIGTERM)()


def test_a_loss_that_is_found_not_finite_later(tmp_path: Path) -> None:
    """The first step is named, and neither the checkpoint that was due nor that of a signal is saved."""
    words = [*TINY, "--lr", "1e19", "--lr-warmup", 0, "--grad-clip", 0, "--log-every", 6, "--validate-every", 6]
    for hook, last in ((deferred, 6), (deferred_and_stopped, 4)):
        folder = tmp_path / str(last)
        ended = run(TOKENIZER, *words, "--checkpoint-every", 6, "--output", folder, hook=hook)
        ended.refused(1, "not finite: ", "at step 2;", "it began in", "no checkpoint was saved")
        assert [(row["step"], row["health"]) for row in rows(folder)] == [(last, "not finite")]
        assert steps(folder) == []


def test_checks_that_wait_change_nothing(tmp_path: Path, whole: Path) -> None:
    run(TOKENIZER, *TINY, "--keep-checkpoints", 9, "--output", tmp_path / "run", hook=deferred).ok()
    assert weights(tmp_path / "run") == weights(whole) and rows(tmp_path / "run") == rows(whole)


def test_a_validation_that_fails_costs_no_step(tmp_path: Path, cli) -> None:
    """The checkpoint before it is saved, from which it is repeated where its images are whole again."""
    write_images(tmp_path / "images", 60)
    words = [*TINY[2:], "--data", tmp_path / "images", "--checkpoint-every", 6, "--validate-every", 3]
    assert cli(main, *words, "--output", tmp_path / "whole").code == 0
    heldout = open_source(str(tmp_path / "images"), "heldout", 0.05)
    kept = {Path(name): Path(name).read_bytes() for name in map(heldout.item_name, range(len(heldout)))}
    for path in kept:
        path.write_bytes(b"no image")
    for _ in range(2):
        result = cli(main, *words, "--output", tmp_path / "run")
        assert result.code == 1 and "--max-broken 0.01" in result.err
        assert steps(tmp_path / "run") == [3] and not (tmp_path / "run/model.safetensors").exists()
    for path, data in kept.items():
        path.write_bytes(data)
    assert cli(main, *words, "--output", tmp_path / "run").code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_images_that_cannot_be_read_any_more_cost_no_step(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, "--checkpoint-every", 100, "--output"]
    assert cli(main, *words, tmp_path / "whole").code == 0

    def failing(*given: Any) -> Iterator[Any]:
        yield from islice(training_batches(*given), 3)
        raise UserError("--data: gone; restore it")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_batches", failing)
        result = cli(main, *words, tmp_path / "run")
    assert result.code == 1 and "--data: gone" in result.err
    assert steps(tmp_path / "run") == [3]
    assert cli(main, *words, tmp_path / "run").code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_disk_that_is_full(small: Path, whole: Path) -> None:
    folder = small / "run"
    words = [*TINY, "--output", folder]
    run(TOKENIZER, *words, "--steps", 3).ok()
    shutil.rmtree(folder)

    # Room for one checkpoint, not for two.
    size = sum(path.stat().st_size for path in (whole / "checkpoints/step-00000002").iterdir())
    ballast = fill(small, 2 * size - 50_000)
    line = run(TOKENIZER, *words).refused(1, "cannot write", str(folder), "No space left")
    assert "Error" not in line.split("cannot write")[0]
    assert steps(folder) == [2]
    finite(folder / "checkpoints/step-00000002")
    assert not list(folder.rglob("*.part"))

    # No room for a row of history.
    ballast.write_bytes(ballast.read_bytes())
    with open(ballast, "ab") as file:
        file.write(bytes(max(0, shutil.disk_usage(small).free)))
    run(TOKENIZER, *words).refused(1, "cannot write", str(folder), "No space left")
    assert steps(folder) == [2]

    # With room again it goes on and loses nothing.
    ballast.unlink()
    run(TOKENIZER, *words).ok()
    assert weights(folder) == weights(whole)
    assert rows(folder) == rows(whole)


def test_history_and_pictures_on_a_full_disk(small: Path, whole: Path) -> None:
    folder = small / "run"
    words = [*TINY, "--checkpoint-every", 9, "--output", folder]
    for room in (4096, 12 * 1024):
        ballast = fill(small, room)
        run(TOKENIZER, *words).refused(1, "cannot write", str(folder))
        ballast.unlink()
    assert not list(folder.glob("images/*.png")), "a picture that is cut off"
    run(TOKENIZER, *words).ok()
    assert rows(folder) == rows(whole)


def test_an_output_that_cannot_be_written(tmp_path: Path, whole: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    run(TOKENIZER, *TINY, "--output", file).refused(2, str(file))
    run(TOKENIZER, *TINY, "--output", file / "run").refused(1, str(file / "run"))
    assert file.read_text() == "mine"
    place = tmp_path / "readonly"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True).returncode == 0:
        try:
            run(TOKENIZER, *TINY, "--output", place / "run").refused(1, str(place / "run"), "Read-only")
            run(TOKENIZER, *TINY, "--output", place).refused(1, str(place), "Read-only")
        finally:
            subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_checkpoint_with_any_flipped_bit_gives_way_to_the_one_before_it(tmp_path: Path, whole: Path) -> None:
    for number, name in enumerate(("tokenizer.safetensors", "optimizers.pt", "state.json")):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        for unfinished in ("finished.json", "vqgen.json", "model.safetensors"):
            (folder / unfinished).unlink()
        newest = folder / "checkpoints/step-00000006"
        flip(newest / name, (newest / name).stat().st_size // 2)
        before = (newest / name).read_bytes()
        words = [*TINY, "--keep-checkpoints", 9, "--output", folder]
        ended = run(TOKENIZER, *words, "--checkpoint-every", 9, hook=in_step(5, signal.SIGTERM))
        assert ended.code == 143 and str(newest / name) in ended.err and "step-00000004" in ended.err
        # It is kept until the run has passed its step.
        assert steps(folder) == [2, 4, 5] and (folder / "checkpoints/damaged-00000006" / name).read_bytes() == before
        assert str(newest) not in run(TOKENIZER, *words).ok().err
        assert weights(folder) == weights(whole) and rows(folder) == rows(whole)
        assert steps(folder) == [2, 4, 5, 6] and not (folder / "checkpoints/damaged-00000006").exists()


def test_checkpoints_that_are_all_damaged(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in folder.glob("checkpoints/*/optimizers.pt"):
        path.write_bytes(path.read_bytes()[:100])
    before = tree(folder)
    line = run(TOKENIZER, *TINY, "--steps", 8, "--output", folder).refused(1, "step-00000006/optimizers.pt")
    assert "--overwrite" in line
    assert tree(folder) == before


def test_a_checkpoint_file_of_another_size_is_not_hashed(tmp_path: Path, whole: Path) -> None:
    """A sparse file of a terabyte would take hours."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for unfinished in ("finished.json", "vqgen.json", "model.safetensors"):
        (folder / unfinished).unlink()
    os.truncate(folder / "checkpoints/step-00000006/tokenizer.safetensors", 2**40)
    ended = run(TOKENIZER, *TINY, "--output", folder).ok()
    assert "step-00000006/tokenizer.safetensors" in ended.err and "size" in ended.err
    assert weights(folder) == weights(whole)


def test_a_checkpoint_that_a_kill_left_to_be_removed_goes(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for unfinished in ("finished.json", "vqgen.json", "model.safetensors"):
        (folder / unfinished).unlink()
    kept = steps(folder)
    shutil.copytree(folder / f"checkpoints/step-{kept[0]:08d}", folder / "checkpoints/step-00000001")
    run(TOKENIZER, *TINY, "--output", folder).ok()
    assert steps(folder) == kept[-2:] and weights(folder) == weights(whole)


def test_what_a_kill_left_beside_a_finished_run_goes(tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    left = folder / ".finished.json.vqgen-0123456789abcdef.part"
    left.mkdir()
    assert "is finished" in run(TOKENIZER, *TINY, "--output", folder).ok().err
    assert not left.exists() and tree(folder) == tree(whole)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    net = torch.nn.Linear(1, 1)
    path = save_checkpoint(tmp_path, 3, {"net": net}, {"o": torch.optim.SGD(net.parameters())}, {"best": 0.1}, keep=2)
    assert check_checkpoint(path).step == 3
    for name in ("state.json", "net.safetensors", "optimizers.pt"):
        size = (path / name).stat().st_size
        for byte in range(0, size, 1 if name == "state.json" else 7):
            flip(path / name, byte, byte % 8)
            with pytest.raises(UserError, match=name):
                check_checkpoint(path)
            flip(path / name, byte, byte % 8)
    (path / "net.safetensors").unlink()
    with pytest.raises(UserError, match=r"net\.safetensors"):
        check_checkpoint(path)


def test_a_compressed_archive_of_optimizers_is_not_unpacked(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path, 3, {"net": net}, {"o": torch.optim.SGD(net.parameters())}, {}, keep=2)
    torch.save({"o": torch.zeros(100_000)}, path / "optimizers.pt")
    with zipfile.ZipFile(path / "optimizers.pt") as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path / "optimizers.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)
    with pytest.raises(UserError, match=r"optimizers\.pt unpacks"):
        load_checkpoint(path, {"net": net}, {})


def test_what_only_resembles_a_checkpoint_stays(tmp_path: Path) -> None:
    """A run keeps the newest two of its own and touches neither copies nor links."""
    net, elsewhere = torch.nn.Linear(2, 2), tmp_path / "elsewhere"
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        save_checkpoint(elsewhere, step, {"net": net}, {}, {}, keep=2)
    shutil.copytree(elsewhere / "step-00000001", folder / "step-00000002.bak")
    (folder / "step-00000001").symlink_to(elsewhere / "step-00000001")
    before = tree(elsewhere)
    for step in (2, 3, 4):
        path = save_checkpoint(folder, step, {"net": net}, {}, {}, keep=1)
        (path / "notes.txt").write_text("mine")
    left = {"step-00000001", "step-00000002", "step-00000002.bak", "step-00000003", "step-00000004"}
    assert {path.name for path in folder.iterdir()} == left and tree(elsewhere) == before
    assert [path.name for path in (folder / "step-00000003").iterdir()] == ["notes.txt"]


def test_a_checkpoint_with_files_of_others_is_not_replaced(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path, 3, {"net": net}, {}, {"best": 1}, keep=1)
    (path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=path.name):
        save_checkpoint(tmp_path, 3, {"net": net}, {}, {"best": 2}, keep=1)
    assert tree(tmp_path) == before


def test_too_little_memory_is_no_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    net = torch.nn.Linear(2, 2)
    path = save_checkpoint(tmp_path, 3, {"net": net}, {}, {}, keep=2)
    monkeypatch.setattr("vqgen.training.checkpoint.load_module", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_checkpoint(path, {"net": net}, {})


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"{}", b'{"step": "'])
@pytest.mark.parametrize("name", ["state.json", "net.safetensors", "optimizers.pt"])
def test_a_checkpoint_file_that_is_not_what_it_should_be(tmp_path: Path, name: str, content: bytes | None) -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters())
    path = save_checkpoint(tmp_path, 3, {"net": net}, {"net": optimizer}, {"best": 1.5}, keep=2)
    assert load_checkpoint(path, {"net": net}, {"net": optimizer}) == {"step": 3, "extra": {"best": 1.5}}
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, {"net": net}, {"net": optimizer})
    line = str(caught.value)
    assert str(path / name) in line and ("remove" in line or content is None) and "\n" not in line and len(line) < 600


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    net, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)
    path = save_checkpoint(tmp_path, 3, {"net": net}, {}, {}, keep=2)
    with pytest.raises(UserError, match=r"net\.safetensors"):
        load_checkpoint(path, {"net": other}, {})


def usage(ended: Ended, *parts: str) -> None:
    ended.refused(2, *parts)
    assert len(ended.err.strip().splitlines()) == 1, ended.err


def test_combinations_that_cannot_be(tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused as usage, before any data is looked for: none of it exists."""
    monkeypatch.setattr("vqgen.training.trackers.is_wandb_available", lambda: False)
    one = [*TINY, "--data", tmp_path / "nothing", "--output", tmp_path / "run"]
    usage(cli(main, *one, "--batch-size", 10, "--accumulate", 4), "--batch-size", "10", "--accumulate 4")
    usage(cli(main, *one, "--size", 15), "--size", "15x15", "2")
    usage(cli(main, *one, "--groups", 3), "--groups", "3", "8")
    usage(cli(main, *one, "--log-with", "nothing"), "--log-with", "nothing", "tensorboard")
    usage(cli(main, *one, "--log-with", "wandb"), "--log-with", "wandb is not installed")
    two = ["--codes", tmp_path / "nothing", "--output", tmp_path / "run"]
    usage(cli(train_prior.main, *two, "--dim", 16, "--heads", 3), "--heads", "3", "16")
    usage(cli(train_prior.main, *two, "--batch-size", 10, "--accumulate", 4), "--batch-size", "10")
    assert cli(train_prior.main, *two).refused(1, str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    run(TOKENIZER, *TINY, "--log-with", "tensorboard", "--output", folder).ok()
    places = {path.parent for path in (folder / "logs").rglob("events.out.tfevents.*")}
    assert places
    found: dict[str, list[int]] = {}
    for place in places:
        events = EventAccumulator(str(place))
        events.Reload()
        found |= {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert found["heldout/psnr"] == [4, 6]
