"""Model folders and atomic files: whatever is on disk under its final name is whole.

A model folder is what inference needs and nothing else: `vqgen.json` (architecture and contract) beside
`model.safetensors`. The fingerprint, a sha256 over the tensors, ties codes and priors to their tokenizer.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__
from .errors import UserError

DESCRIPTION = "vqgen.json"
WEIGHTS = "model.safetensors"


def _sync(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success sync it and rename it into place, on failure remove it.

    The temporary may be written as a file or made a folder; an existing folder at `path` is replaced.
    An `OSError` (full disk, no permission) becomes a `UserError` that names `path`; what was there before stays.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)  # a killed process of the same number may have left one
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        for item in [*sorted(temporary.rglob("*")), temporary] if temporary.is_dir() else [temporary]:
            if item.is_file():  # safetensors makes files that nobody else may read
                item.chmod(0o666 & ~mask)
            _sync(item)
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over a full one: the old one steps aside for an instant.
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, aside / "old")
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(aside / "old", path)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        # What stands in the way may be another path, e.g. a parent folder that is a file.
        other = getattr(error, "filename", None) not in (None, str(temporary), temporary)
        reason = str(error) if other else getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):
            _remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Raise `UserError` where `path` cannot become a file or a folder: to be known before the work, not after it."""
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        state = "may not be written to" if above.is_dir() else "is a file"
        raise UserError(f"cannot write {path}: {above} {state}; choose another place")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing, unreadable or malformed file is a `UserError` that names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); restore or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object belongs; restore or remove it")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or truncated one is a `UserError` that names it."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); restore it or train again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically as safetensors (contiguous CPU copies are made where needed)."""
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over every tensor's name, type, shape and bytes, in order of name; 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A model folder as read: its description (without the reserved keys), its tensors and their fingerprint."""

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprint: str


def save_artifact(folder: Path, kind: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write `vqgen.json` and `model.safetensors` into `folder` and return the fingerprint.

    Args:
        kind: "tokenizer" or "prior"; reading with another kind is refused.
        description: JSON-able values, e.g. the architecture, image size, grid and codebook size.

    The description names the weights' fingerprint and is written last, so an interrupted save is recognised.
    """
    mark = fingerprint(tensors)
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / DESCRIPTION, {"kind": kind, "version": __version__, "fingerprint": mark, **description})
    return mark


def load_artifact(folder: Path, kind: str) -> Artifact:
    """Read a model folder and check its kind and fingerprint. Raises `UserError` where anything does not fit."""
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        state = "does not exist" if not folder.exists() else f"holds no {DESCRIPTION}"
        hint = "; its training has not finished" if (folder / "checkpoints").is_dir() else ""
        raise UserError(f"{folder} is not a {kind} folder: it {state}{hint}")
    description = read_json(folder / DESCRIPTION)
    if description.get("kind") != kind:
        raise UserError(f"{folder} holds a {description.get('kind')}, where a {kind} is needed")
    tensors = read_tensors(folder / WEIGHTS)
    found = fingerprint(tensors)
    if found != description.get("fingerprint"):
        raise UserError(
            f"{folder / WEIGHTS} has fingerprint {found[:12]}, but {DESCRIPTION} names "
            f"{str(description.get('fingerprint'))[:12]}; the file was changed or damaged: restore it"
        )
    rest = {k: v for k, v in description.items() if k not in ("kind", "version", "fingerprint")}
    return Artifact(rest, tensors, found)


def copy_artifact(source: Path, target: Path) -> None:
    """Copy what a model folder needs for inference, and nothing else, as the folder `target`, atomically."""
    with atomic_path(target) as temporary:
        temporary.mkdir(parents=True)
        for name in (DESCRIPTION, WEIGHTS):
            shutil.copyfile(source / name, temporary / name)
