"""What a program may take over and remove in an output folder: its own files and nothing else."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from processes import write_images

from vqgen.config import parse
from vqgen.errors import UsageError, UserError
from vqgen.files.output_folder import OutputFolder, new_folder
from vqgen.prior.convert.program import main as convert
from vqgen.prior.train import PriorTraining
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.tokenizer.trainer import build
from vqgen.training.folder import MACHINE, Session, check_folder, prepare_folder, read_sessions


@dataclass
class Options:
    """A configuration of a run."""

    lr: float = 1.0
    """Learning rate."""
    overwrite: bool = False
    """Start anew."""


def left_by_a_kill(name: str) -> str:
    """A name of a temporary file of `name`."""
    return f".{name}.vqgen-0123456789abcdef.part"


def begun(path: Path) -> None:
    prepare_folder(path, Options(), overwrite=False)
    (path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (path / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    (path / "images").mkdir()
    (path / "images" / "step-00000004.png").write_bytes(b"a picture")
    (path / "vqgen.json").write_text("{}")
    Session(path, 0, {"device": "cpu"})


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


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, mode: not mode & os.R_OK)  # root may read every folder
    with pytest.raises(UsageError, match=str(tmp_path)):
        OutputFolder(tmp_path)
    OutputFolder(tmp_path / "new")


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
    half = tmp_path / "checkpoints" / left_by_a_kill("step-00000008")
    half.mkdir()
    prepare_folder(tmp_path, Options(lr=2.0), overwrite=True)
    assert all(path.read_text() == "mine" for path in mine)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {path.relative_to(tmp_path).as_posix() for path in mine} | {"config.yaml"}
    assert not half.exists() and "lr: 2.0" in (tmp_path / "config.yaml").read_text()


def test_a_run_from_before_an_option_goes_on_with_its_default(tmp_path):
    config = parse(TokenizerTraining, ["--data", "demo", "--output", str(tmp_path)])
    prepare_folder(tmp_path, config, False)
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


# ---- any program's folder ----


OWN = (r"grid\.png", r"images/.+/0\.png", r"codes-[0-9]+\.bin", r"parts/[ab]/x")


def folder(path: Path) -> OutputFolder:
    return OutputFolder(path, ("plan.json",), OWN, lambda name: name != "codes-77.bin")


def fill(path: Path) -> list[Path]:
    """Files of `folder`, its leftovers, and foreign ones, which are returned."""
    own = ("plan.json", "grid.png", "images/cat/0.png", "codes-00.bin", "codes-01.bin", "parts/a/x", "parts/b/x")
    left = [left_by_a_kill("grid.png"), left_by_a_kill("codes-02.bin")]
    left += [f"images/cat/{left_by_a_kill('0.png')}", f"parts/{left_by_a_kill('a')}/x"]
    foreign = (
        "notes.txt", "images/cat/1.png", "codes-x.bin", "codes-77.bin", ".hidden", "other/codes-00.bin", "grid.png.bak",
        ".notes.old.txt", ".thesis.part", ".grid.png.12.part", left_by_a_kill("notes.txt"), "parts/b/y",
    )  # fmt: skip
    for name in (*own, *left, *foreign):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    return [path / name for name in foreign]


def files_in(path: Path) -> set[Path]:
    return {found for found in path.rglob("*") if found.is_file()}


def test_own_files_and_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    foreign = fill(tmp_path)
    output = folder(tmp_path)
    assert list(output.own_files())[-1] == tmp_path / "plan.json"
    output.clear()
    assert files_in(tmp_path) == set(foreign)
    assert not (tmp_path / "parts" / "a").exists() and (tmp_path / "images" / "cat").is_dir()
    output.clear()  # nothing of ours is left


def test_what_is_kept_stays(tmp_path: Path) -> None:
    foreign = fill(tmp_path)
    folder(tmp_path).clear(keep=["plan.json", "codes-00.bin"])
    assert files_in(tmp_path) == {*foreign, tmp_path / "plan.json", tmp_path / "codes-00.bin"}


def test_links_are_refused_and_never_followed(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    fill(outside)
    inside.mkdir()
    (inside / "plan.json").write_text("{}")
    before = files_in(outside)
    for name, target in (("grid.png", "grid.png"), ("codes-00.bin", "."), ("parts", "parts"), ("images", "images")):
        (inside / name).symlink_to(outside / target)
        with pytest.raises(UsageError, match=f"the link {name}"):
            folder(inside).refuse_foreign()
        folder(inside).clear(keep=["plan.json"])  # where it came after the check
        assert files_in(outside) == before and (inside / name).is_symlink()
        (inside / name).unlink()
    (inside / "parts").touch()  # a file where a folder belongs is in nobody's way until it is written to
    folder(inside).refuse_foreign()
    os.mkfifo(inside / "codes-7.bin")
    with pytest.raises(UsageError, match=r"the device codes-7\.bin"):
        folder(inside).refuse_foreign()
    (inside / "codes-7.bin").unlink()
    (inside / "grid.png").mkdir()
    with pytest.raises(UsageError, match=r"the folder grid\.png"):
        folder(inside).refuse_foreign()
    folder(inside).clear()
    assert {path.name for path in inside.iterdir()} == {"parts", "grid.png"}


def test_a_folder_that_is_named_by_a_link_is_used(tmp_path: Path) -> None:
    foreign = fill(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    folder(tmp_path / "link").refuse_foreign()
    folder(tmp_path / "link").clear()
    assert files_in(tmp_path / "real") == set(foreign)


def test_a_tokenizer_is_not_trained_on_its_own_previews(tmp_path: Path) -> None:
    write_images(images := tmp_path / "images", 40)
    (tmp_path / "link").symlink_to(images)
    before = sorted(images.iterdir())

    def config(data: Path, output: Path, *more: str) -> TokenizerTraining:
        words = ["--data", str(data), "--output", str(output), "--size", "16", "--perceptual-weight", "0", *more]
        return parse(TokenizerTraining, [*words, "--width", "8", "--groups", "4", "--precision", "fp32"])

    for output in (images / "runs" / "tokenizer", tmp_path / "link" / "run"):
        with pytest.raises(UsageError, match="inside of --data"):
            build(config(images, output))
    assert sorted(images.iterdir()) == before
    # Where its images are not read, or where it began before this was refused, it may be.
    assert build(config(images, images / ".runs" / "tokenizer"))
    for split in ("train", "heldout"):
        write_images(tmp_path / "split" / split, 8)
    assert build(config(tmp_path / "split", tmp_path / "split" / "run"))
    prepare_folder(images / "run", config(images, images / "run"), overwrite=False)
    (images / "run" / "vqgen.json").write_text("{}")
    assert build(config(images, images / "run"))
    with pytest.raises(UsageError, match="inside of --data"):
        build(config(images, images / "run", "--overwrite"))


def test_a_folder_with_foreign_files_is_refused_unless_it_is_recognised(tmp_path: Path) -> None:
    output = folder(tmp_path / "new")
    output.refuse_foreign()
    output.path.mkdir()
    (output.path / ".hidden").write_text("x")
    output.refuse_foreign()
    with pytest.raises(UsageError, match="hidden"):
        OutputFolder(output.path).refuse_foreign()  # without marks: new or empty
    (output.path / "codes-00.bin").write_text("x")  # a name that fits makes no folder ours
    with pytest.raises(UsageError, match=r"codes-00\.bin"):
        output.refuse_foreign()
    (output.path / "plan.json").write_text("{}")
    output.refuse_foreign()
    with pytest.raises(UsageError, match="is a file"):
        folder(output.path / "plan.json")


def test_a_new_folder_loses_what_a_kill_left_beside_it(tmp_path: Path) -> None:
    for name in (left_by_a_kill("out"), left_by_a_kill("other")):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out"):
        assert {path.name for path in tmp_path.iterdir()} == {"out", left_by_a_kill("other")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".git").mkdir()
    with pytest.raises(UsageError, match="git"), new_folder(tmp_path / "out"):
        pass


def test_a_folder_that_cannot_be_replaced_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out := tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: path == out)
        with pytest.raises(UsageError, match="mount point"), new_folder(out):
            pass
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: path != tmp_path or mode != os.W_OK)
        with pytest.raises(UserError, match="may not be written to"), new_folder(out):
            pass


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is named: who stands in it would stand in a folder that is gone."""
    (here := tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    for name in (".", "./", "missing/..", "../here", "../link", str(here)):
        with pytest.raises(UsageError, match=r"^--output: .*current folder"), new_folder(Path(name)):
            pass
    assert list(here.iterdir()) == []
    with new_folder(Path("new")):
        assert [path.name for path in here.iterdir()] == ["new"]


@pytest.mark.parametrize("target", ["link", "nowhere"])
def test_a_link_that_leads_nowhere_is_found_before_the_work(tmp_path: Path, target: str) -> None:
    (link := tmp_path / "link").symlink_to(target)
    for path in (link, link / "new", link / ".." / "new"):
        with pytest.raises(UsageError, match=rf"^--output: {link} is a link"), new_folder(path):
            pass
    assert list(tmp_path.iterdir()) == [link] and os.readlink(link) == target


def test_a_program_refuses_such_an_output_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    for output in (".", "loop"):
        result = cli(convert, "--input", "missing.ckpt", "--output", output)
        assert result.code == 2 and len(result.err.splitlines()) == 1 and "--output: " in result.err


def test_a_codebook_size_beside_levels_is_no_difference(tmp_path: Path) -> None:
    def config(*words: str) -> TokenizerTraining:
        given = ["--data", "demo", "--output", str(tmp_path), "--quantizer", "fsq", "--perceptual-weight", "0", *words]
        return parse(TokenizerTraining, given)

    begun = config("--levels", "8", "5", "--codebook-size", "512")
    prepare_folder(tmp_path, begun, overwrite=False)
    (tmp_path / "vqgen.json").write_text("{}")
    check_folder(tmp_path, same := config("--levels", "8", "5"), overwrite=False)
    assert begun.architecture().codes_options() == same.architecture().codes_options()
    for other in (["--levels", "8", "6"], ["--codebook-size", "512"]):
        with pytest.raises(UserError, match="--levels"):
            check_folder(tmp_path, config(*other), overwrite=False)


def test_a_prior_does_not_start_from_what_it_removes_either(tmp_path: Path) -> None:
    config = PriorTraining(codes=tmp_path / "codes", output=tmp_path / "run", init=tmp_path / "other/../run")
    with pytest.raises(UsageError, match=r"--init.*--overwrite"):
        check_folder(config.output, config, overwrite=True)
    check_folder(config.output, config, overwrite=False)


def test_a_link_to_itself_is_no_folder_to_start_from(tmp_path: Path) -> None:
    (loop := tmp_path / "loop").symlink_to("loop")
    config = PriorTraining(codes=tmp_path / "codes", output=tmp_path / "run", init=loop)
    check_folder(config.output, config, overwrite=True)
    with pytest.raises(UsageError, match=rf"^--output: {loop}"):
        check_folder(loop, config, overwrite=True)
