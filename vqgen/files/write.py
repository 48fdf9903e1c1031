"""Files that are either complete or absent: atomic writing of text, JSON and folders."""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vqgen.errors import UserError

LOCK = ".vqgen.lock"
"""Name of the lock file in an output folder, see `lock.py`."""


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(pattern: str) -> str:
    """The regular expression of the names of temporaries whose target's name matches `pattern`."""
    return rf"\.(?:{pattern})\.vqgen-[0-9a-f]{{16}}\.part"


def _place(path: Path) -> Path:
    """A new hidden folder beside `path`. Nobody else has such names, so that of a killed run may be removed."""
    name = path.name.encode("utf-8", "surrogateescape")[:200].decode("utf-8", "ignore")  # of at most 255 bytes
    return path.with_name(f".{name}.vqgen-{secrets.token_hex(8)}.part")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, in a hidden folder of its own; on success rename it to `path`.

    A file that is there is replaced; a folder must be empty but for the program's own lock. Raises `UserError` where
    `path` cannot be written (full disk, no permission); what is there then stays as it was.
    """
    path = Path(path)
    # Beside a folder that a link leads to. A folder, because safetensors has temporary files of its own.
    place = _place(path.resolve() if os.path.isdir(path) else path)
    temporary = place / path.name
    try:
        place.mkdir(parents=True)
        yield temporary
        allowed = place.stat().st_mode & 0o666  # by the umask, which can only be read by changing it
        for item in [*sorted(temporary.rglob("*")), temporary] if temporary.is_dir() else [temporary]:
            if item.is_file():  # safetensors creates files that only their owner may read
                item.chmod(allowed)
            _sync(item)
        if temporary.is_dir() and path.is_dir():
            if [item.name for item in path.iterdir()] == [LOCK]:
                # With its folder: what is removed while it is open, as the lock is, leaves a file there on NFS.
                os.rename(path.resolve(), place / "former")
            os.rename(temporary, path.resolve())  # fails where the folder is not empty
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        # The error may concern another path, e.g. a parent folder that is a file.
        other = getattr(error, "filename", None) not in (None, str(temporary), temporary, str(place))
        reason = str(error) if other else getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        try:
            place.rmdir()
        except OSError:  # not empty, or never made
            shutil.rmtree(place, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder: one that is killed leaves it whole, or under a temporary name. Raises `OSError`."""
    place = _place(path)
    path.rename(place)
    shutil.rmtree(place)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; bytes of file names that are no UTF-8 become escapes, which JSON reads back."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_writable(path: Path) -> None:
    """Raise `UserError` where `path` cannot be created: called before long work, whose result would be lost."""
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        state = "may not be written to" if above.is_dir() else "is a file"
        raise UserError(f"cannot write {path}: {above} {state}; choose another place")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def cache_folder() -> Path:
    """Where what can be computed again is kept: `vqgen` in $XDG_CACHE_HOME, by default in ~/.cache (not expanded)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vqgen"
