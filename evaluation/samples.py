"""Samples compared with real images, and with the classes they were drawn as."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor

from vqgen.devices import on_main, rank_and_world
from vqgen.errors import UsageError, UserError, data_named
from vqgen.files import read_record
from vqgen.progress import progress
from vqgen.sampling.generator import Generator
from vqgen.sampling.output import FINISHED, UNFINISHED
from vqgen.sampling.oversample import batches
from vqgen.seeding import epoch_slice
from vqgen.tokenizer.data.dataset import ImageDataset, ordered_batches
from vqgen.tokenizer.data.decoding import BrokenImage, read_size
from vqgen.tokenizer.data.items import Files
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import Source, open_source

from .classifier import ACCURACY, Classifier
from .distances import DISTANCES, compute_distances
from .extractors import extract, extractor_for
from .features import FeatureSets, reduce_sum
from .measurement import Measurement, SetHash, check_count, reading, start_processes
from .options import SamplesConfig
from .receipt import environment
from .reference import measure_reference

METRICS = {metric.name: metric for metric in (*chain(*DISTANCES.values()), ACCURACY)}
DRAWN = 10_000  # samples drawn from --model unless --n says otherwise
Batches = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Batches of positions (B,), uint8 images (B, C, H, W) and labels (B,), -1 for none."""


@dataclass(frozen=True)
class _Image:
    file: str
    label: Annotated[int, Interval(ge=-1, lt=2**31)]

    def __post_init__(self) -> None:
        if not self.file or Path(self.file).is_absolute() or ".." in Path(self.file).parts:
            raise ValueError(f"{self.file[:80]!r} is no file of the folder")


@dataclass(frozen=True)
class _Samples:
    """What an evaluation reads of samples.json."""

    images: list[_Image]
    class_names: list[str] | None
    fit: Literal["crop", "pad"] | None = None
    """How the tokenizer's training images were fitted; lists of earlier versions do not say."""


class Reading(Protocol):
    """Options by which images of a folder are read."""

    fit: Literal["crop", "pad"] | None
    workers: int


def open_samples(folder: Path, config: Reading) -> tuple[ImageDataset, list[str] | None]:
    """Open the images of a folder, all of one size, with the names of their classes. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"--samples: {folder} is no folder; name one that vqgen-sample wrote, or one of images")
    path, fitted = folder / FINISHED, config.fit
    if path.is_file():
        about = read_record(path, _Samples)
        names, classes = [image.file for image in about.images], about.class_names
        fitted = fitted or about.fit
        labels = np.array([image.label for image in about.images], dtype=np.int64)
        if classes and labels.max(initial=-1) >= len(classes):
            raise UserError(f"{path} has the label {labels.max()} of {len(classes)} classes; draw the samples again")
        mark = hashlib.sha256("\n".join(names).encode()).hexdigest()
        source = Source(str(folder), Files(folder, names), np.arange(len(names)), labels, classes, mark)
    elif (folder / UNFINISHED).is_file():
        raise UserError(f"--samples: {folder} is not complete; run the same vqgen-sample again")
    else:
        with data_named("--samples"):
            source = open_source(os.path.abspath(folder), "all", ImageConfig.holdout)
        order = epoch_slice(len(source), 0, 0, len(source))  # a folder of classes lists one class after the other
        source = replace(source, rows=source.rows[order], labels=source.labels[order])
    if not len(source):
        raise UserError(f"--samples: {folder} holds no images")
    size, grey = _size_and_grey(source, 0)
    for index in range(1, len(source)):
        other, other_grey = _size_and_grey(source, index)
        if other != size:
            found, first = "x".join(map(str, other)), "x".join(map(str, size))
            name = source.item_name(index)
            raise UserError(f"--samples: {name} has {found} pixels, others {first}; give images of one size")
        grey &= other_grey
    images = ImageConfig(size, 1 if grey else 3, fitted or "crop", broken="error", cache_mb=0)
    images.workers = config.workers
    return ImageDataset(source, images, option="--samples"), source.class_names


def _size_and_grey(source: Source, index: int) -> tuple[list[int], bool]:
    """Height and width of an image, and whether it is grey."""
    try:
        height, width, grey = read_size(source.read(index))
        return [height, width], grey
    except (OSError, BrokenImage) as error:
        raise UserError(f"--samples: {source.item_name(index)} cannot be read ({error}); remove it") from error


def draw_samples(generator: Generator, config: SamplesConfig, count: int) -> Batches:
    """Draw this process's share of images 0 to `count` - 1, each oversampling group once."""
    rank, world = rank_and_world()
    cycle = generator.conditioning.cycle(generator.conditioning.conditions())
    shares = batches(range(count), cycle, config.sampling.oversample, config.batch_size)
    for indices in shares[rank::world]:
        drawn = generator.draw(indices, None, config.sampling, config.seed, config.batch_size)
        yield torch.tensor(indices), drawn.images, drawn.labels


def read_samples(dataset: ImageDataset, config: SamplesConfig, count: int) -> Batches:
    """Read this process's share of the first `count` images."""
    rank, world = rank_and_world()
    for batch in ordered_batches(dataset, range(rank, count, world), config.batch_size):
        yield batch.indices, batch.images, batch.labels


def load_classifier(folder: Path, names: list[str] | None, images: ImageConfig, device: torch.device) -> Classifier:
    """Read a classifier for samples of these classes and this size. Raises `UserError`."""
    classifier = Classifier.load(folder, device)
    fits = classifier.config
    if [fits.class_names, fits.size, fits.channels] != [names, images.size, images.channels]:
        theirs = f"{fits.class_names} at {fits.size}x{fits.channels}"
        ours = f"{names} at {images.size}x{images.channels}"
        raise UserError(f"--classifier: {folder} is for classes {theirs}, the samples are {ours}; train one for them")
    return classifier


def measure_samples(config: SamplesConfig) -> Measurement:
    """Compare samples with real images, and classify them. Raises `UserError`."""
    device = start_processes(config.device)
    rank, world = rank_and_world()
    generator = None
    if config.model is not None:
        generator = Generator.load(config.model, device, config.precision)
        generator.check(config.sampling, generator.conditioning.conditions())
        if generator.conditioning.text is not None:
            text = f"{config.model} reads captions, and all its images would be drawn without"
            advice = "draw them with vqgen-sample --prompt-file, and give that folder as --samples"
            raise UsageError(f"--model: {text}; {advice}")
        about, names = generator.tokenizer.config, generator.prior.conditioning.classes.names
        images, count = ImageConfig(list(about.image_size), about.channels, about.fit), config.n or DRAWN
        stream, classes = draw_samples(generator, config, count), np.array(generator.conditioning.classes.default())
    else:
        dataset, names = open_samples(cast(Path, config.samples), config)
        images, count = dataset.config, check_count(config.n, len(dataset), "--n", str(config.samples))
        stream, classes = read_samples(dataset, config, count), dataset.source.labels
    network = config.extractor
    if count < 2 and network != "none":
        raise UsageError(f"--n: found {count}, but a distance needs at least 2 samples; give more")
    for fewer in config.at:
        check_count(fewer, count, "--at", "the set of samples")
    least = min(config.at, default=count)
    if config.classifier and not (classes[:least] >= 0).any():
        raise UserError(f"--classifier: none of the first {least} samples has a class; leave it out")
    extractor = None if network == "none" else extractor_for(network, config.weights, device)
    classifier = load_classifier(config.classifier, names, images, device) if config.classifier else None
    real = None
    if extractor:
        whole = reading(config, images.size, images.channels, images.fit)
        real = measure_reference(config, whole, extractor, device)

    counts, pixels = sorted({*config.at, count}), SetHash()
    sets = FeatureSets(extractor.size, device, counts, extractor.classes) if extractor else None
    bounds = torch.tensor(counts)
    classified = torch.zeros(len(counts), 2, dtype=torch.long)  # correct, and with a class, between two counts
    with progress(count, "samples", "img", rank == 0) as bar:
        for positions, shown, labels in stream:
            if extractor and sets:
                sets.add(positions, *extract(extractor, shown, device))
            if classifier:
                known = labels >= 0
                rows = torch.stack([(classifier.choose(shown) == labels) & known, known], 1).long()
                classified.index_add_(0, torch.bucketize(positions, bounds, right=True), rows)
            pixels.add_images(shown, labels)
            bar.update(len(shown) * world)
    pixels = pixels.over_processes()
    statistics = sets.reduce(rank == 0) if sets else {}
    classified = reduce_sum(classified, device).cumsum(0)

    def metrics_of(number: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if real and real.statistics and network != "none":
            result = compute_distances(statistics[number], real.statistics, network)
        if classifier:
            correct, labelled = classified[counts.index(number)].tolist()
            result[ACCURACY.name] = correct / labelled
        return result

    def metrics_by_count() -> dict[str, Any]:
        at = {str(number): metrics_of(number) for number in sorted(config.at)}
        return metrics_of(count) | ({"at": at} if at else {})

    drawn = {"prior": generator.prior, "tokenizer": generator.tokenizer} if generator else {}
    networks = {"extractor": extractor, "prior": None, "tokenizer": None, **drawn, "classifier": classifier}
    marks = {name: network.fingerprint if network else None for name, network in networks.items()}
    number, labelled = {"samples": pixels.count, "real images": real.count if real else 0}, int(classified[-1, 1])
    return Measurement(
        {"samples": pixels.hexdigest(), "data": real.pixels if real else None, **marks},
        number | ({"samples of a class": labelled} if 0 < labelled < pixels.count else {}),
        on_main(metrics_by_count),
        environment(device, generator.precision if generator else "fp32", world),
    )
