"""The registry of mutations: what is done to an input.

A mutation is a function of (path, random, place) that changes the file `path`, or what is around it, as the numbers of
`random` say, and returns a line that describes it, or a `Change`. It raises `NotApplicable` where it has nothing to
change. `@mutation("json", "yaml")` registers it for kinds of files; `--mutations FILE.py` loads more of them.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..place import Place

KINDS = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "image",
    ".gif": "image",
    ".bmp": "image",
    ".tiff": "image",
    ".json": "json",
    ".jsonl": "jsonl",
    ".yaml": "yaml",
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".ckpt": "torch",
    ".parquet": "parquet",
    ".vqc": "archive",
}
"""Ending of a file -> the kind of mutations it gets, besides "bytes" and "entry". "words" are of the command line."""


class NotApplicable(Exception):
    """Raised by a mutation that has nothing to change here."""


@dataclass(frozen=True)
class Change:
    """What a mutation did."""

    text: str
    invalid: bool = False
    """The content is wrong, and can be known to be: no program may accept it and have another result."""
    honest: bool = False
    """The content is consistent in itself: another result is right."""


Mutation = Callable[[Path, Random, Place], "str | Change"]
REGISTRY: dict[str, list[Mutation]] = {}


def mutation(*kinds: str) -> Callable[[Any], Any]:
    """Register a mutation for kinds of files: values of `KINDS`, or "bytes" and "entry" (any file), or "words"."""

    def register(function: Any) -> Any:
        for kind in kinds:
            REGISTRY.setdefault(kind, []).append(function)
        return function

    return register


def load(path: Path) -> list[Mutation]:
    """Import a file that registers further mutations, and return these."""
    before = {id(function) for functions in REGISTRY.values() for function in functions}
    spec = importlib.util.spec_from_file_location(f"mutations_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"--mutations: {path} is no Python file")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return [function for functions in REGISTRY.values() for function in functions if id(function) not in before]


def choices(path: Path) -> dict[str, list[Mutation]]:
    """Group -> mutations that this file may get."""
    kinds = ("bytes", "entry", KINDS.get(path.suffix.lower(), ""))
    return {kind: REGISTRY[kind] for kind in kinds if REGISTRY.get(kind)}


from . import archives, bytes_, entries, images, records, tables, tensors, words, yaml_  # noqa: E402, F401 (they register)
