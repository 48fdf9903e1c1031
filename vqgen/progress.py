"""Progress of every program: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm

LINE_EVERY = 30.0
"""Seconds between two lines where standard error is no terminal; shorter work prints none."""


class Lines:
    """Progress for log files, with the methods of a bar that programs use: a line every `LINE_EVERY` seconds.

    Args:
        total, done: units of the whole job, None where they are not known, and those done before.
        shown: whether anything is printed.
        clock: returns seconds.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        unit: str,
        shown: bool,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.what, self.unit, self.shown, self.clock = total, what, unit, shown, clock
        self.n, self.postfix = done, ""
        self.last_n, self.last_time = done, clock()  # at the last line

    def update(self, n: int = 1) -> None:
        """Count `n` further units."""
        self.n += n
        now = self.clock()
        if self.shown and now - self.last_time >= LINE_EVERY:
            rate = (self.n - self.last_n) / (now - self.last_time)
            left = f", {tqdm.format_interval((self.total - self.n) / rate)} left" if rate and self.total else ""
            done = f"{self.n} of {self.total}" if self.total else str(self.n)
            text = f"{self.what}: {done} {self.unit}, {rate:.3g} {self.unit}/s{left}{self.postfix}"
            self.write(text, sys.stderr)
            self.last_n, self.last_time = self.n, now

    def set_postfix(self, values: Mapping[str, str]) -> None:
        """Set what the next line says besides."""
        self.postfix = "".join(f", {name} {value}" for name, value in values.items())

    @staticmethod
    def write(text: str, file: TextIO) -> None:
        """Print a line."""
        print(text, file=file, flush=True)

    def close(self) -> None:
        """End without a further line."""
        self.shown = False

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


Progress = tqdm | Lines
"""A bar or lines; both have `update`, `set_postfix` and `write`."""


def progress(total: int | None, what: str, unit: str, main: bool, done: int = 0) -> Progress:
    """Return the progress of a job, shown by the main process."""
    if not sys.stderr.isatty():
        return Lines(total, what, unit, main, done)
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not main, file=sys.stderr, smoothing=0.1)
