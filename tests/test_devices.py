"""What is asked of the machine."""

import subprocess
import sys

import pytest
import torch

from vqgen.devices import keep_memory

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


@pytest.mark.skipif(
    not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)
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
