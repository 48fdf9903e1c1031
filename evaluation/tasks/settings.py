"""Recommended sampling settings of a prior: a search on validation images."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vqgen.config import as_dict
from vqgen.devices import processes
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.classifier import Classifier, classifier_of
from vqgen.evaluation.measurement import Measurement, SetHash, is_shipped, reading, start_processes, warn
from vqgen.evaluation.options import SMALLEST, ClassifierTraining
from vqgen.evaluation.receipt import environment
from vqgen.evaluation.samples import load_classifier
from vqgen.files import DESCRIPTION, is_file, read_json
from vqgen.metric import Metric
from vqgen.prior.model import Prior
from vqgen.prior.options import GENERATION, RECOMMENDED
from vqgen.prior.parts.source import PairedSource
from vqgen.prior.parts.text import Text
from vqgen.progress import progress
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings, in_words, write_recommended
from vqgen.tokenizer.data.dataset import open_images, ordered_batches
from vqgen.tokenizer.data.options import ImageConfig

from .options import PARTS, SettingsConfig, least_classes

_METRICS = (
    Metric("class_kernel_distance", "Kernel distance within classes", "", "lower"),
    Metric("classifier_accuracy", "Classifier accuracy", "share of the samples", "higher"),
)
METRICS = {metric.name: metric for metric in _METRICS}
"""Of samples of each candidate. The distance is KID's (cubic kernel, unbiased) on the classifier's features, between
the samples of a class and the validation images of it, and its mean over the classes: samples of other classes raise
it, and so do samples that are too much alike. Without classes it is between tenths of both, and the classifier tells
how images are turned: its accuracy is the share of the samples that it takes for upright."""
LEAST = 2
"""Images of a class on each side; an unbiased distance needs them."""


def kernel_distances(
    samples: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, classes: Sequence[int]
) -> Tensor:
    """Squared maximum mean discrepancy of features (N, D) and (M, D) within each of the classes: float64 (len,).

    The kernel is that of KID (Binkowski et al. 2018), (x y / D + 1)^3, the estimate unbiased.
    """

    def mean(one: Tensor, other: Tensor, same: bool) -> Tensor:
        values = (one @ other.T / one.shape[1] + 1) ** 3
        return (values.sum() - values.trace()) / (len(one) * (len(one) - 1)) if same else values.mean()

    samples, real, found = samples.double(), real.double(), []
    for label in classes:
        x, y = samples[labels == label], real[real_labels == label]
        found.append(mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    return torch.stack(found)


def best_of(distances: list[Tensor], accuracies: list[float]) -> int:
    """The candidate of the least mean distance; of those no farther from it than the standard error of their difference
    over the classes, the one of the highest accuracy. Distances are by class, (classes,)."""
    least = min(range(len(distances)), key=lambda i: distances[i].mean().item())

    def tied(i: int) -> bool:
        difference = distances[i] - distances[least]
        return i == least or bool(difference.mean() <= difference.std() / len(difference) ** 0.5)

    return max(filter(tied, range(len(distances))), key=lambda i: (accuracies[i], i == least))


def candidates(config: SettingsConfig, guidable: bool = True) -> list[SamplingSettings]:
    """All combinations of the values to try; without guidance there is no schedule, and where the prior is not guided
    by classes no guidance that nobody asked for."""
    asked = guidable or (config.stated is not None and "guidance_scale" in config.stated)
    scales = config.guidance_scale if asked else [1.0]
    if set(scales) == {1.0} and config.stated is not None and "guidance_schedule" in config.stated:
        text = "has no effect, as no guidance is tried; leave it out, or give --guidance-scale"
        raise UsageError(f"--guidance-schedule: {text}")
    combinations = itertools.product(config.temperature, scales, config.guidance_schedule, config.min_p, config.top_p)
    found: dict[str, SamplingSettings] = {}
    for temperature, scale, schedule, min_p, top_p in combinations:
        settings = SamplingSettings(
            temperature=temperature,
            guidance_scale=scale,
            guidance_schedule="constant" if scale == 1 else schedule,
            min_p=min_p,
            top_p=top_p,
        )
        found.setdefault(name_of(settings), settings)
    return list(found.values())


def name_of(settings: SamplingSettings) -> str:
    """The options that differ from plain sampling, as words of the command line."""
    plain = vars(SamplingSettings())
    return in_words({name: value for name, value in vars(settings).items() if value != plain[name]}) or "plain"


def check_folder(folder: Path) -> None:
    """Raise `UserError` where a folder is not that of a prior, or is of the package, or holds a generation_config.json
    that vqgen did not write."""
    if not is_file(folder / DESCRIPTION):
        text = f"{folder} holds no {DESCRIPTION}; settings are written into the prior's folder, so name that"
        raise UserError(f"--model: {text}")
    if is_shipped(folder):
        text = f"{folder} is in the installed package, where no settings belong"
        raise UsageError(f"--model: {text}; copy it, and name the copy")
    path = folder / GENERATION
    if is_file(path) and RECOMMENDED not in read_json(path):
        raise UserError(f"{path} is not of vqgen; move it elsewhere")


def write_choice(config: SettingsConfig, found: Measurement) -> None:
    """Write the best settings of a search into the prior's folder."""
    settings = SamplingSettings(**found.details["chosen"])
    write_recommended(config.model, settings, Prior.load(config.model).generation_config())
    print(f"recommended: {name_of(settings)}; written to {config.model / GENERATION}")


def measure_settings(config: SettingsConfig) -> Measurement:
    """Draw samples with each candidate, compare them with validation images, and choose. Raises `UserError`."""
    if processes().num_processes > 1:
        raise UsageError("vqgen-eval settings runs in one process; start it without accelerate launch")
    device = start_processes(config.device)
    generator = Generator.load(config.model, device, config.precision)
    about = generator.tokenizer.config
    read = reading(config, about.image_size, about.channels, about.fit)
    classes = generator.conditioning.classes
    tried = candidates(config, classes.count > 1 and classes.guidable)
    for settings in tried:
        generator.check(settings, generator.conditioning.conditions())
    heldout = open_images(config.data, "heldout", read)
    heldout.broken.report = warn
    judge = _judge(config, generator, heldout.class_names, read, device)
    pixels, features = SetHash(), []
    for batch in ordered_batches(heldout, range(len(heldout)), config.batch_size):
        pixels.add_images(batch.images, batch.labels)
        features.append((judge.classifier.judge(batch.images)[1], batch.labels))
    real, labels = (torch.cat(side) for side in zip(*features, strict=True))
    groups = judge.groups(labels)
    compared = judge.compared(groups, config.n)
    distances, accuracies = [], []
    with progress(len(tried) * config.n, "samples", "img", True) as bar:
        for settings in tried:
            drawn, accuracy, theirs = _judged(generator, judge, settings, config, bar.update)
            distances.append(kernel_distances(drawn, theirs, real, groups, compared))
            accuracies.append(accuracy)
    names = [name_of(settings) for settings in tried]
    chosen = best_of(distances, accuracies)
    return Measurement(
        {
            "prior": generator.prior.fingerprint,
            "tokenizer": generator.tokenizer.fingerprint,
            "classifier": judge.classifier.fingerprint,
            "data": pixels.hexdigest(),
        },
        {"samples": config.n, "settings": len(tried), "real images": len(labels)},
        {
            "class_kernel_distance": {name: value.mean().item() for name, value in zip(names, distances)},
            "classifier_accuracy": dict(zip(names, accuracies)),
        },
        environment(device, generator.precision, 1),
        {"chosen": as_dict(tried[chosen]), "not_compared": judge.others(compared)},
    )


@dataclass(frozen=True)
class Judge:
    """What the samples of a prior are judged by."""

    classifier: Classifier
    """Of the prior's classes; without any, of how images are turned."""
    names: list[str]
    """Of the groups of images within which samples are compared with real ones."""
    classes: bool
    """Whether these are the classes."""

    def groups(self, labels: Tensor) -> Tensor:
        """The groups of images with these classes, (n,)."""
        return labels if self.classes else torch.arange(len(labels)) % PARTS

    def correct(self, chosen: Tensor, labels: Tensor) -> Tensor:
        """Whether the classifier's choices (n,) are right of images with these classes."""
        return chosen == (labels if self.classes else 0)

    def compared(self, groups: Tensor, n: int) -> list[int]:
        """The groups that have enough of the real images, which are of these groups.

        Raises `UserError` where those are fewer than two classes or than half of them, or a group has too few of `n`
        samples.
        """
        wanted = least_classes(len(self.names)) if self.classes else len(self.names)
        found = [group for group in range(len(self.names)) if int((groups == group).sum()) >= LEAST]
        if n < LEAST * len(self.names) or len(found) < wanted:
            count, least = len(self.names), LEAST * len(self.names)
            text = f"{len(groups)} validation images and --n {n} samples, expected at least {least} on both sides"
            if self.classes:
                text = f"{len(found)} of {count} classes with {LEAST} validation images, and --n {n}"
                text += f", expected at least {math.ceil(wanted)} such classes, and --n {least}"
            raise UserError(f"--data: found {text}")
        if others := self.others(found):
            warn(f"not compared: {', '.join(others)}, with fewer than {LEAST} validation images")
        return found

    def others(self, compared: Sequence[int]) -> list[str]:
        """Names of the groups that are not compared."""
        return [name for group, name in enumerate(self.names) if group not in compared]


def _judge(
    config: SettingsConfig, generator: Generator, names: list[str] | None, reading: ImageConfig, device: torch.device
) -> Judge:
    """What samples are judged by, of data with classes of these names. Raises `UserError`, `UsageError`."""
    classes = generator.conditioning.classes
    if classes.count > 1 and generator.conditioning.text:
        text = f"{config.model} is for images with captions, and the search draws them without"
        raise UsageError(f"--model: {text}; compare settings by `vqgen-eval text`")
    if classes.count < 2:
        if others := [part.option for part in generator.conditioning.parts if isinstance(part, (Text, PairedSource))]:
            text = f"{config.model} is for images with {' and '.join(others)}"
            raise UsageError(f"--model: {text}, which have no classes to judge them by")
        if config.classifier:
            text = f"{config.model} has no classes that a classifier could tell apart"
            raise UsageError(f"--classifier: found {config.classifier}, but {text}; leave it out")
        return Judge(_trained_classifier(config, reading, device, turned=True), [str(n) for n in range(PARTS)], False)
    if names != classes.names:
        theirs = ", ".join(names or []) or "none"
        raise UserError(f"--data: {config.data} has the classes {theirs}, the prior {', '.join(classes.names or [])}")
    if config.classifier:
        classifier = load_classifier(config.classifier, classes.names, reading, device)
    else:
        classifier = _trained_classifier(config, reading, device)
    return Judge(classifier, classes.names or [], True)


def _trained_classifier(
    config: SettingsConfig, reading: ImageConfig, device: torch.device, turned: bool = False
) -> Classifier:
    """A classifier of the images of the train split, fitted as those that are measured are; see `classifier_of`."""
    if min(reading.size) < SMALLEST:
        size = "x".join(map(str, reading.size))
        text = f"{config.model} draws images of {size} pixels, and a classifier needs {SMALLEST} a side"
        raise UsageError(f"--model: {text}; its settings cannot be searched for")
    images = replace(reading, flip=config.flip, cache_mb=ImageConfig.cache_mb)
    train = open_images(config.data, "train", images, augment=True, replace_broken=True)
    train.broken.report = warn
    training = ClassifierTraining(
        data=config.data,
        output=config.model,
        size=images.size,
        channels=images.channels,
        steps=config.classifier_steps,
        seed=config.seed,
    )
    return classifier_of(train, training, device, turned, "give another seed")


def _judged(
    generator: Generator,
    judge: Judge,
    settings: SamplingSettings,
    config: SettingsConfig,
    advance: Callable[[int], object],
) -> tuple[Tensor, float, Tensor]:
    """Features (n, D) of samples, the share that the classifier is right about, and their groups (n,)."""
    rows = []
    for first in range(0, config.n, config.batch_size):
        part = range(first, min(first + config.batch_size, config.n))
        drawn = generator.draw(part, None, settings, config.seed, config.batch_size)
        chosen, features = judge.classifier.judge(drawn.images)
        rows.append((features, judge.correct(chosen, drawn.labels), drawn.labels))
        advance(len(part))
    features, correct, labels = (torch.cat(side) for side in zip(*rows, strict=True))
    return features, correct.double().mean().item(), judge.groups(labels)
