"""--overwrite that is killed before any of its file operations: the same command again does the rest."""

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.kills import killed_at

from vqgen.files import write_json
from vqgen.sampling.output import Names, begin, check_output, finish
from vqgen.tokenizer.codes import plan
from vqgen.tokenizer.comparison import METRICS, PARTIAL, open_output
from vqgen.tokenizer.reconstruction import write_png_atomic
from vqgen.training.checkpoint import check_checkpoint, newest_checkpoint, rotate, save_checkpoint
from vqgen.training.folder import check_folder, checkpoints, prepare_folder, step_of

PICTURE = torch.zeros(1, 4, 4, dtype=torch.uint8)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@dataclass
class Config:
    """A configuration of a run."""

    lr: float = 1.0
    """Learning rate."""
    overwrite: bool = False
    """Start anew."""


class Training:
    own = ("config.yaml",)
    foreign = ("checkpoints/step-00000002.bak", "checkpoints/step-00000002/notes", "images/holiday.png", ".thesis.part")

    def fill(self, folder: Path) -> None:
        prepare_folder(folder, Config(), False)
        net = torch.nn.Linear(2, 2)
        for step in (2, 4):
            save_checkpoint(folder / "checkpoints", step, {"net": net}, {}, {}, 2)
        (folder / "checkpoints" / "step-00000002").rename(folder / "checkpoints" / "damaged-00000002")
        (folder / "checkpoints" / f".step-00000006.vqgen-{6:016x}.part").mkdir()
        touch(folder, "metrics.jsonl", "finished.json", "vqgen.json", "tokenizer/vqgen.json")
        touch(folder, "images/step-00000002.png", "logs/vqgen/12.3/hparams.yml")

    def overwrite(self, folder: Path) -> None:
        check_folder(folder, Config(2.0), True)
        prepare_folder(folder, Config(2.0), True)


class Codes:
    own = ("plan.json",)
    foreign = ("codes-mine.safetensors", "tokenizer/notes", "notes.txt", ".notes.old.txt")

    def fill(self, folder: Path) -> None:
        plan.begin(folder, {"tokenizer": "a", "views": 1, "shard_size": 2}, False)
        touch(folder, "codes-00000.safetensors", "codes-00001.safetensors", "manifest.json", "config.yaml")
        touch(folder, "tokenizer/vqgen.json", "tokenizer/model.safetensors", f".manifest.json.vqgen-{1:016x}.part")

    def overwrite(self, folder: Path) -> None:
        plan.begin(folder, {"tokenizer": "a", "views": 2, "shard_size": 2}, True)


class Samples:
    own = ("samples.partial.json",)
    foreign = ("00009.png", "images/cat/00009.png", "images/dog/notes", "notes.txt")

    def fill(self, folder: Path) -> None:
        about = {"n": 3, "layout": "folders", "labels": [0, 1], "class_names": ["cat", "dog"], "seed": 1}
        names = Names("folders", [0, 1], ["cat", "dog"])
        begin(folder, about, check_output(folder, names, about, False, (4, 4), {}))
        for name in (*map(names.file, range(3)), "grid.png"):
            write_png_atomic(folder / name, PICTURE)
        finish(folder, names, about)

    def overwrite(self, folder: Path) -> None:
        about = {"n": 2, "layout": "flat", "labels": [-1], "class_names": None, "seed": 2}
        begin(folder, about, check_output(folder, Names("flat", [-1], None), about, True, (4, 4), {}))
        assert not json.loads((folder / "samples.partial.json").read_text()).get("former")


class Reconstructions:
    own = (PARTIAL,)
    foreign = ("00001-mine.png", "notes.txt", ".00000-a.png.7.part")

    def fill(self, folder: Path) -> None:
        touch(folder, "00000-a.png", "00001-b.png", "grid.png", f".00001-b.png.vqgen-{1:016x}.part")
        write_json(folder / METRICS, {"pictures": [{"file": "00000-a.png"}, {"file": "00001-b.png"}]})

    def overwrite(self, folder: Path) -> None:
        open_output(folder, ["00000-c.png"], True).clear()
        write_json(folder / PARTIAL, {"pictures": [{"file": "00000-c.png"}]})


Kind = Training | Codes | Samples | Reconstructions
KINDS = [Training(), Codes(), Samples(), Reconstructions()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_overwriting_that_is_killed_can_be_repeated(tmp_path: Path, kind: Kind) -> None:
    for number in count():
        folder = tmp_path / str(number)
        kind.fill(folder)
        touch(folder, *kind.foreign)
        with killed_at(number) as done:
            kind.overwrite(folder)
        if killed := "killed" in done:
            kind.overwrite(folder)
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert set(found) == {*kind.own, *kind.foreign}
        assert all(found[name].read_text() == name for name in kind.foreign)
        if not killed:
            break
    assert number > 8


def test_a_checkpoint_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    """Whenever rotation is killed, the next start leaves no half of one, and what a user put there."""
    net, names = torch.nn.Linear(2, 2), {"net.safetensors", "optimizers.pt", "state.json"}
    for number in count():
        folder = tmp_path / str(number)
        prepare_folder(folder, Config(), False)
        for step in (2, 4):
            save_checkpoint(folder / "checkpoints", step, {"net": net}, {}, {}, 2)
        with killed_at(number) as done:
            save_checkpoint(folder / "checkpoints", 6, {"net": net}, {}, {}, 2)
        prepare_folder(folder, Config(), False)
        found = sorted((folder / "checkpoints").iterdir())
        assert 2 <= len(found) <= 3 and {path.name[:5] for path in found} == {"step-"}
        assert all({path.name for path in checkpoint.iterdir()} == names for checkpoint in found)
        if "killed" not in done:
            break
    assert number > 8
    mine = found[0] / "notes"
    mine.write_text("mine")
    for step in (8, 10):
        save_checkpoint(folder / "checkpoints", step, {"net": net}, {}, {}, 2)
    assert [path.name for path in mine.parent.iterdir()] == ["notes"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_is_saved_again_is_there_all_the_time(tmp_path: Path, keep: int) -> None:
    """Whenever that is killed, the run resumes from the same step, and saving it once more leaves nothing behind."""
    net, steps = torch.nn.Linear(2, 2), [2, 4][-keep:]
    for number in count():
        folder = tmp_path / str(number) / "checkpoints"
        for step in (2, 4):
            save_checkpoint(folder, step, {"net": net}, {}, {"saved": 1}, keep)
        with killed_at(number) as done:
            save_checkpoint(folder, 4, {"net": net}, {}, {"saved": 2}, keep)
        prepare_folder(folder.parent, Config(), False)
        path, problems = newest_checkpoint(folder)
        assert path and step_of(path) == 4 and not problems
        saved = check_checkpoint(path).extra["saved"]
        rotate(folder, 4, keep)
        assert [step_of(each) for each in checkpoints(folder)] == steps
        save_checkpoint(folder, 4, {"net": net}, {}, {"saved": 3}, keep)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08d}" for step in steps]
        assert check_checkpoint(folder / "step-00000004").extra["saved"] == 3
        if "killed" not in done:
            break
    assert number > 8 and saved == 2
