"""One program at a time writes into a folder, and a dead one holds no lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from processes import TOKENIZER, run, run_together

from vqgen.errors import UserError
from vqgen.files import locked
from vqgen.files.write import LOCK
from vqgen.sampling.compression import compress

OLD = Path(__file__).parent / "data" / "version-0.1"


def test_the_second_is_told_who_holds_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with locked(folder):
        with pytest.raises(UserError) as caught, locked(folder):
            pass
        said = str(caught.value)
        assert str(folder) in said and f"process {os.getpid()} on {os.uname().nodename}" in said and "\n" not in said
        assert caught.value.exit_code == 1
        with locked(tmp_path / "a" / "other"):
            (tmp_path / "a" / "other" / "file").touch()
    assert not folder.exists() and [path.name for path in tmp_path.rglob("*")] == ["a", "other", "file"]
    with locked(folder):  # again, in the same process
        (folder / "file").touch()
    assert [path.name for path in folder.iterdir()] == ["file"]
    with pytest.raises(KeyError), locked(folder):
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["file"]


HOLD = """
import os, sys, time
from pathlib import Path
from vqgen.files import locked
with locked(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives it; it has no lock from its first line on
        print("held", flush=True)
        time.sleep(20)
        os._exit(0)
    time.sleep(60)
"""


def test_a_killed_owner_holds_nothing(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert owner.stdout and owner.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"process {owner.pid} on"), locked(tmp_path):
            pass
        owner.kill()
        owner.wait()
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            pass
        assert not (tmp_path / LOCK).exists()
    finally:
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()


PUT: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("../mine"),
    "dangling link": lambda path: path.symlink_to("../nothing"),
}


@pytest.mark.parametrize("kind", PUT)
def test_what_is_no_lock_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    PUT[kind](tmp_path / "run" / LOCK)
    with pytest.raises(UserError, match=LOCK), locked(tmp_path / "run"):
        pass
    assert os.path.lexists(tmp_path / "run" / LOCK) and (tmp_path / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


def test_what_a_lock_file_says_is_shown_only_where_it_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("\x1b[31m forged\n" * 9)  # left by something dead
    with locked(tmp_path):
        (tmp_path / LOCK).write_text("\x1b[31m forged")
        with pytest.raises(UserError, match="by another process"), locked(tmp_path):
            pass


def test_a_lock_that_was_replaced_is_left_alone(tmp_path: Path) -> None:
    """A finished folder takes the place of the one that holds the lock, and another program may lock it at once."""
    with locked(tmp_path):
        (tmp_path / LOCK).rename(tmp_path / "old")  # keeps its number from being used again
        (tmp_path / LOCK).write_text("another's")
    assert (tmp_path / LOCK).read_text() == "another's"


def test_an_interrupt_while_a_lock_is_taken_releases_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vqgen.files.lock._sign", interrupted)
        with pytest.raises(KeyboardInterrupt), locked(tmp_path):
            pass
    with locked(tmp_path):
        (tmp_path / "file").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number: int) -> None:
    def flock(*_arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        (tmp_path / "file").touch()
    assert str(tmp_path) in capsys.readouterr().err


def test_where_nothing_can_be_written_the_writer_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "run"), pytest.raises(NotADirectoryError):
        (tmp_path / "file" / "run").mkdir()
    with locked(tmp_path / "file"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


PROGRAMS = {
    "vqgen-train-tokenizer": "--data demo",
    "vqgen-train-prior": f"--codes {OLD}/codes",
    "vqgen-tokenize": f"--data {OLD}/images --tokenizer {OLD}/tokenizer",
    "vqgen-reconstruct": f"{OLD}/images --tokenizer {OLD}/tokenizer",
    "vqgen-convert": f"--input {OLD}/tokenizer --to diffusers",
    "vqgen-export": f"--model {OLD}/prior",
    "vqgen-sample": f"--model {OLD}/prior --device cpu",
    "vqgen-compress": f"{OLD}/images --model {OLD}/prior --probabilities histogram",
    "vqgen-decompress": f"ARCHIVE --model {OLD}/prior",
    "vqgen-eval codebook": f"--tokenizer {OLD}/tokenizer",
    "vqgen-eval classifier": f"--data {OLD}/images --size 16",
    "vqgen-demo": "",
    "vqgen-train": f"--data {OLD}/images",
}
ONE_FILE = {"vqgen-report", *(f"vqgen-eval {name}" for name in (
    "reconstruction likelihood samples accuracy inpainting windows translation text settings replay".split()
))}  # fmt: skip
"""Programs that replace single files as a whole, and so need no lock."""
NONE = {"vqgen-app"}
"""Programs that write no output."""


def test_every_program_is_known_to_write_into_a_folder_or_not(programs: dict[str, Any]) -> None:
    assert sorted(programs) == sorted([*PROGRAMS, *ONE_FILE, *NONE])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "archive"
    assert compress.main([*PROGRAMS["vqgen-compress"].split(), "--output", str(path)]) == 0
    return path


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_that_writes_into_a_folder_takes_its_lock(
    program: str, tmp_path: Path, cli: Any, project: dict[str, Any], archive: Path
) -> None:
    name, *command = program.split()
    main = import_module(project["project"]["scripts"][name].partition(":")[0]).main
    words = [archive if word == "ARCHIVE" else word for word in PROGRAMS[program].split()]
    with locked(tmp_path / "out"):
        ended = cli(main, *command, *words, "--output", tmp_path / "out")
        assert ended.code == 1 and f"{tmp_path / 'out'} is in use by process {os.getpid()}" in ended.err, ended.err
        assert len(ended.err.strip().splitlines()) == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]


def test_two_processes_of_one_run_both_stop(tmp_path: Path) -> None:
    run(TOKENIZER, "--help").ok()  # starts the server of forks, whose imports are no part of the time
    start = time.monotonic()
    with locked(tmp_path / "run"):
        for ended in run_together(TOKENIZER, "--data", "demo", "--output", tmp_path / "run"):
            ended.refused(1, str(tmp_path / "run"), f"process {os.getpid()}")
    assert time.monotonic() - start < 60
