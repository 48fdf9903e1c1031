"""Checkpoints for an exact resume.

`checkpoints/step-00000500/` holds one safetensors file per module, `optimizers.pt` (optimizers and schedules, read with
`weights_only=True`) and `state.json`, which has a checksum of each file and one of itself. Random numbers and the
position in the data are functions of (seed, step, process), see `step_seed`, and are not saved.
"""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vqgen.artifact import unpickle
from vqgen.errors import UserError, lacks_memory
from vqgen.files import atomic_path, checksum, open_regular, read_record
from vqgen.files.output_folder import OutputFolder
from vqgen.files.write import remove_folder

from .folder import CHECKPOINT_FILE, DAMAGED, checkpoints, step_of
from .fsdp import full_tensors, load_module, load_optimizer

# Raised by the readers of safetensors and torch archives on truncated or foreign files.
_UNREADABLE = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile)
_UNREADABLE += (RuntimeError, LookupError, TypeError, ValueError)
Modules = Mapping[str, nn.Module]
Named = Mapping[str, Any]
SCALER = "scaler"
"""Name of the gradient scaler among the optimizers: only runs in fp16 have one."""


@dataclass(frozen=True)
class State:
    """Content of state.json. Earlier versions wrote no checksums."""

    step: Annotated[int, Ge(0)]
    extra: dict[str, Any]
    files: dict[str, str] | None = None
    """Name -> sha256 of every other file."""
    sizes: dict[str, int] | None = None
    """Name -> bytes of these files, compared first: a sparse file of a terabyte takes hours to hash."""
    sha256: str | None = None
    """Of the other values, see `_own_checksum`."""


def _own_checksum(state: State) -> str:
    values = {name: value for name, value in vars(state).items() if name != "sha256" and value is not None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def save_checkpoint(
    folder: Path, step: int, modules: Modules, optimizers: Named, extra: Named, keep: int, write: bool = True
) -> Path:
    """Write `folder/step-N` atomically, in place of an earlier one, then remove all but the newest `keep`.

    Args:
        optimizers: anything with `state_dict` and `load_state_dict`: optimizers, schedules, the gradient scaler.
        extra: JSON-serialisable values, e.g. the best held-out loss.
        write: whether this process writes; the others only contribute their shards.
    """
    path = folder / f"step-{step:08d}"
    weights = {name: full_tensors(module.state_dict(), host=True) for name, module in modules.items()}
    states = {name: full_tensors(part.state_dict(), host=True) for name, part in optimizers.items()}
    if not write:
        return path
    with atomic_path(path) as temporary:
        temporary.mkdir(parents=True)
        for name, tensors in weights.items():
            held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(held, temporary / f"{name}.safetensors")
        _save(states, temporary / "optimizers.pt")
        files = sorted(temporary.iterdir())
        sums, sizes = {file.name: checksum(file) for file in files}, {file.name: file.stat().st_size for file in files}
        plain = json.loads(json.dumps(dict(extra)))  # JSON turns tuples into lists
        state = State(step, plain, sums, sizes)
        text = json.dumps({**vars(state), "sha256": _own_checksum(state)}, indent=2)
        (temporary / "state.json").write_text(text + "\n", encoding="utf-8")
        _set_aside(path)
    rotate(folder, step, keep)
    return path


def rotate(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the damaged ones that a run has passed with `step` steps."""
    passed = [damaged for damaged in checkpoints(folder, DAMAGED) if step_of(damaged) <= step]
    found = checkpoints(folder)
    newest = list({step_of(path): path for path in found}.values())[-keep:]  # one of each step
    _remove([*passed, *(path for path in found if path not in newest)])


def _set_aside(path: Path) -> None:
    """Rename a checkpoint that is about to be replaced, where there is one and it holds no files of others.

    Its new name is one of the same step, too, so that a kill before the replacement is in its place loses none.
    """
    if path in checkpoints(path.parent) and _is_own(path):
        former = path.with_name(f"step-0{step_of(path):08d}")
        _remove([former])  # of an earlier kill
        path.rename(former)


def _remove(paths: Iterable[Path]) -> None:
    """Remove checkpoints: as a whole, or their own files where others are in them. Raises `UserError`."""
    for path in paths:
        try:
            if _is_own(path):
                remove_folder(path)
            else:
                OutputFolder(path, patterns=(CHECKPOINT_FILE,)).clear()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from error


def _is_own(path: Path) -> bool:
    """Whether a checkpoint holds its own files alone. Raises `OSError`."""
    own = OutputFolder(path, patterns=(CHECKPOINT_FILE,))
    return {file.name for file in own.own_files()} == set(os.listdir(path))


def _save(states: dict[str, Any], path: Path) -> None:
    """Call `torch.save`; raise the system's `OSError` of a full disk instead of torch's error about its archive."""
    with open(path, "wb") as file:
        try:
            torch.save(states, file)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def read_state(path: Path) -> State:
    """Read the `state.json` of a checkpoint. Raises `UserError`."""
    return read_record(path / "state.json", State)


def check_checkpoint(path: Path) -> State:
    """Compare every file of a checkpoint with its checksum; those of earlier versions have none.

    Raises `UserError` naming the file that is missing or damaged.
    """
    file, state = path / "state.json", read_state(path)
    if state.files is None and state.sha256 is None:
        return state
    if state.files is None or state.sha256 != _own_checksum(state):
        raise UserError(f"{file} is damaged: it does not have the checksum that was saved with it")
    for name, expected in state.files.items():
        size = (state.sizes or {}).get(name)
        if size is not None and os.path.isfile(path / name) and os.path.getsize(path / name) != size:
            raise UserError(f"{path / name} is damaged: it does not have the size in state.json, {size} bytes")
        if checksum(path / name) != expected:
            raise UserError(f"{path / name} is damaged: it does not have the checksum in state.json")
    return state


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, None where there is none at all, and what is wrong with those after it.

    These are set aside as `damaged-N` until the run has passed their step. Raises `UserError` where all are damaged.
    """
    problems: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        try:
            check_checkpoint(path)
        except UserError as error:
            problems[path] = str(error)
            continue
        for bad in problems:
            aside = folder / f"damaged-{step_of(bad):08d}"
            _remove([aside])
            try:
                bad.rename(aside)
            except OSError as error:
                raise UserError(f"cannot rename {bad} to {aside.name}: {error.strerror}") from error
        return path, list(problems.values())
    if problems:
        first = next(iter(problems.values()))
        raise UserError(f"no checkpoint in {folder} is whole ({first}); restore one, or use --overwrite to start anew")
    return None, []


def load_checkpoint(path: Path, modules: Modules, optimizers: Named) -> dict[str, Any]:
    """Restore modules and optimizers in place; returns `step` and `extra`. See `check_checkpoint`.

    A gradient scaler that was not saved stays as it is, and one that is not asked for is left out: the precision that
    `auto` stands for may differ between two machines.

    Raises `UserError` naming the file that is missing, damaged or of another model.
    """
    state, file = read_state(path), path
    try:
        for name, module in modules.items():
            file = path / f"{name}.safetensors"
            open_regular(file).close()
            _load(module, load_file(file), file)
        file = path / "optimizers.pt"
        saved = unpickle(file)
        for name, part in optimizers.items():
            if name in saved or name != SCALER:
                load_optimizer(part, saved[name])
    except _UNREADABLE as error:
        if lacks_memory(error):  # a RuntimeError, too
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        remedy = f"remove {path} to resume from an older checkpoint"
        raise UserError(f"{file} is damaged or from another run ({reason}); {remedy}") from error
    return {"step": state.step, "extra": state.extra}


def _load(module: nn.Module, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Load the tensors of a file into a module. Raises `UserError` where it has others: no older file would fit."""
    try:
        load_module(module, tensors)
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        reason = " ".join(str(error).split("\n", 1)[-1].split())[:200]  # the first line has no details
        remedy = "give the options and data that the run began with, --overwrite to start anew, or another --output"
        raise UserError(f"{file} is of another model ({reason}); {remedy}") from error
