"""The folder of one case, and what changed in it."""

import hashlib
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Larger files, sparse ones of mutations, are told by size and time of change.
_HASHED = 1 << 28


@dataclass(frozen=True)
class Entry:
    """A file, folder, link or other entry: its type, and what it holds where that can be read without blocking."""

    kind: str
    content: str


@dataclass(frozen=True)
class Place:
    """A case's folder: programs run in `work`; all else belongs to somebody else."""

    root: Path

    @property
    def work(self) -> Path:
        """Inputs and outputs, the current folder of the program."""
        return self.root / "work"

    @property
    def elsewhere(self) -> Path:
        """A folder of somebody else, for links to lead to."""
        return self.root / "elsewhere"

    @property
    def home(self) -> Path:
        """The user's home, for caches and temporary files."""
        return self.root / "home"

    @property
    def victims(self) -> list[Path]:
        """Files of somebody else, also in the folders around the inputs."""
        return [self.root / "victim.txt", self.work / "victim.txt", self.elsewhere / "step-00000002" / "victim.txt"]


def lay_out(root: Path, stock: Path, inputs: Sequence[str]) -> Place:
    """Make a case's folder with copies of some inputs."""
    place = Place(root)
    shutil.rmtree(root, ignore_errors=True)
    for name in inputs:
        target = place.work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (stock / name).is_dir():
            shutil.copytree(stock / name, target)
        else:
            shutil.copyfile(stock / name, target)
    for victim in place.victims:
        victim.parent.mkdir(parents=True, exist_ok=True)
        victim.write_text("not yours\n")
    (place.elsewhere / "step-00000002" / "state.json").write_text('{"step": 2}\n')
    (place.elsewhere / "00000.png").write_text("a holiday\n")
    return place


PLANTED = (
    "thesis.txt",
    ".thesis.part",
    ".notes.old.txt",
    "positions.png",
    "models.tar",
    "checkpoints/step-00000002.bak",
    "checkpoints/step-00000002.notes/readme.txt",
    "checkpoints/.step-00000002.old.mine",
    "images/holiday.jpg",
)
"""Files of the user in a run's folder."""


def plant(folder: Path, inside: Sequence[str] = PLANTED) -> None:
    """Put files of the user into an output folder."""
    for name in inside:
        if (folder / name).parent.is_dir() or ("notes/" in name and (folder / "checkpoints").is_dir()):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"mine: {name}\n")


def entry(path: Path) -> Entry:
    """What `path` is, links not followed."""
    about = path.lstat()
    mode = f"{stat.S_IFMT(about.st_mode):o} {stat.S_IMODE(about.st_mode):o}"
    if stat.S_ISLNK(about.st_mode):
        return Entry("link", os.readlink(path))
    if stat.S_ISREG(about.st_mode):
        if about.st_size > _HASHED:
            return Entry(mode, f"{about.st_size} {about.st_mtime_ns}")
        permission = stat.S_IMODE(about.st_mode)
        if not os.access(path, os.R_OK):
            path.chmod(0o600)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        path.chmod(permission)
        return Entry(mode, content)
    return Entry(mode, "")


def snapshot(place: Place) -> dict[str, Entry]:
    """Relative path -> entry of everything below the case's folder except the home."""
    found: dict[str, Entry] = {}
    for folder, folders, files in os.walk(place.root, followlinks=False):
        if Path(folder) == place.root:
            folders.remove("home") if "home" in folders else None
        for name in (*folders, *files):
            path = Path(folder, name)
            found[os.path.relpath(path, place.root)] = entry(path)
    return found


def outside(place: Place, output: str, before: dict[str, Entry], own: set[str], after: dict[str, Entry]) -> list[str]:
    """What a program changed although it may only write to `output`, relative to `work`.

    Whatever was there before must be the same, but for files in the output that are its own (`own`, relative to the
    case's folder). New entries may only be in the output, or where a link in the output leads.
    """
    top = os.path.normpath(os.path.join("work", output))
    found = [
        f"{'changed' if name in after else 'removed'} {name}"
        for name, entry in before.items()
        if name not in own
        and name != top
        and after.get(name) != entry
        and not _folder_of_output(name, top, entry, after)
    ]
    inside = [top] + [
        os.path.relpath(os.path.realpath(place.root / name), os.path.realpath(place.root))
        for name, entry in before.items()
        if entry.kind == "link" and _below(name, [top])
    ]
    return found + [f"created {name}" for name in after if name not in before and not _below(name, inside)]


def _below(name: str, folders: list[str]) -> bool:
    return any(name == folder or name.startswith(folder + os.sep) for folder in folders)


def _folder_of_output(name: str, top: str, entry: Entry, after: dict[str, Entry]) -> bool:
    """Whether it is an emptied folder of the output: programs may remove those."""
    return _below(name, [top]) and entry.kind.startswith("40000 ") and not any(_below(k, [name]) for k in after)
