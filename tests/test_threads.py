"""CPU threads of a program, and progress where standard error is no terminal."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from vqgen import progress as progress_module
from vqgen import threads
from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.options import Options

PROGRAM = """
import sys
from dataclasses import dataclass
from vqgen.config import command
from vqgen.options import Options

@dataclass
class Config(Options):
    pass

def run(config):
    import torch
    print(torch.get_num_threads())

sys.exit(command("threads", Config, run))
"""


@dataclass
class Nothing(Options):
    """No options."""


QUOTA, PERIOD = "cpu.cfs_quota_us", "cpu.cfs_period_us"


def started(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | environment
    return subprocess.run([sys.executable, "-c", PROGRAM, *words], env=env, capture_output=True, text=True)


def test_the_option_wins_over_the_environment() -> None:
    assert started("--threads", "3").stdout == "3\n"
    assert started("--threads=3", OMP_NUM_THREADS="2").stdout == "3\n"
    assert started(OMP_NUM_THREADS="2").stdout == "2\n"


@pytest.mark.parametrize(
    "value", ["0", "-1", "two", "1.5", "99999999999999999999", "2048", "0000019999999", "9" * 5000]
)
def test_what_is_no_number_of_threads_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("threads", Nothing, lambda config: None, ["--threads", value]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--threads" in lines[0] and value[:99] in lines[0]


def test_the_value_is_needed() -> None:
    with pytest.raises(UsageError, match="--threads"):
        threads.without_threads(["--n", "1", "--threads"])
    assert threads.without_threads(["--n", "1", "--threads", "2", "x"]) == (["--n", "1", "x"], 2)


def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    (tmp_path / "self").write_text(own)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(threads, "_OWN", tmp_path / "self")
    monkeypatch.setattr(threads, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/jobs/one\n", {"jobs/one/cpu.max": "250000 100000\n", "jobs/cpu.max": "max 100000\n"}, 3),
        ("0::/jobs/one\n", {"jobs/one/cpu.max": "max 100000\n", "jobs/cpu.max": "200000 100000\n"}, 2),
        ("0::/not/there\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("4:cpu,cpuacct:/a\n", {f"cpu,cpuacct/a/{QUOTA}": "400000", f"cpu,cpuacct/a/{PERIOD}": "100000"}, 4),
        ("4:cpu:/a\n", {f"cpu/a/{QUOTA}": "-1", f"cpu/a/{PERIOD}": "100000"}, 16),
        ("0::/a\n", {"a/cpu.max": "nonsense\n"}, 16),
        ("nonsense\n", {}, 16),
    ],
)  # fmt: skip
def test_the_time_that_a_control_group_grants_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], expected: int
) -> None:
    groups(tmp_path, monkeypatch, own, files)
    assert threads.available_cpus() == expected


def test_memory_is_what_the_control_groups_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from vqgen.app import machine

    monkeypatch.setattr(machine, "find_device", lambda _name: SimpleNamespace(type="cpu"))
    outer = {"jobs/memory.max": "4000000\n", "jobs/memory.current": "3500000\n"}
    outer["jobs/memory.stat"] = "active_file 50000\ninactive_file 150000\ntotal_active_file 9\n"
    inner = {"jobs/one/memory.max": "max\n", "jobs/one/memory.current": "100\n"}
    groups(tmp_path, monkeypatch, "0::/jobs/one\n", outer | inner)
    assert machine._left() == [700000] and machine.machine().memory == 700000
    first = {f"memory/a/memory.{name}_in_bytes": number for name, number in (("limit", "900"), ("usage", "1000"))}
    groups(tmp_path, monkeypatch, "4:memory:/a\n", first)
    assert machine._left() == [0]
    first = {"memory/a/memory.stat": "inactive_file 9\ntotal_inactive_file 400\n"}
    groups(tmp_path, monkeypatch, "4:memory:/a\n", first)
    assert machine._left() == [300]


def test_oversubscription_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "200000 100000\n"})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.0, 0.0))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert threads.oversubscription(2) is None
    assert "--threads 2" in str(threads.oversubscription(16))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "--threads 1" in str(threads.oversubscription(2)) and threads.oversubscription(1) is None
    monkeypatch.setattr(os, "getloadavg", lambda: (900.0, 0.0, 0.0))
    assert "900" in str(threads.oversubscription(1))


def test_a_log_file_gets_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    with progress_module.Lines(200, "run", "step", True, done=100, clock=lambda: clock[0]) as bar:
        for second in range(1, 101):
            clock[0] = float(second)
            bar.set_postfix({"loss": f"{second}"})
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 100 // progress_module.LINE_EVERY
    assert lines[0] == "run: 130 of 200 step, 1 step/s, 01:10 left, loss 30"
    assert lines[-1].startswith("run: 190 of 200")


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_module.progress(5, "run", "step", True) as bar:
        for _ in range(5):
            bar.update()
    assert not any(capsys.readouterr())


THREADS = """
from threading import Thread
import torch
from vqgen.sampling.generator import DEFAULT, Generator

def threads():
    found = []
    other = Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    return found[0]

generator = Generator.load(DEFAULT, "cpu", "{}")
before = threads()
drawing = Thread(target=lambda: generator.sample(5))
drawing.start()
drawing.join()
generator.sample(3)
print(before, threads(), torch.get_num_threads())
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_drawing_leaves_other_threads_their_number(precision: str) -> None:
    """Products are measured on one thread when rows are first computed, which is in a thread of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", THREADS.format(precision)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "2 2 2\n", done.stderr
