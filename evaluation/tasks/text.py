"""Text: whether captions are told apart, by images that are drawn of them and by the likelihood."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.devices import rank_and_world
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.extractors import Extractor, extract, extractor_for
from vqgen.evaluation.measurement import Measurement, SetHash, check_classes, reading, start_processes, warn
from vqgen.evaluation.receipt import environment
from vqgen.metric import Metric
from vqgen.prior.conditioning import Values
from vqgen.prior.parts.part import ABSENT
from vqgen.prior.parts.text import Text
from vqgen.progress import progress
from vqgen.sampling.generator import Generator
from vqgen.seeding import epoch_slice
from vqgen.tokenizer.data.dataset import ImageDataset, open_images, ordered_batches

from .images import Columns, shares
from .options import TextConfig

_METRICS = (
    Metric("reciprocal_rank", "Mean reciprocal rank of the right image", "", "higher"),
    Metric("median_rank", "Median rank of the right image", "", "lower"),
    Metric("first", "Right image ranked first", "share of the captions", "higher"),
)
METRICS = {metric.name: metric for metric in _METRICS}
"""Each has what is expected of chance (`chance`), and two ranks, from 1 on, among n images with n different captions.

`features`: the images are ordered by the similarity of their features with those of an image that is drawn of the
caption: the cosine after the mean feature of the n images is subtracted. `likelihood`: of an image, the captions are
ordered by the NLL of its codes given each, and the rank is that of its own. Ties count half.
"""


def rank(scores: Tensor, right: Tensor) -> Tensor:
    """The rank, from 1 on, of item `right` (B,) in each row of scores (B, n), higher first: float64 (B,)."""
    own = scores.gather(1, right[:, None])
    return 1 + (scores > own).sum(1).double() + ((scores == own).sum(1).double() - 1) / 2


def choose(dataset: ImageDataset, part: Text, config: TextConfig) -> list[int]:
    """Indices of `config.n` images whose captions differ for the prior, ascending. Raises `UserError`."""
    captions, found = dataset.captions or [], dict[tuple[int, ...], int]()
    for index in epoch_slice(len(dataset), 0, 0, len(dataset)).tolist():
        caption = captions[index]
        if caption and not part.tokenizer.rest(caption, part.length):
            found.setdefault(tuple(part.of_text(caption)), index)
        if len(found) == config.n:
            return sorted(found.values())
    text = f"found {config.n}, but the {config.split} split of {config.data} has {len(found)} different captions"
    raise UsageError(f"--n: {text} of at most {part.length} tokens; ask for fewer")


def measure_text(config: TextConfig) -> Measurement:
    """Rank images by what a prior draws of their captions, and captions by its likelihood. Raises `UserError`."""
    device, (_, world) = start_processes(config.device), rank_and_world()
    generator = Generator.load(config.model, device, config.precision)
    part = generator.conditioning.text
    if part is None:
        text = f"{config.model} was trained without text"
        raise UsageError(f"--model: {text}; give a prior trained on codes of vqgen-tokenize --text-column")
    extractor = None if config.extractor == "none" else extractor_for(config.extractor, config.weights, device)
    about = generator.tokenizer.config
    read = reading(config, about.image_size, about.channels, about.fit)
    dataset = open_images(config.data, config.split, read, text_column=config.text_column)
    dataset.broken.report = warn
    check_classes(generator.prior, dataset.class_names, config.unconditional, f"--data: {config.data}")
    classed = generator.conditioning.classes.count and not config.unconditional
    images, prompts, labels, pixels = [], list[str](), list[int](), SetHash()
    for batch in ordered_batches(dataset, choose(dataset, part, config), config.batch_size):
        images.append(batch.images)
        prompts += [(dataset.captions or [])[index] for index in batch.indices.tolist()]
        labels += batch.labels.tolist() if classed else [ABSENT] * len(batch.images)
        pixels.add_images(batch.images, torch.tensor(labels[-len(batch.images) :]))
    if len(prompts) < 2:
        raise UserError(f"--data: {config.data} has fewer than 2 images to measure; give more")
    true, ranks = torch.cat(images), Columns()
    given = generator.conditioning.conditions({"text": prompts, "class": labels}, absent=True)
    generator.check(config.sampling, given)
    _rank_by_likelihood(config, generator, true, given, ranks)
    if extractor:
        _rank_by_features(config, generator, true, given, extractor, ranks)
    found, n = ranks.all(), len(prompts)
    chance = {"reciprocal_rank": sum(1 / place for place in range(1, n + 1)) / n, "median_rank": (n + 1) / 2}
    metrics: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for name, values in found.items():
        metrics["reciprocal_rank"][name] = (1 / values).mean().item()
        metrics["median_rank"][name] = values.quantile(0.5).item()
        metrics["first"][name] = (values == 1).double().mean().item()
    for name, value in {**chance, "first": 1 / n}.items():
        metrics[name]["chance"] = value
    return Measurement(
        {
            "prior": generator.prior.fingerprint,
            "tokenizer": generator.tokenizer.fingerprint,
            "data": pixels.hexdigest(),
            "captions": hashlib.sha256(repr(prompts).encode()).hexdigest(),
            "extractor": extractor.fingerprint if extractor else None,
        },
        {"captions": n, "images drawn": n * config.per_prompt if extractor else 0},
        metrics,
        environment(device, generator.precision, world),
    )


def _rank_by_likelihood(config: TextConfig, generator: Generator, true: Tensor, given: Values, ranks: Columns) -> None:
    """Rank the own caption of each of this process's share of the images among all captions, with its class."""
    codes, count = generator.encode(true), len(true)
    with progress(count, "likelihood", "img", rank_and_world()[0] == 0) as bar:
        for row in shares(count):
            repeated = codes[row : row + 1].expand(count, *codes.shape[1:])
            own = given.having({"class": [given["class"][row]]})
            nats = generator.nats(repeated, own, config.batch_size).sum(1)
            ranks.add("likelihood", rank(-nats[None], torch.tensor([row])))
            bar.update(rank_and_world()[1])


def _rank_by_features(
    config: TextConfig, generator: Generator, true: Tensor, given: Values, extractor: Extractor, ranks: Columns
) -> None:
    """Rank the own image of each of this process's share of drawn images among all true ones."""

    def features(images: Tensor) -> Tensor:
        return torch.cat([extract(extractor, part, generator.device)[0] for part in images.split(config.batch_size)])

    real, indices = features(true), list(shares(len(true) * config.per_prompt))
    centre = real.mean(0)
    with progress(len(indices), "drawing", "img", rank_and_world()[0] == 0) as bar:
        for first in range(0, len(indices), config.batch_size):
            part = indices[first : first + config.batch_size]
            drawn = generator.draw(part, given, config.sampling, config.seed, config.batch_size)
            scores = F.normalize(features(drawn.images) - centre, dim=1) @ F.normalize(real - centre, dim=1).T
            ranks.add("features", rank(scores, torch.tensor(part) % len(true)))
            bar.update(len(part))
