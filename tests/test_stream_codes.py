"""vqgen-tokenize from a stream: the codes of each image, captions, splits, kills, processes and what is refused."""

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.streams import garments, sample, serving, write_tar, write_tars
from helpers.tokenizing import DIE, content, environment, make_tokenizer
from processes import TOKENIZE, run_together, start

from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.encode import main

OPTIONS = "--holdout 0.2 --precision fp32 --device cpu --batch-size 16 --text-column txt".split()
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
VIEWS = "--views 3 --flip --random-crop 0.3 --random-shift 1 --source noise:0.1-0.4".split()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 files of 25 garments."""
    return write_tars(tmp_path_factory.mktemp("tars"), 4, 25)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("model") / "tokenizer")


def words(data: str, tokenizer: Path, output: Path, *further: str) -> list[str]:
    return ["--data", data, "--tokenizer", str(tokenizer), "--output", str(output), *OPTIONS, *further]


@pytest.fixture(scope="module")
def whole(tars: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Code files that nothing disturbed."""
    folder = tmp_path_factory.mktemp("codes") / "whole"
    start(TOKENIZE, *words(f"stream:{tars}", tokenizer, folder, *VIEWS), environ=ONE_THREAD).wait().ok()
    return folder


def by_caption(folder: Path, split: Any) -> dict[str, tuple[torch.Tensor, int]]:
    """Codes of view 0 and label of every image."""
    files = CodeFiles(folder, split)
    numbers = range(len(files))
    codes = files.gather(list(numbers), [0] * len(files))
    return {files.captions([i])[0]: (codes[i], int(files.labels[i])) for i in numbers}


def test_every_image_has_its_codes_whatever_the_source(
    tars: Path, tokenizer: Path, whole: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted(tars.iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if not member.name.endswith(".cls"):
                    (folder / member.name).write_bytes(file.read())
    assert cli(main, *words(str(folder), tokenizer, tmp_path / "folder")).code == 0
    expected = by_caption(tmp_path / "folder", "train") | by_caption(tmp_path / "folder", "heldout")
    train, heldout = by_caption(whole, "train"), by_caption(whole, "heldout")
    assert len(train) + len(heldout) == len(expected) == 100 and train.keys().isdisjoint(heldout)
    for caption, (codes, label) in (train | heldout).items():
        assert torch.equal(codes, expected[caption][0]) and label == garments(100)[int(caption)]["label"]
    files = CodeFiles(whole, "train")
    files.verify()
    assert files.views == 3 and files.class_names == [str(n) for n in range(10)]
    assert not torch.equal(files.gather([0], [1]), files.gather([0], [2]))
    assert files.gather_source([0], [0]).shape == files.gather([0], [0]).shape


def test_a_killed_run_is_finished_to_the_same_bytes(tars: Path, tokenizer: Path, whole: Path, tmp_path: Path) -> None:
    command = words(f"stream:{tars}", tokenizer, tmp_path / "out", *VIEWS)
    died = subprocess.run(
        [sys.executable, "-c", DIE, "codes-00005.safetensors", "SIGKILL", *command], env=environment()
    )
    written = {path.name for path in (tmp_path / "out").glob("codes-*")}
    # The training images of the second file are there, its held-out ones are not.
    assert died.returncode == -9 and written == {f"codes-0000{n}.safetensors" for n in (0, 1, 4)}
    start(TOKENIZE, *command, environ=ONE_THREAD).wait().ok()
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.slow
def test_two_processes_and_workers_write_the_same(tars: Path, tokenizer: Path, whole: Path, tmp_path: Path) -> None:
    command = words(f"stream:{tars}", tokenizer, tmp_path / "out", *VIEWS, "--workers", "1")
    for ended in run_together(TOKENIZE, *command, environ=ONE_THREAD):
        ended.ok()
    assert content(tmp_path / "out") == content(whole)


def test_the_place_of_the_files_changes_nothing(tars: Path, tokenizer: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(tars, tmp_path / "copy")
    with serving(tmp_path / "copy", drop=lambda n: None if n % 3 else 2000) as server:
        url = f"{server.url}/shard-{{0000..0003}}.tar"
        start(TOKENIZE, *words(url, tokenizer, tmp_path / "out", *VIEWS), environ=ONE_THREAD).wait().ok()
    assert content(tmp_path / "out") == content(whole)


def test_other_files_do_not_continue_a_folder(
    tars: Path, tokenizer: Path, whole: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    shutil.copytree(tars, tmp_path / "tars")
    shutil.copytree(whole, tmp_path / "out")
    write_tar(tmp_path / "tars" / "shard-0001.tar", sample("new", garments(1)[0]))
    ended = cli(main, *words(f"stream:{tmp_path / 'tars'}", tokenizer, tmp_path / "out", *VIEWS))
    assert ended.code == 1 and "--data" in ended.err and "shard-0001.tar" in ended.err


def test_a_repaired_file_continues_a_folder(tars: Path, tokenizer: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(tars, tmp_path / "tars")
    damaged, first = tmp_path / "tars" / "shard-0002.tar", tmp_path / "tars" / "shard-0000.tar"
    damaged.write_bytes(damaged.read_bytes()[:20_000])
    command = words(f"stream:{tmp_path / 'tars'}", tokenizer, tmp_path / "out", *VIEWS)

    def again() -> Any:
        return start(TOKENIZE, *command, environ=ONE_THREAD).wait()

    ended = again()
    assert ended.code == 1 and damaged.name in ended.err and (tmp_path / "out" / "codes-00000.safetensors").exists()
    shutil.copy(tars / damaged.name, damaged)
    with open(first, "ab") as file:
        file.write(bytes(512))
    ended = again()
    assert ended.code == 1 and first.name in ended.err and "--data" in ended.err, "its codes are there"
    shutil.copy(tars / first.name, first)
    again().ok()
    assert content(tmp_path / "out") == content(whole)


def test_splits_by_name_and_broken_images(tokenizer: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    write_tars(tmp_path / "in", 2, 6, "train")
    write_tars(tmp_path / "in", 1, 5, "val")
    write_tars(tmp_path / "in", 1, 4, "test")
    members = [*sample("good", garments(1)[0]), ("bad\x1b[31m.png", b"no"), ("bad.png", b"no")]
    write_tar(tmp_path / "in" / "train-0002.tar", members)
    ended = cli(main, *words(f"{tmp_path}/in/*.tar", tokenizer, tmp_path / "out"))
    assert ended.code == 0, ended.err
    splits = ("train", "heldout", "test")
    assert [len(CodeFiles(tmp_path / "out", split)) for split in splits] == [13, 5, 4]  # type: ignore[arg-type]
    assert "bad.png" in ended.err and "31m" in ended.err and "\x1b" not in ended.err
    strict = words(f"{tmp_path}/in/*.tar", tokenizer, tmp_path / "strict", "--broken", "error")
    assert "bad" in cli(main, *strict).err
    # What was skipped under a lenient limit does not pass a stricter one when the run is finished later.
    (tmp_path / "out" / "manifest.json").unlink()
    resumed = words(f"{tmp_path}/in/*.tar", tokenizer, tmp_path / "out")
    refused = cli(main, *resumed, "--broken", "error")
    assert refused.code == 1 and "--broken error: 2 of 24 images are broken" in refused.err
    again = cli(main, *resumed)
    assert again.code == 0 and "2 broken images skipped" in again.out, "those of the first call, too"
    assert CodeFiles(tmp_path / "out", "train").verify() is None


def test_processes_that_each_skip_few_images_skip_too_many_together(tokenizer: Path, tmp_path: Path) -> None:
    """Of 1,000 images each may skip ten."""
    for number in range(2):
        members = [part for n, each in enumerate(garments(9)) for part in sample(f"{number} {n}", each)]
        members += [(f"{number} {n}.png", b"no") for n in range(9, 15)]
        write_tar(tmp_path / "in" / f"{number}.tar", members)
    command = words(f"stream:{tmp_path}/in", tokenizer, tmp_path / "out", "--holdout", "0.5", "--text-column", "none")
    ended = run_together(TOKENIZE, *command)
    assert [each.code for each in ended] == [1, 1], [each.err for each in ended]
    assert "--max-broken 0.01: 12 of 30 images are broken" in ended[0].err


def test_captions_that_are_all_empty_are_refused(tokenizer: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    rows = garments(20)
    given = [[(f"{n:02d}.png", rows[n]["image"]), (f"{n:02d}.txt", b" \n")] for n in range(20)]
    write_tar(tmp_path / "in.tar", [member for each in given for member in each])
    command = words(str(tmp_path / "in.tar"), tokenizer, tmp_path / "out")
    for _ in range(2):
        ended = cli(main, *command)
        assert ended.code == 1 and "--text-column txt" in ended.err and "in.tar" in ended.err
        assert "--overwrite" in ended.err, "the folder is of that column"
    given[7][1] = ("07.txt", b"a shoe")
    write_tar(tmp_path / "in.tar", [member for each in given for member in each])
    assert cli(main, *command, "--overwrite").code == 0


@pytest.mark.parametrize("option", ["--shard-size 10", "--source-data demo", "--text-column cls"])
def test_options_that_need_an_index_are_refused(
    option: str, tars: Path, tokenizer: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    ended = cli(main, *words(f"stream:{tars}", tokenizer, tmp_path / "out", *option.split()))
    assert ended.code == 2 and option.split()[0] in ended.err and not (tmp_path / "out").exists()
