"""Output folders: which files in them are a program's own, and how only those are removed."""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vqgen.errors import UsageError, UserError

from .lock import locked
from .write import LOCK, check_writable, temporary_name


def _everything(_name: str) -> bool:
    return True


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a program writes into, and which files in it are the program's own.

    All others are foreign and never replaced or removed, and neither are links, which no program makes. Raises
    `UsageError` where `path` is a file or cannot be read.
    """

    path: Path
    marks: tuple[str, ...] = ()
    """Names of files by which the folder is recognised; removed last, so that a killed removal can be repeated."""
    patterns: tuple[str, ...] = ()
    """Own files: regular expressions of their paths, whose parts "/" separates, in order of removal."""
    listed: Callable[[str], bool] = _everything
    """Whether a file that matches a pattern is the program's: e.g. whether a record of an earlier run names it."""
    is_mark: Callable[[Path], bool] = Path.is_file

    def __post_init__(self) -> None:
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UsageError(f"--output: {self.path} is a file; name a folder")
        if os.path.isdir(self.path) and not os.access(self.path, os.R_OK | os.X_OK):
            raise UsageError(f"--output: {self.path} cannot be read; change its permissions or choose another folder")

    @property
    def present(self) -> list[str]:
        """Names of what the folder holds, except hidden files; empty where it does not exist."""
        return sorted(path.name for path in self.path.glob("[!.]*"))

    @property
    def recognised(self) -> bool:
        """Whether the folder has a mark."""
        return any(self.is_mark(self.path / mark) for mark in self.marks)

    def refuse_foreign(self) -> None:
        """Raise `UsageError` where the folder is not empty and has no mark, or where a link is in the way.

        The folder of a program without marks must be empty, of hidden files too: it is replaced as a whole.
        """
        hidden = sorted(path.name for path in self.path.glob(".*") if path.name != LOCK) if not self.marks else []
        if (found := [*self.present, *hidden]) and not self.recognised:
            raise UsageError(f"--output: {self.path} holds files of something else ({found[0]}); choose another folder")
        self.refuse_links()

    def refuse_links(self) -> None:
        """Raise `UsageError` where a link has the name of an own file or folder, or a folder that of a file."""
        for parts in self._all_patterns():
            for depth in range(1, len(parts) + 1):
                for path, entry in _matches(self.path, parts[:depth]):
                    if entry.is_symlink() or (depth == len(parts) and not entry.is_file()):
                        kind = "link" if entry.is_symlink() else "folder" if entry.is_dir() else "device"
                        held = f"{self.path} holds the {kind} {path.relative_to(self.path)}, which vqgen did not make"
                        raise UsageError(f"--output: {held}; move it or choose another folder")

    def own_files(self) -> Iterator[Path]:
        """The program's files that exist, in order of removal."""
        for parts in self._all_patterns():
            for path, entry in _matches(self.path, parts):
                if entry.is_file(follow_symlinks=False) and (
                    path.name in self.marks or self.listed(path.relative_to(self.path).as_posix())
                ):
                    yield path

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the program's files and leftovers except `keep`, and those of its folders that are then empty.

        The marks go last of all. Raises `UserError` where a file cannot be removed.
        """
        self.remove_leftovers()
        files = [path for path in self.own_files() if path.relative_to(self.path).as_posix() not in keep]
        marks = [path for path in files if path.parent == self.path and path.name in self.marks]
        self.remove(path for path in files if path not in marks)
        for folder in sorted(self._folders(), key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty
                folder.rmdir()
        self.remove(marks)

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files of this folder, in order. Raises `UserError`."""
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error.strerror}") from error

    def remove_leftovers(self) -> None:
        """Remove temporary files and folders that a killed writer of an own file left. Raises `UserError`."""
        for parts in self._all_patterns():
            for depth, part in enumerate(parts):
                for path, entry in _matches(self.path, [*parts[:depth], temporary_name(part)]):
                    if entry.is_file(follow_symlinks=False):
                        self.remove([path])
                    elif entry.is_dir(follow_symlinks=False):
                        try:
                            shutil.rmtree(path)
                        except OSError as error:
                            raise UserError(f"cannot remove {path}: {error.strerror}") from error

    def _all_patterns(self) -> list[list[str]]:
        """The parts of the paths of own files, the marks last."""
        return [pattern.split("/") for pattern in (*self.patterns, *map(re.escape, self.marks))]

    def _folders(self) -> list[Path]:
        """Sub-folders that hold own files, or could."""
        found: dict[Path, None] = {}
        for parts in self._all_patterns():
            for depth in range(1, len(parts)):
                matched = _matches(self.path, parts[:depth])
                found |= dict.fromkeys(path for path, entry in matched if entry.is_dir(follow_symlinks=False))
        return list(found)


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Hold the lock of a folder that is new or empty, and is to be written as a whole, see `atomic_path`.

    Raises `UserError` where it is in use, holds anything, hidden files too, or could not be replaced.
    """
    place = _replaceable(path)
    check_writable(place)
    with locked(path):
        OutputFolder(path).refuse_foreign()
        OutputFolder(place.parent, patterns=(re.escape(place.name),)).remove_leftovers()
        yield


def _replaceable(path: Path) -> Path:
    """The folder that a path leads to. Raises `UsageError` where no other could be renamed to it."""
    nearest = next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))
    if not os.path.exists(nearest):
        raise UsageError(f"--output: {nearest} is a link that leads nowhere; remove it or choose another folder")
    place = Path(os.path.realpath(path))
    kind = "a mount point" if os.path.ismount(place) else "the current folder" if _is_current(place) else ""
    if kind:
        raise UsageError(f"--output: {path} is {kind}, which cannot be replaced; name a new folder in it")
    return place


def _is_current(folder: Path) -> bool:
    return os.path.isdir(folder) and os.path.samefile(folder, os.curdir)


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[tuple[Path, "os.DirEntry[str]"]]:
    """Entries below a folder whose path matches `parts`, one regular expression each, in order of name.

    Links are not followed, but what they are called counts. Raises `UsageError`.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((e for e in entries if re.fullmatch(parts[0], e.name)), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"--output: {folder} cannot be read ({error.strerror}); choose another folder") from error
    for entry in found:
        if len(parts) == 1:
            yield folder / entry.name, entry
        elif entry.is_dir(follow_symlinks=False):
            yield from _matches(folder / entry.name, parts[1:])
