"""Model folders: `vqgen.json` (architecture and contract) and `model.safetensors`, all that inference needs.

The fingerprint, a sha256 over the tensors, ties codes and priors to their tokenizer.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import __version__
from .errors import UserError
from .files import DESCRIPTION, WEIGHTS, atomic_path, is_file, open_regular, read_json, write_json


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises `UserError` where it is missing, damaged or no regular file."""
    try:
        open_regular(path).close()
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); restore it or train again") from error


def unpickle(path: Path, classes: Sequence[Any] = ()) -> Any:
    """Read a file of `torch.save` with tensors and plain values only; no code in it is run.

    Args:
        classes: what `torch.serialization.safe_globals` takes, replacing classes in the file.

    Raises `UserError` where the file is no regular one or unpacks to more than its size, and errors of many types
    where it is damaged.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    with file:
        if zipfile.is_zipfile(file):  # torch writes without compression
            size = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
            if size > os.fstat(file.fileno()).st_size:
                raise UserError(f"{path} unpacks to {size} bytes, more than it has; save it by torch.save")
        file.seek(0)
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(file, map_location="cpu", weights_only=True)


def refuse_non_finite(tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise `UserError`, naming the tensor, where one holds NaN or infinity, or is no plain tensor.

    Reads each tensor once, at memory speed, without a copy. `where` names their file.
    """
    for name, tensor in tensors.items():
        # A stride of 0 makes a tensor larger than what its file stores, without bound. Torch has nothing for 4 bits.
        packed = tensor.is_quantized or tensor.dtype == torch.float4_e2m1fn_x2
        plain = tensor.layout == torch.strided and not (packed or tensor.is_meta)
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{where}: {name} is sparse, quantized or expanded; save it as a plain tensor")
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        if values.is_floating_point() and values.numel():
            # NaN and infinity reach the minimum or the maximum; types of 8 bits have neither operation.
            bounds = (values if values.itemsize > 1 else values.float()).aminmax()
            if not all(bound.isfinite() for bound in bounds):
                raise UserError(f"{where}: {name} holds NaN or infinity; take weights of before the divergence")


def refuse_others(tensors: Mapping[str, Tensor], promised: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise `UserError` where names or shapes of tensors are not those that a description promises.

    Args:
        promised: of a model built with `torch.device("meta")`, which takes no memory, however large it is.
        where: the folder, for errors.
    """
    for name in sorted(promised.keys() | tensors.keys()):
        found, wanted = (tuple(each[name].shape) if name in each else None for each in (tensors, promised))
        if found != wanted:
            texts = (f"has shape {shape}" if shape is not None else "is missing" for shape in (found, wanted))
            raise UserError(
                f"{where}: in {WEIGHTS}, {name} {next(texts)}, by {DESCRIPTION} it {next(texts)}; restore both"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically as safetensors (contiguous CPU copies are made where needed), with further metadata."""
    known = {"format": "pt", **(metadata or {})}
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=known)
        if len(known) > 1:
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file, which has them in another order each time: equal weights
    are to be equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"a header of {size} bytes became one of {len(text)}"
        file.seek(8)
        file.write(text.ljust(size))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over name, type, shape and bytes of every tensor, in order of name, as 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """Content of a model folder: description (without kind, version and fingerprint), tensors and their fingerprint."""

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprint: str


def save_artifact(folder: Path, kind: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Write a model folder of kind "tokenizer" or "prior" and return its fingerprint.

    `description` holds JSON-able values, e.g. the architecture, image size, grid and codebook size. The file names the
    weights' fingerprint and is written last, so an interrupted save is recognised.
    """
    mark = fingerprint(tensors)
    # Tensors that lose their folder still say what they are.
    write_tensors(folder / WEIGHTS, tensors, _metadata(kind, __version__, mark))
    write_json(folder / DESCRIPTION, {"kind": kind, "version": __version__, "fingerprint": mark, **description})
    return mark


def _metadata(kind: str, version: Any, mark: str) -> dict[str, Any]:
    """What the safetensors file of a model folder says of itself, since version 0.2."""
    return {"name": f"vqgen {kind}", "version": version, "fingerprint": mark}


def _check_metadata(path: Path, expected: Mapping[str, Any]) -> None:
    """Raise `UserError` where the metadata of a safetensors file are damaged; files without any are of version 0.1."""
    with safe_open(path, "pt") as file:
        found = {key: value for key, value in (file.metadata() or {}).items() if key != "format"}
    if found.keys() & expected.keys() and found != expected:
        text = ", ".join(key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key))
        raise UserError(f"{path} has other metadata ({text}) than {DESCRIPTION} and the tensors need; restore both")


def load_artifact(folder: Path, kind: str) -> Artifact:
    """Read a model folder.

    Raises `UserError` where it is of another kind, or its weights have another fingerprint or hold NaN or infinity.
    """
    folder = Path(folder)
    if not is_file(folder / DESCRIPTION):
        state = "does not exist" if not folder.exists() else f"holds no {DESCRIPTION}"
        unfinished = (folder / "checkpoints").is_dir()
        hint = "its training has not finished" if unfinished else f"give the run or model folder of a {kind}"
        hint = f"give {folder / kind}" if is_file(folder / kind / DESCRIPTION) else hint
        raise UserError(f"{folder} is not a {kind} folder: it {state}; {hint}")
    description = read_json(folder / DESCRIPTION)
    if description.get("kind") != kind:
        raise UserError(f"{folder} holds a {description.get('kind')}, where a {kind} is needed")
    tensors = read_tensors(folder / WEIGHTS)
    found = fingerprint(tensors)
    if found != description.get("fingerprint"):
        named = str(description.get("fingerprint"))[:12]
        raise UserError(f"{folder / WEIGHTS} has fingerprint {found[:12]}, {DESCRIPTION} names {named}; restore it")
    _check_metadata(folder / WEIGHTS, _metadata(kind, description.get("version"), found))
    refuse_non_finite(tensors, folder / WEIGHTS)
    rest = {k: v for k, v in description.items() if k not in ("kind", "version", "fingerprint")}
    return Artifact(rest, tensors, found)


def copy_artifact(source: Path, target: Path) -> None:
    """Copy weights and, last, the description of a model folder to the folder `target`, other files of which stay."""
    for name in (WEIGHTS, DESCRIPTION):
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
