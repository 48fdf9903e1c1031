"""Checkpoints for an exact resume.

`checkpoints/step-00000500/` holds one safetensors file per module, `optimizers.pt` (optimizers and schedules, read with
`weights_only=True`) and `state.json`. Random numbers and the position in the data are functions of (seed, step,
process), see `step_seed`, and are not saved.
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

# Raised by the readers of JSON, safetensors and torch archives on truncated or foreign files.
_DAMAGED = (OSError, EOFError, SafetensorError, pickle.UnpicklingError)
_DAMAGED += (RuntimeError, LookupError, TypeError, ValueError)
Modules = Mapping[str, nn.Module]
Named = Mapping[str, Any]


def save_checkpoint(
    folder: Path, step: int, modules: Modules, optimizers: Named, extra: Named, keep: int, write: bool = True
) -> Path:
    """Write `folder/step-N` atomically, then remove all but the newest `keep`.

    Args:
        optimizers: anything with `state_dict` and `load_state_dict`: optimizers, schedules, the gradient scaler.
        extra: JSON-serialisable values, e.g. the best held-out loss.
        write: whether this process writes; the others only contribute their shards.
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
    """Call `torch.save`; raise the system's `OSError` of a full disk instead of torch's error about its archive."""
    with open(path, "wb") as file:
        try:
            torch.save(states, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path, modules: Modules, optimizers: Named) -> dict[str, Any]:
    """Restore modules and optimizers in place; returns `step` and `extra`.

    Raises `UserError` naming the file that is missing, damaged or of another model.
    """
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
        remedy = f"remove {path} to resume from an older checkpoint"
        raise UserError(f"{file} is damaged or from another run ({reason}); {remedy}") from error
    return state
