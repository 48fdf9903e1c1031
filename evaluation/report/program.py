"""vqgen-report: runs as one HTML page that needs nothing else: curves, pictures, codebook, configuration, machine.

The page makes no request and runs no script. The same folders give the same bytes.
"""

import base64
import importlib.resources
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jinja2
from torchvision.io import encode_png

from vqgen import __version__
from vqgen.config import command, options
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION, write_text
from vqgen.prior.train import PriorTraining
from vqgen.tokenizer.codes.format import Manifest
from vqgen.tokenizer.data.pixels import BrokenImage, decode, fit
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.train import TokenizerTraining

from . import charts
from .charts import Bars, Chart, number
from .codebook import Painted, Usage, codes_of, count_codes, paint
from .run_folder import Kind, Png, RunFolder, open_folder, tell_apart
from .series import Row, curves, different_options, final_table, plain

TEMPLATE = "report.html.j2"
# By this a page is known as one that may be replaced.
GENERATOR = '<meta name="generator" content="vqgen-report'
# Pictures shown of one run, and of each of several.
MOMENTS, MOMENTS_OF_MANY = 6, 3
# Wider pictures are shrunk to so many pixels: grids of large images would make pages that no telephone opens.
WIDEST = 1100


@dataclass
class ReportConfig:
    """What is shown, and where."""

    runs: list[Path] = field(metadata={"positional": "RUN"})
    """Run folders of tokenizers or priors, finished or not, or folders that hold tokenizer/, codes/, prior/ and
    samples/ as the demo's does. Several runs of one kind are shown side by side."""
    output: Path = Path("report.html")
    """The page; an earlier report there is replaced, no other file is."""
    codes: list[Path] = field(default_factory=list)
    """Folders of code files, for the codebook of the tokenizers that made them; those in a demo's folder are found."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UsageError("RUN: found nothing; name a run folder")


@dataclass(frozen=True)
class Codebook:
    """The codebook of one tokenizer; where it cannot be shown, `missing` says why."""

    run: RunFolder
    missing: str = ""
    size: int = 0
    usage: Usage | None = None
    bars: Bars | None = None
    ranks: Chart | None = None
    most: list[Painted] = field(default_factory=list)
    least: list[Painted] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """All runs of one kind."""

    kind: Kind
    runs: list[RunFolder]
    figures: list[Row]
    different: list[Row]
    curves: dict[str, list[Chart]]
    codebooks: list[Codebook]


def moments(run: RunFolder, count: int) -> list[tuple[int, Png]]:
    """The pictures of a run to show, with their steps: the first, the last, and `count` - 2 between them."""
    items = list(run.pictures.items())
    if len(items) > count:
        items = [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]
    return [(step, shrunk(picture)) for step, picture in items]


def shrunk(picture: Png) -> Png:
    """The picture itself, or where it is wider than `WIDEST` (and can be read) a copy that is not."""
    if picture.width <= WIDEST:
        return picture
    try:
        image = decode(picture.data, 3)
    except BrokenImage:
        return picture
    image = fit(image, [max(1, picture.height * WIDEST // picture.width), WIDEST], "crop")
    return Png(encode_png(image).numpy().tobytes(), image.shape[2], image.shape[1])


def changed(run: RunFolder) -> set[str]:
    """The options of a run that are other than the program's default."""
    program = PriorTraining if run.kind == "prior" else TokenizerTraining
    # By their own names, which occur once in a program: a section may have been another in an earlier version.
    defaults = {option.name: option.default for option in options(program)}
    names = {name: name.rpartition(".")[2] for name in run.options}
    return {
        name
        for name, own in names.items()
        if own not in ("output", "overwrite")
        and (own not in defaults or plain(defaults[own]) != plain(run.options[name]))
    }


def codebook(run: RunFolder, folders: Sequence[Path]) -> Codebook:
    """The codebook of a tokenizer run, its uses counted over those of `folders` that are its own."""
    if not run.description:
        return Codebook(run, f"The model is not written yet (there is no {DESCRIPTION}).")
    try:
        tokenizer = Tokenizer.load(run.path)
        folder = codes_of(tokenizer, folders)
        if folder is None:
            how = f"vqgen-tokenize --tokenizer {run.path} makes code files, vqgen-report --codes FOLDER counts them."
            return Codebook(run, f"How often codes are used was not counted, for want of this tokenizer's codes. {how}")
        usage = count_codes(folder)
        if usage.counts.shape != (tokenizer.depth, tokenizer.codebook_size):
            raise UserError(f"{folder} names another codebook size than its tokenizer has; tokenize again")
        most, least = paint(tokenizer, usage)
    except UserError as error:
        return Codebook(run, f"It cannot be shown: {error}.")
    return Codebook(run, "", tokenizer.codebook_size, usage, *usage.charts(), most, least)


def _check_codes(folders: Sequence[Path], tokenizers: Sequence[RunFolder]) -> None:
    """See that each folder of codes named by the user is of one of the tokenizers. Raises `UserError`."""
    if folders and not tokenizers:
        raise UsageError("--codes: found codes but no tokenizer run; name the run of the tokenizer that made them")
    known = {str(run.description.get("fingerprint")): run for run in tokenizers if run.description}
    for folder in folders:
        mark = Manifest.read(folder).tokenizer_fingerprint
        if mark not in known:
            theirs = ", ".join(f"{run.path} is {mark[:12]}" for mark, run in known.items()) or "no model is finished"
            raise UserError(f"--codes: {folder} holds codes of the tokenizer {mark[:12]}, but {theirs}; give its codes")


def _uri(picture: Png) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.data).decode("ascii")


def _scale(picture: Png) -> int:
    """Pixels of the screen a side of a pixel, where there is room."""
    return max(1, min(4, 700 // max(1, picture.width)))


def duration(seconds: float) -> str:
    """Seconds in the two largest units that they fill."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def state(run: RunFolder) -> str:
    """How far a run is, in words."""
    asked = run.options.get("run.steps")
    if run.finished:
        early = isinstance(asked, int) and run.rows and run.steps < asked
        return f"finished after {run.steps:,} of {asked:,} steps" if early else f"finished, {run.steps:,} steps"
    if not run.rows and run.description:
        return "a model without a history"
    return f"not finished: step {run.steps:,}" + (f" of {asked:,}" if isinstance(asked, int) else "")


def sections(runs: Sequence[RunFolder], codes: Sequence[Path]) -> list[Section]:
    """The runs by their kind, samples first."""
    kinds: list[Kind] = ["samples", "tokenizer", "prior"]
    found = []
    for kind in kinds:
        same = [run for run in runs if run.kind == kind]
        if same:
            books = [codebook(run, codes) for run in same] if kind == "tokenizer" else []
            different = different_options(same) if kind != "samples" else []
            found.append(Section(kind, same, final_table(same), different, curves(same), books))
    return found


def page(title: str, paths: Sequence[Path], found: Sequence[Section]) -> str:
    """The HTML of the report on what was found in the folders that were named."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(uri=_uri, scale=_scale, number=number, duration=duration, state=state, plain=plain)
    text = (importlib.resources.files(__package__ or "vqgen.evaluation.report") / TEMPLATE).read_text(encoding="utf-8")
    given: dict[str, Any] = {"title": title, "paths": paths, "sections": found, "version": __version__, "frame": charts}
    given |= {"ids": partial(next, count()), "moments": moments, "changed": changed, "few": (MOMENTS, MOMENTS_OF_MANY)}
    return environment.from_string(text).render(given).lstrip()


def check_output(output: Path) -> None:
    """Raise `UsageError` where `output` is something else than an earlier report."""
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder; name a file, e.g. {output / 'report.html'}")
    try:
        with output.open("rb") as file:
            earlier = GENERATOR.encode() in file.read(1000)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be read ({error.strerror}); name another file") from error
    if not earlier:
        raise UsageError(f"--output: {output} is no report; name another file")


def write_report(config: ReportConfig) -> None:
    """Read the runs and write the page. Raises `UserError`."""
    check_output(config.output)
    found = [open_folder(path) for path in config.runs]
    runs = list({run.path.resolve(): run for each in found for run in each.runs}.values())
    _check_codes(config.codes, [run for run in runs if run.kind == "tokenizer"])
    codes = [*config.codes, *(folder for each in found for folder in each.codes)]
    for kind in ("samples", "tokenizer", "prior"):
        tell_apart([run for run in runs if run.kind == kind])
    title = ", ".join(dict.fromkeys(path.resolve().name for path in config.runs))
    write_text(config.output, page(title, config.runs, sections(runs, codes)))


def report(config: ReportConfig) -> None:
    """Show runs on one page, for people: curves, pictures over time, the codebook, configuration and duration."""
    write_report(config)
    print(f"look at {config.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-report", ReportConfig, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
