"""Locks: one program at a time writes into an output folder."""

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vqgen.errors import UserError

from .read import is_file, read_bytes
from .write import LOCK

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of some network file systems
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder where it is missing, and hold its lock, which the system releases when this process dies.

    Raises `UserError` naming host and process that hold it. On a file system without locks a line on stderr says that
    there is none. Where the folder cannot be created or written to there is no lock either: the first file that is
    written there says why. What was created and is still empty at the end is removed again.
    """
    from filelock import FileLock, Timeout  # not needed by --help

    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    path = folder / LOCK
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    if os.path.lexists(path) and not (is_file(path) and not path.is_symlink()):
        raise UserError(f"cannot lock {folder}: {path} is no file of vqgen; remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        held = f"{folder} is in use by {_holder(path)}"
        raise UserError(f"{held}; wait until that ends, or choose another folder") from None
    except OSError as error:
        if os.path.isdir(folder) and not (error.errno in _READ_ONLY and not os.path.lexists(path)):
            if error.errno not in _NO_LOCKS:
                raise UserError(f"cannot lock {folder}: {path}: {error.strerror}; remove it") from error
            print(f"{folder}: this file system has no locks; start one program at a time there", file=sys.stderr)
    mine = None
    try:
        mine = _sign(path) if lock.is_locked else None
        yield
    finally:
        # Removed while it is held: whoever opened it before finds it gone and takes no lock on it.
        with suppress(OSError):
            if lock.is_locked and _identity(os.lstat(path)) == mine:
                path.unlink()
        lock.release()
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _sign(path: Path) -> tuple[int, int] | None:
    """Write this process and host into the lock file, which is held; return the file's identity."""
    with suppress(OSError):  # a full disk: the lock holds all the same
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    with suppress(OSError):
        return _identity(os.lstat(path))
    return None


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    with suppress(OSError):
        text = read_bytes(path, 300).decode("utf-8", "replace").strip()
        if text and text.isprintable():
            return text
    return "another process"
