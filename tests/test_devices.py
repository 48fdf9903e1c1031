"""What is asked of the machine."""

import subprocess
import sys

import pytest
import torch
from accelerate import DistributedType, PartialState

from vqgen.devices import compile_module, growing_attention, keep_memory
from vqgen.training.fsdp import forget_former_run

GLIBC = pytest.mark.skipif(
    not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)
FAULTS = """
import resource, sys, torch
from vqgen.devices import compile_module, keep_memory
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


def test_compilation_is_chosen_on_cuda_in_long_runs(monkeypatch):
    """Asked for it is done anywhere, refused nowhere."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for asked, kind, steps, expected in (
        (None, "cuda", 1000, True), (None, "cuda", 999, False), (None, "cpu", 10**6, False), (True, "cpu", 1, True),
        (False, "cuda", 10**6, False),
    ):  # fmt: skip
        module = torch.nn.Linear(2, 2)
        assert compile_module(module, asked, torch.device(kind), steps, print) == expected
        assert (module._compiled_call_impl is not None) == expected
        assert module(torch.ones(1, 2)).shape == (1, 2)


def test_a_compilation_that_fails_unasked_is_said_once_and_left_out(monkeypatch):
    class Broken(torch.nn.Linear):
        def forward(self, input):
            return super().forward(input)

    def fails(*_):
        raise RuntimeError("no C++ compiler\nin /usr/bin")

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=fails))
    told, module = [], Broken(3, 2)
    expected = module(torch.ones(1, 3))
    compile_module(module, None, torch.device("cuda"), 1000, told.append)
    assert torch.equal(module(torch.ones(1, 3)), expected) and torch.equal(module(torch.ones(1, 3)), expected)
    assert len(told) == 1 and "no C++ compiler" in told[0] and "--compile" in told[0]
    # Where it was asked for, the error is the user's to see.
    compile_module(module, True, torch.device("cpu"), 1, told.append)
    with pytest.raises(RuntimeError, match="no C"):
        module(torch.ones(1, 3))


def test_growing_attention_leaves_out_the_kernel_that_makes_a_plan_for_each_shape() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert before == (True, True)
    with growing_attention(torch.device("cuda")):
        assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    with growing_attention(torch.device("cpu")):
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_a_second_run_finds_the_processes_as_the_first_did(monkeypatch) -> None:
    """Accelerate makes of several GPUs the kind FSDP, for which a second run finds no settings."""
    state = PartialState()
    for left, found in ((DistributedType.FSDP, DistributedType.MULTI_GPU), (state.distributed_type,) * 2):
        monkeypatch.setitem(PartialState._shared_state, "distributed_type", left)
        forget_former_run()
        assert PartialState().distributed_type == found
