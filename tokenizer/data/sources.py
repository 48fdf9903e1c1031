"""Sources of images: a folder, parquet files, a dataset on disk or by name, or the demo images.

`open_source` finds the encoded images of one split of a source: bytes, labels and a fingerprint. Nothing is decoded
here. The network is used only where the source is neither "demo" nor a path.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar
from unicodedata import category

import numpy as np

from vqgen.config import shown
from vqgen.errors import UserError
from vqgen.seeding import hash64

from .captions import of_folder
from .items import Files, FoundSplit, Items, files_below
from .options import SUFFIXES, Split, is_stream
from .tables import (
    MAX_CLASSES,
    download_folders,
    group_by_split,
    load_datasets,
    load_folder,
    read_dataset,
    read_parquet,
)

T = TypeVar("T")

DEMO = Path(__file__).parent / "demo"
VALIDATION = ("heldout", "validation", "valid", "val")  # the first of these that a source has is its heldout split


@dataclass(frozen=True)
class Source:
    """The encoded images of one split; image i is item `rows[i]` of the files or tables of the source."""

    name: str
    items: Items = field(repr=False)
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: list[str] | None
    fingerprint: str
    test_images: int = 0
    """Number of images in the source's test split."""
    all_images: int = 0
    """Number of images in all splits of the source."""
    captions: list[str] | None = field(default=None, repr=False)
    """The caption of every image, "" for none; None where they were not asked for."""
    note: str = ""
    """What is to be said of the source: files that could be taken for its images, copies in a cache; mostly nothing."""
    part: str = ""
    """The split of the source that these are images of: held-out images may be a share of `train`, or of `all`."""

    @property
    def folder(self) -> Path | None:
        """The folder all of whose image files are items; None for tables."""
        return self.items.root if isinstance(self.items, Files) else None

    def __len__(self) -> int:
        return len(self.rows)

    def item_name(self, index: int) -> str:
        """Return the file, or the table file and row, of image `index`."""
        return self.items.name(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of image `index`; empty where the source holds none. Raises `OSError`."""
        return self.items.read(int(self.rows[index]))

    def take(self, kept: np.ndarray) -> "Source":
        """Return the source of the images `kept` alone, bool (n,), with a fingerprint of its own unless all are."""
        if kept.all():
            return self
        text = f"{self.fingerprint} {np.flatnonzero(kept).tolist()}"
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        captions = self.captions and [self.captions[i] for i in np.flatnonzero(kept)]
        return replace(self, rows=self.rows[kept], labels=self.labels[kept], fingerprint=fingerprint, captions=captions)


def open_source(data: str, split: Split | Literal["all"], holdout: float, text_column: str | None = None) -> Source:
    """Find the images of a source, with their captions where there is a `text_column`, and choose one split.

    Where the source has no validation split, its training images (without splits: all images, "all") are divided into
    train and heldout by a hash of each image's relative path or row number: round(holdout * n) images, at least one,
    are held out, always the same. A test split is never divided. Raises `UserError` where there is nothing to read, too
    little to divide, or a damaged file.
    """
    splits = find_splits(data, text_column)
    if split == "all" and len(splits) == 1:
        splits = {"all": next(iter(splits.values()))}
    divided = split in ("train", "heldout") and ("train" in splits or "all" in splits) and "heldout" not in splits
    part = split if not divided else "train" if "train" in splits else "all"
    if split == "all" and split not in splits:
        raise UserError(f"--data: {data} has the splits {' and '.join(splits)}; name the folder or file of one")
    if split not in splits and not divided:
        found, names = "no splits" if "all" in splits else f"only {' and '.join(splits)}", " or ".join(splits)
        if split == "train":
            text = f"{data} has {found} images, and none of train"
            raise UserError(f"--data: {text}; name other data, or where a split can be chosen give --split {names}")
        other = "test" if list(splits) == ["test"] else "heldout"
        raise UserError(f"--split: found {split}, but {data} has {found}; use {other}, or name other --data")
    if text_column is not None and not any(any(each.captions or []) for each in splits.values()):
        text = f"{data} has no captions, all of them are empty"
        raise UserError(f"--text-column {text_column}: {text}; correct them, or leave the option out")
    names, labels = _number_labels(data, splits)
    items = splits[part].items
    if not (count := len(items)):
        raise UserError(f"--data: {data} holds no {'' if part == 'all' else part} images; add some".replace("  ", " "))
    rows = np.arange(count)
    if divided:
        if count < 2:
            raise UserError(f"--data: {data} holds 1 image; a training and a held-out split need at least 2")
        hashes = np.array([hash64("split", items.key(i)) for i in range(count)], dtype=np.uint64)
        held_out = np.zeros(count, dtype=bool)
        held_out[np.argsort(hashes, kind="stable")[: min(max(round(holdout * count), 1), count - 1)]] = True
        rows = np.flatnonzero(held_out == (split == "heldout"))
    chosen = json.dumps([split, names, holdout if divided else None, len(rows)])
    captions = splits[part].captions
    found = None if captions is None else [captions[row] for row in rows]
    listing = [*splits[part].listing, *(map(json.dumps, found or []))]
    mark = hashlib.sha256("\n".join([chosen, *listing]).encode("utf-8", "surrogateescape")).hexdigest()
    test_images = len(splits["test"].items) if "test" in splits else 0
    all_images = sum(len(each.items) for each in splits.values())
    note = splits[part].note
    if data == "demo" and os.path.isdir(data):
        note = "demo is the images of the package, not the folder of that name here; give ./demo for it"
    return Source(data, items, rows, labels[part][rows], names, mark, test_images, all_images, found, note, part)


def find_splits(data: str, text_column: str | None = None) -> dict[str, FoundSplit]:
    """Find the splits of a source: train with heldout, test or both; heldout or test alone; {"all": ...} where it has
    no splits, or train alone.

    With `text_column` they have captions: of a column of text, see `captions.py` for folders.
    """
    if not data.strip():
        raise UserError("--data: found nothing; give a folder, a parquet file, a dataset's name or demo")
    if is_stream(data):
        read_by = "which vqgen-train-tokenizer and vqgen-tokenize read; give a folder, a table or a dataset's name"
        raise UserError(f"--data: {shown(data)} is a stream of shards, {read_by}")
    path = DEMO if data == "demo" else Path(os.path.expanduser(data))
    roots = [path]
    if os.path.isfile(path):
        if path.suffix.lower() == ".parquet":
            return {"all": read_parquet(path.parent, [path], text_column)}
        raise UserError(f"--data: {data} is a single file and not parquet; give the folder that holds the images")
    if any(os.path.isfile(path / name) for name in ("dataset_dict.json", "state.json")):
        found = load_folder(path)
    elif os.path.isdir(path):
        files = _list_files(path, unread := list[str]())
        tables = [path / name for name in files if name.lower().endswith(".parquet")]
        if not tables:
            splits = _image_folder(path, files, text_column)
            kinds = [f"images that are not read ({len(unread)}, as {min(unread)}); convert them"] if unread else []
            return {split: _noted(one, kinds) for split, one in splits.items()}
        images = [name for name in files if not name.lower().endswith(".parquet")]
        if images and all(table.name.lower() == "metadata.parquet" for table in tables):
            advice = "write it as metadata.jsonl or metadata.csv, or move it elsewhere"
            raise UserError(f"--data: {tables[0]} is beside images, and is not read; {advice}")
        groups = group_by_split({file.relative_to(path).as_posix(): file for file in tables})
        if len(groups) > 1 and (left := groups.get("")):
            other = next(files[0] for word, files in groups.items() if word)
            found = f"{left[0]} is of no split, unlike {other}"
            raise UserError(f"--data: {found}; name its split, or move it elsewhere")
        named = name_splits(groups, path)
        notes = [f"image files beside tables ({len(images)}, as {images[0]})"] if images else []
        notes += _dropped(groups, named)
        return {split: _noted(read_parquet(path, paths, text_column), notes) for split, paths in named.items()}
    elif os.path.lexists(path):
        raise UserError(f"--data: {data} is neither a folder nor a regular file; give one of these")
    elif data.startswith((".", "~", "/")) or "\\" in data or data.count("/") > 1 or path.suffix == ".parquet":
        raise UserError(f"--data: {data} does not exist; give a folder, a parquet file, a dataset's name or demo")
    else:
        advice = "no such path exists either; check the name, or the network"
        found, roots = load_datasets(data, lambda library: library.load_dataset(data), advice), download_folders()
    # Rows are named by their split: those of different splits are different images.
    chosen = name_splits(found, data)
    notes, names = _dropped(found, chosen), {split: f"{data}, {split}" for split in chosen if split != "all"}
    return {
        split: _noted(read_dataset(names.get(split, data), one, roots, text_column), notes)
        for split, one in chosen.items()
    }


def _dropped(groups: Mapping[str, object], chosen: Mapping[str, object]) -> list[str]:
    """The splits of a table that none of those that are read is."""
    kept = {id(one) for one in chosen.values()}
    return [f"the split {word}" for word, one in groups.items() if id(one) not in kept]


def _noted(found: FoundSplit, left_out: Sequence[str]) -> FoundSplit:
    """A split with a note of what was left out."""
    notes = [found.note] * bool(found.note) + [f"left out: {'; '.join(left_out)}"] * bool(left_out)
    return replace(found, note="; ".join(notes))


def name_splits(groups: Mapping[str, T], where: object) -> dict[str, T]:
    """Map the split names of a source to train, heldout and test, or to {"all": ...} where it has no other than train.

    Where it has several that are validation splits, the first of `VALIDATION` is.
    """
    if "train" in groups and len(groups) > 1:
        words = {"train": "train", "heldout": next((w for w in VALIDATION if w in groups), ""), "test": "test"}
        found = {split: groups[word] for split, word in words.items() if word and word in groups}
        return found if len(found) > 1 else {"all": groups["train"]}
    if len(groups) == 1:
        (word, only), *_ = groups.items()
        return {"test" if word == "test" else "heldout" if word in VALIDATION else "all": only}
    names = ", ".join(sorted(word or "unnamed" for word in groups))
    raise UserError(f"--data: {where} has the splits {names} and no train; name one of them train")


OTHERS = {".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raw"}
"""Endings of images that are not read."""


def _list_files(root: Path, unread: list[str] | None = None) -> dict[str, int]:
    """Relative path -> size of the image and parquet files below `root`, sorted by path, without hidden ones.

    `unread` gets the paths of images of other kinds.
    """
    files: dict[str, int] = {}
    for path in files_below(root, "--data"):
        if unread is not None and path.suffix.lower() in OTHERS:
            unread.append(path.relative_to(root).as_posix())
        if path.suffix.lower() in SUFFIXES | {".parquet"}:
            files[path.relative_to(root).as_posix()] = os.path.getsize(path) if os.path.exists(path) else -1
    return dict(sorted(files.items()))


def _image_folder(root: Path, files: Mapping[str, int], text_column: str | None) -> dict[str, FoundSplit]:
    """The splits of a folder of images: sub-folders named like splits, or all images; class folders give the labels."""
    if not files:
        if any(name.endswith((".tar", ".tar.gz")) for name in os.listdir(root)):
            raise UserError(f"--data: {root} holds tar files, which are read as a stream; give stream:{root}")
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise UserError(f"--data: {root} holds no images and no parquet files; image files end in {kinds}")
    folders = {name.split("/")[0].lower(): name.split("/")[0] + "/" for name in files if "/" in name}
    # train/ is a split next to another split, or when most images are in it; else it may be a class, as of trains.
    # Others are splits next to it, or when they hold all images.
    alone = len(folders) == 1 and 2 * sum("/" in name for name in files) > len(files)
    others = folders.keys() & {*VALIDATION, "test"}
    only = others == folders.keys() and all("/" in name for name in files)
    has_splits = ("train" in folders and (alone or bool(others))) or (bool(others) and only)
    chosen = name_splits(folders, root) if has_splits else {"all": ""}

    inside = {split: [name for name in files if name.startswith(folder)] for split, folder in chosen.items()}
    beside, note = [name for name in files if not name.startswith(tuple(chosen.values()))], ""
    if beside:
        splits = ", ".join(chosen.values())
        note = f"left out, as they are beside {splits}: {len(beside)} image{'s' * (len(beside) > 1)}, as {beside[0]}"
    captions: dict[str, str] = {}
    if text_column is not None:
        every = [name for names in inside.values() for name in names]
        captions = dict(zip(every, of_folder(root, every, text_column)))

    def read(folder: str, names: list[str]) -> FoundSplit:
        short = [name.removeprefix(folder) for name in names]
        # Images outside of class folders have no class.
        labels = np.array([name.split("/")[0] if "/" in name else "" for name in short], dtype=str)
        items, listing = Files(root / folder, short), [f"{n}\t{files[name]}" for n, name in zip(short, names)]
        named = None if text_column is None else [captions[name] for name in names]
        return FoundSplit(items, listing, labels, captions=named, note=note)

    return {split: read(folder, inside[split]) for split, folder in chosen.items()}


def _printable(name: str) -> str:
    """A class name with escapes for line breaks, control characters and bytes that are no UTF-8."""
    escaped = (c.encode("unicode_escape").decode() if category(c) in ("Cc", "Cs") else c for c in name)
    return "".join(escaped)


def _number_labels(data: str, splits: Mapping[str, FoundSplit]) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """Class names, and the labels of each split (n,) int64, -1 for none; the classes are those of all splits together.

    Names and labels are absent where fewer than two classes are found.
    """
    unlabelled = {split: np.full(len(found.items), -1, dtype=np.int64) for split, found in splits.items()}
    raws = {split: found.raw_labels for split, found in splits.items() if found.raw_labels is not None}
    if len({raw.dtype.kind for raw in raws.values()}) > 1:
        raise UserError(f"--data: {data} has labels as numbers in one split and as text in another; make them alike")

    def is_labelled(raw: np.ndarray) -> np.ndarray:
        return raw != "" if raw.dtype.kind == "U" else raw >= 0

    declared = {split: splits[split].class_names for split, raw in raws.items() if raw.dtype.kind != "U"}
    names, raws = _in_one_order(data, raws, {split: found for split, found in declared.items() if found})
    present = np.unique(np.concatenate([raw[is_labelled(raw)] for raw in raws.values()])) if raws else np.empty(0)
    values = present if names is None else np.arange(len(names))
    names = [_printable(name) for name in names or map(str, present)]
    if len(present) and present[-1] not in values:
        raise UserError(f"--data: {data} has label {present[-1]} but names {len(names)} classes; correct its features")
    if len(names) > MAX_CLASSES:
        raise UserError(f"--data: {data} has {len(names)} classes, at most {MAX_CLASSES} are possible; merge some")
    if len(names) < 2 or not len(present):
        return None, unlabelled
    numbered = {s: np.where(is_labelled(raw), np.searchsorted(values, raw), -1) for s, raw in raws.items()}
    return names, unlabelled | numbered


def _in_one_order(
    data: str, raws: Mapping[str, np.ndarray], declared: Mapping[str, list[str]]
) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """The names of classes of the first split that declares some, and the labels of all splits by their order.

    Raises `UserError` where another split declares other names.
    """
    if not declared:
        return None, dict(raws)
    (first, names), found = next(iter(declared.items())), dict(raws)
    for split, others in declared.items():
        if others == names:
            continue
        if sorted(others) != sorted(names) or len(set(names)) < len(names):
            pair = next((f"{a} and {b}" for a, b in zip(names, others) if a != b), f"{len(names)} and {len(others)}")
            text = f"the classes of {first} and of {split} have different names ({pair})"
            raise UserError(f"--data: {data}: {text}; make them alike")
        raw, numbers = raws[split], np.array([names.index(name) for name in others])
        known = (raw >= 0) & (raw < len(numbers))
        found[split] = np.where(known, numbers[np.where(known, raw, 0)], raw)
    return names, found
