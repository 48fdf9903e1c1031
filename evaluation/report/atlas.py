"""vqgen-codebook: what every code of a tokenizer paints, how often it is used, and which codes are near it.

The output folder gets atlas.png, every code in a tile of its own, the most used first; codebook.json, with the counts
and each depth's figures; and with --neighbours neighbours.png.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from vqgen import __version__
from vqgen.config import command
from vqgen.errors import UsageError, UserError
from vqgen.files import write_json
from vqgen.options import at_least
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.reconstruction import write_png_atomic

from .codebook import codes_of, count_codes, tiles

ATLAS, FIGURES, NEIGHBOURS = "atlas.png", "codebook.json", "neighbours.png"
TILE = 4
"""Rows and columns of the grid that a code fills in the atlas."""


@dataclass
class CodebookConfig:
    """Which codebook, and what to show of it."""

    tokenizer: Path
    """Run or model folder of the tokenizer."""
    codes: Path | None = None
    """Folder of code files that it made, to count how often each code is used; none = codes in order of index."""
    neighbours: list[int] = field(default_factory=list)
    """Codes whose nearest codes are shown; of a tokenizer of several depths, depth * codebook size + code."""
    k: int = 8
    """How many nearest codes."""
    output: Path = Path("codebook")
    """Folder for the pictures and figures, which are replaced there."""

    def __post_init__(self) -> None:
        at_least(self, k=1)


@torch.no_grad()
def vectors(tokenizer: Tokenizer) -> Tensor:
    """What each code adds to the latent that the decoder sees, whatever the quantizer: float32 (depth, K, D)."""
    depth, size = tokenizer.depth, tokenizer.codebook_size
    found = []
    for which in range(depth):
        codes = torch.zeros(size, 1, 1, depth, dtype=torch.long)
        codes[:, 0, 0, which] = torch.arange(size)
        latents = tokenizer.quantizer.decode(codes if depth > 1 else codes[..., 0])
        found.append(latents.flatten(1))
    return torch.stack(found)


def nearest_codes(table: Tensor, index: int, k: int) -> list[tuple[int, float]]:
    """The k codes nearest to `index` (depth * K + code) of the same depth, by Euclidean distance of what they add to
    the latent; nearest first, equal ones by index."""
    depth, code = divmod(index, table.shape[1])
    distances = (table[depth] - table[depth, code]).norm(dim=1)
    distances[code] = math.inf
    order = distances.sort(stable=True)
    return [
        (depth * table.shape[1] + int(i), float(d)) for d, i in zip(order.values[:k], order.indices[:k], strict=True)
    ]


def inspect(config: CodebookConfig) -> dict[str, Any]:
    """Write everything, and return what codebook.json holds. Raises `UserError`."""
    tokenizer = Tokenizer.load(config.tokenizer)
    depth, size = tokenizer.depth, tokenizer.codebook_size
    for index in config.neighbours:
        if not 0 <= index < depth * size:
            raise UsageError(f"--neighbours: found {index}, but the codes are 0 to {depth * size - 1}")
    about: dict[str, Any] = {
        "version": __version__,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "codebook_size": size,
        "depth": depth,
    }
    common, order = torch.zeros(depth, dtype=torch.long), torch.arange(depth * size)
    if config.codes is not None:
        if codes_of(tokenizer, [config.codes]) is None:
            raise UserError(f"--codes: {config.codes} holds codes of another tokenizer than {config.tokenizer}")
        usage = count_codes(config.codes)
        common = usage.counts.argmax(1)
        order = torch.cat(
            [which * size + counts.argsort(descending=True, stable=True) for which, counts in enumerate(usage.counts)]
        )
        counted = {"images": usage.images, "splits": usage.splits, "counts": usage.counts.tolist()}
        about |= usage.figures | counted
    columns = math.ceil(math.sqrt(depth * size))
    write_png_atomic(config.output / ATLAS, _sheet(tiles(tokenizer, order, common, TILE), columns))
    if config.neighbours:
        table = vectors(tokenizer)
        about["neighbours"] = {str(i): nearest_codes(table, i, min(config.k, size - 1)) for i in config.neighbours}
        rows = [[int(i), *(j for j, _ in near)] for i, near in about["neighbours"].items()]
        shown = tiles(tokenizer, torch.tensor(rows).flatten(), common, TILE)
        write_png_atomic(config.output / NEIGHBOURS, _sheet(shown, len(rows[0])))
    write_json(config.output / FIGURES, about)
    return about


def _sheet(pictures: Tensor, columns: int) -> Tensor:
    return make_grid(pictures, nrow=columns, padding=1, pad_value=255)


def run(config: CodebookConfig) -> None:
    """See a tokenizer's codebook: what each code paints, how often it is used, and which codes are near it."""
    found = inspect(config)
    if "counts" in found:
        print(
            f"{found['codes_used']:.0f} of {found['codebook_size']} codes used over {found['images']} images "
            f"({found['usage']:.1%}), perplexity {found['perplexity']:.1f}"
        )
    for index, near in found.get("neighbours", {}).items():
        print(f"near {index}: " + ", ".join(f"{other} ({distance:.3g})" for other, distance in near))
    print(f"look at {config.output / ATLAS}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-codebook", CodebookConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
