"""What the machine offers: a device with its name, and the memory that is free on it."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from vqgen.devices import find_device
from vqgen.threads import control_groups


@dataclass(frozen=True)
class Machine:
    """The device that a training here takes."""

    name: str
    cuda: bool
    memory: float
    """Free bytes: of the device, or that this process may still take from the system."""


def _left() -> list[int]:
    """Bytes that the control groups of this process leave it, by their limits and what is taken."""
    found: list[int] = []
    for folder, second in control_groups("memory"):
        names = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        with suppress(OSError, ValueError):  # no such control group, or no limit in it
            limit, used = (int((folder / name).read_text(encoding="utf-8")) for name in names)
            found.append(max(0, limit - used + _cached(folder / "memory.stat", "" if second else "total_")))
    return found


def _cached(statistics: Path, prefix: str) -> int:
    """Bytes of files that a control group keeps in memory until that is needed, 0 where it does not say."""
    names = f"{prefix}inactive_file", f"{prefix}active_file"
    with suppress(OSError, ValueError, IndexError):
        lines = map(str.split, statistics.read_text(encoding="utf-8").splitlines())
        return sum(int(words[1]) for words in lines if words[:1] and words[0] in names)
    return 0


def machine() -> Machine:
    """Describe this machine as it is now."""
    device = find_device("auto")
    if device.type == "cuda":
        return Machine(torch.cuda.get_device_name(device), True, float(torch.cuda.mem_get_info(device)[0]))
    free = min(psutil.virtual_memory().available, *_left(), math.inf)
    threads = torch.get_num_threads()
    return Machine(f"{threads} CPU thread{'s' * (threads > 1)}", False, float(free))
