"""Classification accuracy score (Ravuri and Vinyals 2019): what classifiers learn from samples alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqgen.devices import processes
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.classifier import ClassifierConfig, fit_classifier, shuffled_batches
from vqgen.evaluation.measurement import Measurement, SetHash, check_count, reading, start_processes, warn
from vqgen.evaluation.options import SMALLEST
from vqgen.evaluation.receipt import environment
from vqgen.evaluation.samples import open_samples
from vqgen.metric import Metric
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.data.dataset import ImageDataset, open_images, ordered_batches
from vqgen.tokenizer.model import Tokenizer

from .options import AccuracyConfig

_METRICS = (
    Metric("cas", "Accuracy on real images, trained on", "", "higher"),
    Metric("cas_share", "Accuracy over that of real training images", "", "higher"),
    Metric("cas_by_class", "Accuracy by class, trained on", "", "higher"),
)
METRICS = {metric.name: metric for metric in _METRICS}
"""`cas` is the accuracy on the same real images of classifiers trained on `samples`, on as many real images of the
train split (`real`), and on reconstructions of those (`reconstructions`), each the mean over the seeds. `cas_by_class`
lacks classes of which no image is tested."""


@dataclass(frozen=True)
class Labelled:
    """Images in memory, uint8 (N, C, H, W), and their classes, int64 (N,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def read(cls, dataset: ImageDataset, indices: Iterable[int], what: str) -> "Labelled":
        """Read images of a dataset. Raises `UserError` where none of them has a class."""
        dataset.broken.report = warn
        parts = [(batch.images, batch.labels) for batch in ordered_batches(dataset, indices, 256)]
        images, labels = (torch.cat(side) for side in zip(*parts, strict=True))
        known = labels >= 0
        if not known.any():
            raise UserError(f"{what} has no classes; give images that have")
        return cls(images[known], labels[known])


def measure_accuracy(config: AccuracyConfig) -> Measurement:
    """Train classifiers on samples, real images and reconstructions, and test all on real ones. Raises `UserError`."""
    if processes().num_processes > 1:
        raise UsageError("vqgen-eval accuracy trains in one process; start it without accelerate launch")
    device = start_processes(config.device)
    drawn, names = open_samples(config.samples, config)
    if not names:
        raise UserError(f"--samples: {config.samples} has no classes; give samples that were drawn of classes")
    if min(drawn.config.size) < SMALLEST:
        size = "x".join(map(str, drawn.config.size))
        raise UsageError(
            f"--samples: {config.samples} has images of {size} pixels, expected at least {SMALLEST} a side"
        )
    read = reading(config, drawn.config.size, drawn.config.channels, drawn.config.fit)
    train, test = (open_images(config.data, split, read) for split in ("train", config.split))
    for other in (train, test):
        if sorted(other.class_names or []) != sorted(names):
            theirs = ", ".join(other.class_names or []) or "none"
            raise UserError(f"--data: {config.data} has the classes {theirs}, the samples {', '.join(names)}")
    if names != train.class_names:  # those of folders are in alphabetical order, those of tables in their own
        if len(set(names)) < len(names):
            raise UserError(f"--data: {config.data} has classes of equal names in another order than the samples")
        drawn_as, names = names, train.class_names or []
        order = torch.tensor([names.index(name) for name in drawn_as])
        drawn.labels = torch.where(drawn.labels < 0, drawn.labels, order[drawn.labels])
    count = check_count(config.n, len(drawn), "--n", str(config.samples))
    sets = {"samples": Labelled.read(drawn, range(count), f"--samples: {config.samples}")}
    count, labelled = len(sets["samples"].images), np.flatnonzero(train.source.labels >= 0)
    if count > len(labelled):
        text = f"the train split of {config.data} has {len(labelled)} images with a class, fewer than {count} samples"
        raise UsageError(f"--n: {text}; give {len(labelled)} or fewer")
    sets["real"] = Labelled.read(train, labelled[fixed_subset(count, len(labelled))].tolist(), f"--data: {config.data}")
    tokenizer = None
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer, device)
        if tokenizer.config.fit != read.fit:
            text = f"{config.tokenizer} was trained with --fit {tokenizer.config.fit}, the real images get {read.fit}"
            raise UserError(f"--tokenizer: {text}; give --fit {tokenizer.config.fit} where the samples were fitted so")
        sets["reconstructions"] = _reconstructed(sets["real"], tokenizer, config)
    tested = Labelled.read(test, range(len(test)), f"--data: {config.data}")
    correct = {
        name: [_correct(config, names, data, tested, seed, device, name) for seed in config.seeds]
        for name, data in sets.items()
    }
    means = {name: torch.stack(rows).double().mean(0) for name, rows in correct.items()}
    cas = {name: mean.mean().item() for name, mean in means.items()}
    by_class: dict[str, Any] = {
        name: {names[label]: mean[tested.labels == label].mean().item() for label in tested.labels.unique().tolist()}
        for name, mean in means.items()
    }
    seeds = {name: [row.double().mean().item() for row in rows] for name, rows in correct.items()}
    marks = {name: SetHash() for name in ("samples", "data")}
    for name, part in (("samples", "samples"), ("data", "real")):
        marks[name].add_images(sets[part].images, sets[part].labels)
    marks["data"].add_images(tested.images, tested.labels)
    return Measurement(
        {name: mark.hexdigest() for name, mark in marks.items()} | {"tokenizer": tokenizer and tokenizer.fingerprint},
        {"samples": len(sets["samples"].images), "real images": len(sets["real"].images), "tested": len(tested.images)},
        {"cas": cas, "cas_share": cas["samples"] / max(cas["real"], 1e-9), "cas_by_class": by_class},
        environment(device, "fp32", 1),
        {"seeds": seeds},
    )


def _reconstructed(real: Labelled, tokenizer: Tokenizer, config: AccuracyConfig) -> Labelled:
    """The same images as the tokenizer reconstructs them. Raises `UserError` where it is for others."""
    about, shape = tokenizer.config, real.images.shape[1:]
    if (about.channels, *about.image_size) != tuple(shape):
        ours, theirs = ("x".join(map(str, sides)) for sides in (shape, (about.channels, *about.image_size)))
        raise UserError(f"--tokenizer: {config.tokenizer} is for images of {theirs}, the samples have {ours}")
    parts = [tokenizer.reconstruct(part) for part in real.images.split(config.batch_size)]
    return Labelled(torch.cat(parts), real.labels)


def _correct(
    config: AccuracyConfig,
    names: list[str],
    data: Labelled,
    tested: Labelled,
    seed: int,
    device: torch.device,
    title: str,
) -> Tensor:
    """Train a classifier, and return which of the tested images it assigns to their class, bool (N,)."""
    described = ClassifierConfig(list(data.images.shape[2:]), data.images.shape[1], names, config.width)
    batches = shuffled_batches(data.images, data.labels, config.batch_size, seed, config.flip)
    model = fit_classifier(described, batches, config.steps, config.lr, seed, device, f"classifier of {title}")
    chosen = [model.choose(part) for part in tested.images.split(256)]
    return torch.cat(chosen) == tested.labels
