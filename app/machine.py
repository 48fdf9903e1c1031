"""What the machine offers: a device with its name, and the memory that is free on it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from vqgen.devices import find_device

_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Machine:
    """The device that a training here takes."""

    name: str
    cuda: bool
    memory: float
    """Free bytes: of the device, or that this process may still take from the system."""


def machine() -> Machine:
    """Describe this machine as it is now."""
    device = find_device("auto")
    if device.type == "cuda":
        return Machine(torch.cuda.get_device_name(device), True, float(torch.cuda.mem_get_info(device)[0]))
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no control group, or no limit in it
        free = min(free, int(_LIMIT.read_text(encoding="utf-8")))
    threads = torch.get_num_threads()
    return Machine(f"{threads} CPU thread{'s' * (threads > 1)}", False, float(free))
