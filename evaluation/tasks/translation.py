"""Translation: images from their degraded versions or partners, beside those, a classical method and a bound."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vqgen.artifact import fingerprint
from vqgen.devices import rank_and_world
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.measurement import Measurement, held_out, start_processes
from vqgen.evaluation.receipt import environment
from vqgen.metric import Metric
from vqgen.progress import progress
from vqgen.sampling.drawing import Recipe
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.codes.degrade import Degradations, Keep, degrade, parse_degradations, source_seed
from vqgen.tokenizer.codes.pairs import pair
from vqgen.tokenizer.data.dataset import ImageDataset
from vqgen.tokenizer.data.sources import open_source
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.metrics import SMALLEST, psnr, ssim

from .classical import colourfulness, non_local_means
from .images import Columns, Encoded, TaskImages, lpips, perceptual_of, shares
from .options import TranslationConfig

_METRICS = (
    Metric("nats", "NLL of the codes", "nats per token", "lower"),
    Metric("psnr", "PSNR", "dB", "higher"),
    Metric("ssim", "SSIM", "", "higher"),
    Metric("lpips", "LPIPS", "", "lower"),
    Metric("colourfulness", "Colourfulness"),
)
METRICS = {metric.name: metric for metric in _METRICS}
"""`nats`: given the source (`source`), that of another image (`shuffled`), and, where it was dropped in training, none
(`absent`).

`psnr`, `ssim`, `lpips` compare with the image before it was degraded, or that of --data: the translation
(`translated`), the degraded image or the partner (`input`), the translation of another image's source (`shuffled`), and
the tokenizer's reconstruction of the truth (`reconstruction`), the best that codes allow; where noise was added, also
its removal by non-local means (`non_local_means`). Where the prior keeps what sources show as it was, as the luma of
grey and the coarse structure of smaller ones, all that is decoded from codes gets it; `decoded` is the translation
without. `colourfulness` has them too, and that of the truth (`original`).
"""


class PairedImages(TaskImages):
    """The images of --data that have a partner in --source-data. Raises `UserError`."""

    config: TranslationConfig

    def opened(self) -> ImageDataset:
        config, split = self.config, self.config.split
        source, data = open_source(config.data, split, held_out(config), config.text_column), str(config.source_data)
        self.pairs, kept = pair({split: source}, data, config.pair_by, config.unpaired, self.reading)
        return ImageDataset(kept[split], self.reading)

    def partners(self, originals: Tensor, indices: Tensor) -> Tensor:
        """The partners of images, both uint8 (B, C, H, W), by their indices in the data. Raises `UserError`."""
        found = self.pairs.images.__getitems__(self.pairs.partners(self.config.split, indices.numpy(), 0).tolist())
        if len(found.images) < len(originals):
            raise UserError(f"--source-data: {found.broken[0]}; replace it, or remove it and add --unpaired skip")
        return found.images


def degradations_of(config: TranslationConfig, generator: Generator) -> list[str]:
    """The degradations of --source, by default those that the prior was trained on, none with --source-data. Raises
    `UsageError`."""
    part = generator.conditioning.paired_source
    if part is None:
        text = f"{config.model} was trained without a source"
        raise UsageError(f"--model: {text}; give a prior trained on codes of vqgen-tokenize --source")
    if part.about.grid != list(generator.vocabulary.grid):
        found = "x".join(map(str, part.about.grid))
        raise UsageError(f"--model: its sources have {found} codes, not as many as its images; no metric compares them")
    if config.source_data:
        return []
    if not config.source and not part.about.degradations:
        text = f"{config.model} was trained on pairs ({part.about.description})"
        raise UsageError(f"--source: {text}; give --source-data with the partners of --data, or name degradations")
    return config.source or part.about.degradations


def measure_translation(config: TranslationConfig) -> Measurement:
    """Measure how a prior restores degraded images. Raises `UserError`."""
    device, (_, world) = start_processes(config.device), rank_and_world()
    generator = Generator.load(config.model, device, config.precision)
    specs = degradations_of(config, generator)
    degradations = parse_degradations(specs) if specs else Degradations()
    keep = generator.keep(specs) if config.paste else None
    perceptual = perceptual_of(config, device)

    def degraded(originals: Tensor, indices: Tensor) -> Tensor:
        return degrade(originals, degradations, [source_seed(config.seed, index) for index in indices.tolist()])

    if config.source_data:
        images = PairedImages(config, generator)
        source_of, details = images.partners, {"pairs": str(images.pairs)}
    else:
        images, source_of, details = TaskImages(config, generator), degraded, {"degradations": specs}
    truth, sources = images.encoded(), images.encoded(source_of)
    generator.check(config.sampling, _conditions(generator, truth, range(len(truth)), sources.codes))
    return Measurement(
        {
            "prior": generator.prior.fingerprint,
            "tokenizer": generator.tokenizer.fingerprint,
            "data": truth.fingerprint,
            "sources": sources.fingerprint,
            **truth.captions,
            "perceptual": fingerprint(perceptual.distance.state_dict()) if perceptual else None,
        },
        {"images": len(truth)},
        {
            "nats": _likelihoods(config, generator, truth, sources),
            **_pictures(config, generator, images, truth, sources, degradations, keep, source_of, perceptual),
        },
        environment(device, generator.precision, world),
        {**details, "source_kept": keep is not None},
    )


def _conditions(generator: Generator, truth: Encoded, rows: Any, source: Tensor | None) -> dict[str, Any]:
    given = truth.given(rows) | ({} if source is None else {"source": list(source[list(rows)])})
    return generator.conditioning.conditions(given, absent=True)


def _likelihoods(config: TranslationConfig, generator: Generator, truth: Encoded, sources: Encoded) -> dict[str, float]:
    """The mean NLL of the truth's codes by what source is given."""
    given: dict[str, Tensor | None] = {"source": sources.codes, "shuffled": sources.codes[truth.others]}
    part = generator.conditioning.paired_source
    if part and part.dropout:
        given["absent"] = None
    found, rows = Columns(), list(shares(len(truth)))
    with progress(len(truth), "likelihood", "img", rank_and_world()[0] == 0) as bar:
        for first in range(0, len(rows), config.batch_size):
            part = rows[first : first + config.batch_size]
            for name, source in given.items():
                nats = generator.nats(truth.codes[part], _conditions(generator, truth, part, source))
                found.add(name, nats.mean(1))
            bar.update(len(part) * rank_and_world()[1])
    return found.means()


def _pictures(
    config: TranslationConfig,
    generator: Generator,
    images: TaskImages,
    truth: Encoded,
    sources: Encoded,
    degradations: Degradations,
    keep: Keep | None,
    source_of: Callable[[Tensor, Tensor], Tensor],
    perceptual: PerceptualDistance | None,
) -> dict[str, Any]:
    """Metrics of what is drawn, and of what it is compared with."""
    rows, (rank, world) = shares(len(truth)), rank_and_world()
    codes = {"reconstruction": truth.codes}
    for name, source in {"translated": sources.codes, "shuffled": sources.codes[truth.others]}.items():
        conditions, drawn = _conditions(generator, truth, range(len(truth)), source), truth.codes.clone()
        with progress(len(rows) * generator.vocabulary.length, f"drawing ({name})", "code", rank == 0) as bar:
            on_token = lambda tokens, bar=bar: bar.update(len(tokens))  # noqa: E731
            recipe = Recipe(conditions, config.sampling, config.seed, config.batch_size, on_token)
            drawn[list(rows)] = generator.draw_codes(rows, recipe)[0]
        codes[name] = drawn
    chain = degradations.chains[0] if len(degradations.chains) == 1 else []
    noise = [each for each in chain if each.name == "noise"] if chain and chain[-1].name == "noise" else []
    sigma = 255 * sum((each.low + each.high) ** 2 / 4 for each in noise) ** 0.5  # the middle of a range
    found = Columns()  # one exchange for all metrics: a process without images has no names
    with progress(len(truth), "comparing", "img", rank == 0) as bar:
        for part, originals, indices in images.pixels(truth):
            shown = {name: generator.decode(of[part]) for name, of in codes.items()}
            shown["input"] = source_of(originals, indices)
            if keep:
                kept = {name: keep(shown[name], shown["input"]) for name in codes}
                shown |= {"decoded": shown["translated"], **kept}
            if noise:
                shown["non_local_means"] = non_local_means(shown["input"], sigma)
            for name, each in shown.items():
                values = {"psnr": psnr(each, originals)}
                if min(each.shape[2:]) >= SMALLEST:
                    values["ssim"] = ssim(each, originals)
                if perceptual is not None:
                    values["lpips"] = lpips(perceptual, each, originals, generator.device)
                if each.shape[1] == 3:
                    values["colourfulness"] = colourfulness(each)
                for metric, column in values.items():
                    found.add(f"{metric} {name}", column)
            if originals.shape[1] == 3:
                found.add("colourfulness original", colourfulness(originals))
            bar.update(len(part) * world)
    means: dict[str, dict[str, float]] = {}
    for words, value in found.means().items():
        metric, name = words.split()
        means.setdefault(metric, {})[name] = value
    return means
