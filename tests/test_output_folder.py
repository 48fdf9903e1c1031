"""What a run may take over and remove: its own files and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from vqgen.config import parse
from vqgen.errors import UserError
from vqgen.output_folder import check_folder, take_folder
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.training.sessions import MACHINE, Session, read_sessions


@dataclass
class Options:
    """A configuration of a run."""

    lr: float = 1.0
    """Learning rate."""


def begun(folder: Path) -> None:
    take_folder(folder, Options(), overwrite=False)
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "images" / "step-00000004.png").write_bytes(b"a picture")
    (folder / "vqgen.json").write_text("{}")
    Session(folder, 0, {"device": "cpu"})


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("text", ["", "lr: 1.0\n", "output: here\n"])
def test_a_configuration_of_ones_own_makes_no_run(tmp_path: Path, text: str, overwrite: bool) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "step-1.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="something else"):
        check_folder(tmp_path, Options(), overwrite)
    assert (tmp_path / "images" / "step-1.png").read_bytes() == b"mine"
    assert (tmp_path / "config.yaml").read_text() == text


def test_a_run_is_known_again(tmp_path: Path) -> None:
    begun(tmp_path)
    check_folder(tmp_path, Options(), overwrite=False)
    with pytest.raises(UserError, match=r"--lr 1\.0, now 2\.0"):
        check_folder(tmp_path, Options(lr=2.0), overwrite=False)
    check_folder(tmp_path, Options(lr=2.0), overwrite=True)


def test_overwriting_removes_what_a_run_wrote_alone(tmp_path: Path) -> None:
    begun(tmp_path)
    mine = [tmp_path / name for name in ("images/holiday.png", "tokenizer/notes.txt", "logs/diary", "notes.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    half = tmp_path / "checkpoints" / ".step-00000008.123.part"
    half.mkdir()
    take_folder(tmp_path, Options(lr=2.0), overwrite=True)
    assert all(path.read_text() == "mine" for path in mine)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {path.relative_to(tmp_path).as_posix() for path in mine} | {"config.yaml"}
    assert not half.exists() and "lr: 2.0" in (tmp_path / "config.yaml").read_text()


def test_a_run_from_before_an_option_goes_on_with_its_default(tmp_path):
    config = parse(TokenizerTraining, ["--data", "demo", "--output", str(tmp_path)])
    take_folder(tmp_path, config, False)
    (tmp_path / "vqgen.json").touch()
    saved = tmp_path / "config.yaml"
    saved.write_text("".join(line for line in saved.open() if "optimizer: adamw" not in line))
    check_folder(tmp_path, config, False)
    config.optimizer.optimizer = "muon"
    with pytest.raises(UserError, match="was started with --optimizer adamw, now muon"):
        check_folder(tmp_path, config, False)


def test_every_session_is_listed_with_what_it_saved(tmp_path: Path) -> None:
    Session(tmp_path, 0, {"device": "cpu"}).saved(4)
    Session(tmp_path, 4, {"device": "cpu", "threads": 2})  # killed before its first checkpoint
    Session(tmp_path, 4, {"device": "cuda"}).saved(9)
    found = read_sessions(tmp_path)
    assert [(entry["first_step"], entry["last_step"]) for entry in found] == [(0, 4), (4, 4), (4, 9)]
    assert found[1]["seconds"] == 0 and found[1]["threads"] == 2 and found[0]["began"].endswith("+00:00")
    (tmp_path / MACHINE).write_text("half a")
    Session(tmp_path, 9, {"device": "cpu"})
    assert [entry["first_step"] for entry in read_sessions(tmp_path)] == [9]
