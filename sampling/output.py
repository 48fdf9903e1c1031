"""The output folder of samples: names of its files, and which images of a run it holds already.

A finished run has samples.json, an unfinished one samples.partial.json. Either lists the images of the run, so that it
is continued where it was interrupted, and no other file is ever replaced or removed.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from vqgen.errors import OtherRun, UsageError, UserError
from vqgen.files import checksum, read_json, read_record, write_json
from vqgen.files.output_folder import OutputFolder
from vqgen.files.png import png_state
from vqgen.files.read import MAX_TEXT
from vqgen.prior.parts.part import is_absent

from .settings import SamplingSettings

FINISHED, UNFINISHED, GRID = "samples.json", "samples.partial.json", "grid.png"
Layout = Literal["flat", "labels", "folders"]  # labels: written by version 0.1
PARTS = ("mask", "box", "vary", "extend", "keep_rows")
"""Options that say which part of --init-image is drawn. What they come to has the keys `_OF_PARTS`."""
_OF_PARTS = ("kept_codes", "kept_fingerprint", "code_grid", "mask_fingerprint")
# Settings that may differ between a run and the one that continues it.
MAY_DIFFER = ("n", "former", "version", "model", "init_images", "source_images", "images", "grid", *PARTS)
# Settings that lists did not always have: what they do not say may be the same.
_LATER = ("pasted_fingerprint", "fit")
# All names that files of a run can have, in order of removal: the finished list must not outlive an image.
_OWN = (
    r"samples\.json",
    r"[0-9]{5,}(-.+)?\.png",
    r"images/.+/[0-9]{5,}\.png",
    r"translated/.+\.png",
    r"grid\.png",
)
_INDEX = re.compile(r"(?:images/.+/)?([0-9]{5,})(?:-.+)?\.png")


def path_word(name: str, otherwise: str) -> str:
    """A name without what file systems forbid in a path component, of at most 80 bytes; `otherwise` if none is left."""
    # Bytes that are no UTF-8 become "?" first, so that a word of a word is itself.
    name = re.sub(r'[\x00-\x1f/\\:*?"<>|]+', "_", name.encode("utf-8", "replace").decode())
    # File systems limit bytes, not characters.
    return name.encode()[:80].decode(errors="ignore").strip(" .") or otherwise


@dataclass(frozen=True)
class Names:
    """File names of a series."""

    layout: Layout
    """flat = 00000.png; folders = images/cat/00000.png, a folder of labelled images; labels = 00000-cat.png."""
    labels: Sequence[int]
    """The classes that the series goes through in turn."""
    class_names: Sequence[str] | None
    stems: Sequence[str] | None = None
    """Names of the images in a flat layout, translated/NAME.png, where these are not numbers."""

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
        taken: set[str] = set()
        for label in sorted(set(self.labels)):
            name = path_word(self.class_name(label) or "none", str(label))
            if name.casefold() in taken:
                name = f"{name}-{label}"
            while name.casefold() in taken:
                name += "_"
            taken.add(name.casefold())
            found[label] = name
        return found

    def file(self, index: int) -> str:
        """Path of image `index`, relative to the output folder."""
        if self.layout == "flat":
            return f"translated/{self.stems[index]}.png" if self.stems else f"{index:05d}.png"
        name = self._words[self.label(index)]
        if self.layout == "folders":
            return f"images/{name}/{index:05d}.png"
        return f"{index:05d}-{name}.png"

    @cached_property
    def kept(self) -> frozenset[str]:
        """All files that are not named by their number."""
        return frozenset(self.file(index) for index in range(len(self.stems or [])))


@dataclass(frozen=True)
class _Image:
    file: str
    sha256: str | None = None


@dataclass(frozen=True)
class _Run:
    """What a list says of its files. `former` are those of an earlier run that are still to be removed."""

    n: Annotated[int, Ge(0), Le(10**8)]
    layout: Layout
    labels: Annotated[list[Annotated[int, Ge(-1)]], MinLen(1)]
    class_names: list[str] | None
    stems: list[str] | None = None
    former: list[str] = field(default_factory=list)
    images: list[_Image] = field(default_factory=list)

    @cached_property
    def names(self) -> Names:
        return Names(self.layout, self.labels, self.class_names, self.stems)

    @cached_property
    def sums(self) -> dict[str, str | None]:
        """The checksums of images by file name; lists of earlier versions and of unfinished runs have none."""
        return {image.file: image.sha256 for image in self.images}

    def lists(self, name: str) -> bool:
        """Whether `name` is a file of the run."""
        return name == GRID or name in self._former or in_series(name, self.names, self.n)

    @cached_property
    def _former(self) -> frozenset[str]:
        return frozenset(self.former)


def in_series(name: str, names: Names, n: int) -> bool:
    """Whether a path is that of one of the first `n` images of a series."""
    if names.stems:
        return name in names.kept
    found = _INDEX.fullmatch(name)
    return found is not None and int(found[1]) < n and names.file(int(found[1])) == name


def _read_list(path: Path) -> _Run:
    """Read the list of a run. Raises `UserError`."""
    run = read_record(path, _Run)
    if run.class_names and max(run.labels) >= len(run.class_names):
        found = f"label {max(run.labels)} of {len(run.class_names)} classes"
        raise UserError(f"{path} is no list of samples ({found}); remove it or choose another --output")
    wrong = next((stem for stem in run.stems or [] if stem != path_word(stem, "_")), None)
    if wrong is not None or (run.stems and (len(run.stems) != run.n or run.layout != "flat")):
        found = f"{len(run.stems or [])} stems for {run.n} images" if wrong is None else f"the stem {wrong[:80]!r}"
        raise UserError(f"{path} is no list of samples ({found}); remove it or choose another --output")
    return run


def _lists(output: Path) -> list[Path]:
    """The lists in a folder, that of an unfinished run first."""
    return [path for name in (UNFINISHED, FINISHED) if (path := output / name).is_file()]


def samples_folder(output: Path) -> OutputFolder:
    """The output folder, with the files that the lists of earlier runs name. Raises `UserError`."""
    runs = [_read_list(path) for path in _lists(output)]
    return OutputFolder(output, (UNFINISHED,), _OWN, lambda name: name == FINISHED or any(r.lists(name) for r in runs))


def _difference(former: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting in which two runs differ, as text; empty where one can continue the other."""
    for key in [*wanted, *(key for key in former if key not in wanted)]:
        before, now = former.get(key), wanted.get(key)
        if key in MAY_DIFFER or before == now or (key in _LATER and key not in former):
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            return _difference(before, now)
        if key == "stems" and not (before and now):
            names = "named after their sources", "numbered, as they are not one for each source"
            return f"its files are {names[not before]}, those of --n {wanted['n']} {names[not now]}"
        if key in _OF_PARTS:  # the option tells more, where it was recorded
            key = next((part for part in PARTS if part in former and former[part] != wanted.get(part)), key)
        return f"{key.replace('_', ' ')} {_short(former.get(key))}, now {_short(wanted.get(key))}"
    return ""


def _short(value: object) -> str:
    """A value of a list as text, of a fingerprint its first digits."""
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}..."


@dataclass(frozen=True)
class Found:
    """What an output folder holds of a run."""

    status: Literal["new", "on", "done"]
    """Whether the run starts, is continued, or is finished there."""
    n: int
    """Images of the run; more than were asked for where the folder holds more."""
    damaged: tuple[str, ...] = ()
    """Files that are empty, cut off or changed, to be written again."""


def own_folder(output: Path) -> OutputFolder:
    """`samples_folder`; raises `UsageError` where it holds files but no list of samples."""
    folder = samples_folder(output)
    if folder.present and not _lists(output):
        raise UsageError(f"--output: {output} holds other files ({folder.present[0]}); choose another folder")
    return folder


def _refuse_given(folder: OutputFolder, given: Mapping[str, Sequence[Path]]) -> None:
    """Raise `UsageError` where a file that is read is one that a new run removes."""
    own = {os.path.realpath(path) for path in folder.own_files()}
    for option, paths in given.items():
        if inside := next((path for path in paths if os.path.realpath(path) in own), None):
            found = f"{inside} is a file of the former run, which is removed"
            raise UsageError(f"{option}: {found}; copy it or choose another --output")


def check_output(
    output: Path,
    names: Names,
    about: Mapping[str, Any],
    overwrite: bool,
    size: tuple[int, int],
    given: Mapping[str, Sequence[Path]],
) -> Found:
    """Return what `output` holds of the run that `about` describes.

    `size` is (width, height) of its images, `given` the files that are read for them, by option. Raises `OtherRun`
    where the folder holds another run, `UsageError` where it holds other files or one of `given` is to be removed.
    """
    folder, lists, n = own_folder(output), _lists(output), about["n"]
    if not folder.present:
        return Found("new", n)
    folder.refuse_links()
    own = {path.relative_to(output).as_posix() for path in folder.own_files()}
    every = {path.relative_to(output).as_posix() for path in OutputFolder(output, patterns=_OWN).own_files()}
    foreign = sorted(name for name in every - own if name == GRID or in_series(name, names, n))
    if overwrite:
        if foreign:
            raise UsageError(f"--output: {output} holds {foreign[0]}, no sample of a former run; choose another folder")
        _refuse_given(folder, given)
        return Found("new", n)
    former, unfinished, run = read_json(lists[0]), lists[0].name == UNFINISHED, _read_list(lists[0])
    if isinstance(settings := former.get("settings"), dict):  # an earlier version knew fewer
        former["settings"] = {**vars(SamplingSettings()), **settings}
    differs = _difference(former, json.loads(json.dumps(about)))  # JSON turns tuples into lists
    if run.former and not differs:
        _refuse_given(folder, given)
        return Found("new", n)  # it was killed while it removed the images of an earlier run
    if not differs and unfinished and run.n > n:
        differs = f"n {run.n}, now {n}"
    n, damaged = max(n, run.n), []
    for name in [] if differs or foreign else sorted(own - {FINISHED, UNFINISHED}):
        state = png_state(output / name, run.sums.get(name), None if name == GRID else size)
        (damaged if state == "damaged" else foreign if state == "other" else []).append(name)
    if differs or foreign:
        what = "a run that did not end" if unfinished else "another run"
        reason = f"({differs})" if differs else f"and {foreign[0]}, which is not of that run"
        text = f"{output} holds the samples of {what} {reason}"
        raise (UsageError if foreign else OtherRun)(f"--output: {text}; choose another folder or add --overwrite")
    whole = not damaged and all(name in own for name in (GRID, *map(names.file, range(n))))
    return Found("on" if unfinished or not whole else "done", n, tuple(damaged))


def begin(output: Path, about: Mapping[str, Any], found: Found) -> None:
    """Write samples.partial.json; remove the damaged files of the run, or all of an earlier one where it starts anew.

    The partial list names what is still to be removed, so that a removal that is killed can be repeated.
    """
    folder = samples_folder(output)
    if found.status != "new":
        write_json(output / UNFINISHED, {**about, "former": []})
        folder.remove([output / FINISHED, *(output / name for name in found.damaged)])
        folder.remove_leftovers()
        return
    former = [path.relative_to(output).as_posix() for path in folder.own_files()]
    former = [name for name in former if name not in (FINISHED, UNFINISHED)]
    write_json(output / UNFINISHED, {**about, "former": former})
    folder.clear(keep=[UNFINISHED])
    if former:
        write_json(output / UNFINISHED, dict(about))


def _entries(
    names: Names, about: Mapping[str, Any], indices: Sequence[int], sum_of: Callable[[str], str]
) -> dict[str, Any]:
    """The list of a run with the entries of some images; `sum_of` gives the checksum of a file."""
    given = {name: values for name, values in about.get("conditions", {}).items() if isinstance(values, list)}
    images = []
    for index in indices:
        file, label = names.file(index), names.label(index)
        own = {k: None if is_absent(value := values[index % len(values)]) else value for k, values in given.items()}
        images.append({"file": file, "label": label, "class": names.class_name(label), **own, "sha256": sum_of(file)})
    return {**about, "grid": GRID, "images": images}


def check_list(names: Names, about: Mapping[str, Any]) -> None:
    """Raise `UsageError` where samples.json would be larger than it may be when it is read."""
    n, size = about["n"], _size_of_list(names, about)
    if size(n) > MAX_TEXT:
        most = max(0, bisect_right(range(n + 1), MAX_TEXT, key=size) - 1)
        raise UsageError(f"--n: {FINISHED} of {n} such images has more than {MAX_TEXT} bytes; draw {most} at most")


def _size_of_list(names: Names, about: Mapping[str, Any]) -> Callable[[int], int]:
    """The bytes of samples.json by the number of images, all numbers in the names of files as long as the last one.

    An entry has values that the series goes through in turn, and besides as many bytes as every other.
    """
    n, given = about["n"], about.get("conditions", {}).values()

    def size_of(value: Any) -> int:
        return len(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="replace"))

    def of_first(count: int) -> int:
        return size_of(_entries(names, about, [0] * count, lambda file: "0" * 64)) + 1  # the line break at the end

    files = [names.file(index) for index in range(min(n, len(names.stems or names.labels)))]
    own = [[None if is_absent(value) else value for value in each[:n]] for each in given if isinstance(each, list)]
    values = files, names.labels[:n], map(names.class_name, names.labels[:n]), *own
    sums = [list(accumulate(map(size_of, each), initial=0)) for each in values]
    one, two = of_first(1), of_first(2)
    fixed = two - one - sum(each[1] for each in sums) + len(names.file(n - 1)) - len(files[(n - 1) % len(files)])

    def of_images(count: int) -> int:
        in_turn = (count // (len(each) - 1) * each[-1] + each[count % (len(each) - 1)] for each in sums)
        return 2 * one - two + count * fixed + sum(in_turn)

    return of_images


def finish(output: Path, names: Names, about: Mapping[str, Any]) -> None:
    """Write samples.json: enough to draw every image again."""
    folder = samples_folder(output)
    folder.remove_leftovers()
    found = _entries(names, about, range(about["n"]), lambda file: checksum(output / file))
    write_json(output / FINISHED, found)
    folder.remove([output / UNFINISHED])
