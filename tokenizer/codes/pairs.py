"""Pairs of images of two data sets: each image of the one has a partner in the other, found by a key.

The key is a column of tables or, of files, the path relative to the folder (to the split's, where it has splits)
without its ending. The split of a pair is that of the image. Its partner is of the same split of the other data where
that has one, else of any.
"""

import functools
import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vqgen.errors import UsageError, UserError, data_named
from vqgen.tokenizer.data.dataset import ImageDataset
from vqgen.tokenizer.data.items import Files, Items, Joined, Rows
from vqgen.tokenizer.data.options import ImageConfig, Split
from vqgen.tokenizer.data.sources import Source, find_splits
from vqgen.tokenizer.data.tables import read_keys

NAME = "name"
"""The --pair-by that means the path of a file."""
Unpaired = Literal["error", "skip"]
"""What becomes of images without a partner."""


@dataclass(frozen=True)
class Pairs:
    """The partners of the images of every split."""

    images: ImageDataset
    """All images of the other data."""
    first: Mapping[Split, np.ndarray]
    """Of each image, the place in `order` of the first partner with its key, and how many have it: (n, 2)."""
    turn: Mapping[Split, np.ndarray]
    """Of each image, how many images of its split before it have its key, (n,)."""
    own: Mapping[Split, np.ndarray]
    """Of each image, its own number among those with its key, -1 where it is not one of them, (n,)."""
    order: np.ndarray
    """Indices in `images`, those of one key after another."""
    fingerprint: str
    """Of the other data, and of who is whose partner."""
    summary: str

    @property
    def most(self) -> int:
        """Most partners that a training image has; the others are not augmented."""
        return int((self.first["train"][:, 1] - (self.own["train"] >= 0)).max(initial=0))

    def partners(self, split: Split, indices: np.ndarray, view: int) -> np.ndarray:
        """Return the indices in `images` of the partners of one view of images, (m,) -> (m,).

        Where several have the key, images of one key take them in turn, and so do the views of an image. An image that
        is one of them is passed over.
        """
        first, count = self.first[split][indices].T
        own = self.own[split][indices]
        number = (self.turn[split][indices] + view) % (count - (own >= 0))
        return self.order[first + number + ((own >= 0) & (number >= own))]

    def __str__(self) -> str:
        return self.summary


def _keys(items: Items, by: str) -> list[str | None]:
    """The key of each item; None where it has none. Raises `UserError`."""
    if isinstance(items, Rows):
        return read_keys(items, by)
    if isinstance(items, Joined):
        return [key for part in items.parts for key in _keys(part, by)]
    assert isinstance(items, Files)  # those in memory are of streams, which have no partners
    if by != NAME:
        raise UsageError(f"--pair-by: found {by[:80]}, but {items.root} holds files, which are paired by {NAME}")
    return [os.path.splitext(name)[0] for name in items.names]


def _place(name: str) -> str:
    """The name of an item, the same by whatever path its folder is named."""
    folder, item = os.path.split(name)
    return os.path.join(_resolved(folder), item)


@functools.lru_cache(maxsize=4096)
def _resolved(folder: str) -> str:
    return os.path.realpath(os.path.expanduser(folder))


def _open_all(data: str) -> tuple[Source, list[str]]:
    """All images of a source, without labels, and the split of each. Raises `UserError` naming --source-data."""
    with data_named("--source-data"):
        splits = find_splits(data)
    items = Joined([found.items for found in splits.values()])
    text = "\n".join(line for split, found in splits.items() for line in (split, *found.listing))
    fingerprint = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    source = Source(data, items, np.arange(len(items)), np.full(len(items), -1, np.int64), None, fingerprint)
    return source, [split for split, found in splits.items() for _ in range(len(found.items))]


def pair(
    sources: Mapping[Split, Source], data: str, by: str, unpaired: Unpaired, images: ImageConfig, augment: bool = False
) -> tuple[Pairs, dict[Split, Source]]:
    """Find the partner of every image in other data; return them with the sources of the images that have one.

    No image is its own partner, where the other data hold it, too. Images of one split have partners of that split,
    where it has any; images that are held out of a split are of that.

    Args:
        data, by, unpaired: the options --source-data, --pair-by and --unpaired.
        images: how the partners are read, with the same augmentation as the images where `augment` is set.

    Raises `UserError` where there are none, or with --unpaired error some have none.
    """
    other, parts = _open_all(data)
    indices: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(_keys(other.items, by)):
        if key is not None:
            indices[key].append(index)
    order = np.array([index for same in indices.values() for index in same], np.int64)
    place_of = {_place(other.items.name(index)): place for place, index in enumerate(order.tolist())}
    spans: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])  # of a key, and of a key and a split
    keys_of = (key for key, same in indices.items() for _ in same)
    for place, (key, index) in enumerate(zip(keys_of, order.tolist(), strict=True)):
        for wanted in ("", parts[index]):  # the items of a split follow one another
            spans[key, wanted] = [spans[key, wanted][0] if (key, wanted) in spans else place, spans[key, wanted][1] + 1]

    def partners(key: str | None, part: str, itself: int) -> tuple[int, int, int]:
        """The first place of the partners of an image, how many they are, and its own number among them, or -1."""
        for wanted in (part, ""):
            first, count = spans.get((str(key), wanted), (0, 0))
            inside = first <= itself < first + count
            if key is not None and count > inside:
                return first, count, itself - first if inside else -1
        return 0, 0, -1

    kept: dict[Split, Source] = {}
    first: dict[Split, np.ndarray] = {}
    turn: dict[Split, np.ndarray] = {}
    own: dict[Split, np.ndarray] = {}
    lost: list[str] = []
    several: set[str] = set()
    digest = hashlib.sha256(f"{other.fingerprint} {order.tolist()}".encode())
    for split, source in sources.items():
        every = _keys(source.items, by)
        keys = [every[row] for row in source.rows.tolist()]
        itself = [place_of.get(_place(source.item_name(i)), -1) for i in range(len(source))]
        spanned = np.array([partners(key, source.part, i) for key, i in zip(keys, itself)], np.int64).reshape(-1, 3)
        paired = spanned[:, 1] > 0
        found = [str(key) for key, has in zip(keys, paired) if has]
        lost += [source.item_name(i) for i in np.flatnonzero(~paired).tolist()]
        kept[split], first[split], own[split] = source.take(paired), spanned[paired, :2], spanned[paired, 2]
        several |= {key for key, count in zip(found, first[split][:, 1].tolist()) if count > 1}
        before: dict[str, int] = defaultdict(int)
        turns: list[int] = []
        for key in found:
            turns.append(before[key])
            before[key] += 1
        turn[split] = np.array(turns, np.int64)
        digest.update(f"{split} {first[split].tolist()} {turns}".encode())
        if (own[split] >= 0).any():
            digest.update(str(own[split].tolist()).encode())
    total = sum(map(len, sources.values()))
    if lost:
        text = f"{len(lost)} of {total} images have no partner by {by[:80]} in {other.name}, the first {lost[0]}"
        empty = [split for split, source in kept.items() if not len(source)]
        if unpaired == "error":
            raise UserError(f"--source-data: {text}; correct --pair-by, or leave them out by --unpaired skip")
        if empty:
            raise UserError(f"--source-data: {text}, which leaves no {empty[0]} images; correct --pair-by")
    summary = f"{total - len(lost)} of {total} images have a partner, {len(lost)} are left out"
    if several:
        summary += f"; {len(several)} keys have several, which are taken in turn"
    dataset = ImageDataset(other, images, augment=augment)
    return Pairs(dataset, first, turn, own, order, digest.hexdigest(), summary), kept
