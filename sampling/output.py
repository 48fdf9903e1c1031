"""The output folder of samples: names of its files, and which images of a run it holds already.

A finished run has samples.json, an unfinished one samples.partial.json. Either lists the images of the run, so that it
is continued where it was interrupted, and no other file is ever replaced or removed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vqgen.errors import UsageError, UserError
from vqgen.files import read_json, write_json
from vqgen.files.output_folder import OutputFolder

FINISHED, UNFINISHED, GRID = "samples.json", "samples.partial.json", "grid.png"
Layout = Literal["flat", "labels", "folders"]  # labels: written by version 0.1
# Settings that may differ between a run and the one that continues it.
MAY_DIFFER = ("n", "former", "version", "model", "init_images", "images", "grid")


@dataclass(frozen=True)
class Names:
    """File names of a series."""

    layout: Layout
    """flat = 00000.png; folders = images/cat/00000.png, a folder of labelled images; labels = 00000-cat.png."""
    labels: Sequence[int]
    """The classes that the series goes through in turn."""
    class_names: Sequence[str] | None

    def label(self, index: int) -> int:
        return self.labels[index % len(self.labels)]

    def class_name(self, label: int) -> str | None:
        """Name of a class, or its index where classes have no names; None for -1."""
        if label < 0:
            return None
        return self.class_names[label] if self.class_names else str(label)

    @cached_property
    def _words(self) -> dict[int, str]:
        """Path component of each class: its name without characters that file systems forbid, unique without case."""
        found: dict[int, str] = {}
        for label in sorted(set(self.labels)):
            name = re.sub(r'[\x00-\x1f/\\:*?"<>|]+', "_", self.class_name(label) or "none")
            # File systems limit bytes, not characters.
            name = name.encode("utf-8", "replace")[:80].decode(errors="ignore").strip(" .") or str(label)
            taken = {other.casefold() for other in found.values()}
            if name.casefold() in taken:
                name = f"{name}-{label}"
            while name.casefold() in taken:
                name += "_"
            found[label] = name
        return found

    def file(self, index: int) -> str:
        """Path of image `index`, relative to the output folder."""
        name = self._words[self.label(index)] if self.layout != "flat" else ""
        if self.layout == "folders":
            return f"images/{name}/{index:05d}.png"
        return f"{index:05d}-{name}.png" if self.layout == "labels" else f"{index:05d}.png"


def _listed(path: Path) -> list[str]:
    """The images that the list of a run names. Raises `UserError` where the file is no such list."""
    about = read_json(path)
    try:
        names = Names(about["layout"], about["labels"], about["class_names"])
        return [names.file(index) for index in range(about["n"])] + about.get("former", [])
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no list of samples; remove it or choose another --output") from error


def samples_folder(output: Path) -> OutputFolder:
    """The output folder, with the files that the lists of earlier runs name. Raises `UserError`."""
    lists = [path for name in (UNFINISHED, FINISHED) if (path := output / name).is_file()]
    names = dict.fromkeys(name for path in lists for name in [*_listed(path), GRID])
    # The finished list is removed first: it must not outlive an image.
    return OutputFolder(output, (UNFINISHED,), (FINISHED, *names))


def _difference(former: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting in which two runs differ, as text; empty where one can continue the other."""
    for key in [*wanted, *(key for key in former if key not in wanted)]:
        before, now = former.get(key), wanted.get(key)
        if key in MAY_DIFFER or before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _difference(before, now)
        return f"{key.replace('_', ' ')} {before!r}, now {now!r}"
    return ""


def check_output(output: Path, names: Names, about: Mapping[str, Any], overwrite: bool) -> Literal["new", "on", "done"]:
    """Return whether the run that `about` describes starts in `output`, is continued there, or is finished there.

    Raises `UsageError` where the folder holds files of something else or of another run.
    """
    folder = samples_folder(output)
    if not folder.present:
        return "new"
    lists = [output / name for name in (UNFINISHED, FINISHED) if name in folder.present]
    if not lists:
        raise UsageError(f"--output: {output} holds other files ({folder.present[0]}); choose another folder")
    own = {path.relative_to(output).as_posix() for path in folder.own_files()}
    written = [*map(names.file, range(about["n"])), GRID, FINISHED, UNFINISHED]
    foreign = [name for name in written if name not in own and (output / name).exists()]
    if overwrite:
        if foreign:
            raise UsageError(f"--output: {output} holds {foreign[0]}, no sample of a former run; choose another folder")
        return "new"
    former, unfinished = read_json(lists[0]), lists[0].name == UNFINISHED
    differs = _difference(former, json.loads(json.dumps(about)))  # JSON turns tuples into lists
    if former.get("former") and not differs:
        return "new"  # it was killed while it removed the images of an earlier run
    if not differs and unfinished and former["n"] > about["n"]:
        differs = f"n {former['n']}, now {about['n']}"
    if differs or foreign:
        run = "a run that did not end" if unfinished else "another run"
        reason = f"({differs})" if differs else f"and {foreign[0]}, which is not of that run"
        text = f"{output} holds the samples of {run} {reason}"
        raise UsageError(f"--output: {text}; choose another folder or add --overwrite")
    complete = all((output / names.file(index)).is_file() for index in range(about["n"]))
    return "on" if unfinished or former["n"] < about["n"] or not complete else "done"


def begin(output: Path, about: Mapping[str, Any], anew: bool) -> None:
    """Write samples.partial.json; where a run starts `anew`, remove the files of an earlier one.

    The partial list names what is still to be removed, so that a removal that is killed can be repeated.
    """
    folder, lists = samples_folder(output), [output / FINISHED, output / UNFINISHED]
    if not anew:
        n = max([about["n"], *(read_json(path)["n"] for path in lists if path.is_file())])
        write_json(output / UNFINISHED, {**about, "n": n, "former": []})
        folder.remove([output / FINISHED])
        return
    former = [path.relative_to(output).as_posix() for path in folder.own_files() if path not in lists]
    write_json(output / UNFINISHED, {**about, "former": former})
    folder.clear(keep=[UNFINISHED])
    if former:
        write_json(output / UNFINISHED, dict(about))


def finish(output: Path, names: Names, about: Mapping[str, Any]) -> None:
    """Write samples.json: enough to draw every image again."""
    folder = samples_folder(output)
    folder.remove(folder.leftovers())
    labels = map(names.label, range(about["n"]))
    images = [{"file": names.file(i), "label": k, "class": names.class_name(k)} for i, k in enumerate(labels)]
    write_json(output / FINISHED, {**about, "grid": GRID, "images": images})
    folder.remove([output / UNFINISHED])
