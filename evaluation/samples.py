"""Samples against a data set: how far the one set of images lies from the other."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from vqgen.artifact import load_artifact, save_artifact
from vqgen.config import values_of
from vqgen.devices import find_device, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import read_json
from vqgen.options import at_least
from vqgen.progress import progress
from vqgen.sampling.generator import Generator
from vqgen.sampling.output import FINISHED, UNFINISHED
from vqgen.sampling.settings import SamplingSettings
from vqgen.seeding import epoch_slice, fixed_subset
from vqgen.tokenizer.data.dataset import ImageDataset, open_images, ordered_batches
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import Files, Source, open_source

from .classifier import Classifier
from .distances import Statistics, figures, statistics
from .extractors import Extractor, Network, PixelHash, extractor_for
from .measurement import Collected, Measured, check_weights_are_used, everywhere, many, rank_and_world, warn
from .receipt import environment

Streamed = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Batches of indices, uint8 images and labels."""


@dataclass
class SamplesConfig:
    """Which samples are judged, and by what."""

    data: str = ""
    """Real images to compare with: as for vqgen-train-tokenizer."""
    samples: Path | None = None
    """Folder that vqgen-sample wrote, or any folder of images; or --model."""
    model: Path | None = None
    """Prior to draw from; nothing is written but the receipt."""
    n: int = 0
    """Samples to judge, the first ones that vqgen-sample drew, or some from all over another folder; 0 = all of
    --samples, 10,000 of --model."""
    split: Literal["train", "heldout"] = "train"
    """Which of the real images."""
    reference_n: int = 0
    """Real images to compare with, the same ones from all over the set; 0 = all."""
    fit: Literal["crop", "pad"] | None = None
    """How real images are brought to the size of --samples; by default cropped. Of --model, as its tokenizer does."""
    at: list[int] = field(default_factory=list)
    """Also give the figures of so many samples, the first ones: distances depend on the number."""
    output: Path = Path("receipt.json")
    """The receipt; one that is there is replaced."""
    extractor: Literal["none"] | Network = "inception"
    """Network whose features are compared: inception for FID, fd-vgg16 where there is no way to download that one, or
    none, for --classifier alone."""
    weights: str | None = None
    """Weights of --extractor: a local file, or download."""
    classifier: Path | None = None
    """Classifier that `vqgen-eval classifier` trained: how many samples it takes for the class they were drawn as."""
    cache: Path = Path("~/.cache/vqgen/references")
    """Folder where the features of real images are kept for the next time."""
    seed: int = 0
    """Of --model."""
    holdout: float = 0.05
    """Share of the images held out where the source has no held-out split of its own."""
    batch_size: int = 64
    """Images at once."""
    workers: int = 0
    """Processes that decode images; -1 takes one per free core."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of --model; features are computed in float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        at_least(self, n=0, batch_size=1, reference_n=0)
        if self.extractor != "none" and not self.data:
            raise UsageError("--data: needed, the real images to compare with; or --extractor none")
        if (self.samples is None) == (self.model is None):
            raise UsageError("--samples or --model: give one of them, the samples or the prior to draw them from")
        if self.extractor == "none" and self.classifier is None:
            raise UsageError("--extractor: found none and no --classifier, so there is nothing to measure; give one")
        if self.samples is not None:
            drawing = {"seed": 0, "precision": "auto", **values_of(SamplingSettings())}
            given = {"seed": self.seed, "precision": self.precision, **values_of(self.sampling)}
            other = next((name for name in drawing if given[name] != drawing[name]), None)
            if other:
                option = other.replace("_", "-")
                raise UsageError(f"--{option}: found {given[other]} with --samples, which are drawn; leave it out")
        elif self.fit:
            raise UsageError(f"--fit: found {self.fit} with --model, whose tokenizer says it; leave it out")
        check_weights_are_used(self.extractor, self.weights)
        if any(count < 2 for count in self.at):
            raise UsageError(f"--at: found {min(self.at)}, expected at least 2")


@dataclass
class Reference:
    """Real images as far as figures need them, and the fingerprint of their pixels."""

    statistics: Statistics
    pixels: str


def _contents(source: Source, chosen: Sequence[int]) -> str:
    """A fingerprint of encoded images and their labels, by all processes together; much sooner had than of pixels."""
    rank, world = rank_and_world()
    found = PixelHash()
    for index in chosen[rank::world]:
        try:
            data = source.read(index)
        except OSError:  # broken, as it will be found again where it is decoded
            data = b""
        found.add_one(b"%d\n" % source.labels[index] + data)
    return found.join(everywhere(found)).hexdigest()


def _kept(folder: Path) -> Reference | None:
    """What --cache holds, as the main process finds it; None where it has to be made."""
    found: list[Reference | None] = [None]
    if rank_and_world()[0] == 0 and folder.is_dir():
        try:
            kept = load_artifact(folder, "reference")
            held, about = kept.tensors, kept.description
            moments = Statistics(int(about["count"]), held["mean"], held["covariance"], held["features"])
            found = [Reference(moments, str(about["pixels"]))]
        except (UserError, KeyError, ValueError, TypeError) as error:
            warn(f"{folder} is damaged and made again ({error})")
    if dist.is_initialized():
        dist.broadcast_object_list(found, 0)
    return found[0]


def reference(config: SamplesConfig, images: ImageConfig, extractor: Extractor, device: torch.device) -> Reference:
    """Features of the real images at the samples' size, from --cache where they have been made before."""
    dataset = open_images(config.data, config.split, images)
    count = many(config.reference_n, len(dataset), "--reference-n", f"the {config.split} split of {config.data}")
    if count < 2:
        raise UsageError(f"--data: {config.data} holds {count} {config.split} image; a distance needs at least 2")
    dataset.broken.report = warn
    chosen, shape = fixed_subset(count, len(dataset)), [images.size, images.channels, images.fit]
    contents = _contents(dataset.source, chosen)
    key = json.dumps(["reference 2", contents, shape, extractor.name, extractor.fingerprint])
    folder = config.cache.expanduser() / hashlib.sha256(key.encode()).hexdigest()[:32]
    kept = _kept(folder)
    if kept is not None:
        return kept
    rank, world = rank_and_world()
    found, pixels = Collected(extractor, device), PixelHash()
    with progress(count, "real images", "img", rank == 0) as bar:
        for batch in ordered_batches(dataset, chosen[rank::world], config.batch_size, images):
            found.add(batch.indices, batch.images)
            pixels.add(batch.images, batch.labels)
            bar.update(len(batch.images) * world)
    made = statistics(found.joined()["features"])
    whole = pixels.join(everywhere(pixels))
    if rank == 0:
        tensors = {"mean": made.mean, "covariance": made.covariance, "features": made.features}
        save_artifact(folder, "reference", {"count": made.count, "pixels": whole.hexdigest()}, tensors)
    return Reference(made, whole.hexdigest())


def open_samples(folder: Path, config: SamplesConfig) -> tuple[ImageDataset, list[str] | None]:
    """The images of a folder, all of one size, and the names of their classes. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"--samples: {folder} is no folder; name one that vqgen-sample wrote, or one of images")
    path = folder / FINISHED
    if path.is_file():
        about = read_json(path)
        try:
            names = [str(image["file"]) for image in about["images"]]
            labels = np.array([int(image["label"]) for image in about["images"]], dtype=np.int64)
            classes = about["class_names"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no list of samples ({error!r}); draw them again") from error
        mark = hashlib.sha256("\n".join(names).encode()).hexdigest()
        source = Source(str(folder), Files(folder, names), np.arange(len(names)), labels, classes, mark)
    elif (folder / UNFINISHED).is_file():
        raise UserError(f"--samples: {folder} is not drawn to its end; run the same vqgen-sample again")
    else:
        source = open_source(str(folder), "all", config.holdout)
        order = epoch_slice(len(source), 0, 0, len(source))  # the first ones of a class are no sample of all
        source = replace(source, rows=source.rows[order], labels=source.labels[order])
    if not len(source):
        raise UserError(f"--samples: {folder} holds no images")
    size, grey = _size_and_grey(source, 0)
    for index in range(1, len(source)):
        other, also = _size_and_grey(source, index)
        if other != size:
            found, first = "x".join(map(str, other)), "x".join(map(str, size))
            name = source.item_name(index)
            raise UserError(f"--samples: {name} has {found} pixels, others {first}; give images of one size")
        grey &= also
    images = ImageConfig([size[1], size[0]], 1 if grey else 3, config.fit or "crop", broken="error", cache_mb=0)
    images.workers = config.workers
    return ImageDataset(source, images), source.class_names


def _size_and_grey(source: Source, index: int) -> tuple[tuple[int, int], bool]:
    """Width and height as it is shown, and whether it has no colour, by the head of an image alone."""
    try:
        with Image.open(BytesIO(source.read(index))) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            width, height = image.size
            return (height, width) if turned else (width, height), image.mode in ("1", "L", "I;16")
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--samples: {source.item_name(index)} cannot be read ({error}); remove it") from error


def measure_samples(config: SamplesConfig) -> Measured:
    """Compare samples with real images. Raises `UserError`."""
    device = find_device(config.device)
    state = processes(cpu=device.type == "cpu")
    device = torch.device(state.device or device) if state.num_processes > 1 else device
    rank, world = state.process_index, state.num_processes
    generator, dataset = None, None
    if config.model is not None:
        generator = Generator.load(config.model, device, config.precision)
        generator.check(config.sampling)
        about, names = generator.tokenizer.config, generator.prior.conditioning.classes.names
        images, count = ImageConfig(list(about.image_size), about.channels, about.fit), config.n or 10_000
    else:
        assert config.samples is not None
        dataset, names = open_samples(config.samples, config)
        images, count = dataset.config, many(config.n, len(dataset), "--n", str(config.samples))
    if count < 2:
        raise UsageError(f"--n: found {count}, but a distance needs at least 2 samples; give more")
    for fewer in config.at:
        many(fewer, count, "--at", "the set of samples")
    extractor = None if config.extractor == "none" else extractor_for(config.extractor, config.weights, device)
    classifier = None
    if config.classifier is not None:
        classifier = Classifier.load(config.classifier, device)
        fits = classifier.config
        if [fits.class_names, fits.size, fits.channels] != [names, images.size, images.channels]:
            raise UserError(
                f"--classifier: {config.classifier} knows {fits.class_names} at {fits.size}x{fits.channels}, the "
                f"samples are {names} at {images.size}x{images.channels}; train one for them"
            )
    given = ImageConfig(images.size, images.channels, images.fit, holdout=config.holdout, cache_mb=0)
    given.workers = config.workers
    real = reference(config, given, extractor, device) if extractor else None

    def streamed() -> Streamed:
        mine = range(rank, count, world)
        if generator is None:
            assert dataset is not None
            for batch in ordered_batches(dataset, mine, config.batch_size, images):
                yield batch.indices, batch.images, batch.labels
            return
        for start in range(0, len(mine), config.batch_size):
            some = mine[start : start + config.batch_size]
            drawn = generator.draw(some, None, config.sampling, config.seed, config.batch_size)
            yield torch.tensor(some), drawn.images, drawn.labels

    found, pixels = Collected(extractor, device, classifier), PixelHash()
    with progress(count, "samples", "img", rank == 0) as bar:
        for indices, shown, labels in streamed():
            found.add(indices, shown, labels)
            pixels.add(shown, labels)
            bar.update(len(shown) * world)
    rows, whole = found.joined(), pixels.join(everywhere(pixels))
    labelled = int((rows["right"] >= 0).sum()) if "right" in rows else 0

    def judged(number: int) -> dict[str, Any]:
        first = {name: value[:number] for name, value in rows.items()}
        result: dict[str, Any] = {}
        if extractor and real:
            these = statistics(first["features"])
            result = figures(these, real.statistics, extractor.name, extractor.kernel, first.get("logits"))
        if "right" in first:
            known = first["right"][first["right"] >= 0]
            if not len(known):
                raise UserError(f"--classifier: none of the first {number} samples has a class; leave it out")
            result["classifier_accuracy"] = float(known.double().mean())
        return result

    result = judged(count)
    if config.at:
        result["at"] = {str(number): judged(number) for number in sorted(config.at)}
    return Measured(
        {
            "samples": whole.hexdigest(),
            "data": real.pixels if real else None,
            "extractor": extractor.fingerprint if extractor else None,
            "prior": generator.prior.fingerprint if generator else None,
            "tokenizer": generator.tokenizer.fingerprint if generator else None,
            "classifier": classifier.fingerprint if classifier else None,
        },
        {
            "samples": whole.count,
            "real images": real.statistics.count if real else 0,
            **({"samples of a class": labelled} if 0 < labelled < whole.count else {}),
        },
        result,
        environment(device, generator.precision if generator else "fp32", world),
    )
