"""What is asked of the machine."""

import subprocess
import sys

import pytest
import torch

from vqgen.devices import keep_memory

GLIBC = pytest.mark.skipif(
    not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)
FAULTS = """
import resource, sys, torch
from vqgen.devices import keep_memory
if sys.argv[1] == "keep":
    keep_memory(torch.device("cpu"))
def step():
    return [torch.zeros(2**24) for _ in range(3)]  # 64 MiB each
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@GLIBC
def test_large_tensors_are_not_fetched_anew_each_step():
    """Each of those fetched from the system costs faults, 16384 of them where pages are 4 KiB."""
    faults = {}
    for how in ("keep", "as it is"):
        result = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(result.stdout)
    assert faults["keep"] < 100 < 1000 < faults["as it is"]


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_other_devices_leave_the_c_library_alone(kind, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("asked the C library"))
    keep_memory(torch.device(kind))


@GLIBC
def test_memory_that_was_kept_for_the_next_step_can_be_released() -> None:
    program = """
import psutil, torch
from vqgen.devices import keep_memory, release_memory
keep_memory(torch.device("cpu"))
held = [torch.ones(2**20) for _ in range(50)]
last, held = held.pop(), None
resident = psutil.Process().memory_info().rss
release_memory()
print(resident - psutil.Process().memory_info().rss, float(last[0]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    released, value = map(float, done.stdout.split())
    assert released > 49 * 2**22 / 2 and value == 1
