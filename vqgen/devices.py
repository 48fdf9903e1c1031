"""What the machine offers: processes, devices, and the precision they compute in."""

import ctypes
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from . import __version__
from .errors import UsageError


def find_device(device: str | torch.device) -> torch.device:
    """The device that was named; `auto` is CUDA where there is one, else the CPU. Raises `UsageError`."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise UsageError(f"--device: found {device}, expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: found {device}, but torch sees {torch.cuda.device_count()} CUDA devices; use auto")
    return found


def precision_of(precision: str, device: torch.device) -> Literal["no", "bf16", "fp16"]:
    """Accelerate's name of the precision; `auto` takes bf16 where the hardware computes in it."""
    if precision == "fp16" and device.type != "cuda":
        raise UsageError(f"--precision: fp16 needs a CUDA device, found {device.type}; use auto, bf16 or fp32")
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        # These CPU checks are private in some versions of torch; where they are missing float32 is always right.
        checks = [getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        return "bf16" if device.type == "cpu" and any(check() for check in checks if check) else "no"
    if precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"--precision: found {precision}, expected auto, fp32, bf16 or fp16")
    return precision.replace("fp32", "no")  # type: ignore[return-value]


def processes(cpu: bool = False, **settings: Any) -> PartialState:
    """Accelerate's view of the processes; the first call decides, `settings` go to torch's process group.

    Args:
        cpu: compute on the CPU whatever there is. Where there is nothing else it must be said: Accelerate then takes
            the processes that a launcher started for so many runs of one process each, in one and the same folder.
    """
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    first = not torch.distributed.is_initialized()
    state = PartialState(cpu=cpu, **settings)
    if first:  # or one that refuses its options is gone before the others have finished connecting to it
        state.wait_for_everyone()
    return state


def matrix_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations a second of a large matrix product, measured now, in about a tenth of a second.

    Args:
        precision: Accelerate's name.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    float((left @ right)[0, 0])  # the first product also loads its kernels
    best, until = 0.0, time.perf_counter() + 0.1
    while not best or time.perf_counter() < until:
        start = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def keep_memory(device: torch.device) -> None:
    """Let a process that trains on a CPU keep what a step frees for the next one (Linux with glibc; else nothing).

    glibc gives large tensors back to the system as they are freed. Getting them again costs a page fault every 4 KiB,
    a tenth of the step of a large model; the most memory in use stays the same.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, -1)
        mallopt(mmap_threshold, 2**30)


def describe(device: torch.device, precision: str, count: int) -> dict[str, Any]:
    """What a run computes on and with, to be kept beside its figures; nothing by which a machine is told from others.

    Args:
        precision: Accelerate's name.
        count: processes.
    """
    processor = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # Linux on x86; elsewhere the file or the line is missing
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": count,
        "precision": precision.replace("no", "fp32"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vqgen": __version__,
    }
