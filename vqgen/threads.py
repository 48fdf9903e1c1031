"""CPU threads of a program: how many it takes, and whether the machine has room for them. Needs no torch."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError

OPTION = "--threads"
MOST = 1024
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and the CPU time of its control groups (Linux, v2 or v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.ceil(min(_quotas(), default=allowed))))


def _quotas() -> list[float]:
    """CPU limits of the control groups that this process is in, the outer ones included."""
    found: list[float] = []
    for folder, second in control_groups("cpu"):
        try:
            if second:
                quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
            else:
                quota, period = ((folder / f"cpu.cfs_{n}_us").read_text(encoding="utf-8") for n in ("quota", "period"))
            if (share := float(quota) / float(period)) > 0:  # "max" is no number, -1 no limit
                found.append(share)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return found


def control_groups(controller: str) -> list[tuple[Path, bool]]:
    """Folders of the control groups that this process is in, each before the outer ones, and whether they are of v2."""
    found: list[tuple[Path, bool]] = []
    try:
        lines = _OWN.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        second = not controllers
        if not second and controller not in controllers.split(","):
            continue
        root = _GROUPS if second else _GROUPS / controllers
        # Inside a container the path may be that of the host: then the root holds the limit.
        inner = root / path.strip("/")
        for folder in [inner, *inner.parents]:
            if not folder.is_relative_to(root):
                break
            found.append((folder, second))
    return found


def without_threads(words: Sequence[str]) -> tuple[list[str], int | None]:
    """The words of a command line less `--threads N`, and N. Raises `UsageError` where it is no number in range."""
    rest, number, words = list[str](), None, list(words)
    while words:
        flag, has_value, value = (word := words.pop(0)).partition("=")
        if flag != OPTION:
            rest.append(word)
            continue
        value = value if has_value else words.pop(0) if words else ""
        number = int(value) if value.isdecimal() and len(value) < 100 else 0  # int() refuses thousands of digits
        if not 1 <= number <= MOST:
            raise UsageError(f"{OPTION}: found {value or 'nothing'}, expected a number from 1 to {MOST}")
    return rest, number


def limit_threads(number: int | None) -> None:
    """Let this process compute with `number` threads; for None as many as it may use, where torch would take more.

    Variables of the environment that say so (`OMP_NUM_THREADS`, which launchers set, too) win over None. It has to be
    called before torch is imported, or in its main thread.
    """
    if number is None:
        if "OMP_NUM_THREADS" in os.environ or not _quotas() or available_cpus() >= (os.cpu_count() or 1):
            return
        number = available_cpus()
    os.environ["OMP_NUM_THREADS"] = str(number)
    os.environ["MKL_DYNAMIC"] = "FALSE"  # else torch takes no more than MKL sees cores
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(number)


def oversubscription(threads: int) -> str | None:
    """Where the processes of this machine have more threads than there are CPUs, one line that says so, else None.

    `threads` is what this process computes with.
    """
    cpus, local = available_cpus(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if threads * local > cpus:
        wanted = f"{threads} threads" + (f" in each of {local} processes" if local > 1 else "")
        return f"{wanted} on {cpus} CPUs, which slows all of them down; {OPTION} {max(1, cpus // local)} would fit"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1 + (os.cpu_count() or 1):
        return f"other programs keep this machine busy (load {load:.1f} on {os.cpu_count()} CPUs), so it takes longer"
    return None
