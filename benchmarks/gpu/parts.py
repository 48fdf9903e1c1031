"""The parts of the run: their names, time limits and order, and the process of one of them."""

import importlib
import json
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINES = 30
"""Last lines of the output that are kept of a part that failed."""


@dataclass(frozen=True)
class Setup:
    """What a part gets."""

    device: str
    """cuda or cpu."""
    folder: Path
    """Its own, empty."""
    report: Callable[[dict[str, Any]], None]
    """Adds findings to its result at once: what a time limit cuts off keeps them."""

    @property
    def tiny(self) -> bool:
        """Whether this is the rehearsal on a CPU."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Part:
    """A function `run(setup, **arguments)` of a module, and the seconds it has at most."""

    place: str
    limit: float
    arguments: dict[str, Any]


def _part(place: str, limit: float, **arguments: Any) -> Part:
    return Part(place, limit, arguments)


PARTS = {
    "machine": _part("machine:measure", 60),
    "tests": _part("tests:run", 150),
    "drawing-11m": _part("drawing:sides", 60, dim=384, layers=6, codebook_size=1024),
    "drawing-343m": _part("drawing:sides", 120, dim=1024, layers=24, codebook_size=16384),
    "package": _part("drawing:package", 90),
    "prior-bf16": _part("training:prior", 150, precision="bf16"),
    "tokenizer-bf16": _part("training:tokenizer", 150, precision="bf16"),
    "quantizer": _part("rates:quantizer", 60),
    "tokenizing": _part("rates:tokenizing", 90),
    "prior-fp16": _part("training:prior", 150, precision="fp16"),
    "tokenizer-fp16": _part("training:tokenizer", 150, precision="fp16"),
    "processes": _part("processes:two", 120),
}
"""In the order of running: what matters most comes first."""


def perform(name: str, device: str, folder: Path) -> None:
    """Run a part in this process; its result goes to result.json in `folder`, its output to output.txt."""
    os.setsid()  # so that what it starts ends with it
    descriptor = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    found: dict[str, Any] = {}

    def report(values: dict[str, Any]) -> None:
        found.update(values)
        (folder / "new.json").write_text(json.dumps(found))
        os.replace(folder / "new.json", folder / "result.json")

    part = PARTS[name]
    module, _, function = part.place.partition(":")
    (folder / "work").mkdir()
    try:
        run = getattr(importlib.import_module(f".{module}", __package__), function)
        report(run(Setup(device, folder / "work", report), **part.arguments) or {})
    except (Exception, SystemExit):
        report({"error": traceback.format_exc(limit=-6)})


def result_of(folder: Path, killed: float | None) -> dict[str, Any]:
    """What a part has found so far, with the end of its output where it failed or was `killed` after some seconds."""
    found: dict[str, Any] = {}
    with suppress(OSError):
        found = json.loads((folder / "result.json").read_text())
    if killed is not None:
        found["error"] = f"ended after {killed:.0f} s, its limit"
    elif not found:
        found["error"] = "its process ended without a result"
    if "error" in found:
        with suppress(OSError):
            found["output"] = (folder / "output.txt").read_text(errors="replace").splitlines()[-LINES:]
    return found
