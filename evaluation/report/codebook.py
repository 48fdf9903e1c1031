"""The codebook section of the report: charts of the codes' use, and what the codes decode to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqgen.artifact import DESCRIPTION
from vqgen.errors import UserError
from vqgen.evaluation.codebook import Usage, count_codes, find_codes, tiles
from vqgen.tokenizer.model import Tokenizer

from .charts import Chart, Series, bar_chart, line_chart
from .run_folder import Png, RunFolder

SHOWN = 24  # codes shown of the most used, and of the least used
SIDE = 8  # largest number of rows and columns of the grid of one code
# Uses of a code relative to a uniform distribution: upper ends of the bars, and their labels.
EDGES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, math.inf)
LABELS = ("never", "<⅛", "⅛–¼", "¼–½", "½–1", "1–2", "2–4", "4–8", "≥8")


class CodeImage(NamedTuple):
    """A code, its depth, how often it was used, and the image of a grid filled with it."""

    code: int
    depth: int
    uses: int
    image: Png


@dataclass(frozen=True)
class Codebook:
    """Codebook of one tokenizer run; if it cannot be shown, `missing` says why."""

    run: RunFolder
    missing: str = ""
    usage: Usage | None = None
    bars: Chart | None = None
    ranks: Chart | None = None
    most: list[CodeImage] = field(default_factory=list)
    least: list[CodeImage] = field(default_factory=list)


def codebook_of(run: RunFolder, folders: Sequence[Path]) -> Codebook:
    """The codebook of a tokenizer run, counted over the first of `folders` that holds its codes."""
    if not run.description:
        return Codebook(run, f"The model is not written yet (there is no {DESCRIPTION}).")
    try:
        tokenizer = Tokenizer.load(run.path)
        folder = find_codes(tokenizer, folders)
        if folder is None:
            how = f"vqgen-tokenize --tokenizer {run.path} makes code files, vqgen-report --codes FOLDER counts them."
            return Codebook(run, f"Codes were not counted, because no code files of this tokenizer were given. {how}")
        usage = count_codes(folder)
        if usage.counts.shape != (tokenizer.depth, tokenizer.codebook_size):
            raise UserError(f"{folder} names another codebook size than its tokenizer has; tokenize again")
        most, least = code_images(tokenizer, usage)
    except UserError as error:
        return Codebook(run, f"It cannot be shown: {error}.")
    return Codebook(run, "", usage, *usage_charts(usage), most, least)


def usage_charts(usage: Usage) -> tuple[Chart, Chart]:
    """A histogram of the codes by their use, and the uses of the codes by rank."""
    uniform = usage.counts.sum(1, keepdim=True).double() / usage.counts.shape[1]
    relative, used = usage.counts / uniform, usage.counts > 0
    edges = torch.tensor(EDGES, dtype=torch.float64)
    bars = torch.bincount(torch.bucketize(relative[used], edges, right=True), minlength=len(EDGES))
    values = [int((~used).sum()), *bars.tolist()]
    series = []
    for depth, counts in enumerate(usage.counts):
        ranked = [float(n) for n in counts.sort(descending=True).values if n]
        label = f"depth {depth}" if len(usage.counts) > 1 else "uses"
        series.append(Series(label, list(enumerate(ranked, 1)), depth))
    chart = line_chart("Uses of the codes by rank", "uses", series, log=True, x_label="rank")
    return bar_chart("Codes by their use", "uses, relative to a uniform distribution", LABELS, values), chart


def code_images(tokenizer: Tokenizer, usage: Usage) -> tuple[list[CodeImage], list[CodeImage]]:
    """The most and the least used codes; with several depths, the others hold their most used codes."""
    order = usage.counts.flatten().argsort(descending=True, stable=True)
    shown, common = min(SHOWN, len(order) // 2), usage.counts.argmax(1)

    def images_of(indices: Tensor) -> list[CodeImage]:
        found = []
        for index, image in zip(indices.tolist(), tiles(tokenizer, indices, common, SIDE), strict=True):
            depth, code = divmod(index, usage.counts.shape[1])
            found.append(CodeImage(code, depth, int(usage.counts[depth, code]), Png.encode(image)))
        return found

    return images_of(order[:shown]), images_of(order[len(order) - shown :].flip(0))
