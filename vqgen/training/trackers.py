"""Trackers of a run's metrics: always `metrics.jsonl`, and others by name."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import is_tensorboard_available, is_wandb_available

from vqgen.errors import UsageError, UserError
from vqgen.files import parse_json, read_bytes


class JsonlTracker(GeneralTracker):
    """Appends one JSON object per line to `metrics.jsonl`, flushed at once."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        self.tracker = path
        super().__init__()

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in values.items()}
        try:
            with open(self.tracker, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **clean}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.tracker}: {error.strerror}") from error


def further_trackers(names: Sequence[str]) -> list[str]:
    """Check that every tracker is known and installed, as Accelerate ignores a missing one; returns `names`."""
    known = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    for name in names:
        if name not in known:
            raise UsageError(f"--log-with: found {name}, expected {' or '.join(known)}")
        if not known[name]():
            raise UsageError(f"--log-with: {name} is not installed; pip install {name}")
    return list(names)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows of `metrics.jsonl`, oldest first, and the number of lines that are none; ([], 0) where there is no file.

    A row is an object of numbers and text with a `step`. Its numbers are small enough for arithmetic: health checks
    square them. Raises `UserError` where the file cannot be read.
    """
    if not os.path.lexists(path):
        return [], 0
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore or remove it") from error
    rows, damaged = [], 0
    for line in lines:
        row = None
        with suppress(ValueError, RecursionError):  # of UTF-8, too
            row = parse_json(line)
        if isinstance(row, dict) and _is_count(row.get("step")) and all(map(_is_plain, row.values())):
            rows.append(row)
        else:
            damaged += bool(line.strip())
    return rows, damaged


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1e15


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 1e100)


def read_history(path: Path, last: int) -> tuple[list[dict[str, Any]], int]:
    """Rows of `metrics.jsonl` up to step `last`, and the number of lines that were skipped; see `read_rows`."""
    rows, damaged = read_rows(path)
    return [row for row in rows if row["step"] <= last], damaged


def validated(rows: Sequence[Mapping[str, Any]], step: int) -> bool:
    """Whether rows of metrics have the validation of a step; the last one of a run that was shortened may lack it."""
    return any(row["step"] == step and any(name.startswith("heldout/") for name in row) for row in rows)
