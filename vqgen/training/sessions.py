"""The sessions of a run: what machine it trained on, with which versions, and for how long."""

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
    """The sessions that a run folder tells of, oldest first; none where it has no `machine.json` or a damaged one."""
    with suppress(UserError):
        sessions = read_json(folder / MACHINE).get("sessions")
        if isinstance(sessions, list):
            return [session for session in sessions if isinstance(session, dict)]
    return []


class Session:
    """One entry of `machine.json`, of the time from a start or a resumption of a run until it ends.

    Args:
        folder: the run folder; its earlier sessions stay in the list.
        first_step: steps that were done before.
        about: what it runs on, see `hardware.describe`.

    `seconds` is the wall time up to the last checkpoint, `last_step` the steps done by then: what a killed session did
    afterwards, the next one does again.
    """

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        self.path, self.former, self.start = folder / MACHINE, read_sessions(folder), time.monotonic()
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.entry = {"began": began, "first_step": first_step, "last_step": first_step, "seconds": 0.0, **about}
        self._write()

    def saved(self, step: int) -> None:
        """Note that a checkpoint after `step` steps is on disk."""
        self.entry.update(last_step=step, seconds=round(time.monotonic() - self.start, 1))
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"sessions": [*self.former, self.entry]})
