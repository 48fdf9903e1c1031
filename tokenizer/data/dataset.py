"""Datasets and batches of images: one split of a source at the configured size, augmented.

The content of a batch is a function of source, configuration and keys alone, whatever the number of workers.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqgen.errors import UserError
from vqgen.seeding import epoch_slice, hash64

from .broken import BrokenImages
from .decoding import BrokenImage
from .loader import Loader, worker_count
from .options import ImageConfig, Split
from .sources import Source, open_source
from .views import augmented, fitted

Key = int | tuple[int, int]
REPLACEMENTS = 64
CACHED, BROKEN = 1, 2  # states of an image in the cache; 0 is unknown


@dataclass(frozen=True)
class Sample:
    """One image: uint8 (C, H, W), its label (-1: none) and its index in the split."""

    image: Tensor
    label: int
    index: int


@dataclass(frozen=True)
class Batch:
    """Images uint8 (B, C, H, W), labels int64 (B,), -1 for none, and indices (B,), those of replacements included."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    broken: list[str]
    """Names of broken images, each with the reason."""


class ImageDataset(Dataset[Sample]):
    """The images of one split at the configured size.

    A key is an index (image without augmentation) or (index, augmentation seed): where the dataset augments, flip,
    crop and shift depend on that seed alone. Decoded images are cached in memory shared with the workers, if all of
    them fit.

    Args:
        augment: apply flips, random crops and shifts to keys with a seed.
        replace_broken: use another image in place of a broken one, so that batches keep their size.
        option: the option that an error names where broken images are errors.
    """

    def __init__(
        self,
        source: Source,
        config: ImageConfig,
        augment: bool = False,
        replace_broken: bool = False,
        option: str = "--broken error",
    ):
        config.check_augmentation()
        self.source, self.config = source, config
        self.augment, self.replace_broken = augment, replace_broken
        self.name, self.class_names, self.fingerprint = source.name, source.class_names, source.fingerprint
        self.labels, self.captions = torch.from_numpy(source.labels), source.captions
        self.broken = BrokenImages(source.name, config, max(source.all_images, len(source)), len(source), option)
        # Random crops are taken from an enlarged image, which is then what the cache holds.
        self.enlarged = augment and config.random_crop > 0
        self._loaders: list[Loader] = []
        self._pixels, self._seen = self._make_cache()

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaders": [], "captions": None, "source": replace(self.source, captions=None)}

    def __getitem__(self, key: Key) -> Sample:
        """Return one image. Raises `UserError` where it is broken and not replaced."""
        batch = self.__getitems__([key])
        if not len(batch.indices):
            raise UserError(f"--data: {batch.broken[0]}; replace or remove it")
        return Sample(batch.images[0], int(batch.labels[0]), int(batch.indices[0]))

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Return the images of `keys` in order; broken ones are left out or, with `replace_broken`, replaced."""
        images = np.empty((len(keys), self.config.channels, *self.config.size), dtype=np.uint8)
        indices: list[int] = []
        broken: dict[str, None] = {}
        for key in keys:
            index, seed = key if isinstance(key, tuple) else (key, None)
            for attempt in range(REPLACEMENTS if self.replace_broken else 1):
                chosen = hash64("replace", index, attempt) % len(self) if attempt else index
                try:
                    images[len(indices)] = self._view(chosen, seed if self.augment else None)
                except BrokenImage as error:
                    broken[f"{self.source.item_name(chosen)} ({error})"] = None
                    continue
                indices.append(chosen)
                break
        where = torch.tensor(indices, dtype=torch.int64)
        return Batch(torch.from_numpy(images[: len(indices)]), self.labels[where], where, list(broken))

    def cached(self, indices: Sequence[int] | None = None, augmented: bool = True) -> bool:
        """Return whether the images (all by default) need no more decoding; known broken ones need none."""
        if self._seen is None or (self.enlarged and not augmented):
            return False
        return bool((self._seen if indices is None else self._seen[torch.as_tensor(indices)]).ne(0).all())

    def first_read(self) -> float:
        """Seconds by which an image takes longer the first time, where this process keeps decoded ones; else 0.

        The median over 16 images: a single large one says nothing of the others.
        """
        if self._seen is None or worker_count(self.config.workers):
            return 0.0
        chosen = np.linspace(0, len(self) - 1, min(17, len(self))).astype(int)
        first, *keys = [(int(index), 0) for index in chosen]
        self.__getitems__([first])  # imports what decodes, which takes seconds
        if not keys:
            return 0.0

        def seconds(key: tuple[int, int]) -> float:
            began = time.perf_counter()
            self.__getitems__([key])
            return time.perf_counter() - began

        taken = [[seconds(key) for key in keys] for _ in range(2)]
        return max(0.0, statistics.median(new - kept for new, kept in zip(*taken, strict=True)))

    def _view(self, index: int, seed: int | None) -> np.ndarray:
        """Return uint8 (C, H, W) of image `index`: center-cropped, or augmented by `seed`."""
        image = self._load(index, self.enlarged and seed is not None)
        if seed is None:
            return image
        return augmented(image, self.config, seed)

    def _load(self, index: int, enlarged: bool) -> np.ndarray:
        """Return the resized image before augmentation, from the cache or decoded. Raises `BrokenImage`."""
        if self._pixels is None or self._seen is None or enlarged != self.enlarged:
            return self._decode(index, enlarged).numpy()
        if self._seen[index] == CACHED:
            return self._pixels[index].numpy()
        try:
            image = self._decode(index, enlarged)
        except BrokenImage:
            self._seen[index] = BROKEN
            raise
        if image.shape == self._pixels.shape[1:]:
            self._pixels[index] = image
            self._seen[index] = CACHED
        return image.numpy()

    def _decode(self, index: int, enlarged: bool) -> Tensor:
        """Return the resized image from its file. Raises `BrokenImage`."""
        try:
            data = self.source.read(index)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error
        return fitted(data, self.config, enlarged)

    def _make_cache(self) -> tuple[Tensor | None, Tensor | None]:
        """Allocate pixels (n, C, H, W) and states (n,) for all images; None where they do not fit into memory."""
        shape: tuple[int, ...] = (self.config.channels, *self.config.size)
        for index in range(min(len(self), REPLACEMENTS) if self.enlarged else 0):
            with suppress(BrokenImage):
                shape = tuple(self._decode(index, True).shape)
                break
        size, shared = len(self) * math.prod(shape), Path("/dev/shm")
        room = shutil.disk_usage(shared).free // 2 if self.config.workers and shared.is_dir() else size
        if size > min(self.config.cache_mb << 20, room):
            return None, None
        # Written at once, so that the peak that is measured in the first steps is that of the whole run.
        pixels, seen = (torch.zeros((len(self), *each), dtype=torch.uint8) for each in (shape, ()))
        return (pixels.share_memory_(), seen.share_memory_()) if self.config.workers else (pixels, seen)

    def read(
        self, plan: Callable[[int], Iterator[Sequence[Key]]], workers: int, cached: Callable[[], bool]
    ) -> Iterator[Batch]:
        """Yield the batches of `plan(0)`; `plan(n)` yields the keys from batch n on.

        Worker processes decode until everything is `cached()`, then this process reads from the cache.
        """
        done = 0
        if workers and not cached():
            # Workers take seconds to start: the loader is kept for the next call.
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
            del loader  # else its workers, idle by now, would live as long as this generator
        for keys in plan(done):
            yield self.__getitems__(keys)


def open_images(
    data: str,
    split: Split,
    config: ImageConfig,
    augment: bool = False,
    replace_broken: bool = False,
    text_column: str | None = None,
) -> ImageDataset:
    """Open one split of `data` as an `ImageDataset`. Raises `UserError` where there is nothing to read.

    Args:
        data: "demo", a folder, parquet, a `save_to_disk` folder, or a dataset's name.
        text_column: of the captions, which `ImageDataset.captions` then has.
    """
    return ImageDataset(open_source(data, split, config.holdout, text_column), config, augment, replace_broken)


def training_batches(
    dataset: ImageDataset, batch_size: int, seed: int, first_step: int, rank: int, world: int
) -> Iterator[Batch]:
    """Yield batches without end; each epoch is a new shuffle without replacement.

    The global batch of step s, `batch_size * world` images, and its augmentation are a pure function of (seed, s); rank
    r gets its r-th slice. Raises `UserError` where too many images are broken.
    """

    def plan(done: int) -> Iterator[list[Key]]:
        for step in count(first_step + done):
            start = (step * world + rank) * batch_size
            indices = epoch_slice(len(dataset), seed, start, batch_size)
            yield [(int(i), hash64("augment", seed, start + place)) for place, i in enumerate(indices)]

    for batch in dataset.read(plan, worker_count(dataset.config.workers), dataset.cached):
        dataset.broken.add(batch.broken)
        if len(batch.indices) < batch_size:
            found = f"{dataset.name} has too few intact images ({batch.broken[0]})"  # else the batch would be full
            raise UserError(f"--data: {found}; replace or remove the broken ones")
        yield batch


def ordered_batches(dataset: ImageDataset, indices: Iterable[int], batch_size: int) -> Iterator[Batch]:
    """Yield the images of `indices` in order, without augmentation, e.g. for validation; the last batch may be smaller.

    Broken images are left out, and so are empty batches. Raises `UserError` where too many images are broken.
    """
    wanted = [int(index) for index in indices]

    def plan(done: int) -> Iterator[Sequence[Key]]:
        return (wanted[at : at + batch_size] for at in range(done * batch_size, len(wanted), batch_size))

    workers = worker_count(dataset.config.workers)
    for batch in dataset.read(plan, workers, lambda: dataset.cached(wanted, augmented=False)):
        dataset.broken.add(batch.broken)
        if len(batch.indices):
            yield batch
