"""Images of a stream in training: shuffled, decoded in workers, and resumed exactly where a checkpoint was saved.

A block of images is read, shuffled and used, then the next: where it began and how many of it were used is all that a
checkpoint needs. `IterableDataset` of `datasets` has no such state: one that resumes loses what is in its shuffle
buffer. Its `split_dataset_by_node` has each process read all files unless their number is a multiple of the processes.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from vqgen.errors import UserError
from vqgen.seeding import hash64
from vqgen.tokenizer.data.broken import BrokenImages
from vqgen.tokenizer.data.dataset import Batch, ImageDataset
from vqgen.tokenizer.data.decoding import BrokenImage
from vqgen.tokenizer.data.loader import Loader, prefetch, worker_count
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.views import augmented, fitted

from .heldout import read_heldout
from .records import Record
from .shards import Shards, open_shards

BLOCK_BYTES = 2**28
"""A block of images that are shuffled among each other ends with so many bytes; two are in memory."""

Key = tuple[Record, int | None]
"""A record, and the seed of its augmentation; None for none."""


@dataclass(frozen=True)
class Position:
    """Where a process is in its stream."""

    epoch: int = 0
    block: int = 0
    """Of the epoch."""
    file: int = 0
    """Where the block begins, as of `Shards.share`."""
    record: int = 0
    taken: int = 0
    """Images of the block that were used."""


class StreamImages(Dataset[Any]):
    """The images of one split of a stream at the configured size.

    Args:
        augment: apply flips, random crops and shifts to keys with a seed.
        replace_broken: repeat another image of the batch in place of a broken one, so that batches keep their size.
    """

    def __init__(self, shards: Shards, config: ImageConfig, augment: bool = False, replace_broken: bool = False):
        config.check_augmentation()
        self.shards, self.config, self.augment, self.replace_broken = shards, config, augment, replace_broken
        self.broken = BrokenImages(shards.data, config, None)
        self.class_names = shards.class_names
        self.position = Position()
        self.fingerprint = ""
        """Of the files, where they are to be the same later; set by who needs it."""
        self._loader: Loader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return the images of `keys`; `indices` are places in `keys`. Broken ones are left out, or replaced."""
        images = np.empty((len(keys), self.config.channels, *self.config.size), dtype=np.uint8)
        used, broken = list[int](), dict[int, str]()
        for place, (record, seed) in enumerate(keys):
            try:
                images[len(used)] = self._view(record, seed if self.augment else None)
            except BrokenImage as error:
                broken[place] = f"{record.name} ({error})"
                continue
            used.append(place)
        intact = len(used)
        for place in broken if self.replace_broken and intact else ():
            chosen = hash64("replace", keys[place][0].key) % intact
            images[len(used)] = images[chosen]
            used.append(used[chosen])
        labels = torch.tensor([keys[place][0].label for place in used], dtype=torch.int64)
        where = torch.tensor(used, dtype=torch.int64)
        return Batch(torch.from_numpy(images[: len(used)]), labels, where, list(broken.values()))

    def _view(self, record: Record, seed: int | None) -> np.ndarray:
        """Return uint8 (C, H, W) of a record. Raises `BrokenImage`."""
        if record.problem:
            raise BrokenImage(record.problem)
        image = fitted(record.data, self.config, enlarged=seed is not None and self.config.random_crop > 0).numpy()
        return image if seed is None else augmented(image, self.config, seed)

    def read(self, plan: Iterator[Sequence[Key]]) -> Iterator[Batch]:
        """Yield the batches of `plan`, decoded in the configured number of workers."""
        workers = worker_count(self.config.workers)
        if not workers:
            yield from map(self.__getitems__, plan)
            return
        loader, self._loader = self._loader or Loader(self, workers), None  # workers take seconds to start
        try:
            yield from loader.batches(plan)
        finally:
            self._loader = loader

    def batches(self, batch_size: int, seed: int, rank: int, world: int, buffer: int) -> Iterator[Batch]:
        """Yield batches without end, beginning at `position`, which then is the place behind the last batch.

        Each epoch is a new order of the files, and of the images within blocks of `buffer`. The batches of process
        `rank` of `world` are a function of (files, seed, rank, world, position). Raises `UserError`.
        """
        behind = deque[Position]()

        def plan() -> Iterator[Sequence[Key]]:
            for keys, position in self._planned(batch_size, seed, rank, world, buffer):
                behind.append(position)
                yield keys

        for batch in self.read(plan()):
            position = behind.popleft()
            self.broken.add(batch.broken, batch_size)
            if len(batch.indices) < batch_size:  # else some would have been repeated
                found = f"{self.shards.data} has no intact image in a batch ({batch.broken[0]})"
                raise UserError(f"--data: {found}; replace or remove the broken ones")
            self.position = position
            yield batch

    def _planned(
        self, batch_size: int, seed: int, rank: int, world: int, buffer: int
    ) -> Iterator[tuple[list[Key], Position]]:
        """Yield the keys of each batch, and the position behind it."""
        keys, taken = list[Key](), self.position.taken
        for start, records in prefetch(self._blocks(seed, rank, world, buffer), 1):
            generator = np.random.default_rng(hash64("block", seed, start.epoch, rank, start.block))
            for place, index in enumerate(generator.permutation(len(records)).tolist()):
                if place < taken:
                    continue
                record = records[index]
                keys.append((record, hash64("augment", seed, start.epoch, record.key)))
                if len(keys) == batch_size:
                    yield keys, replace(start, taken=place + 1)
                    keys = []
            taken = 0

    def _blocks(self, seed: int, rank: int, world: int, buffer: int) -> Iterator[tuple[Position, list[Record]]]:
        """Yield blocks of records with their positions, without end. Raises `UserError` where a pass has none."""
        start = replace(self.position, taken=0)
        while True:
            order = np.random.default_rng(hash64("files", seed, start.epoch)).permutation(len(self.shards.files))
            files = [self.shards.files[file] for file in order]
            stream = self.shards.share(files, rank, world, start.file, start.record)
            while block := list(_block(stream, buffer)):
                yield start, [record for record, *_ in block]
                _, file, record = block[-1]
                start = Position(start.epoch, start.block + 1, file, record)
            if not start.block:
                share = f" for process {rank + 1} of {world}" if world > 1 else ""
                raise UserError(f"--data: {self.shards.data} holds no training image{share}; add some")
            start = Position(start.epoch + 1)

    def place(self) -> dict[str, Any]:
        """The position and what it belongs to, JSON-serialisable."""
        return {"files": self.shards.mark, **asdict(self.position)}

    def resume(self, saved: Sequence[Mapping[str, Any]], rank: int, world: int) -> list[str]:
        """Continue where the processes of a run were, each with its `place`; returns a line where that is not possible,
        and a new epoch begins."""
        same = all(place["files"] == self.shards.mark for place in saved)
        places = [Position(**{k: v for k, v in place.items() if k != "files"}) for place in saved]
        if len(places) == world and same:
            self.position = places[rank]
            return []
        self.position = Position(max(place.epoch for place in places) + 1)
        why = "its files are others" if len(places) == world else f"{len(places)} processes had begun the last one"
        return [f"--data: {self.shards.data} begins a new epoch, as {why}"]


def _block(stream: Iterator[tuple[Record, int, int]], buffer: int) -> Iterator[tuple[Record, int, int]]:
    """The next records of a stream, until there are `buffer` of them or `BLOCK_BYTES`."""
    size = 0
    for each in islice(stream, buffer):
        yield each
        size += len(each[0].data)
        if size >= BLOCK_BYTES:
            return


def open_stream(data: str, config: ImageConfig, validated: int) -> tuple[StreamImages, ImageDataset]:
    """Open a stream for training, and read at most `validated` of its held-out images. Raises `UserError`."""
    splits = open_shards(data, config.holdout)
    return StreamImages(splits["train"], config, True, True), read_heldout(splits["heldout"], config, validated)
