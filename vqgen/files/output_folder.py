"""Output folders: which files in them are a program's own, and how only those are removed."""

import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vqgen.errors import UsageError, UserError

from .write import remove, temporary_of


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a program writes into, and which paths in it (relative, with "/") are the program's own.

    All others are foreign and never replaced or removed. Raises `UsageError` where `path` is a file.
    """

    path: Path
    marks: tuple[str, ...] = ()
    """Files by which the folder is recognised; removed last, so that a removal that was killed can be repeated."""
    names: Collection[str] = ()
    """Files by exact name, in order of removal, e.g. as listed in a record of an earlier run."""
    globs: tuple[str, ...] = ()
    """Files, and folders that are removed with all they hold, by pattern."""
    is_mark: Callable[[Path], bool] = Path.is_file

    def __post_init__(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--output: {self.path} is a file; name a folder")

    @property
    def present(self) -> list[str]:
        """Names of what the folder holds, except hidden files; empty where it does not exist."""
        return sorted(path.name for path in self.path.glob("[!.]*"))

    @property
    def recognised(self) -> bool:
        """Whether the folder has a mark."""
        return any(self.is_mark(self.path / mark) for mark in self.marks)

    def refuse_foreign(self) -> None:
        """Raise `UsageError` where the folder is not empty and has no mark."""
        if self.present and not self.recognised:
            held = f"{self.path} holds files of something else ({self.present[0]})"
            raise UsageError(f"--output: {held}; choose another folder")

    def own_files(self) -> list[Path]:
        """Files and folders of the program that exist, in order of removal."""
        matched = sorted(path for pattern in self.globs for path in self.path.glob(pattern))
        found = dict.fromkeys([*map(self._inside, self.names), *matched])
        marks = [self.path / mark for mark in self.marks]
        return [path for path in (*(path for path in found if path not in marks), *marks) if os.path.lexists(path)]

    def leftovers(self) -> list[Path]:
        """Temporary files that a killed writer of an own file left."""
        own = {self._inside(name) for name in (*self.names, *self.marks)}
        own |= {parent for path in own for parent in path.parents if self.path in parent.parents}
        hidden = {path for folder in {path.parent for path in own} for path in folder.glob(".*")}
        hidden.update(path for glob in self.globs for path in self.path.glob(str(PurePosixPath(glob).with_name(".*"))))

        def is_own(target: Path) -> bool:
            inside = target.relative_to(self.path)
            depth = len(inside.parts)
            return target in own or any(len(Path(g).parts) == depth and inside.match(g) for g in self.globs)

        return sorted(path for path in hidden if (target := temporary_of(path)) and is_own(target))

    def clear(self, keep: Collection[str] = ()) -> None:
        """Remove the program's files and leftovers except `keep`, then those of their folders that are empty.

        Links are removed, not followed. Raises `UserError` where a file cannot be removed or a link leads outside.
        """
        files = [*self.leftovers(), *(path for path in self.own_files() if path not in {self.path / k for k in keep})]
        self.remove(files)
        folders = {parent for path in files for parent in path.parents if self.path in parent.parents}
        for folder in sorted(folders, reverse=True):
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()

    def remove(self, paths: Iterable[Path]) -> None:
        """Remove files and folders of this folder, in order. Raises `UserError`, before any if a link leads outside."""
        paths = list(paths)
        for parent in dict.fromkeys(path.parent for path in paths):
            if not parent.resolve().is_relative_to(self.path.resolve()):
                raise UserError(f"cannot remove what is in {parent}: a link leads out of {self.path}; remove it")
        for path in paths:
            try:
                remove(path)
            except OSError as error:
                raise UserError(f"cannot remove {path}: {error.strerror}") from error

    def _inside(self, name: str) -> Path:
        """The path of a file of this folder. Raises `UserError` where a name, e.g. of a record, points elsewhere."""
        parts = PurePosixPath(name).parts
        if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
            raise UserError(f"{self.path}: {name!r} is no name of a file in this folder; choose another folder")
        return self.path / name
