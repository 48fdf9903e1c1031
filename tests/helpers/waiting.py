"""What waits for a device: on CUDA by torch's own check, elsewhere by the operators that would wait there."""

import linecache
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "bincount", "equal", "is_nonzero")
"""Operators whose value or shape the host needs: `item`, `if tensor`; boolean indices, too."""
COPYING = ("lift_fresh",)
"""Operators that a tensor from numbers of the host goes through: `torch.tensor`, `new_tensor`."""


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in READING + COPYING or any(i is not None and i.dtype == torch.bool for i in chosen):
            frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename]
            place = next((f for f in reversed(frames) if "helpers" not in f.filename), frames[-1])
            self.found.append(f"{name} at {place.filename}:{place.lineno}: {place.line}")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(device: str) -> Iterator[list[str]]:
    """Collect what waits for the device inside the context; on a CPU what would wait for another one."""
    if device == "cpu":
        with _Watch() as watch:
            yield watch.found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list[str] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [
                f"{each.filename}:{each.lineno}: {linecache.getline(each.filename, each.lineno).strip()}"
                for each in caught
                if "called a synchronizing" in str(each.message)
            ]
