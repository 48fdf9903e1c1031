"""How often the codes of a tokenizer are used, and what a code paints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import encode_png

from vqgen.errors import UserError
from vqgen.tokenizer.codes.format import CodeFiles, Manifest, Split
from vqgen.tokenizer.data.pixels import to_uint8
from vqgen.tokenizer.metrics import code_metrics
from vqgen.tokenizer.model import Tokenizer

from .charts import Bars, Chart, Series, bar_chart, line_chart
from .run_folder import Png

SHOWN = 24
"""Codes that are painted, of the most used and of the least used."""
SIDE = 8
"""Rows and columns at most of the grid that one code fills."""
# Images whose codes are counted at once, and codes painted at once.
IMAGES, PAINTED = 8192, 8
# Uses of a code as a multiple of what even use would give it: the upper ends of the bars, and what they are called.
EDGES = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, math.inf)
LABELS = ("never", "<⅛", "⅛–¼", "¼–½", "½–1", "1–2", "2–4", "4–8", "≥8")


@dataclass(frozen=True)
class Painted:
    """A code, at which depth, how often it was used, and a grid filled with it."""

    code: int
    depth: int
    uses: int
    picture: Png


@dataclass(frozen=True)
class Usage:
    """Counts over code files, and what comes of them."""

    images: int
    """Grids of codes counted: images times their views."""
    splits: str
    counts: Tensor
    """int64 (depth, K)."""

    @property
    def figures(self) -> dict[str, float]:
        """Codes in use, their share, and the perplexity; means over the depths."""
        return code_metrics(self.counts)

    def charts(self) -> tuple[Bars, Chart]:
        """How many codes are used how often, and the uses of the codes by rank."""
        even = self.counts.sum(1, keepdim=True).double() / self.counts.shape[1]
        relative, used = self.counts / even, self.counts > 0
        edges = torch.tensor(EDGES, dtype=torch.float64)
        bars = torch.bincount(torch.bucketize(relative[used], edges, right=True), minlength=len(EDGES))
        values = [int((~used).sum()), *bars.tolist()]
        title, x_label = "How many codes are used how often", "uses, as a multiple of even use"
        depths = len(self.counts)
        series = []
        for depth, counts in enumerate(self.counts):
            ranked = [float(n) for n in counts.sort(descending=True).values if n]
            label = f"depth {depth}" if depths > 1 else "uses"
            series.append(Series(label, list(enumerate(ranked, 1)), depth))
        chart = line_chart("Uses of the codes, from the most used on", "uses", series, log=True, x_label="rank")
        return bar_chart(title, x_label, LABELS, values), chart


def count_codes(folder: Path) -> Usage:
    """Count every code of a folder of code files, all splits and views. Raises `UserError`."""
    manifest = Manifest.read(folder)
    counts = torch.zeros(manifest.depth, manifest.codebook_size, dtype=torch.long)
    shift = manifest.codebook_size * torch.arange(manifest.depth)
    grids, splits = 0, []
    for split in manifest.splits:
        files = CodeFiles(folder, _split(split, folder))
        if len(files):
            splits.append(split)
        for start in range(0, len(files), IMAGES):
            images = range(start, min(start + IMAGES, len(files)))
            for view in range(files.views):
                codes = files.gather(images, view).reshape(-1, manifest.depth)
                if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < manifest.codebook_size:
                    raise UserError(f"{folder} holds codes that the codebook does not have; tokenize again")
                counts += torch.bincount((codes + shift).flatten(), minlength=counts.numel()).view_as(counts)
                grids += len(images)
    if not grids:
        raise UserError(f"{folder} holds no images; tokenize again")
    return Usage(grids, " and ".join(splits).replace("heldout", "held-out"), counts)


def _split(name: str, folder: Path) -> Split:
    if name == "train" or name == "heldout":
        return name
    raise UserError(f"{folder} holds a split {name}, which this version of vqgen does not know; tokenize again")


def paint(tokenizer: Tokenizer, usage: Usage) -> tuple[list[Painted], list[Painted]]:
    """The most and the least used codes, in this order, each with the grid that it alone fills.

    Where a position has several codes, the other depths hold their most used ones.
    """
    order = usage.counts.flatten().argsort(descending=True, stable=True)
    shown = min(SHOWN, len(order) // 2)
    common = usage.counts.argmax(1)
    chosen: list[Tensor] = [order[:shown], order[len(order) - shown :].flip(0)]
    found = [
        [_painted(int(index), image, usage) for index, image in zip(indices, tiles(tokenizer, indices, common))]
        for indices in chosen
    ]
    return found[0], found[1]


def tiles(tokenizer: Tokenizer, indices: Tensor, common: Tensor, side: int = SIDE) -> Tensor:
    """What codes paint: uint8 (n, C, H, W), a grid filled with each, of at most `side` rows and columns.

    Args:
        indices: (n,), depth * K + code.
        common: (depth,), the codes that the other depths hold meanwhile.
    """
    size, (rows, columns) = tokenizer.codebook_size, (min(side, length) for length in tokenizer.grid)
    found = []
    for part in indices.split(PAINTED):
        codes = common.repeat(len(part), 1)
        codes[torch.arange(len(part)), part // size] = part % size
        grid = codes[:, None, None].expand(-1, rows, columns, -1)
        found.append(to_uint8(tokenizer.decode(grid if tokenizer.depth > 1 else grid[..., 0])).cpu())
    return torch.cat(found)


def _painted(index: int, image: Tensor, usage: Usage) -> Painted:
    depth, code = divmod(index, usage.counts.shape[1])
    picture = Png(encode_png(image).numpy().tobytes(), image.shape[2], image.shape[1])
    return Painted(code, depth, int(usage.counts[depth, code]), picture)


def codes_of(tokenizer: Tokenizer, folders: Sequence[Path]) -> Path | None:
    """The first of `folders` whose codes this tokenizer made."""
    marks = ((folder, Manifest.read(folder).tokenizer_fingerprint) for folder in folders)
    return next((folder for folder, mark in marks if mark == tokenizer.fingerprint), None)
