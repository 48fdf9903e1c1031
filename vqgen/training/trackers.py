"""Trackers of a run's metrics: always `metrics.jsonl`, and others by name."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import is_tensorboard_available, is_wandb_available

from vqgen.errors import UsageError, UserError


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


def read_history(path: Path, last: int) -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` up to step `last`; an incomplete line of a killed run is skipped."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return [row for row in rows if row["step"] <= last]
