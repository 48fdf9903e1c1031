"""Resume checkpoints: everything a training run must know to go on as if it had never stopped.

`checkpoints/step-00000500/` holds one safetensors file a module, `optimizers.pt` (optimizers and schedules, read with
`weights_only=True`) and `state.json`. Random numbers and the place in the data need no file: both are functions of
(seed, step, process), see `step_seed`.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vqgen.errors import UserError
from vqgen.files import atomic_path

from .fsdp import full_tensors, load_module, load_optimizer

# What the readers of JSON, safetensors and torch's archives raise on a file that is cut off or not theirs.
_DAMAGED = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, RuntimeError)
_DAMAGED += (LookupError, TypeError, ValueError)


def non_finite(modules: Mapping[str, nn.Module]) -> str | None:
    """The first tensor of any module that holds NaN or infinity, by name; None where all are finite."""
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not full_tensors(torch.isfinite(tensor).all()):
                return f"{name}.{key}"
    return None


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    extra: Mapping[str, Any],
    keep: int,
    write: bool = True,
) -> Path:
    """Write `folder/step-N` atomically, then remove all but the newest `keep`.

    Args:
        write: whether this process writes; the others only bring their shares of sharded weights.
        optimizers: anything with `state_dict` and `load_state_dict`: optimizers, schedules, the gradient scaler.
        extra: JSON-able values, e.g. the best held-out loss.
    """
    path = folder / f"step-{step:08d}"
    weights = {name: full_tensors(module.state_dict()) for name, module in modules.items()}
    states = {name: full_tensors(part.state_dict()) for name, part in optimizers.items()}
    if not write:
        return path
    with atomic_path(path) as temporary:
        temporary.mkdir(parents=True)
        for name, tensors in weights.items():
            held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(held, temporary / f"{name}.safetensors")
        _save(states, temporary / "optimizers.pt")
        state = json.dumps({"step": step, "extra": dict(extra)}, indent=2)
        (temporary / "state.json").write_text(state + "\n", encoding="utf-8")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def _save(states: dict[str, Any], path: Path) -> None:
    """`torch.save`, but with the system's own error: torch hides a full disk behind a position in its archive."""
    with open(path, "wb") as file:
        try:
            torch.save(states, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Restore everything in place and return `state.json`; a file that misses or does not fit is a `UserError`."""
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        state = {"step": int(state["step"]), "extra": dict(state["extra"])}
        for name, module in modules.items():
            file = path / f"{name}.safetensors"
            load_module(module, load_file(file))
        file = path / "optimizers.pt"
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for name, part in optimizers.items():
            load_optimizer(part, saved[name])
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise UserError(
            f"{file} is damaged or of another run ({reason}); remove {path} to resume from an older checkpoint"
        ) from error
    return state


class NonFinite(Exception):
    """A loss or a gradient became NaN or infinite; the message names which."""


def finite_or_raise(terms: Mapping[str, torch.Tensor]) -> None:
    """Raise `NonFinite` naming the scalars that are NaN or infinite; one wait for the device, not one a term."""
    finite = torch.stack([torch.isfinite(value.detach().float()) for value in terms.values()]).tolist()
    if not all(finite):
        raise NonFinite(", ".join(name for name, good in zip(terms, finite) if not good))
