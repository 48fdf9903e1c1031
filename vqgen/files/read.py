"""Input files: regular files only (a FIFO or a device can block for ever), of bounded size, with checked types."""

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from vqgen.errors import UserError

T = TypeVar("T")

MAX_BYTES = 2**31
"""Largest file that is read into memory as a whole, in bytes."""
MAX_TEXT = 2**28
"""Largest text file, in bytes: samples.json of 1.7 million images without prompts."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, links followed. Raises `OSError`, also for FIFOs, devices, sockets and folders.

    A path that no file can have, e.g. with a NUL, raises `OSError` as well.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened: that alone has effects on a device
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        # Without O_NONBLOCK a FIFO that took the file's place in between would block.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def is_file(path: str | Path) -> bool:
    """Whether a path is a regular file; False where no file can have it, e.g. a name of more than 255 bytes."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def checksum(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits. Raises `UserError`."""
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(2**22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); restore it") from error
    return digest.hexdigest()


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises `OSError`."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise OSError(errno.EFBIG, f"it has {size} bytes, at most {limit} are read", str(path))
        return file.read(size)  # `limit` would be allocated, whatever the size


def read_text(path: str | Path, limit: int = MAX_TEXT) -> str:
    """Read a UTF-8 text file. Raises `UserError`, naming it, where it is missing, too large or no UTF-8."""
    return _user_bytes(path, limit, "text").decode("utf-8").replace("\r\n", "\n")


def _user_bytes(path: str | Path, limit: int, what: str) -> bytes:
    """Read a file that must be UTF-8. Raises `UserError`."""
    try:
        data = read_bytes(path, limit)
        data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} cannot be read as {what} ({reason}); restore or remove it") from error
    return data


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text. Raises `ValueError` or `RecursionError`, also for what only some readers accept.

    Those are keys given twice, integers of more than 64 bits, and strings with NUL or not valid Unicode, except for
    bytes of file names that are no UTF-8, as `os.fsdecode` gives and `write_json` writes them.
    """
    value = json.loads(data, object_pairs_hook=_unique, parse_int=_integer)
    text = data.decode() if isinstance(data, bytes) else data
    odd = (each for each in _strings(value) if re.search("[\0\ud800-\udc7f\udd00-\udfff]", each))
    if re.search(r"\\u(0000|[dD][89a-fA-F])", text) and (found := next(odd, None)) is not None:
        raise ValueError(f"{found[:80]!r} is no text")
    return value


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{text[:40]} has more than 64 bits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"{keys.most_common(1)[0][0][:80]!r} is given twice")
    return found


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value if isinstance(value, list) else [*value.keys(), *value.values()]:
            yield from _strings(each)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `UserError` where the file is missing, unreadable or refused by `parse_json`."""
    try:
        value = parse_json(_user_bytes(path, MAX_TEXT, "JSON"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path} cannot be read as JSON ({reason}); restore or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object belongs; restore or remove it")
    return value


def read_record(path: Path, record: type[T]) -> T:
    """Read a JSON object as the dataclass or type `record`; values must have exactly the types of its fields.

    Bounds of numbers are declared as `Annotated[int, annotated_types.Ge(0)]`; unknown keys are ignored. Bytes of file
    names that are no UTF-8 become "?". Raises `UserError` naming the file, the key and what was found.
    """
    return as_record(path, read_json(path), record)


def as_record(path: Path, value: Any, record: type[T]) -> T:
    """A JSON value that `path` holds as `record`, see `read_record`."""
    from pydantic import TypeAdapter, ValidationError  # not needed by --help

    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    try:
        return TypeAdapter(record).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        found = f", found {str(first['input'])[:80]!r}" if key and first["type"] != "missing" else ""
        problem = f"{f'{key}: ' if key else ''}{first['msg'][:1].lower()}{first['msg'][1:]}{found}"
        raise UserError(f"{path} is malformed ({problem}); restore or remove it") from error
