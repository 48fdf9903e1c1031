"""The images that vqgen-tokenize encodes: every view of the images of some shards, with their source images."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, groupby, repeat

import numpy as np
import torch
from torch import Tensor

from vqgen.seeding import hash64
from vqgen.tokenizer.data.dataset import Key
from vqgen.tokenizer.data.loader import worker_count
from vqgen.tokenizer.data.options import Split
from vqgen.tokenizer.data.views import flips
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.streams.records import Record

from .degrade import degrade, source_seed
from .plan import Job, ShardRange


@dataclass(frozen=True)
class ViewBatch:
    """One view of some images of a shard, without those that are broken."""

    shard: ShardRange
    view: int
    images: Tensor
    """uint8 (B, C, H, W)."""
    source: Tensor | None
    """Their source images, uint8 (B, C, H, W); None where there are none."""
    labels: Tensor
    indices: Tensor
    """(B,), in the split."""
    broken: list[str]
    """Names of broken images, each with the reason."""
    captions: list[str] | None
    """(B,); None where they are not asked for."""


def view_seed(config: TokenizeConfig, image: object, view: int) -> int:
    """Return the augmentation seed of a view, a function of (seed, image, view); `image` is an index or a text.

    With --flip the odd views are the flipped ones, so that of flips alone no view repeats another by chance.
    """
    seeds = (hash64("view", config.seed, image, view, attempt) for attempt in count())
    return next(seed for seed in seeds if not config.images.flip or flips(seed) == bool(view % 2))


def read_views(job: Job, shards: Sequence[ShardRange]) -> Iterator[ViewBatch]:
    """Yield the batches of some shards, group by group. Raises `UserError` for too many broken images."""
    if job.streams:
        batches = _of_streams(job, shards)
    else:
        of_splits = [[shard for shard in shards if shard.split == split] for split in job.indexed]
        batches = chain.from_iterable(_of_split(job, split, some) for split, some in zip(job.indexed, of_splits))
    return map(_pinned, batches) if job.device.type == "cuda" else batches


def _pinned(batch: ViewBatch) -> ViewBatch:
    source = None if batch.source is None else batch.source.pin_memory()
    return dataclasses.replace(batch, images=batch.images.pin_memory(), source=source)


@dataclass(frozen=True)
class _Piece:
    """One view of some records of a shard, the first of which is number `start` of the shard."""

    shard: ShardRange
    view: int
    start: int
    records: list[Record]

    def name(self, row: int) -> str:
        """What seeds are made of: the same wherever the files lie."""
        return f"{self.shard.number} {row}"


def _pieces(job: Job, file: str, shards: Sequence[ShardRange]) -> Iterator[_Piece]:
    """Read a file once, for all of its `shards`; a shard without images has a piece without records."""
    wanted: dict[Split, ShardRange] = {shard.split: shard for shard in shards}
    waiting, done = {split: list[Record]() for split in wanted}, dict.fromkeys(wanted, 0)

    def views(split: Split) -> Iterator[_Piece]:
        shard, records = wanted[split], waiting[split]
        yield from (_Piece(shard, view, done[split], records) for view in range(shard.views))
        done[split] += len(records)
        waiting[split] = []

    files = job.streams[shards[0].split].shards
    for record in files.read_all([file]):
        if (split := files.split_of(record)) in wanted:
            waiting[split].append(record)
            if len(waiting[split]) == job.config.batch_size:
                yield from views(split)
    for split in wanted:
        yield from views(split)


def _of_streams(job: Job, shards: Sequence[ShardRange]) -> Iterator[ViewBatch]:
    """Yield the batches of the shards of streams, file by file."""
    config, decoder = job.config, job.streams["train"]
    planned = deque[_Piece]()

    def plan() -> Iterator[list[tuple[Record, int | None]]]:
        for file, group in groupby(sorted(shards, key=lambda shard: shard.file), key=lambda shard: shard.file):
            for piece in _pieces(job, file, list(group)):
                planned.append(piece)
                rows = enumerate(piece.records, piece.start)
                yield [(r, view_seed(config, piece.name(row), piece.view) if piece.view else None) for row, r in rows]

    for batch in decoder.read(plan()):
        piece = planned.popleft()
        decoder.broken.add(batch.broken, len(piece.records) if piece.view == 0 else 0)
        indices, source, captions = batch.indices + piece.start, None, None
        if job.degradations:
            seeds = [source_seed(config.seed, piece.name(row), piece.view) for row in indices.tolist()]
            source = degrade(batch.images, job.degradations, seeds)
        if config.text_column is not None:
            captions = [piece.records[i].caption for i in batch.indices.tolist()]
        yield ViewBatch(piece.shard, piece.view, batch.images, source, batch.labels, indices, batch.broken, captions)


def _of_split(job: Job, split: Split, shards: Sequence[ShardRange]) -> Iterator[ViewBatch]:
    """Yield the batches of some shards of a split as one stream."""
    config, dataset, pairs = job.config, job.indexed[split], job.pairs
    size, workers = config.batch_size, worker_count(config.images.workers)
    pieces = [(s, view, at) for s in shards for view in range(s.views) for at in range(s.start, s.stop, size)]

    def indices(shard: ShardRange, at: int) -> np.ndarray:
        return np.arange(at, min(at + size, shard.stop))

    def keys(of_piece: np.ndarray, images: np.ndarray, view: int) -> list[Key]:
        """Keys of `images`, the images of a piece or their partners: both are flipped and cropped alike."""
        return [
            (image, view_seed(config, i, view)) if view else image
            for i, image in zip(of_piece.tolist(), images.tolist())
        ]

    def plan(done: int) -> Iterator[Sequence[Key]]:
        for shard, view, at in pieces[done:]:
            yield keys(indices(shard, at), indices(shard, at), view)

    def plan_partners(done: int) -> Iterator[Sequence[Key]]:
        assert pairs
        for shard, view, at in pieces[done:]:
            here = indices(shard, at)
            yield keys(here, pairs.partners(split, here, view), view)

    batches = dataset.read(plan, workers, cached=lambda: dataset.cached(augmented=False))
    others = pairs.images.read(plan_partners, workers, lambda: False) if pairs else repeat(None)
    for batch, other, (shard, view, at) in zip(batches, others, pieces):
        dataset.broken.add(batch.broken)
        images, found, labels, broken, source = batch.images, batch.indices, batch.labels, batch.broken, None
        if pairs and other:
            pairs.images.broken.add(other.broken)
            here = indices(shard, at)
            partners = pairs.partners(split, here, view)
            intact, partner_intact = np.isin(here, found.numpy()), np.isin(partners, other.indices.numpy())
            kept = torch.from_numpy(partner_intact[intact])
            images, found, labels = images[kept], found[kept], labels[kept]
            source, broken = other.images[torch.from_numpy(intact[partner_intact])], broken + other.broken
        elif job.degradations:
            seeds = [source_seed(config.seed, i, view) for i in found.tolist()]
            source = degrade(images, job.degradations, seeds)
        captions = None if dataset.captions is None else [dataset.captions[i] for i in found.tolist()]
        yield ViewBatch(shard, view, images, source, labels, found, broken, captions)
