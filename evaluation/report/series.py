"""What runs logged, as charts and as the table of the final validation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqgen.evaluation.measurement import metrics_of
from vqgen.metric import Metric

from .charts import Chart, Series, line_chart, number
from .run_folder import Kind, RunFolder

QUALITY, LOSSES, ADVERSARIAL, TRAINING = "Validation metrics", "Losses", "Discriminator", "Training"
GROUPS = (QUALITY, LOSSES, ADVERSARIAL, TRAINING)
# What training logs beside the registered metrics, by the name without train/ or heldout/, in the order shown.
LOGGED: dict[str, dict[str, Metric]] = {
    group: {name: Metric(name, title, unit, "lower" if group == LOSSES else "") for name, title, unit in rows}
    for group, rows in {
        LOSSES: (
            ("loss", "Total loss", ""),
            ("reconstruction", "Reconstruction loss", ""),
            ("perceptual", "Perceptual loss", ""),
            ("quantizer", "Quantizer loss", ""),
        ),
        ADVERSARIAL: (
            ("adversarial", "Adversarial loss", ""),
            ("gan_weight", "Adversarial weight", ""),
            ("adaptive_ratio", "Adaptive ratio", ""),
            ("discriminator", "Discriminator loss", ""),
            ("discriminator_real", "Logits of originals", ""),
            ("discriminator_fake", "Logits of reconstructions", ""),
            ("discriminator_grad_norm", "Gradient norm of the discriminator", ""),
        ),
        TRAINING: (
            ("lr", "Learning rate", ""),
            ("grad_norm", "Gradient norm", ""),
            ("weight_growth", "Growth of the weights", "times the first"),
            ("per_second", "Training rate", "images a second"),
            ("tokens_per_second", "Training rate", "tokens a second"),
            ("mfu", "Model-FLOPs utilisation", "share of the matrix rate"),
        ),
    }.items()
}
# Shown on a log scale where they span enough.
LOG_SCALE = {*LOGGED[LOSSES], "mse_over_variance", "grad_norm", "discriminator_grad_norm"}
# A prior's training loss is its negative log-likelihood in nats per token.
ALIAS = {"train/loss": "nats_per_token"}
SIDES = {"train": "training", "heldout": "held-out"}


def logged_metrics(kind: Kind) -> dict[str, tuple[str, Metric]]:
    """Name -> group and metric of everything that runs of this kind may log, in the order shown."""
    registered: Mapping[str, Metric] = metrics_of("likelihood" if kind == "prior" else "reconstruction")
    found = {name: (QUALITY, metric) for name, metric in registered.items()}
    return found | {name: (group, metric) for group, metrics in LOGGED.items() for name, metric in metrics.items()}


def describe_metric(name: str, kind: Kind) -> tuple[str, Metric]:
    """Group and metric of a logged name, also of an unknown one."""
    group = ADVERSARIAL if name.startswith(("discriminator", "gan_")) else TRAINING
    unknown = Metric(name, name.replace("_", " ").replace("/", " ").capitalize())
    return logged_metrics(kind).get(name, (group, unknown))


def in_order(names: set[str], kind: Kind) -> list[str]:
    """Names in the order shown, unknown ones last."""
    order = {name: place for place, name in enumerate(logged_metrics(kind))}
    return sorted(names, key=lambda name: (order.get(name, len(order)), name))


def split(full: str, kind: Kind) -> tuple[str, str]:
    """`heldout/psnr` -> its side and its name, which is the same for both sides of one metric."""
    side, _, name = full.partition("/")
    return side, ALIAS.get(full, name) if kind == "prior" else name


def curves(runs: Sequence[RunFolder]) -> dict[str, list[Chart]]:
    """Group -> charts of everything that runs of one kind logged, training and held-out in one chart.

    A single run has one colour per side; of several runs each has one, with a dashed line for training if both sides
    are logged.
    """
    names: dict[str, set[str]] = {}
    for run in runs:
        for full in run.logged:
            if run.series(full):
                side, name = split(full, run.kind)
                names.setdefault(name, set()).add(side)
    groups: dict[str, list[Chart]] = {group: [] for group in GROUPS}
    for name in in_order(set(names), runs[0].kind):
        (group, metric), sides, series = describe_metric(name, runs[0].kind), sorted(names[name], reverse=True), []
        for index, run in enumerate(runs):
            for side in sides:
                points = [p for full in run.logged if split(full, run.kind) == (side, name) for p in run.series(full)]
                if not points:
                    continue
                label = SIDES.get(side, side)
                if len(runs) > 1:
                    label = f"{run.name}, {label}" if len(sides) > 1 else run.name
                colour = index if len(runs) > 1 else int(side != "train")
                series.append(Series(label, points, colour, len(runs) > 1 and len(sides) > 1 and side == "train"))
        groups[group].append(line_chart(metric.title, metric.unit, series, name in LOG_SCALE))
    return {group: charts for group, charts in groups.items() if charts}


def final(run: RunFolder) -> tuple[int, dict[str, float]] | None:
    """Step and held-out metrics of the weights that a run leaves: the last validation, or a prior's best.

    None if the run has not been validated.
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
    """A cell of a table; `best` marks the best value of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table: title, unit, and one cell per run."""

    title: str
    unit: str
    cells: list[Cell]


def final_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Final held-out metrics of runs of one kind, one column each; empty before the first validation.

    The best value is marked if all runs had the same data.
    """
    found = [final(run) for run in runs]
    comparable = (
        len(runs) > 1 and len({str(run.options.get("codes" if run.kind == "prior" else "data")) for run in runs}) == 1
    )
    names = {name for each in found if each for name in each[1]}
    rows = []
    if names:
        rows.append(Row("At step", "", [Cell(f"{each[0]:,}" if each else "–") for each in found]))
    for name in in_order(names, runs[0].kind):
        _, metric = describe_metric(name, runs[0].kind)
        values = [each[1].get(name) if each else None for each in found]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        best = (max if metric.better == "higher" else min)(finite) if finite and metric.better else None
        clear = comparable and len(set(finite)) > 1 and best is not None
        cells = [
            Cell("–" if value is None else number(value), clear and value is not None and value == best)
            for value in values
        ]
        rows.append(Row(metric.title, metric.unit, cells))
    return rows


def format_value(value: Any) -> str:
    """Text of a value of a configuration."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(format_value(item) for item in value)
    return number(value, 7) if isinstance(value, float) else str(value)


def different_options(runs: Sequence[RunFolder]) -> list[Row]:
    """Options in which runs of one kind differ, one column each; the output folder is left out."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.options):
        texts = [format_value(run.options[name]) if name in run.options else "–" for run in runs]
        if len(set(texts)) > 1 and name not in ("output", "overwrite"):
            rows.append(Row(name, "", [Cell(text) for text in texts]))
    return rows
