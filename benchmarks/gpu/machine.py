"""The machine: its name, and what it does at most."""

import time
from typing import Any

import torch

from vqgen.devices import describe, find_device, matrix_rate

from ..sample import copy_bandwidth
from .parts import Setup


def measure(setup: Setup) -> dict[str, Any]:
    """Matrix rates by precision, copy bandwidth, and the time to launch a kernel."""
    device = find_device(setup.device)
    found: dict[str, Any] = describe(device, "no", 1)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_gb": properties.total_memory / 1e9, "cuda": torch.version.cuda}
        found |= {"capability": f"{properties.major}.{properties.minor}", "devices": torch.cuda.device_count()}
    setup.report(found)
    kinds = ["no", "bf16"] if setup.tiny else ["no", "bf16", "fp16"]
    found |= {f"tflops_{kind.replace('no', 'fp32')}": matrix_rate(device, kind) / 1e12 for kind in kinds}
    if not setup.tiny:
        found["bandwidth_gbs"] = copy_bandwidth(device) / 1e9
    value, count = torch.zeros(1, device=device), 100 if setup.tiny else 10_000
    for _ in range(count // 10):
        value.add_(1)
    float(value)
    start = time.perf_counter()
    for _ in range(count):
        value.add_(1)
    float(value)
    return {**found, "launch_us": (time.perf_counter() - start) / count * 1e6}
