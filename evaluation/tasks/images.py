"""Images that a task is measured on, their codes, and per-image metrics over all processes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vqgen.devices import gather_objects, rank_and_world
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.measurement import SetHash, check_classes, check_count, reading, warn
from vqgen.prior.parts.part import ABSENT
from vqgen.progress import progress
from vqgen.sampling.generator import Generator
from vqgen.seeding import epoch_slice, fixed_subset
from vqgen.tokenizer.data.dataset import Batch, ImageDataset, open_images, ordered_batches
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.losses.lpips import PerceptualDistance

from .options import PicturesConfig


@dataclass(frozen=True)
class Encoded:
    """All images of a measurement as codes, the same in every process; image i is row i."""

    indices: Tensor
    """int64 (n,): the images' indices in the data, ascending."""
    codes: Tensor
    """int64 (n, h, w[, depth])."""
    labels: list[int]
    """Class of each image for the prior, or -1."""
    fingerprint: str
    """Of the pixels and labels."""
    texts: list[str] = field(default_factory=list)
    """Caption of each image, as far as the prior reads it; none without --text-column."""

    def __len__(self) -> int:
        return len(self.codes)

    def given(self, rows: Sequence[int]) -> dict[str, Any]:
        """What the prior is told of the images of some rows."""
        found: dict[str, Any] = {"class": [self.labels[row] for row in rows]}
        return {**found, "text": [self.texts[row] for row in rows]} if self.texts else found

    @property
    def captions(self) -> dict[str, str]:
        """Fingerprint of the captions, for a receipt; none without them."""
        return {"captions": hashlib.sha256(repr(self.texts).encode()).hexdigest()} if self.texts else {}

    @cached_property
    def others(self) -> Tensor:
        """Another image for each, int64 (n,): its successor in one fixed random cycle through all of them."""
        order = torch.from_numpy(epoch_slice(len(self), 1, 0, len(self)))
        found = torch.empty_like(order)
        found[order] = order.roll(-1)
        return found


class TaskImages:
    """The images of --data at the size of a model; they are read as often as they are needed. Raises `UserError`."""

    def __init__(self, config: PicturesConfig, generator: Generator) -> None:
        about = generator.tokenizer.config
        self.config, self.generator = config, generator
        if config.text_column is not None and generator.conditioning.text is None:
            text = f"found {config.text_column}, but {config.model} was trained without text"
            raise UsageError(f"--text-column: {text}; leave it out")
        self.reading = reading(config, about.image_size, about.channels, about.fit)
        self.reading.cache_mb = ImageConfig.cache_mb
        self.dataset = self.opened()
        self.dataset.broken.report = warn
        what = f"the {config.split} split of {config.data}"
        self.chosen = fixed_subset(check_count(config.n, len(self.dataset), "--n", what), len(self.dataset))
        check_classes(generator.prior, self.dataset.class_names, config.unconditional, what)
        self.classes = generator.conditioning.classes.count and not config.unconditional

    def opened(self) -> ImageDataset:
        """The split of --data, not yet limited to `--n` images."""
        return open_images(self.config.data, self.config.split, self.reading, text_column=self.config.text_column)

    def encoded(self, change: Callable[[Tensor, Tensor], Tensor] | None = None) -> Encoded:
        """Encode all images, each process its share. Raises `UserError` where fewer than 2 can be read.

        Args:
            change: makes other images of uint8 images (B, C, H, W) and their indices (B,), which are encoded.
        """
        (rank, world), pixels, rows = rank_and_world(), SetHash(), []
        with progress(len(self.chosen), "encoding", "img", rank == 0) as bar:
            for batch in self._batches(self.chosen[rank::world]):
                shown = change(batch.images, batch.indices) if change else batch.images
                pixels.add_images(shown, batch.labels)
                rows.append((batch.indices, self.generator.encode(shown), batch.labels))
                bar.update(len(batch.indices) * world)
        rows = [row for part in gather_objects(rows) for row in part]
        if sum(len(row[0]) for row in rows) < 2:
            raise UserError(f"--data: {self.config.data} has fewer than 2 images to measure; give more")
        indices, codes, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))
        order = indices.argsort()
        given = labels[order].tolist() if self.classes else [ABSENT] * len(order)
        found, texts = indices[order], list[str]()
        if (part := self.generator.conditioning.text) and self.dataset.captions:
            texts = [part.readable([self.dataset.captions[index]])[0] for index in found.tolist()]
        return Encoded(found, codes[order], given, pixels.over_processes().hexdigest(), texts)

    def pixels(self, encoded: Encoded) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The images of this process's rows, its `shares` of `encoded`: rows (B,), uint8 images (B, C, H, W), indices
        in the data (B,)."""
        # Not the share that it encoded: rows are of intact images alone.
        for batch in self._batches(encoded.indices[list(shares(len(encoded)))].tolist()):
            yield torch.searchsorted(encoded.indices, batch.indices), batch.images, batch.indices

    def _batches(self, indices: Sequence[int]) -> Iterator[Batch]:
        return ordered_batches(self.dataset, indices, self.config.batch_size)


def perceptual_of(config: PicturesConfig, device: torch.device) -> PerceptualDistance | None:
    """The network of LPIPS, where weights are named. Raises `UserError`."""
    weights = config.perceptual_weights
    return PerceptualDistance(config.perceptual_net, weights).to(device) if weights else None


@torch.inference_mode()
def lpips(perceptual: PerceptualDistance, images: Tensor, targets: Tensor, device: torch.device) -> Tensor:
    """LPIPS of pairs of uint8 images (B, C, H, W) -> (B,)."""
    return perceptual(*(to_float(each.to(device)) for each in (images, targets)))


class Columns:
    """Values of images by name, added batch by batch in this process, averaged over the images of all processes."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add the values (B,) of a batch."""
        self.values.setdefault(name, []).append(values.double().cpu())

    def all(self) -> dict[str, Tensor]:
        """Name -> float64 (n,), the images of process 0 first."""
        parts = gather_objects({name: torch.cat(values) for name, values in self.values.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}

    def means(self) -> dict[str, float]:
        """Name -> the mean over the images of all processes."""
        return {name: values.mean().item() for name, values in self.all().items()}


@dataclass(frozen=True)
class Neighbours:
    """Pairs of neighbouring pixels of images (H, W)."""

    right: Tensor
    """bool (H, W-1): pixels with the one on their right."""
    below: Tensor
    """bool (H-1, W): pixels with the one below."""

    @classmethod
    def where(cls, values: Tensor, chosen: Callable[[Tensor, Tensor], Tensor]) -> "Neighbours":
        """The pairs of which `chosen` is true for their two values (H, W)."""
        return cls(chosen(values[:, :-1], values[:, 1:]), chosen(values[:-1], values[1:]))

    def __and__(self, other: "Neighbours") -> "Neighbours":
        return Neighbours(self.right & other.right, self.below & other.below)

    def __bool__(self) -> bool:
        return bool(self.right.any() or self.below.any())

    def step(self, images: Tensor) -> Tensor:
        """Mean absolute difference of the pairs in images uint8 (B, C, H, W) -> (B,), of 255."""
        values = images.double().cpu()
        right = (values[..., :, 1:] - values[..., :, :-1]).abs()[..., self.right]
        below = (values[..., 1:, :] - values[..., :-1, :]).abs()[..., self.below]
        return torch.cat([right, below], -1).flatten(1).mean(1)


def shares(count: int) -> Sequence[int]:
    """This process's share of `count` rows."""
    rank, world = rank_and_world()
    return range(rank, count, world)
