"""Filling in holes: the NLL of what is missing, the quality of fillings, their seams and their variety."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vqgen.artifact import fingerprint
from vqgen.devices import rank_and_world
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.measurement import Measurement, start_processes
from vqgen.evaluation.receipt import environment
from vqgen.metric import Metric
from vqgen.prior.parts.part import ABSENT
from vqgen.progress import progress
from vqgen.sampling.drawing import Recipe
from vqgen.sampling.filling import Filling, box_mask, cells_of
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.metrics import psnr

from .images import Columns, Encoded, Neighbours, TaskImages, lpips, perceptual_of, shares
from .options import InpaintingConfig

_METRICS = (
    Metric("hole_nats", "NLL of the hole", "nats per token", "lower"),
    Metric("edge_nats", "NLL of its right and lower edge", "nats per token", "lower"),
    Metric("gain", "Nats saved by the surroundings", "%", "higher"),
    Metric("gain_over_plain", "Nats saved in place of the plain prior", "%", "higher"),
    Metric("hole_psnr", "PSNR inside the hole", "dB", "higher"),
    Metric("lpips", "LPIPS of images with their hole filled", "", "lower"),
    Metric("seam", "Step across the border over steps inside"),
    Metric("seam_of_codes", "The same without pasting"),
    Metric("diversity", "Difference of fillings of one image", "", "higher"),
)
METRICS = {metric.name: metric for metric in _METRICS}
"""Each has a value for each of several ways to fill the hole.

`hole_nats`, `edge_nats`: the mean NLL of the codes of the hole (those that have a pixel in it), and of those among them
whose neighbour on the right or below is known, if there are any. Given is what surrounds the hole (`surroundings`), the
codes before each alone (`before`), another image's surroundings (`shuffled`), and by --plain the codes before
(`plain`).

`hole_psnr`, `lpips`, `seam`: of images filled as vqgen-sample does (`filled`), filled given the codes before alone
(`before`), and with the tokenizer's reconstruction in the hole (`reconstruction`), the best that codes allow. `seam`
divides the mean difference of neighbouring pixels across the hole's border by that inside it, and has it of the data
(`original`); `seam_of_codes` is measured where drawn and known codes meet, of images decoded from codes alone.

`diversity`: standard deviation of pixels in the hole over fillings of one image (`pixels`, of 255), and the mean LPIPS
of all pairs of them.
"""


@dataclass(frozen=True)
class Hole:
    """The hole in images of a size."""

    pixels: Tensor
    """bool (H, W)."""
    factor: int

    @classmethod
    def of(cls, config: InpaintingConfig, generator: Generator) -> "Hole":
        """The hole of --box, by default the central half. Raises `UsageError` where it leaves nothing known."""
        factor, size = generator.tokenizer.factor, generator.tokenizer.config.image_size
        sides = [max(side // 2, 1) for side in generator.tokenizer.grid]
        first = [(all_of - side) // 2 for all_of, side in zip(generator.tokenizer.grid, sides, strict=True)]
        box = config.box or [factor * n for n in (first[1], first[0], sides[1], sides[0])]
        hole = cls(box_mask(box, size[0], size[1], "an image as fitted"), factor)
        if hole.drawn.all():
            raise UsageError(f"--box: {' '.join(map(str, box))} and one code around it are all; give a smaller one")
        return hole

    @cached_property
    def cells(self) -> Tensor:
        """Codes that have a pixel in the hole, bool (h, w)."""
        return cells_of(self.pixels[None], self.factor, grow=0)[0]

    @cached_property
    def edge(self) -> Tensor:
        """Codes of the hole whose neighbour on the right or below is known, bool (h, w)."""
        known = torch.zeros_like(self.cells)
        known[:, :-1] |= ~self.cells[:, 1:]
        known[:-1] |= ~self.cells[1:]
        return self.cells & known

    @cached_property
    def drawn(self) -> Tensor:
        """Codes that are drawn to fill it, bool (h, w)."""
        return cells_of(self.pixels[None], self.factor)[0]

    @cached_property
    def drawn_pixels(self) -> Tensor:
        """Pixels of the codes that are drawn, bool (H, W)."""
        return self.drawn.repeat_interleave(self.factor, 0).repeat_interleave(self.factor, 1)

    def filling(self, codes: Tensor, generator: Generator, sourced: bool) -> Filling:
        """The hole in images of these codes (n, h, w[, depth])."""
        return Filling(codes, self.drawn.expand(len(codes), -1, -1), generator.vocabulary, sourced)


def measure_inpainting(config: InpaintingConfig) -> Measurement:
    """Measure how a prior fills in a hole in images. Raises `UserError`."""
    device, (_, world) = start_processes(config.device), rank_and_world()
    generator = Generator.load(config.model, device, config.precision)
    generator.check_inpainting()
    plain = Generator.load(config.plain, device, config.precision) if config.plain else None
    if plain:
        ours, theirs = ((g.prior.tokenizer_fingerprint[:12], g.tokenizer.grid) for g in (generator, plain))
        if ours != theirs:
            found = f"{config.plain} has tokenizer and grid of codes {theirs}, --model has {ours}"
            raise UserError(f"--plain: {found}; give a prior of the same codes")
    perceptual, hole = perceptual_of(config, device), Hole.of(config, generator)
    images = TaskImages(config, generator)
    if plain:
        _check_plain(config, plain, generator, images)
    encoded = images.encoded()
    given = encoded.given(range(len(encoded)))
    if plain:
        known = plain.conditioning.conditions(_known(plain, given), absent=True)
        plain.conditioning.check_given(known, f"--plain: {config.plain}:", "give another")
    whole = generator.conditioning.conditions(given, absent=True)
    generator.check(config.sampling, generator.seen(whole, hole.filling(encoded.codes, generator, True)))
    metrics, details = likelihoods(config, generator, plain, hole, encoded)
    metrics |= pictures(config, generator, hole, images, encoded, perceptual)
    metrics["diversity"] = diversity(config, generator, hole, encoded, perceptual)
    return Measurement(
        {
            "prior": generator.prior.fingerprint,
            "plain": plain.prior.fingerprint if plain else None,
            "tokenizer": generator.tokenizer.fingerprint,
            "data": encoded.fingerprint,
            **encoded.captions,
            "perceptual": fingerprint(perceptual.distance.state_dict()) if perceptual else None,
        },
        {"images": len(encoded), "codes of the hole": int(hole.cells.sum()), "codes drawn": int(hole.drawn.sum())},
        metrics,
        environment(device, generator.precision, world),
        details,
    )


def _check_plain(config: InpaintingConfig, plain: Generator, generator: Generator, images: TaskImages) -> None:
    """Raise `UserError` where the plain prior does not know the classes of the images, or always had some."""
    theirs, ours = (each.conditioning.classes for each in (plain, generator))
    if not theirs.count:
        return
    if not images.classes and not theirs.guidable:
        text = f"{config.plain} was trained with {theirs.dropout_option} 0, always with a class, and none is given"
        raise UserError(f"--plain: {text}; give a prior trained with some dropout")
    if images.classes and (theirs.count, theirs.names) != (ours.count, ours.names):
        found, wanted = (", ".join(each.names or []) or "unnamed ones" for each in (theirs, ours))
        text = f"{config.plain} has the classes {found}, --model has {wanted}"
        raise UserError(f"--plain: {text}; give a prior of the same classes, or --unconditional")


def likelihoods(
    config: InpaintingConfig, generator: Generator, plain: Generator | None, hole: Hole, encoded: Encoded
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The NLL of the hole by what is given, and the standard errors of what the surroundings save."""
    unknown, found, rows = hole.cells, Columns(), list(shares(len(encoded)))
    places = {name: cells for name, cells in {"hole": hole.cells, "edge": hole.edge}.items() if cells.any()}
    with progress(len(encoded), "likelihood", "img", rank_and_world()[0] == 0) as bar:
        for first in range(0, len(rows), config.batch_size):
            part = rows[first : first + config.batch_size]
            codes, others = encoded.codes[part], encoded.codes[encoded.others[part]]
            given = encoded.given(part)
            nats = {
                "surroundings": hole_nats(generator, given, codes, codes, unknown),
                "before": hole_nats(generator, given, codes),
                "shuffled": hole_nats(generator, given, codes, others, unknown),
            }
            if plain:
                nats["plain"] = hole_nats(plain, _known(plain, given), codes)
            for name, values in nats.items():
                for where, cells in places.items():
                    found.add(f"{where} {name}", values[:, cells].mean(1))
            bar.update(len(part) * rank_and_world()[1])
    columns = found.all()
    mean = {name: values.mean().item() for name, values in columns.items()}
    given = ["surroundings", "before", "shuffled", *["plain"] * bool(plain)]
    metrics: dict[str, Any] = {f"{where}_nats": {name: mean[f"{where} {name}"] for name in given} for where in places}
    errors = {}
    for name, other in {"gain": "before", **({"gain_over_plain": "plain"} if plain else {})}.items():
        saved = {where: columns[f"{where} {other}"] - columns[f"{where} surroundings"] for where in places}
        scale = {where: 100 / mean[f"{where} {other}"] for where in saved}
        metrics[name] = {where: scale[where] * values.mean().item() for where, values in saved.items()}
        errors[name] = {w: scale[w] * values.std().item() / len(values) ** 0.5 for w, values in saved.items()}
    return metrics, {"standard_errors": errors}


def _known(plain: Generator, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of given conditions the plain prior can be told, captions as far as it reads them."""
    known = {"class": given["class"] if plain.conditioning.classes.count else [ABSENT] * len(given["class"])}
    if "text" in given and (text := plain.conditioning.text):
        known["text"] = [text.readable([each])[0] for each in given["text"]]
    return known


def hole_nats(
    generator: Generator,
    given: Mapping[str, Any],
    codes: Tensor,
    source: Tensor | None = None,
    unknown: Tensor | None = None,
) -> Tensor:
    """NLL of each cell's codes (B, h, w[, depth]), mean over the depths: float64 (B, h, w).

    The prior is `given` classes and captions, and with `source`, other codes of that shape, those outside of
    `unknown`, bool (h, w).
    """
    conditions = dict(given)
    if source is not None and unknown is not None:
        cells = unknown.expand(len(codes), -1, -1)
        conditions |= Filling(source, cells, generator.vocabulary, True).conditions
    nats = generator.nats(codes, generator.conditioning.conditions(conditions, absent=True))
    grid = generator.vocabulary.to_grid(nats)
    return grid.mean(3) if grid.ndim == 4 else grid


def pictures(
    config: InpaintingConfig,
    generator: Generator,
    hole: Hole,
    images: TaskImages,
    encoded: Encoded,
    perceptual: PerceptualDistance | None,
) -> dict[str, Any]:
    """PSNR, LPIPS and seams of images filled in each way."""
    rows, conditions, (rank, world) = shares(len(encoded)), encoded.given(range(len(encoded))), rank_and_world()
    codes = {"reconstruction": encoded.codes}
    for name, sourced in {"filled": True, "before": False}.items():
        filling, drawn = hole.filling(encoded.codes, generator, sourced), encoded.codes.clone()
        whole = generator.conditioning.conditions(conditions, absent=True)
        with progress(len(rows) * generator.tokens_of(filling), f"drawing ({name})", "code", rank == 0) as bar:
            on_token = lambda tokens, bar=bar: bar.update(len(tokens))  # noqa: E731
            settings = config.sampling if sourced else config.sampling.without_source_guidance()
            recipe = Recipe(whole, settings, config.seed, config.batch_size, on_token)
            drawn[list(rows)] = generator.draw_filling(filling, rows, recipe)[0]
        codes[name] = drawn
    borders = {
        "seam": (Neighbours.where(hole.pixels, torch.ne), Neighbours.where(hole.pixels, torch.logical_and)),
        "seam_of_codes": (
            Neighbours.where(hole.drawn_pixels, torch.ne),
            Neighbours.where(hole.drawn_pixels, torch.logical_and),
        ),
    }
    borders = {seam: pairs for seam, pairs in borders.items() if all(pairs)}  # a hole of one pixel has none inside
    found = Columns()

    def add_steps(seam: str, name: str, shown: Tensor) -> None:
        for place, pairs in zip(("across", "inside"), borders[seam], strict=True):
            found.add(f"{seam} {place} {name}", pairs.step(shown))

    with progress(len(encoded), "comparing", "img", rank == 0) as bar:
        for part, originals, _ in images.pixels(encoded):
            for seam in borders:
                add_steps(seam, "original", originals)
            for name, all_codes in codes.items():
                decoded = generator.decode(all_codes[part])
                add_steps("seam_of_codes", name, decoded)
                pasted = replace(
                    hole.filling(all_codes[part], generator, True),
                    originals=originals,
                    pixels=hole.pixels.expand(len(part), -1, -1),
                ).finished(range(len(part)), decoded)
                add_steps("seam", name, pasted)
                found.add(f"psnr {name}", psnr(*(each[:, :, hole.pixels][..., None] for each in (pasted, originals))))
                if perceptual is not None:
                    found.add(f"lpips {name}", lpips(perceptual, pasted, originals, generator.device))
            bar.update(len(part) * world)
    mean = found.means()
    ways = ["filled", "before", "reconstruction"]
    metrics: dict[str, Any] = {"hole_psnr": {name: mean[f"psnr {name}"] for name in ways}}
    if perceptual is not None:
        metrics["lpips"] = {name: mean[f"lpips {name}"] for name in ways}
    for seam in borders:
        ratios = {n: mean[f"{seam} across {n}"] / max(mean[f"{seam} inside {n}"], 1e-6) for n in [*ways, "original"]}
        metrics[seam] = ratios
    return metrics


def diversity(
    config: InpaintingConfig, generator: Generator, hole: Hole, encoded: Encoded, perceptual: PerceptualDistance | None
) -> Mapping[str, float]:
    """How much several fillings of one image differ."""
    rows, found = shares(min(config.diverse, len(encoded))), Columns()
    whole = generator.conditioning.conditions(encoded.given(range(len(encoded))), absent=True)
    recipe = Recipe(whole, config.sampling, config.seed, config.batch_size)
    filling = hole.filling(encoded.codes, generator, True)
    with progress(len(rows), "diversity", "img", rank_and_world()[0] == 0) as bar:
        for row in rows:
            # Further fillings of an image follow after whole series of images; the first is that of `pictures`.
            indices = [row + k * len(encoded) for k in range(config.fillings)]
            shown = generator.decode(generator.draw_filling(filling, indices, recipe)[0])
            inside = shown[:, :, hole.pixels].double()
            found.add("pixels", inside.std(0, unbiased=False).mean()[None])
            if perceptual is not None:
                one, two = torch.triu_indices(len(shown), len(shown), 1)
                pairs = zip(one.split(config.batch_size), two.split(config.batch_size), strict=True)
                each = [lpips(perceptual, shown[a], shown[b], generator.device) for a, b in pairs]
                found.add("lpips", torch.cat(each).mean()[None])
            bar.update()
    return found.means()
