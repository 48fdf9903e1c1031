"""The images that vqgen-tokenize encodes: every view of the images of some shards, with their source images."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, repeat

import numpy as np
import torch
from torch import Tensor

from vqgen.seeding import hash64
from vqgen.tokenizer.data.dataset import Key
from vqgen.tokenizer.data.loader import worker_count
from vqgen.tokenizer.data.options import Split
from vqgen.tokenizer.data.views import flips
from vqgen.tokenizer.encode import TokenizeConfig

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


def view_seed(config: TokenizeConfig, index: int, view: int) -> int:
    """Return the augmentation seed of a view, a function of (seed, image, view).

    With --flip the odd views are the flipped ones, so that no view repeats another by chance.
    """
    seeds = (hash64("view", config.seed, index, view, attempt) for attempt in count())
    return next(seed for seed in seeds if not config.images.flip or flips(seed) == bool(view % 2))


def read_views(job: Job, split: Split, shards: Sequence[ShardRange]) -> Iterator[ViewBatch]:
    """Yield the batches of some shards of a split as one stream. Raises `UserError` for too many broken images."""
    config, dataset, pairs = job.config, job.datasets[split], job.pairs
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
        out = ViewBatch(shard, view, images, source, labels, found, broken)
        if job.device.type == "cuda":
            pinned = None if source is None else source.pin_memory()
            out = dataclasses.replace(out, images=images.pin_memory(), source=pinned)
        yield out
