"""The figures of runs: what each is called, which belong into one chart, and the table of the final ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .charts import Chart, Series, line_chart, number
from .run_folder import Kind, RunFolder


@dataclass(frozen=True)
class Figure:
    """How a figure is shown.

    Attributes:
        better: 1 where more is better, -1 where less is, 0 where neither can be said.
        log: on a log scale, where it spans enough.
    """

    title: str
    group: str
    unit: str = ""
    better: int = 0
    log: bool = False


QUALITY, LOSSES, ADVERSARY, COURSE = "Held-out figures", "Losses", "Discriminator", "Course of the training"
GROUPS = (QUALITY, LOSSES, ADVERSARY, COURSE)
# By the name without train/ or heldout/, in the order in which they are shown.
FIGURES = {
    "psnr": Figure("PSNR", QUALITY, "dB", 1),
    "psnr_of_mse": Figure("PSNR of the mean square error", QUALITY, "dB", 1),
    "ssim": Figure("SSIM", QUALITY, "", 1),
    "lpips": Figure("LPIPS", QUALITY, "", -1),
    "mse_over_variance": Figure("MSE over variance", QUALITY, "", -1, True),
    "usage": Figure("Codebook usage", QUALITY, "share of the codes", 1),
    "codes_used": Figure("Codes used", QUALITY, "codes"),
    "perplexity": Figure("Perplexity of the codes", QUALITY, "codes"),
    "nats_per_token": Figure("Loss", QUALITY, "nats per token", -1),
    "bits_per_dimension": Figure("Bits per dimension, the rate of the codes", QUALITY, "bits", -1),
    "loss": Figure("Total loss", LOSSES, "", -1, True),
    "reconstruction": Figure("Reconstruction loss", LOSSES, "", -1, True),
    "perceptual": Figure("Perceptual loss", LOSSES, "", -1, True),
    "quantizer": Figure("Quantizer loss", LOSSES, "", 0, True),
    "adversarial": Figure("Adversarial loss", ADVERSARY),
    "gan_weight": Figure("Adversarial weight", ADVERSARY),
    "adaptive_ratio": Figure("Adaptive ratio", ADVERSARY),
    "discriminator": Figure("Discriminator loss", ADVERSARY),
    "discriminator_real": Figure("Logits of originals", ADVERSARY),
    "discriminator_fake": Figure("Logits of reconstructions", ADVERSARY),
    "discriminator_grad_norm": Figure("Gradient norm of the discriminator", ADVERSARY, "", 0, True),
    "lr": Figure("Learning rate", COURSE),
    "grad_norm": Figure("Gradient norm", COURSE, "", 0, True),
    "weight_growth": Figure("Growth of the weights", COURSE, "times the first"),
    "per_second": Figure("Training rate", COURSE, "images a second"),
    "tokens_per_second": Figure("Training rate", COURSE, "tokens a second"),
    "mfu": Figure("Model-FLOPs utilisation", COURSE, "share of the matrix rate"),
}
# Its sum over the batch is what a prior minimises; both are cross-entropies in nats per token.
ALIAS = {"train/loss": "nats_per_token"}
SIDES = {"train": "training", "heldout": "held-out"}


def known(name: str) -> Figure:
    """How a figure is shown, also one that this version has no name for."""
    if name in FIGURES:
        return FIGURES[name]
    group = ADVERSARY if name.startswith(("discriminator", "gan_")) else COURSE
    return Figure(name.replace("_", " ").replace("/", " ").capitalize(), group)


def split(full: str, kind: Kind) -> tuple[str, str]:
    """`heldout/psnr` -> its side and its name, the same for both sides of one figure."""
    side, _, name = full.partition("/")
    return side, ALIAS.get(full, name) if kind == "prior" else name


def curves(runs: Sequence[RunFolder]) -> dict[str, list[Chart]]:
    """Group -> charts of everything that runs of one kind logged, in order; training and held-out in one chart.

    A single run has a colour for either side; several have one each, training then dashed where both sides are there.
    """
    names: dict[str, set[str]] = {}
    for run in runs:
        for full in run.figures:
            if run.series(full):
                side, name = split(full, run.kind)
                names.setdefault(name, set()).add(side)
    order = list(FIGURES)
    groups: dict[str, list[Chart]] = {group: [] for group in GROUPS}
    for name in sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n)):
        figure, sides, series = known(name), sorted(names[name], reverse=True), []
        for index, run in enumerate(runs):
            for side in sides:
                points = [p for full in run.figures if split(full, run.kind) == (side, name) for p in run.series(full)]
                if not points:
                    continue
                label = SIDES.get(side, side)
                if len(runs) > 1:
                    label = f"{run.name}, {label}" if len(sides) > 1 else run.name
                colour = index if len(runs) > 1 else int(side != "train")
                series.append(Series(label, points, colour, len(runs) > 1 and len(sides) > 1 and side == "train"))
        groups[figure.group].append(line_chart(figure.title, figure.unit, series, figure.log))
    return {group: charts for group, charts in groups.items() if charts}


def final(run: RunFolder) -> tuple[int, dict[str, float]] | None:
    """The step and the held-out figures of the model that a run leaves: of the last validation, or of a prior's best.

    Without a validation, None.
    """
    rows = [row for row in run.rows if any(name.startswith("heldout/") for name in row)]
    key = "heldout/nats_per_token"
    if run.kind == "prior":
        rows = [row for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
        rows = sorted(rows, key=lambda row: row[key], reverse=True)
    if not rows:
        return None
    numbers = {name.partition("/")[2]: value for name, value in rows[-1].items() if name.startswith("heldout/")}
    return rows[-1]["step"], {name: value for name, value in numbers.items() if isinstance(value, (int, float))}


@dataclass(frozen=True)
class Cell:
    """A cell of a table; `best` in its row of several."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table: its heading, what that is in, and a cell for each run."""

    title: str
    unit: str
    cells: list[Cell]


def final_table(runs: Sequence[RunFolder]) -> list[Row]:
    """The final held-out figures of runs of one kind, a column each; empty before the first validation.

    The best is marked where all runs had the same data.
    """
    found = [final(run) for run in runs]
    comparable = (
        len(runs) > 1 and len({str(run.options.get("codes" if run.kind == "prior" else "data")) for run in runs}) == 1
    )
    names = {name for each in found if each for name in each[1]}
    rows = []
    if names:
        rows.append(Row("At step", "", [Cell(f"{each[0]:,}" if each else "–") for each in found]))
    for name in sorted(names, key=lambda n: (list(FIGURES).index(n) if n in FIGURES else len(FIGURES), n)):
        figure, values = known(name), [each[1].get(name) if each else None for each in found]
        there = [value for value in values if value is not None and math.isfinite(value)]
        best = (max if figure.better > 0 else min)(there) if there and figure.better else None
        clear = comparable and len(set(there)) > 1 and best is not None
        cells = [
            Cell("–" if value is None else number(value), clear and value is not None and value == best)
            for value in values
        ]
        title = "Held-out loss" if name == "nats_per_token" else figure.title
        rows.append(Row(title, figure.unit, cells))
    return rows


def plain(value: Any) -> str:
    """A value of a configuration as people write it."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(plain(item) for item in value)
    return number(value, 7) if isinstance(value, float) else str(value)


def different_options(runs: Sequence[RunFolder]) -> list[Row]:
    """The options in which runs of one kind differ, a column each; where they write to does not count."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.options):
        texts = [plain(run.options[name]) if name in run.options else "–" for run in runs]
        if len(set(texts)) > 1 and name not in ("output", "overwrite"):
            rows.append(Row(name, "", [Cell(text) for text in texts]))
    return rows
