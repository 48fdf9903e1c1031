"""Errors that a user can cause. The message names the file or option, what was found, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix; the command line prints its message as one line, without a traceback."""

    exit_code = 1


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that there is not enough memory, of the machine or of a GPU."""
    return isinstance(error, MemoryError) or bool(re.search("can't allocate memory|out of memory", str(error)))


class UsageError(UserError):
    """A wrong option or configuration key; exit code 2."""

    exit_code = 2


class OtherRun(UsageError):
    """An output folder with another run of the same program, all of whose files may be removed by --overwrite."""


class DataError(UserError):
    """Training data that cannot be read any more, found before a step computed anything: what is done can be saved."""


@contextmanager
def data_named(option: str) -> Iterator[None]:
    """Within, errors that name --data name the option by which the data was given instead."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace("--data:", f"{option}:", 1)) from error
