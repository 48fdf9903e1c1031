"""`make gpu`: what it says without a device, that a failure of a part stays its own, and a rehearsal on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __doc__ as about
from benchmarks.gpu.__main__ import options, run
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.table import table

ROOT = Path(__file__).parents[1]
NO_DEVICE = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_without_a_device_it_says_so_in_a_line() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=NO_DEVICE, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "no CUDA device" in done.stderr and "--device cpu" in done.stderr


def test_a_part_that_takes_too_long_is_ended_and_recorded() -> None:
    found = run("machine", "cpu", 0.01)
    assert "0 s" in found["error"] and set(found) <= {"wall_seconds", "error", "output"}, "it went on to its end"


def test_the_commands_of_its_help_are_right() -> None:
    lines = [line.partition("#")[0].split() for line in (about or "").splitlines() if "python -m" in line]
    assert len(lines) == 3
    for _, _, module, *words in lines:
        assert module == "benchmarks.gpu" and options(words)


WITH_A_DEVICE = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda index: "Some Device"
from benchmarks.gpu.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_part_that_fails_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    """And the next one is run."""
    output = tmp_path / "result.json"
    words = ["--parts", "quantizer", "processes", "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", WITH_A_DEVICE, *words], cwd=ROOT, env=NO_DEVICE, capture_output=True)
    assert done.returncode == 1, done.stderr
    found = json.loads(output.read_text())["parts"]
    assert "Traceback" in found["quantizer"]["error"] and "--device" in found["quantizer"]["error"]
    assert "two are needed" in found["processes"]["not_run"] and "error" not in found["processes"]
    assert "| processes | not_run" in table(json.loads(output.read_text()))


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "20", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=NO_DEVICE, capture_output=True, text=True)
    result = json.loads(output.read_text())
    assert done.returncode == 0, [(name, part["error"]) for name, part in result["parts"].items() if "error" in part]
    assert list(result["parts"]) == list(PARTS)
    for what in ("images/s", "codebook", "vqgen-tokenize", "processes: fsdp", "--no-compile", "passed, 0 failed"):
        assert what in table(result), what
    assert "OTHER" not in table(result)
