"""One program at a time writes into a folder, and a dead one holds no lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
from processes import TOKENIZER, run, run_together

from vqgen.errors import UserError
from vqgen.files import locked
from vqgen.files.write import LOCK

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


def test_a_lock_file_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match=LOCK), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run" / LOCK).mkdir()
    with pytest.raises(UserError, match=LOCK), locked(tmp_path / "run"):
        pass
    (tmp_path / "run" / LOCK).rmdir()
    (tmp_path / "run" / LOCK).write_text("\x1b[31m forged\n" * 9)  # left by something dead
    with locked(tmp_path / "run"):
        (tmp_path / "run" / LOCK).write_text("\x1b[31m forged")
        with pytest.raises(UserError, match="by another process"), locked(tmp_path / "run"):
            pass


def test_a_lock_that_was_replaced_is_left_alone(tmp_path: Path) -> None:
    """A finished folder takes the place of the one that holds the lock, and another program may lock it at once."""
    with locked(tmp_path):
        (tmp_path / LOCK).rename(tmp_path / "old")  # keeps its number from being used again
        (tmp_path / LOCK).write_text("another's")
    assert (tmp_path / LOCK).read_text() == "another's"


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
    "tokenizer.train": "--data demo",
    "prior.train": f"--codes {OLD}/codes",
    "tokenizer.encode": f"--data {OLD}/images --tokenizer {OLD}/tokenizer",
    "tokenizer.reconstruct": f"{OLD}/images --tokenizer {OLD}/tokenizer",
    "prior.convert.program": f"--input {OLD}/tokenizer --to diffusers",
    "prior.export.program": f"--model {OLD}/prior",
    "sampling.sample": f"--model {OLD}/prior --device cpu",
    "evaluation.program codebook": f"--tokenizer {OLD}/tokenizer",
    "evaluation.program classifier": f"--data {OLD}/images --size 16",
    "app.demo": "",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_that_writes_into_a_folder_takes_its_lock(program: str, tmp_path: Path, cli) -> None:
    module, *command = program.split()
    main = import_module(f"vqgen.{module}").main
    with locked(tmp_path / "out"):
        ended = cli(main, *command, *PROGRAMS[program].split(), "--output", tmp_path / "out")
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


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_lock_file_is_left_alone(tmp_path, kind):
    path = tmp_path / ".vqgen.lock"
    {"fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("other"), "folder": path.mkdir}[kind]()
    with pytest.raises(UserError, match=r"vqgen\.lock"), locked(tmp_path):
        pass
    assert os.path.lexists(path) and not (tmp_path / "other").exists()
