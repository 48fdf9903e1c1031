"""Tensors: headers of safetensors, numbers that are none, codes and labels out of range, archives of torch.save."""

import hashlib
import io
import json
import math
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ..place import Place
from . import Change, NotApplicable, mutation
from .records import hostile_values

TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
    "BOOL": "?",
}


def split(path: Path) -> tuple[dict[str, Any], bytearray]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", data[:8])
        return json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    except (ValueError, struct.error, OverflowError) as error:
        raise NotApplicable from error


def join(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def names(header: dict[str, Any]) -> list[str]:
    found = sorted(name for name in header if name != "__metadata__")
    if not found:
        raise NotApplicable
    return found


def array(header: dict[str, Any], data: bytearray, name: str) -> np.ndarray:
    """A tensor as a flat array that shares memory with `data`."""
    entry = header[name]
    if entry["dtype"] not in TYPES:
        raise NotApplicable
    start, stop = entry["data_offsets"]
    return np.frombuffer(data, TYPES[entry["dtype"]], (stop - start) // np.dtype(TYPES[entry["dtype"]]).itemsize, start)


def refresh(path: Path, place: Place) -> str:
    """Make the records beside a tensor file agree with it: fingerprint of a model folder, checksum in a manifest."""
    import torch
    from safetensors.torch import load_file

    from vqgen.artifact import fingerprint

    done = ""
    description, manifest = path.parent / "vqgen.json", path.parent / "manifest.json"
    if path.name == "model.safetensors" and description.is_file():
        tree = json.loads(description.read_text())
        torch.set_num_threads(1)
        tree["fingerprint"] = fingerprint(load_file(path))
        description.write_text(json.dumps(tree))
        done = "; fingerprint made to agree"
    if manifest.is_file():
        tree = json.loads(manifest.read_text())
        for entry in (shard for part in tree["splits"].values() for shard in part["shards"]):
            if entry["file"] == path.name:
                entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(tree))
        done = "; checksum made to agree"
    return done


@mutation("safetensors")
@mutation("safetensors")
def not_finite(path: Path, random: Random, place: Place) -> Change:
    header, data = split(path)
    floats = [name for name in names(header) if header[name]["dtype"] in ("F64", "F32", "F16")]
    if not floats:
        raise NotApplicable
    name = random.choice(floats)
    values = array(header, data, name)
    if not len(values):
        raise NotApplicable
    value = random.choice([math.nan, math.inf, -math.inf])
    values[random.randrange(len(values))] = value
    if random.random() < 0.2:
        values[:] = value
    join(path, header, bytes(data))
    agreed = refresh(path, place) if random.random() < 0.7 else ""
    return Change(f"{name} holds {value}{agreed}", invalid=True)


@mutation("safetensors")
def other_numbers(path: Path, random: Random, place: Place) -> Change:
    """Numbers that nothing can tell to be wrong, under fingerprints or checksums that agree."""
    header, data = split(path)
    name = random.choice(names(header))
    values = array(header, data, name)
    if header[name]["dtype"] not in ("F64", "F32", "F16") or not len(values):
        raise NotApplicable
    values *= np.asarray(random.choice([0.0, -1.0, 0.5, 1e4]), values.dtype)
    join(path, header, bytes(data))
    return Change(f"{name} scaled{refresh(path, place)}", honest="/checkpoints/" not in str(path))


@mutation("safetensors")
@mutation("safetensors")
def out_of_range(path: Path, random: Random, place: Place) -> Change:
    """Codes beyond the codebook and labels of classes that do not exist."""
    header, data = split(path)
    found = [name for name in names(header) if name in ("codes", "labels")]
    if not found:
        raise NotApplicable
    name = random.choice(found)
    values = array(header, data, name)
    if not len(values):
        raise NotApplicable
    extremes = [16, 17, 40, 255] if values.dtype.itemsize == 1 else [2, 3, -2, 10**9, -(2**31), 2**31 - 1]
    value = random.choice(extremes)
    for _ in range(random.choice([1, 1, 5])):
        values[random.randrange(len(values))] = value
    join(path, header, bytes(data))
    agreed = refresh(path, place) if random.random() < 0.8 else ""
    return Change(f"{name} holds {value}{agreed}", invalid=True)


@mutation("safetensors")
@mutation("safetensors")
def header_entry(path: Path, random: Random, place: Place) -> str:
    header, data = split(path)
    name = random.choice(names(header))
    entry, what = header[name], random.choice(["offsets", "shape", "dtype", "remove", "rename", "value", "metadata"])
    if what == "offsets":
        entry["data_offsets"] = random.choice(
            [[0, 2**63], [2**62, 2**63], [-1, 4], [8, 0], [0, len(data) + 8], [0], "x"]
        )
    elif what == "shape":
        entry["shape"] = random.choice(
            [[2**40, 2**40], [-1], [0], [], [*entry["shape"], 1], entry["shape"][::-1], None]
        )
    elif what == "dtype":
        entry["dtype"] = random.choice(["F64", "F16", "BF16", "I32", "F8_E4M3", "BOOL", "F33", 3, None, "C64"])
    elif what == "remove":
        del header[name]
    elif what == "rename":
        header[name + "_"] = header.pop(name)
    elif what == "metadata":
        header["__metadata__"] = random.choice([{"a": 1}, {"a": "x" * 10_000_000}, 3, None, {"format": "\0"}])
    else:
        header[name] = random.choice(hostile_values(place))
    join(path, header, bytes(data))
    return f"{what} of {name}"


@mutation("safetensors")
def header_length(path: Path, random: Random, place: Place) -> str:
    data = path.read_bytes()
    length = random.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(data), 100_000_001])
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    return f"the header's length is {length}"


@mutation("safetensors")
def hostile_header(path: Path, random: Random, place: Place) -> str:
    text = random.choice(
        [b"[" * 20_000, b"{}", b"null", b'{"a":' * 20_000, b"\xff" * 64, b'{"": {}}', b'{"a": {"dtype": "F32"}}']
    )
    path.write_bytes(struct.pack("<Q", len(text)) + text + path.read_bytes()[:1000])
    return f"the header is {text[:12]!r}…"


@mutation("safetensors")
def swapped_tensors(path: Path, random: Random, place: Place) -> str:
    header, data = split(path)
    one = random.choice(names(header))
    alike = [n for n in names(header) if n != one and header[n]["shape"] == header[one]["shape"]]
    if not alike:
        raise NotApplicable
    other = random.choice(alike)
    if bytes(array(header, data, one)) == bytes(array(header, data, other)):
        raise NotApplicable
    header[one], header[other] = header[other], header[one]
    join(path, header, bytes(data))
    return f"{one} and {other} swapped"


def pickled_code(mark: Path, state_dict: bool) -> bytes:
    """A pickle, in its own instructions, that leaves the file `mark` when a reader runs its code."""
    text = f"open({str(mark)!r}, 'w').close()".encode()
    call = b"c__builtin__\nexec\nX" + struct.pack("<I", len(text)) + text + b"\x85R"
    name = b"X" + struct.pack("<I", 10) + b"state_dict"
    return b"\x80\x02" + (b"}" + name + call + b"s" if state_dict else call) + b"."


def _rewrite(path: Path, change: Any) -> None:
    """Write an archive of torch.save again, each member changed by `change(name, bytes)`; None leaves it out."""
    try:
        with zipfile.ZipFile(path) as old:
            members = [(item.filename, old.read(item)) for item in old.infolist()]
    except (zipfile.BadZipFile, OSError, KeyError) as error:
        raise NotApplicable from error
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as new:
        for name, data in members:
            if (found := change(name, data)) is not None:
                new.writestr(name, found)
    path.write_bytes(buffer.getvalue())


@mutation("torch")
def code_in_a_pickle(path: Path, random: Random, place: Place) -> Change:
    mark = place.root / "pwned"
    if random.random() < 0.3:
        path.write_bytes(pickled_code(mark, False))
    else:
        _rewrite(path, lambda name, data: pickled_code(mark, True) if name.endswith("data.pkl") else data)
    return Change("a pickle that runs code", invalid=True)


@mutation("torch")
def archive_member(path: Path, random: Random, place: Place) -> str:
    what, choice = random.choice(["drop", "cut", "noise", "big"]), random.random()

    def change(name: str, data: bytes) -> bytes | None:
        if hash01(name, choice) > 0.2:
            return data
        return {"drop": None, "cut": data[: len(data) // 2], "noise": bytes(len(data)), "big": data * 3}[what]

    _rewrite(path, change)
    return f"members of the archive: {what}"


def hash01(name: str, salt: float) -> float:
    """A number in [0, 1) that depends on a name."""
    return int.from_bytes(hashlib.sha256(f"{salt} {name}".encode()).digest()[:4], "big") / 2**32


@mutation("torch")
def flipped_storage(path: Path, random: Random, place: Place) -> str:
    """A bit of one tensor, the archive's checksums made to agree."""
    salt = random.random()

    def change(name: str, data: bytes) -> bytes:
        if "/data/" not in name or not data or hash01(name, salt) > 0.3:
            return data
        position = int(hash01(name, salt + 1) * len(data))
        return data[:position] + bytes([data[position] ^ 64]) + data[position + 1 :]

    _rewrite(path, change)
    return "bits of tensors flipped, checksums of the archive agree"
