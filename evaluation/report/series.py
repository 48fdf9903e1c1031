"""What runs logged, as charts and as the table of the final validation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vqgen.config import shown
from vqgen.evaluation.measurement import metrics_of
from vqgen.metric import Metric
from vqgen.prior.selection import NATS_OF_HOLES, best_validation

from .charts import Chart, Series, line_chart, number
from .run_folder import Kind, RunFolder

QUALITY, LOSSES, ADVERSARIAL, TRAINING = "Validation metrics", "Losses", "Discriminator", "Training"
GROUPS = (QUALITY, LOSSES, ADVERSARIAL, TRAINING)
# What training logs besides the registered metrics, by the name without train/ or heldout/, in the order shown.
LOGGED: dict[str, dict[str, Metric]] = {
    group: {name: Metric(name, title, unit, "lower" if group == LOSSES else "") for name, title, unit in rows}
    for group, rows in {
        LOSSES: (
            ("loss", "Total loss", ""),
            ("reconstruction", "Reconstruction loss", ""),
            ("perceptual", "Perceptual loss", ""),
            ("quantizer", "Quantizer loss", ""),
            ("code_distance", "Squared distance to the codes", "of the vectors' square"),
            ("inpainting_loss", "Negative log-likelihood of filled codes", "nats per token"),
            ("smoothing", "Label smoothing", ""),
            ("z-loss", "Z-loss", ""),
            ("entropy_each", "Entropy of a position's codes", "nats"),
            ("entropy_mean", "Entropy of the codes' mean probabilities", "nats"),
            ("gumbel_kl", "Divergence from equal codes", "nats"),
        ),
        ADVERSARIAL: (
            ("adversarial", "Adversarial loss", ""),
            ("gan_weight", "Adversarial weight", ""),
            ("adaptive_ratio", "Adaptive ratio", ""),
            ("discriminator", "Discriminator loss", ""),
            ("discriminator_real", "Logits of originals", ""),
            ("discriminator_fake", "Logits of reconstructions", ""),
            ("discriminator_real_accuracy", "Originals taken for real", "share"),
            ("discriminator_fake_accuracy", "Reconstructions taken for false", "share"),
            ("discriminator_grad_norm", "Gradient norm of the discriminator", ""),
            ("lecam", "LeCam term", ""),
        ),
        TRAINING: (
            ("lr", "Learning rate", ""),
            ("grad_norm", "Gradient norm", ""),
            ("encoder_grad_norm", "Gradient norm of the encoder", ""),
            ("quantizer_grad_norm", "Gradient norm of the quantizer", ""),
            ("decoder_grad_norm", "Gradient norm of the decoder", ""),
            ("weight_growth", "Growth of the weights", "times the first"),
            ("gumbel_temperature", "Gumbel temperature", ""),
            ("codes_revived", "Codes revived", "a step"),
            ("top1_accuracy", "Most likely code is right", "share"),
            ("top5_accuracy", "Code is among the five most likely", "share"),
            ("gap", "Held-out less training loss", "nats per token"),
            ("epoch", "Epoch", ""),
            ("images", "Images seen", ""),
            ("seconds", "Time in training", "s"),
            ("peak_memory_gb", "Peak memory", "GB"),
            ("per_second", "Training rate", "images a second"),
            ("tokens_per_second", "Training rate", "tokens a second"),
            ("mfu", "Model-FLOPs utilisation", "share of the matrix rate"),
        ),
    }.items()
}
# Shown on a log scale where they span enough.
LOG_SCALE = {*LOGGED[LOSSES], "mse_over_variance", "grad_norm", "discriminator_grad_norm"}
# A prior's training losses are its negative log-likelihoods in nats per token.
ALIAS = {"train/loss": "nats_per_token", "train/inpainting_loss": NATS_OF_HOLES}
OF_HOLES = Metric(NATS_OF_HOLES, "Negative log-likelihood of codes filled in", "nats per token", "lower")
SIDES = {"train": "training", "heldout": "held-out"}
# Options that say which images a validation measures, and at which size, by the kind of run.
VALIDATED: dict[Kind, tuple[str, ...]] = {
    "tokenizer": ("data", "size", "channels", "fit", "holdout", "validation_images"),
    "prior": ("codes", "validation_images"),
    "samples": (),
}


def logged_metrics(kind: Kind) -> dict[str, tuple[str, Metric]]:
    """Name -> group and metric of everything that runs of this kind may log, in the order shown."""
    registered = metrics_of("likelihood" if kind == "prior" else "reconstruction")
    registered = {**registered, OF_HOLES.name: OF_HOLES} if kind == "prior" else registered
    groups: dict[str, Mapping[str, Metric]] = {QUALITY: registered, **LOGGED}
    return {name: (group, metric) for group, metrics in groups.items() for name, metric in metrics.items()}


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
    kind, several = runs[0].kind, len(runs) > 1
    logged = {split(full, kind) for run in runs for full in run.logged if run.series(full)}
    groups: dict[str, list[Chart]] = {group: [] for group in GROUPS}
    for name in in_order({name for _, name in logged}, kind):
        group, metric = describe_metric(name, kind)
        sides, series = sorted((side for side, of in logged if of == name), reverse=True), []
        for index, run in enumerate(runs):
            for side in sides:
                points = [p for full in run.logged if split(full, kind) == (side, name) for p in run.series(full)]
                if not points:
                    continue
                names = [run.name] * several + [SIDES.get(side, side)] * (not several or len(sides) > 1)
                colour = index if several else int(side != "train")
                series.append(Series(", ".join(names), points, colour, several and len(sides) > 1 and side == "train"))
        groups[group].append(line_chart(metric.title, metric.unit, series, name in LOG_SCALE))
    return {group: charts for group, charts in groups.items() if charts}


def final(run: RunFolder) -> tuple[int, dict[str, float]] | None:
    """Step and held-out metrics of the weights that a run leaves: the last validation, or a prior's best.

    None if the run has not been validated.
    """
    rows: list[Mapping[str, Any]] = [row for row in run.rows if any(name.startswith("heldout/") for name in row)]
    if run.kind == "prior":
        best = best_validation(run.rows, _share_of_holes(run))
        rows = [best] if best else []
    if not rows:
        return None
    numbers = {name.partition("/")[2]: value for name, value in rows[-1].items() if name.startswith("heldout/")}
    return rows[-1]["step"], {name: value for name, value in numbers.items() if isinstance(value, (int, float))}


def _share_of_holes(run: RunFolder) -> float:
    """The share of a prior's training steps that filled in images."""
    share = _option(run, "inpainting")
    return share if isinstance(share, (int, float)) else 0.0


def _option(run: RunFolder, own: str) -> Any:
    """An option by its last name, which occurs once in a program: earlier versions had other sections."""
    return next((value for name, value in run.options.items() if name.rpartition(".")[2] == own), None)


class Cell(NamedTuple):
    """A cell of a table; `best` marks the best value of its row."""

    text: str
    best: bool = False


class Row(NamedTuple):
    """A row of a table, with one cell per run."""

    title: str
    unit: str
    cells: list[Cell]


def final_table(runs: Sequence[RunFolder]) -> list[Row]:
    """Final held-out metrics of runs of one kind, one column each; empty before the first validation.

    The best value is marked if all runs were validated on the same images at the same size, see `VALIDATED`.
    """
    found, rows = [final(run) for run in runs], []
    measured = {tuple(str(_option(run, name)) for name in VALIDATED[run.kind]) for run in runs}
    names = {name for each in found if each for name in each[1]}
    if names:
        rows.append(Row("At step", "", [Cell(f"{each[0]:,}" if each else "–") for each in found]))
    for name in in_order(names, runs[0].kind):
        _, metric = describe_metric(name, runs[0].kind)
        values = [each[1].get(name) if each else None for each in found]
        finite = [value for value in values if value is not None and math.isfinite(value)]
        best = None
        if metric.better and len(set(finite)) > 1 and len(measured) == 1:
            best = (max if metric.better == "higher" else min)(finite)
        cells = [Cell("–") if value is None else Cell(number(value), value == best) for value in values]
        rows.append(Row(metric.title, metric.unit, cells))
    return rows


def format_value(value: Any) -> str:
    """Text of a value of a configuration."""
    if value is None or value == "" or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return shown(value)  # of a URL the page has neither query nor password
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
