"""The folder that samples go to: names of its files, whose they are, and what of a run is there already.

At the very end of a run there is samples.json; one that has not ended is marked by samples.partial.json. Either says
which images are its own, so that a run goes on where it was cut off, and no other file is ever replaced or removed.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vqgen.errors import UsageError, UserError
from vqgen.files import read_json, write_json
from vqgen.output_folder import remove

FINISHED, UNFINISHED, GRID = "samples.json", "samples.partial.json", "grid.png"
Layout = Literal["flat", "labels", "folders"]  # labels: written by version 0.1
# What a killed process leaves of a file it was writing; see `atomic_path`.
PART = re.compile(r"\.(\d{5,}(-.*)?\.png|grid\.png|samples(\.partial)?\.json)\..*part")
# These may differ between a run and the one that goes on with it.
FREE = ("n", "former", "version", "model", "init_images", "images", "grid")


@dataclass(frozen=True)
class Names:
    """What the files of a series are called.

    Attributes:
        layout: flat = 00000.png; labels = 00000-cat.png; folders = images/cat/00000.png, which is a folder of labelled
            images like any other.
        labels: the classes that the series goes through in turn.
        class_names: of all classes; without them a class is called by its index.
    """

    layout: Layout
    labels: Sequence[int]
    class_names: Sequence[str] | None

    def label(self, index: int) -> int:
        return self.labels[index % len(self.labels)]

    def class_name(self, index: int) -> str | None:
        label = self.label(index)
        if label < 0:
            return None
        return self.class_names[label] if self.class_names else str(label)

    @cached_property
    def _words(self) -> dict[int, str]:
        """What each class is called in paths: its name without what no file system takes, and no two alike."""
        found: dict[int, str] = {}
        for label in sorted(set(self.labels)):
            name = self.class_name(self.labels.index(label)) or "none"
            name = re.sub(r'[\x00-\x1f/\\:*?"<>|]+', "_", name)
            # File systems count bytes.
            name = name.encode("utf-8", "replace")[:80].decode(errors="ignore").strip(" .") or str(label)
            taken = {other.casefold() for other in found.values()}
            if name.casefold() in taken:
                name = f"{name}-{label}"
            while name.casefold() in taken:
                name += "_"
            found[label] = name
        return found

    def file(self, index: int) -> str:
        """The path of image `index`, relative to the output folder."""
        name = self._words[self.label(index)] if self.layout != "flat" else ""
        if self.layout == "folders":
            return f"images/{name}/{index:05d}.png"
        return f"{index:05d}-{name}.png" if self.layout == "labels" else f"{index:05d}.png"


def _listed(path: Path) -> list[str]:
    """The images that a list of a run calls its own. Raises `UserError` where it is no such list."""
    about = read_json(path)
    try:
        names = Names(about["layout"], about["labels"], about["class_names"])
        return [names.file(index) for index in range(about["n"])] + about.get("former", [])
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no list of samples; remove it or choose another --output") from error


def former_run(output: Path) -> list[Path]:
    """The files in `output` that a former run said were its own, its lists last. Raises `UserError`."""
    lists = [output / name for name in (UNFINISHED, FINISHED) if (output / name).is_file()]
    names = dict.fromkeys(name for path in lists for name in [*_listed(path), GRID])
    folders = {output, *((output / name).parent for name in names)}
    leftovers = [path for folder in folders for path in folder.glob(".*") if PART.fullmatch(path.name)]
    return [path for name in names if (path := output / name).is_file()] + leftovers + lists


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which two runs differ, in words; empty where the one can go on with the other."""
    for key in [*wanted, *(key for key in there if key not in wanted)]:
        before, now = there.get(key), wanted.get(key)
        if key in FREE or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _difference(before, now)
        return f"{key.replace('_', ' ')} {before!r}, now {now!r}"
    return ""


def check_output(output: Path, names: Names, about: Mapping[str, Any], overwrite: bool) -> Literal["new", "on", "done"]:
    """Whether a run described by `about` starts in `output`, goes on there, or is done already. Raises `UsageError`."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; name a folder")
    there = sorted(path.name for path in output.glob("[!.]*")) if output.is_dir() else []
    if not there:
        return "new"
    own = {path.relative_to(output).as_posix() for path in former_run(output)}
    written = [*map(names.file, range(about["n"])), GRID, FINISHED, UNFINISHED]
    foreign = [name for name in written if name not in own and (output / name).exists()]
    if overwrite:
        if foreign:
            raise UsageError(
                f"--output: {output} holds {foreign[0]}, which is no sample of a former run; choose another"
            )
        return "new"
    lists = [output / name for name in (UNFINISHED, FINISHED) if name in there]
    if not lists:
        raise UsageError(f"--output: {output} holds other files ({there[0]}); choose another folder or add --overwrite")
    former = read_json(lists[0])
    if former.get("former") and not _difference(former, about):
        return "new"  # it was cut off while it removed the images of the run before
    unfinished = lists[0].name == UNFINISHED
    differs = _difference(former, about)
    if not differs and unfinished and former["n"] > about["n"]:
        differs = f"n {former['n']}, now {about['n']}"
    if differs or foreign:
        what = "the samples of a run that did not end" if unfinished else "the samples of another run"
        reason = f" ({differs})" if differs else f" and {foreign[0]}, which is not of that run"
        raise UsageError(f"--output: {output} holds {what}{reason}; choose another folder or add --overwrite")
    whole = all((output / names.file(index)).is_file() for index in range(about["n"]))
    return "on" if unfinished or former["n"] < about["n"] or not whole else "done"


def begin(output: Path, about: Mapping[str, Any], anew: bool) -> None:
    """Mark `output` as that of a run that has not ended; where it begins `anew`, remove a former run's files.

    Whenever it is killed, what remains is still listed.
    """
    files = former_run(output) if output.is_dir() else []
    lists = {output / FINISHED, output / UNFINISHED}
    former = [path.relative_to(output).as_posix() for path in files if path not in lists] if anew else []
    n = about["n"]
    if not anew:
        n = max([n, *(read_json(path)["n"] for path in lists if path.is_file())])
    write_json(output / UNFINISHED, {**about, "n": n, "former": former})
    # The finished list first: it must not outlive an image.
    remove([path for path in reversed(files) if path.name != UNFINISHED] if anew else [output / FINISHED])
    for folder in {(output / name).parent for name in former} - {output}:
        if folder.is_dir() and not any(folder.iterdir()):
            remove([folder])
    if anew and former:
        write_json(output / UNFINISHED, {**about, "n": n})


def finish(output: Path, names: Names, about: Mapping[str, Any]) -> None:
    """Write samples.json: enough to draw every image again."""
    remove([path for path in former_run(output) if PART.fullmatch(path.name)])
    images = [{"file": names.file(i), "label": names.label(i), "class": names.class_name(i)} for i in range(about["n"])]
    write_json(output / FINISHED, {**about, "grid": GRID, "images": images})
    remove([output / UNFINISHED])
