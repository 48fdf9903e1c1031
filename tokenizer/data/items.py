"""Encoded images by position: files of a folder, or rows of tables."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vqgen.errors import UserError
from vqgen.files import read_bytes

if TYPE_CHECKING:
    import pyarrow as pa


def files_below(root: Path, option: str) -> Iterator[Path]:
    """The files below a folder, without hidden ones; links are followed, those to a parent folder once.

    Raises `UserError`, beginning with `option`, for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(
            f"{option}: {error.filename} cannot be read: {error.strerror}; check its permissions"
        ) from error

    above: list[tuple[str, str]] = []  # the folders that lead to one, each with its real path
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        while above and above[-1][0] != os.path.dirname(folder):
            above.pop()
        endless = any(real == place for _, place in above)  # a link to a parent folder
        folders[:] = [] if endless else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        if endless:
            continue
        above.append((folder, real))
        yield from (Path(folder, name) for name in names if not name.startswith("."))


class Files:
    """Image files below a folder, named by their path relative to it."""

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self.names = root, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, item: int) -> str:
        """Text that decides the split of an item, wherever it stands among the others."""
        return self.names[item]

    def name(self, item: int) -> str:
        return str(self.root / self.names[item])

    def read(self, item: int) -> bytes:
        return read_bytes(self.root / self.names[item])


class Rows:
    """Images in one column of tables, as bytes or as {bytes, path}.

    Args:
        load: returns a column by its name.
        image: the column of images.
        columns: all columns.
        counts: name and number of rows of each table file.
        roots: folders that files named by `path` may lie in, the first also where relative ones begin.
        folders: of each table file, where its relative paths begin; files that are not there are looked for in the
            first of the roots.
    """

    def __init__(
        self,
        load: "Callable[[str], pa.ChunkedArray]",
        image: str,
        columns: Sequence[str],
        counts: Sequence[tuple[str, int]],
        roots: Sequence[Path],
        folders: Sequence[Path] = (),
    ):
        self.load, self.image, self.columns = load, image, list(columns)
        self.files, self.roots, self.folders = [name for name, _ in counts], roots, folders
        self.starts = np.cumsum([0, *(count for _, count in counts)])
        self.outside = False  # whether an image that was read is in a file that the table names, not in the table
        self._column: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_column": None}  # each process loads its own

    def __len__(self) -> int:
        return int(self.starts[-1])

    def key(self, item: int) -> str:
        return str(item)

    def name(self, item: int) -> str:
        file = self._file(item)
        return f"{self.files[file]} row {item - int(self.starts[file])}"

    def _file(self, item: int) -> int:
        """Number of the table file that an item is in."""
        return int(np.searchsorted(self.starts, item, side="right")) - 1

    def read(self, item: int) -> bytes:
        """Return the encoded bytes; empty where the row has none. Raises `OSError`, `UserError`."""
        if self._column is None:
            self._column = self.load(self.image)
            if len(self._column) != len(self):
                found = f"{self.files[0]} has {len(self._column)} rows of images where {len(self)} were counted"
                raise UserError(f"--data: {found}; restore it or download it again")
        row: Any = self._column[item]
        if not isinstance(row, Mapping):
            return row.as_py() or b""
        data = row["bytes"].as_py()
        if data is None and "path" in row and row["path"].is_valid:
            self.outside = True
            return read_bytes(self._resolved(row["path"], item))
        return data or b""

    def _resolved(self, path: "pa.Scalar", item: int) -> str:
        """The file that a row names, only below `roots`, after links are followed: in the folder of its table, or else
        in the first of the roots. Raises `OSError`."""
        own, full = self.folders[self._file(item)] if self.folders else self.roots[0], ""
        for start in dict.fromkeys([own, self.roots[0]]):
            try:
                full = os.path.realpath(start / path.as_py())
            except (ValueError, TypeError) as error:  # a NUL, other bytes than UTF-8, or no text
                raise OSError(errno.EINVAL, f"its path is no path ({error})") from error
            within = [own] if self.folders and start == own else self.roots
            if not any(Path(full).is_relative_to(os.path.realpath(folder)) for folder in within):
                raise OSError(errno.EACCES, f"it names a file outside of {start}", full)
            if os.path.lexists(full):
                break
        return full


class Kept:
    """Images in memory by name, each as its bytes and, where there are none, the reason."""

    def __init__(self, names: Sequence[str], contents: Sequence[tuple[bytes, str]]):
        self.names, self.contents = names, contents

    def __len__(self) -> int:
        return len(self.names)

    def name(self, item: int) -> str:
        return self.names[item]

    def read(self, item: int) -> bytes:
        """Return the encoded bytes. Raises `OSError` with the reason why there are none."""
        data, problem = self.contents[item]
        if problem:
            raise OSError(problem)
        return data


class Joined:
    """The images of several files or tables one after another."""

    def __init__(self, parts: Sequence[Files | Rows]):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, item: int) -> tuple[Files | Rows, int]:
        part = int(np.searchsorted(self.starts, item, side="right")) - 1
        return self.parts[part], item - int(self.starts[part])

    def name(self, item: int) -> str:
        part, within = self._find(item)
        return part.name(within)

    def read(self, item: int) -> bytes:
        part, within = self._find(item)
        return part.read(within)


Items = Files | Rows | Kept | Joined


@dataclass(frozen=True)
class FoundSplit:
    """One split as found on disk."""

    items: Files | Rows
    listing: list[str]
    """Lines that identify the content: names, sizes, numbers of rows."""
    raw_labels: np.ndarray | None
    """(n,) class names ("" for none) or integers (negative for none); None where the split has no labels."""
    class_names: list[str] | None = None  # of integer labels, where the source declares them
    captions: list[str] | None = None
    """The caption of each item, "" for none; None where they are not asked for."""
    note: str = ""
    """What is to be said of the source: files that are in none of its splits, copies in a cache; mostly nothing."""
