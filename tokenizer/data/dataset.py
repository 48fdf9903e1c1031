"""Images as the models see them: one split of a source at the configured size, augmented and in batches.

What a batch holds is a pure function of the source, the configuration and the keys asked for, whatever the number of
worker processes.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqgen.errors import UserError
from vqgen.seeding import epoch_slice, hash64

from .loader import Loader, worker_count
from .options import ImageConfig
from .pixels import BrokenImage, centre, decode, fit
from .sources import Source, Split, open_source

Key = int | tuple[int, int]
REPLACEMENTS = 64
# What the cache knows of an image; 0 is nothing.
KEPT, BROKEN = 1, 2


@dataclass(frozen=True)
class Sample:
    """One image: uint8 (C, H, W), its label (-1: none) and its index in the split."""

    image: Tensor
    label: int
    index: int


@dataclass(frozen=True)
class Batch:
    """`images` uint8 (B, C, H, W); `labels` int64 (B,), -1 where the source has none; `indices` int64 (B,) of the
    images really shown; `broken` names, with the reason, the images that could not be."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    broken: list[str]


def mirrored(seed: int) -> bool:
    """Whether an augmentation seed flips, where flips are configured."""
    return bool(hash64("flip", seed) & 1)


class BrokenImages:
    """The broken images of one split met so far, counted once each, held against what the configuration allows."""

    def __init__(self, source: Source, config: ImageConfig):
        self.source, self.config = source, config
        self.names: dict[str, None] = {}
        self.report: Callable[[str], None] | None = None
        """Called with a line for each broken image as it is first met."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "report": None}  # the reporting is the main process's

    def add(self, names: Iterable[str]) -> None:
        """Count the images a batch named. Raises `UserError` on any where `broken` is "error", or beyond the share."""
        new = [name for name in names if name not in self.names]
        self.names.update(dict.fromkeys(new))
        if self.report:
            for name in new:
                self.report(f"skipped, broken: {name}")
        if new and self.config.broken == "error":
            raise UserError(f"--broken error: {new[0]}; mend or remove it")
        if new and len(self.names) > self.config.max_broken * len(self.source):
            share = f"{len(self.names)} of {len(self.source)} images of {self.source.name} are broken"
            raise UserError(f"--max-broken {self.config.max_broken}: {share}, the last {new[-1]}; mend or remove them")


class ImageDataset(Dataset[Sample]):
    """The images of one split at the configured size.

    A key is an index, which gives the plain view, or (index, augmentation seed), which flips and crops by that seed
    alone where the dataset augments. Decoded images are kept in memory, shared with the workers, when all fit.
    """

    def __init__(self, source: Source, config: ImageConfig, augment: bool = False, replace_broken: bool = False):
        self.source, self.config = source, config
        self.augment, self.replace_broken = augment, replace_broken
        self.name, self.class_names, self.fingerprint = source.name, source.class_names, source.fingerprint
        self.labels = torch.from_numpy(source.labels)
        self.broken = BrokenImages(source, config)
        # Random crops are cut from an enlarged picture, which is what the cache then holds.
        self.wide = augment and config.random_crop > 0
        self._loaders: list[Loader] = []
        self._pixels, self._seen = self._make_cache()

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaders": []}

    def __getitem__(self, key: Key) -> Sample:
        """One image. Raises `UserError` where it is broken and not to be replaced."""
        batch = self.__getitems__([key])
        if not len(batch.indices):
            raise UserError(f"--data: {batch.broken[0]}; mend or remove it")
        return Sample(batch.images[0], int(batch.labels[0]), int(batch.indices[0]))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """The images of `keys` in order; a broken one is left out or, with `replace_broken`, another stands in."""
        images = np.empty((len(keys), self.config.channels, *self.config.size), dtype=np.uint8)
        indices: list[int] = []
        broken: dict[str, None] = {}
        for key in keys:
            index, seed = key if isinstance(key, tuple) else (key, None)
            for attempt in range(REPLACEMENTS if self.replace_broken else 1):
                shown = hash64("replace", index, attempt) % len(self) if attempt else index
                try:
                    images[len(indices)] = self._view(shown, seed if self.augment else None)
                except BrokenImage as error:
                    broken[f"{self.source.item_name(shown)} ({error})"] = None
                    continue
                indices.append(shown)
                break
        where = torch.tensor(indices, dtype=torch.int64)
        return Batch(torch.from_numpy(images[: len(indices)]), self.labels[where], where, list(broken))

    def cached(self, indices: Sequence[int] | None = None, augmented: bool = True) -> bool:
        """Whether the images (all, unless named) need no decoding any more; a broken one is known as such."""
        if self._seen is None or (self.wide and not augmented):
            return False
        return bool((self._seen if indices is None else self._seen[torch.as_tensor(indices)]).ne(0).all())

    def _view(self, index: int, seed: int | None) -> np.ndarray:
        """uint8 (C, H, W) of image `index`: centred, or flipped and cropped by `seed`."""
        image = self._load(index, self.wide and seed is not None)
        if seed is None:
            return image
        if self.wide:
            height, width = self.config.size
            top = hash64("top", seed) % (image.shape[1] - height + 1)
            left = hash64("left", seed) % (image.shape[2] - width + 1)
            image = image[:, top : top + height, left : left + width]
        return image[:, :, ::-1] if self.config.flip and mirrored(seed) else image

    def _load(self, index: int, wide: bool) -> np.ndarray:
        """The fitted image before augmentation, from memory or decoded. Raises `BrokenImage`."""
        if self._pixels is None or self._seen is None or wide != self.wide:
            return self._decode(index, wide).numpy()
        if self._seen[index] == KEPT:
            return self._pixels[index].numpy()
        try:
            image = self._decode(index, wide)
        except BrokenImage:
            self._seen[index] = BROKEN
            raise
        if image.shape == self._pixels.shape[1:]:
            self._pixels[index] = image
            self._seen[index] = KEPT
        return image.numpy()

    def _decode(self, index: int, wide: bool) -> Tensor:
        try:
            data = self.source.read(index)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error
        enlarged = 1 + self.config.random_crop if wide else 1
        size = [round(side * enlarged) for side in self.config.size]
        image = fit(decode(data, self.config.channels), size, self.config.fit)
        return image if wide else centre(image, size)

    def _make_cache(self) -> tuple[Tensor | None, Tensor | None]:
        """Memory for all images, and which are there; None where they do not fit or their shapes differ."""
        shape: tuple[int, ...] = (self.config.channels, *self.config.size)
        if self.wide:
            for index in range(min(len(self), REPLACEMENTS)):
                try:
                    shape = tuple(self._decode(index, True).shape)
                    break
                except BrokenImage:
                    continue
        size = len(self) * int(np.prod(shape))
        shared = Path("/dev/shm")
        room = shutil.disk_usage(shared).free // 2 if self.config.workers and shared.is_dir() else size
        if size > min(self.config.cache_mb << 20, room):
            return None, None
        pixels, seen = torch.empty((len(self), *shape), dtype=torch.uint8), torch.zeros(len(self), dtype=torch.uint8)
        return (pixels.share_memory_(), seen.share_memory_()) if self.config.workers else (pixels, seen)

    def read(
        self, plan: Callable[[int], Iterator[list[Key]]], workers: int, cached: Callable[[], bool]
    ) -> Iterator[Batch]:
        """The batches of `plan(0)`; `plan(n)` gives the keys from batch n on.

        Workers decode until everything is `cached()`; from then on nothing is left for them to do.
        """
        done = 0
        if workers and not cached():
            # Workers take seconds to start: a loader goes on to the next reading.
            loader = self._loaders.pop() if self._loaders else Loader(self, workers)
            try:
                for batch in loader.batches(plan(0)):
                    done += 1
                    yield batch
                    if cached():
                        break
            finally:
                if not self.cached():
                    self._loaders.append(loader)
        for keys in plan(done):
            yield self.__getitems__(keys)


def open_images(
    data: str,
    split: Split,
    config: ImageConfig,
    augment: bool = False,
    replace_broken: bool = False,
) -> ImageDataset:
    """Open one split of `data`: "demo", a folder, parquet, a `save_to_disk` folder, or a dataset's name.

    Args:
        augment: keys with a seed flip and crop as configured; without it every view is the plain one.
        replace_broken: another image stands in for a broken one, so that batches keep their size.

    Raises `UserError` where there is nothing to read.
    """
    return ImageDataset(open_source(data, split, config.holdout), config, augment, replace_broken)


def training_batches(
    dataset: ImageDataset,
    batch_size: int,
    seed: int,
    first_step: int,
    rank: int,
    world: int,
    config: ImageConfig,
) -> Iterator[Batch]:
    """Batches without end, each epoch shuffled anew without replacement.

    The global batch of step s, `batch_size * world` images, and its augmentation are a pure function of (seed, s); rank
    r gets its r-th slice. Raises `UserError` where too many images are broken.
    """

    def plan(done: int) -> Iterator[list[Key]]:
        for step in count(first_step + done):
            start = (step * world + rank) * batch_size
            indices = epoch_slice(len(dataset), seed, start, batch_size)
            yield [(int(i), hash64("augment", seed, start + place)) for place, i in enumerate(indices)]

    for batch in dataset.read(plan, worker_count(config.workers), dataset.cached):
        dataset.broken.add(batch.broken)
        if len(batch.indices) < batch_size:
            reason = batch.broken[0]  # nothing else makes a batch smaller
            raise UserError(
                f"--data: {dataset.name} has too few whole images ({reason}); mend or remove the broken ones"
            )
        yield batch


def ordered_batches(
    dataset: ImageDataset,
    indices: Iterable[int],
    batch_size: int,
    config: ImageConfig,
    view_seed: int | None = None,
) -> Iterator[Batch]:
    """The images of `indices` in order, for validation and tokenizing; broken ones are left out of their batch.

    The last batch may be smaller, and a batch with nothing left in it is not given. With `view_seed` each image gets
    its own augmented view, a function of (view_seed, index); the dataset must have been opened with `augment`.
    Raises `UserError` where too many images are broken.
    """
    if view_seed is not None and not dataset.augment:
        raise ValueError("view_seed needs a dataset opened with augment=True")
    wanted = [int(index) for index in indices]

    def plan(done: int) -> Iterator[list[Key]]:
        for start in range(done * batch_size, len(wanted), batch_size):
            some = wanted[start : start + batch_size]
            yield [i if view_seed is None else (i, hash64("view", view_seed, i)) for i in some]

    def cached() -> bool:
        return dataset.cached(wanted, view_seed is not None)

    for batch in dataset.read(plan, worker_count(config.workers), cached):
        dataset.broken.add(batch.broken)
        if len(batch.indices):
            yield batch
