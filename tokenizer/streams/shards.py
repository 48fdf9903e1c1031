"""The files of a stream: patterns, URLs, folders and datasets of the hub, and how they are divided into splits."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal
from urllib.parse import urlsplit

from vqgen.config import shown
from vqgen.errors import UserError
from vqgen.seeding import hash64
from vqgen.tokenizer.data.loader import background
from vqgen.tokenizer.data.options import COMPRESSED, STREAM, Split
from vqgen.tokenizer.data.sources import name_splits
from vqgen.tokenizer.data.tables import group_by_split, quiet_hub, reading

from .parquet import declared_classes, read_parquet
from .records import Record
from .tar import check_captions, read_tar
from .transport import USER, size_of

MOST_FILES = 10**6
"""Most files of a stream."""
ENDINGS = (".tar", ".parquet")


@dataclass(frozen=True)
class Shards:
    """The files of one split of a stream, and which of their images belong to it."""

    data: str
    split: Split
    files: list[str] = field(repr=False)
    first: str
    """The file that declares the names of the classes of all splits."""
    holdout: float | None
    """Share of the images that are held out by a hash of their keys; None where files are of one split as a whole."""
    text_column: str | None = None

    def read(self, files: Sequence[str]) -> Iterator[Record]:
        """Yield the records of this split in `files`, which are among its own. Raises `UserError`."""
        return (record for record in self.read_all(files) if self.split_of(record) == self.split)

    def read_all(self, files: Sequence[str]) -> Iterator[Record]:
        """Yield the records of all splits that share these files. Raises `UserError`."""
        for file in files:
            if _ending(file) == ".tar":
                yield from read_tar(file, self.text_column)
            else:
                yield from read_parquet(file, self.text_column, self.class_names)

    def split_of(self, record: Record) -> Split:
        """The split of a record, by a hash of its key alone: other files and other orders change nothing."""
        if self.holdout is None:
            return self.split
        return "heldout" if hash64("split", record.key) < self.holdout * 2**64 else "train"

    @cached_property
    def class_names(self) -> list[str] | None:
        """Names that all files declare; None where they have none."""
        return declared_classes(self.first) if _ending(self.first) == ".parquet" else None

    @property
    def names(self) -> list[str]:
        """The files by their paths below the folder that they have in common."""
        return list(_relative(self.files))

    @cached_property
    def mark(self) -> int:
        """A hash of the names of the files, in order."""
        return hash64("shards", self.split, self.holdout, *self.names)

    def share(
        self, files: Sequence[str], rank: int, world: int, file: int = 0, record: int = 0
    ) -> Iterator[tuple[Record, int, int]]:
        """Yield the share of process `rank` of `world` of the records in `files`, each with the place behind it.

        A place is a number of files and of records in the next one, of this share; it begins at (`file`, `record`).
        With fewer files than processes, each process reads all of them and yields one of `world` records.
        """
        enough = len(files) >= world
        own = files[rank::world] if enough else files
        for number in range(file, len(own)):
            found = self.read([own[number]])
            found = found if enough else islice(found, rank, None, world)
            for place, each in enumerate(found, 1):
                if number > file or place > record:
                    yield each, number, place

    def fingerprint(self, sizes: Mapping[str, int | None]) -> str:
        """SHA-256 over split, names and, where they are given, `sizes` of the files."""
        listing = [f"{name}\t{sizes.get(file)}" for name, file in zip(self.names, self.files)]
        text = json.dumps([self.split, self.holdout, self.text_column, *listing])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def sizes_of(files: Iterable[str]) -> dict[str, int | None]:
    """The bytes of each file, None where its server does not say. Raises `UserError` where one is missing."""
    names = sorted(set(files))
    with background(16) as pool:
        return dict(zip(names, pool.map(size_of, names)))


def open_shards(data: str, holdout: float, text_column: str | None = None) -> dict[Split, Shards]:
    """Find the files of a stream by split: train, heldout and, where names or the hub say so, test.

    Files without a validation split are divided by a hash of the keys in them. Raises `UserError`.
    """
    found, data = _find(data), shown(data)
    divided = "heldout" not in found
    if not found.keys() & {"train", "all"}:
        raise UserError(f"--data: {data} has only {' and '.join(found)} files, and none of train; name those, too")
    train = found["train" if "train" in found else "all"]
    if _ending(train[0]) == ".tar":
        check_captions(text_column)
    share = holdout if divided else None
    splits: dict[Split, Shards] = {
        "train": Shards(data, "train", train, train[0], share, text_column),
        "heldout": Shards(data, "heldout", train if divided else found["heldout"], train[0], share, text_column),
    }
    if "test" in found:
        splits["test"] = Shards(data, "test", found["test"], train[0], None, text_column)
    return splits


def _find(data: str) -> dict[str, list[str]]:
    """The files of a stream by split, or of "all"."""
    where = data.removeprefix(STREAM)
    if any(re.search(r"[@{}*\[\]]", user) for user in USER.findall(where)):
        raise _unreadable(where)
    patterns = _without_braces(where)
    for name in patterns:
        _check_url(name)
        if shown(name).lower().endswith(COMPRESSED):
            raise UserError(f"--data: {shown(name)} is compressed, and such tar files are not read; decompress them")
    for name in patterns if patterns != [where] else ():  # a list of names, all of which are meant
        if not ("://" in name or re.search(r"[*?\[]", name) or os.path.isfile(os.path.expanduser(name))):
            raise UserError(f"--data: {name} of {shown(where)} is no regular file; restore it, or correct the range")
    files = sorted({file for pattern in patterns for file in _matches(pattern)})
    if files:
        groups = group_by_split(dict(zip(_relative(files), files)))
    elif data.startswith(STREAM) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", where) and not os.path.lexists(where):
        groups = _of_hub(where)
    else:
        raise UserError(f"--data: {shown(where)} names no tar or parquet file; correct the path or the pattern")
    for file in (file for group in groups.values() for file in group):
        if _ending(file) not in ENDINGS:
            raise UserError(f"--data: found {shown(file)} in the stream, expected files that end in .tar or .parquet")
    endings = {_ending(file) for group in groups.values() for file in group}
    if len(endings) > 1:
        raise UserError(f"--data: {shown(where)} holds tar and parquet files; name those of one kind by a pattern")
    splits = name_splits(groups, shown(where))
    used = {file for group in splits.values() for file in group}
    if left := [file for file in files if file not in used]:  # the hub's further splits are no oversight
        found = f"{shown(left[0])} is of no split, unlike {shown(next(iter(used)))}"
        raise UserError(f"--data: {found}; name its split, or give a pattern without it")
    return splits


def _check_url(url: str) -> None:
    """Raise `UserError` for a URL that cannot be split; paths are not checked."""
    if "://" not in url:
        return
    try:
        _ = urlsplit(url).port if url.startswith("http") else urlsplit(url)
    except ValueError as error:
        if "@" in url:  # of its password, or in its query
            raise _unreadable(url) from error
        raise UserError(f"--data: {shown(url)} is no URL ({error}); correct it") from error


def _unreadable(url: str) -> UserError:
    """The error for a URL that cannot be split, perhaps at its password: neither what is before the last @ is shown nor
    the query."""
    scheme, rest = url.partition("://")[0], url.partition("?")[0].rpartition("@")[2]
    rest = "…" if "://" in rest else f"…@{rest}"  # without an @ before the query, which may begin in a password
    advice = "write signs in its user and password as %XX, e.g. %40 for @, %2F for /"
    return UserError(f"--data: {scheme}://{rest} is no URL; {advice}, or correct its port")


def _without_braces(pattern: str) -> list[str]:
    """The patterns that one with {0000..0127} or {one,other} stands for."""
    found, rest = [""], pattern
    while match := re.search(r"\{([^{}]*)\}", rest):
        inside, numbers = match[1], re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", match[1])
        words: Sequence[str] | Literal[0] = inside.split(",") if "," in inside else 0
        if numbers:
            first, last = map(int, numbers.groups())
            if len(found) * (last - first + 1) > MOST_FILES:
                raise UserError(f"--data: {shown(pattern)[:500]} names more than {MOST_FILES} files; use longer ones")
            words = [str(n).zfill(len(numbers[1])) for n in range(first, last + 1)]
        if not words or len(found) * len(words) > MOST_FILES:
            expected = f"{{0000..0127}} or {{one,other}}, and at most {MOST_FILES} files"
            raise UserError(f"--data: found {shown(match[0])[:80]} in {shown(pattern)[:500]}, expected {expected}")
        found = [start + rest[: match.start()] + word for start in found for word in words]
        rest = rest[match.end() :]
    return [start + rest for start in found]


def _matches(pattern: str) -> list[str]:
    """The files that a path, a pattern with wildcards or a folder names; a URL without wildcards is not looked up."""
    if "://" in pattern:
        if "*" not in pattern:
            return [pattern]
        if pattern.startswith("http"):
            raise UserError(f"--data: found * in {shown(pattern)}, but HTTP has no lists; use {{0000..0127}}")
        return _listed(pattern)
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        inside = (glob.glob(os.path.join(glob.escape(path), "**", f"*{ending}"), recursive=True) for ending in ENDINGS)
        return [file for each in inside for file in each]
    return [path] if os.path.lexists(path) else glob.glob(path, recursive=True)


def _listed(pattern: str) -> list[str]:
    """The files in an object store that a URL with wildcards names. Raises `UserError`."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(pattern)
        return [str(system.unstrip_protocol(file)) for file in system.glob(path)]
    except Exception as error:  # of whatever library the scheme has
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        advice = "check the address, and the library for its scheme"
        raise UserError(f"--data: {shown(pattern)} cannot be listed ({reason}); {advice}") from error


def _of_hub(name: str) -> dict[str, list[str]]:
    """The files of a dataset of the hub by split."""
    import datasets

    with quiet_hub(), reading(f"{name} gave no dataset", "no such path exists either; check the name, or the network"):
        files = datasets.load_dataset_builder(name).config.data_files or {}
        return {str(split).lower(): [str(file) for file in listed] for split, listed in files.items()}


def _relative(files: Sequence[str]) -> list[str]:
    """Files by their paths below the folder that they have in common; by host and query, too, where paths are alike.
    User and password are in no name: another password is the same data."""
    split = [urlsplit(file) if "://" in file else None for file in files]
    urls = [url and url._replace(netloc=url.netloc.rpartition("@")[2]) for url in split]
    paths = [os.path.abspath(file) if url is None else url.path or "/" for file, url in zip(files, urls)]
    for longer in (lambda url: f"/{url.netloc}{url.path}", lambda url: f"/{url.geturl()}"):
        if len(set(paths)) < len(paths):
            paths = [path if url is None else longer(url) for path, url in zip(paths, urls)]
    start = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [path.removeprefix(start).lstrip("/") for path in paths]


def _ending(file: str) -> str:
    return os.path.splitext(urlsplit(file).path if "://" in file else file)[1].lower()
