"""The HTML page of a report, from run folders."""

from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
import torch

from vqgen import __version__
from vqgen.config import options
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.likelihood import heat_map
from vqgen.evaluation.measurement import label_of
from vqgen.evaluation.receipt import flatten
from vqgen.prior.train import PriorTraining
from vqgen.tokenizer.codes.format import Manifest
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.data.pixels import fit
from vqgen.tokenizer.train import TokenizerTraining

from . import charts
from .charts import number
from .codebook import codebook_of
from .run_folder import Kind, Png, RunFolder, assign_names, open_folder
from .series import curves, different_options, final_table, format_value

KINDS: tuple[Kind, ...] = ("samples", "tokenizer", "prior")
"""Sections of the page, in order."""
STEPS_SHOWN = (6, 3)
"""Images over time that are shown of a single run, and of each of several."""
MAX_WIDTH = 1100  # pixels to which wider images are shrunk


def render_folders(paths: Sequence[Path], code_folders: Sequence[Path]) -> str:
    """HTML of the report on the runs in the folders named on the command line. Raises `UserError`."""
    found = [open_folder(path) for path in paths]
    runs = list({run.path.resolve(): run for each in found for run in each.runs}.values())
    _check_codes(code_folders, [run for run in runs if run.kind == "tokenizer"])
    codes = [*code_folders, *(folder for each in found for folder in each.codes)]
    sections = []
    for kind in KINDS:
        if same := [run for run in runs if run.kind == kind]:
            assign_names(same)
            section = {"kind": kind, "runs": same, "metrics": final_table(same), "curves": curves(same)}
            section["codebooks"] = [codebook_of(run, codes) for run in same] if kind == "tokenizer" else []
            section["different"] = different_options(same) if kind != "samples" else []
            sections.append(section)
    loader = jinja2.PackageLoader("vqgen.evaluation.report", "")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Any] = {"number": number, "duration": duration, "state": state, "plain": format_value}
    environment.filters.update(filters, receipt_table=receipt_table)
    title = ", ".join(dict.fromkeys(path.resolve().name for path in paths))
    given: dict[str, Any] = {"title": title, "paths": paths, "sections": sections, "version": __version__}
    given |= {"ids": partial(next, count()), "images_over_time": images_over_time, "changed": changed_options}
    given |= {"frame": charts, "steps_shown": STEPS_SHOWN}
    return environment.get_template("report.html.j2").render(given).lstrip()


def _check_codes(folders: Sequence[Path], tokenizers: Sequence[RunFolder]) -> None:
    """Check that each folder of codes was made by one of the tokenizers. Raises `UserError`."""
    if folders and not tokenizers:
        raise UsageError("--codes: found codes but no tokenizer run; name the run of the tokenizer that made them")
    known = {str(run.description.get("fingerprint")): run for run in tokenizers if run.description}
    for folder in folders:
        mark = Manifest.read(folder).tokenizer_fingerprint
        if mark not in known:
            theirs = ", ".join(f"{run.path} is {mark[:12]}" for mark, run in known.items()) or "no model is finished"
            raise UserError(f"--codes: {folder} holds codes of the tokenizer {mark[:12]}, but {theirs}; give its codes")


def images_over_time(run: RunFolder, limit: int) -> list[tuple[int, Png]]:
    """Images of a run with their steps: the first, the last, and at most `limit` - 2 between them."""
    items = list(run.pictures.items())
    if len(items) > limit:
        items = [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]
    return [(step, _shrink(image)) for step, image in items]


def _shrink(image: Png) -> Png:
    """The image, or a copy of width `MAX_WIDTH` if it is wider and can be decoded."""
    if image.width <= MAX_WIDTH:
        return image
    try:
        pixels = decode(image.data, 3)
    except BrokenImage:
        return image
    return Png.encode(fit(pixels, [max(1, image.height * MAX_WIDTH // image.width), MAX_WIDTH], "crop"))


def changed_options(run: RunFolder) -> set[str]:
    """Names of the options of a run that differ from the program's defaults."""
    program = PriorTraining if run.kind == "prior" else TokenizerTraining
    defaults = {option.name: format_value(option.default) for option in options(program)}
    # By their last names, which occur once in a program: earlier versions had other sections.
    names = {name: name.rpartition(".")[2] for name in run.options}
    differing = {name for name, own in names.items() if defaults.get(own) != format_value(run.options[name])}
    return {name for name in differing if names[name] not in ("output", "overwrite")}


def receipt_table(receipt: dict[str, Any]) -> dict[str, Any]:
    """A receipt as shown: what was measured on what, (title, value, unit) of each metric, and the NLL by position."""
    program, asked = receipt["program"], receipt["options"]
    rows = []
    for name, value in flatten(receipt["metrics"]):
        title, unit = label_of(program, name)
        rows.append((title, number(value) if isinstance(value, (int, float)) else str(value), unit))
    measured = ", ".join(f"{number(n, 9)} {what}" for what, n in receipt["counts"].items())
    measured += f"; split {asked['split']}" if "split" in asked else ""
    measured += "; without their classes" if asked.get("unconditional") else ""
    details = receipt.get("details")
    grid = details.get("nats_by_position") if isinstance(details, dict) else None
    return {"program": program, "measured": measured, "rows": rows, "map": _map(grid) if grid else None}


def _map(grid: Any) -> Png | None:
    """The NLL by position of a receipt, [depth,] h, w; None where that is not what the receipt has."""
    try:
        values = torch.tensor(grid, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    plausible = values.ndim in (2, 3) and 0 < values.numel() <= 2**16 and values.isfinite().all()
    return Png.encode(heat_map(values)) if plausible else None


def duration(seconds: float) -> str:
    """Text of a duration, in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def state(run: RunFolder) -> str:
    """Text of a run's progress."""
    requested = run.options.get("run.steps")
    if run.finished:
        early = isinstance(requested, int) and run.rows and run.steps < requested
        return f"finished after {run.steps:,} of {requested:,} steps" if early else f"finished, {run.steps:,} steps"
    if not run.rows and run.description:
        return "a model without a history"
    return f"not finished: step {run.steps:,}" + (f" of {requested:,}" if isinstance(requested, int) else "")
