"""Devices, processes, precision and compilation of a run, and a description of the machine."""

import ctypes
import gc
import mmap
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import __version__
from .errors import UsageError, UserError
from .files import locked

T = TypeVar("T")
COMPILED_STEPS = 1000
"""Steps on CUDA from which a run is compiled unasked: shorter ones are over before a compilation has paid."""


def find_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is a CUDA device, else the CPU. Raises `UsageError`."""
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
    """Return Accelerate's name of the precision; `auto` is bf16 where the hardware supports it. Raises `UsageError`."""
    if precision == "fp16" and device.type != "cuda":
        raise UsageError(f"--precision: fp16 needs a CUDA device, found {device.type}; use auto, bf16 or fp32")
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        # These checks are private in some versions of torch; without them float32 is used.
        checks = [getattr(torch.cpu, n, None) for n in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
        return "bf16" if device.type == "cpu" and any(check() for check in checks if check) else "no"
    if precision not in ("fp32", "bf16", "fp16"):
        raise UsageError(f"--precision: found {precision}, expected auto, fp32, bf16 or fp16")
    return precision.replace("fp32", "no")  # type: ignore[return-value]


def compile_module(
    module: nn.Module, asked: bool | None, device: torch.device, steps: int, say: Callable[[str], None]
) -> bool:
    """Compile the calls of a module where it is `asked` for, or where None, in long runs on CUDA; return whether.

    The compilation comes with the first call. Where nobody asked for it, an error there is said, and calls are not
    compiled.
    """
    if asked:
        module.compile()
    elif asked is None and device.type == "cuda" and steps >= COMPILED_STEPS:
        module._compiled_call_impl = _Fallible(module._call_impl, say)  # as `compile` sets it
    else:
        return False
    return True


class _Fallible:
    """A compiled function, or the function itself once it could not be compiled."""

    def __init__(self, function: Callable[..., Any], say: Callable[[str], None]) -> None:
        self.function, self.say = function, say
        self.compiled: Callable[..., Any] | None = torch.compile(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is not None:
            from torch._dynamo.exc import TorchDynamoException  # slow to import

            try:
                return self.compiled(*args, **kwargs)
            except TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                self.compiled, reason = None, (str(cause).strip().splitlines() or [type(cause).__name__])[0]
                self.say(f"training goes on without torch.compile, slower ({reason}); --compile shows the whole error")
        return self.function(*args, **kwargs)


def processes(cpu: bool = False, **settings: Any) -> PartialState:
    """Return Accelerate's state of the processes; the first call initializes it with torch's process group `settings`.

    `cpu` is always set where there is no accelerator: Accelerate would otherwise take the processes of a launcher for
    independent runs of one process each. A process waits two hours for one that checks codes or writes a checkpoint
    alone.
    """
    settings = {"timeout": timedelta(hours=2), **settings}
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    first = not dist.is_initialized()
    state = PartialState(cpu=cpu, **settings)
    if first:  # else a process that exits on a wrong option is gone before the others have connected to it
        state.wait_for_everyone()
    return state


def rank_and_world() -> tuple[int, int]:
    """Index of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(value: T) -> list[T]:
    """The value of each process, in all processes."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def on_main(compute: Callable[[], T]) -> T:
    """Result of `compute`, which only the main process calls, in all processes; a `UserError` is raised in all."""
    rank, _ = rank_and_world()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = compute()
        except UserError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, 0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def locked_by_main(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder in the main process, see `locked`; a refusal is raised in all processes."""
    with ExitStack() as held:
        on_main(lambda: held.enter_context(locked(folder)))
        yield


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting for it."""
    # A copy from memory that is not pinned waits for all work before it, whatever `non_blocking` says.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def growing_attention(device: torch.device) -> AbstractContextManager[object]:
    """Context for attention to one more position in each call.

    On CUDA it leaves out cuDNN's kernel, which torch prefers on recent devices: it makes a plan for each new shape.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def matrix_rate(device: torch.device, precision: str) -> float:
    """Measure the FLOP/s of a large matrix product for 0.1 s; `precision` is Accelerate's name."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    side = 8192 if device.type == "cuda" else 1024
    # Random values, as products of equal ones draw less power and run faster; of an own generator, which nothing sees.
    random = torch.Generator(device).manual_seed(0)
    left, right = (torch.rand(side, side, dtype=dtype, device=device, generator=random) for _ in range(2))
    float((left @ right)[0, 0])  # warm-up: the first product loads the kernels
    best, until = 0.0, time.perf_counter() + 0.1
    while not best or time.perf_counter() < until:
        start = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def keep_memory(device: torch.device) -> None:
    """Keep memory that a training step on a CPU frees for the next step (Linux with glibc; elsewhere do nothing).

    glibc returns freed tensors to the system; a page fault per 4 KiB then costs a tenth of the step of a large model.
    """
    if device.type == "cpu" and (mallopt := _libc("mallopt")):
        mallopt(-1, -1)  # M_TRIM_THRESHOLD of malloc.h
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def release_memory() -> None:
    """Return free memory to the system, also what `keep_memory` keeps (Linux with glibc)."""
    gc.collect()
    if trim := _libc("malloc_trim"):
        trim(0)


def advise_random(address: int, size: int) -> None:
    """Say that a memory-mapped range is accessed at random (Linux with glibc; elsewhere do nothing)."""
    _advise(address, size, "MADV_RANDOM")


def advise_needed(address: int, size: int) -> None:
    """Say that a memory-mapped range will be read soon, as `advise_random` does."""
    _advise(address, size, "MADV_WILLNEED")


def _advise(address: int, size: int, how: str) -> None:
    if size and (madvise := _madvise()):
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, address + size - start, getattr(mmap, how))


@lru_cache
def _madvise() -> Callable[..., int] | None:
    found: Any = _libc("madvise")
    if found:
        found.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return found


@lru_cache
def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library on Linux; None where it has none of this name, as others than glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of tensors on a CUDA device, else of this process; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # on Linux `ru_maxrss` is that of the parent, where this is larger
        lines = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(device: torch.device, precision: str, count: int) -> dict[str, Any]:
    """Describe hardware, `count` processes and software for metadata; nothing in it identifies a single machine."""
    processor = platform.machine()
    with suppress(OSError, StopIteration):  # only Linux on x86 has the file and the line
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
