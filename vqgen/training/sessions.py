"""Sessions of a run: the machine, the library versions and the duration of each start or resume."""

import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vqgen.errors import UserError
from vqgen.files import read_json, write_json

MACHINE = "machine.json"


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Sessions of a run folder, oldest first; none where `machine.json` is missing or damaged."""
    sessions = None
    with suppress(UserError):
        sessions = read_json(folder / MACHINE).get("sessions")
    return [each for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []


class Session:
    """One entry of `machine.json`: from a start or resume of a run, after `first_step` steps, until it ends.

    `seconds` is the wall time up to the last checkpoint and `last_step` the steps done by then; the next session
    repeats the steps that a killed one did afterwards. `about` is the machine and versions, see `devices.describe`.
    """

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        self.path, self.earlier, self.start = folder / MACHINE, read_sessions(folder), time.monotonic()
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.entry = {"began": began, "first_step": first_step, "last_step": first_step, "seconds": 0.0, **about}
        self._write()

    def saved(self, step: int) -> None:
        """Record that a checkpoint after `step` steps is on disk."""
        self.entry.update(last_step=step, seconds=round(time.monotonic() - self.start, 1))
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"sessions": [*self.earlier, self.entry]})
