"""Files that are either complete or absent: atomic writing of text, JSON and folders."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vqgen.errors import UserError


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all it holds; do nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder; on success rename it to `path`, replacing what is there.

    Raises `UserError` where it cannot be written (full disk, no permission); an existing `path` then stays as it was.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # a killed process with the same number may have left it
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        for item in [*sorted(temporary.rglob("*")), temporary] if temporary.is_dir() else [temporary]:
            if item.is_file():  # safetensors creates files that only their owner may read
                item.chmod(0o666 & ~mask)
            _sync(item)
        if temporary.is_dir() and path.is_dir():
            # A folder cannot be renamed over one that is not empty: the old one is moved away first.
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, aside / "old")
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(aside / "old", path)
                raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        # The error may concern another path, e.g. a parent folder that is a file.
        other = getattr(error, "filename", None) not in (None, str(temporary), temporary)
        reason = str(error) if other else getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with suppress(OSError):
            remove(temporary)


def temporary_of(path: Path) -> Path | None:
    """The file or folder that `path` was the temporary of while `atomic_path` wrote it; None where it was none."""
    found = re.fullmatch(r"\.(.+)\.(\d+\.part|old\.[^.]+)", path.name)
    return path.with_name(found[1]) if found else None


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
