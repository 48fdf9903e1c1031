"""What connects a program with its terminal: standard output and error, and interrupts."""

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from .errors import UserError


class _Stream(io.TextIOBase):
    """A text stream in place of another one, with `failed` called for an error of the system in writing."""

    def __init__(self, stream: TextIO, failed: Callable[[OSError], None]) -> None:
        self.stream, self.failed = stream, failed

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.failed(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stream.encoding


def _lost(_error: OSError) -> None:
    """Ignore that a message could not be written, so that the run goes on."""


def _refused(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise error
    close_stdout()
    raise UserError(f"cannot write to standard output: {error.strerror}") from error


@contextmanager
def prepared_streams() -> Iterator[None]:
    """Let names of files that are no UTF-8 be printed, what standard output cannot take be a `UserError`, and messages
    be lost rather than end a program."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # stderr does so anyway
        sys.stdout = _Stream(sys.stdout, _refused)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Stream(sys.stderr, _lost)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def close_stdout() -> None:
    """Send what is left to nowhere: the flush at exit would fail as well."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Yield a list that gets every SIGINT, before it raises `KeyboardInterrupt` as ever: an import may swallow that.

    It stays empty where this is not the main thread, or the handler is not Python's own.
    """
    seen: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    own = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if own:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def stdout_has_no_reader() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    with suppress(OSError, AttributeError):  # no descriptor, or a system without poll
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    return False
