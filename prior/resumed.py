"""Which codes a resumed prior may go on with: those of its own tokenizer, sources, classes and captions."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqgen.errors import UserError
from vqgen.tokenizer.codes.format import CodeFiles

from .conditioning import Conditioning


def describe_codes(files: CodeFiles, conditioning: Conditioning) -> dict[str, Any]:
    """What checkpoints keep of the codes that a run is trained on, JSON-able."""
    return {
        "tokenizer": files.tokenizer_fingerprint,
        "data": files.data_fingerprint,
        "source": dataclasses.asdict(files.source) if files.source else None,
        "class_names": files.class_names or [],
        "prefix": {part.name: part.length for part in conditioning.parts},
    }


def check_codes(
    now: Mapping[str, Any], began: Mapping[str, Any], codes: Path, folder: Path, conditioning: Conditioning
) -> None:
    """Raise `UserError` where `codes` cannot be gone on with in the run folder `folder`.

    Args:
        now: what `describe_codes` says of them.
        began: what a checkpoint of the run says of its own; those of earlier versions do not say all of it.
    """
    began = {**now, **began}

    def refuse(found: str, expected: str) -> None:
        text = f"{codes} has {found}, {folder} began with {expected}"
        raise UserError(f"--codes: {text}; use those, --overwrite to start anew, or another --output")

    both = (now, began)
    if now["tokenizer"] != began["tokenizer"]:
        refuse(*(f"codes of tokenizer {each['tokenizer'][:12]}" for each in both))
    if not _same_task(now["source"], began["source"]):
        refuse(*(f"codes of sources ({_task(each['source'])})" for each in both))
    if now["class_names"] != began["class_names"]:
        refuse(*_different(now["class_names"], began["class_names"]))
    if now["prefix"].keys() == began["prefix"].keys():
        conditioning.check_files(folder)
    if now["prefix"] != began["prefix"]:
        refuse(*(f"codes for the prefix ({listed(each['prefix'])})" for each in both))


def other_images(now: Mapping[str, Any], began: Mapping[str, Any]) -> bool:
    """Whether codes are of other images than those that a run began with, where its checkpoint tells."""
    return any(name in began and began[name] != now[name] for name in ("data", "source"))


def listed(prefix: Mapping[str, int]) -> str:
    """The parts of a prefix and their lengths, as text."""
    return "; ".join(f"{name}, {length} token{'s' * (length > 1)}" for name, length in prefix.items())


def _task(source: Mapping[str, Any] | None) -> str:
    """What the sources of code files are, as text."""
    return " ".join(source["degradations"]) or source["description"] if source else "none"


def _same_task(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two sources are of one task: the same degradations, or partners of the same images or data."""
    if one is None or other is None or one["kind"] != other["kind"] or list(one["grid"]) != list(other["grid"]):
        return one is other
    return _task(one) == _task(other) or (
        one["kind"] == "paired" and one["data_fingerprint"] == other["data_fingerprint"]
    )


def _different(*sides: Sequence[str]) -> list[str]:
    """Two unequal lists of class names, each as text: their numbers, or else the first names that differ."""
    if len(sides[0]) != len(sides[1]):
        return [f"{len(names)} classes" for names in sides]
    place = next(place for place, (one, other) in enumerate(zip(*sides)) if one != other)
    return [f"class {place} {names[place][:80]!r}" for names in sides]
