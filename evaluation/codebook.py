"""A tokenizer's codebook: how often each code is used, what it decodes to, and which codes are near it."""

import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen import __version__
from vqgen.errors import UsageError, UserError
from vqgen.files import locked, read_json, write_json
from vqgen.files.output_folder import OutputFolder
from vqgen.tokenizer.codes.format import CodeFiles, Manifest
from vqgen.tokenizer.data.pixels import image_grid, to_uint8
from vqgen.tokenizer.metrics import code_metrics
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.reconstruction import refuse_foreign_png, write_png_atomic

from .options import CodebookConfig

TILE = 4  # rows and columns of the grid of one code in atlas.png
COUNT_BATCH, DECODE_BATCH = 8192, 8  # images counted, and grids decoded, at once


@dataclass(frozen=True)
class Usage:
    """How often each code occurs in code files: int64 `counts` (depth, K), over images times their views."""

    images: int
    splits: list[str]
    counts: Tensor

    @property
    def metrics(self) -> dict[str, float]:
        """Number of used codes, their share, and the perplexity; means over the depths."""
        return code_metrics(self.counts)


def count_codes(folder: Path) -> Usage:
    """Count every code in a folder of code files, over all splits and views. Raises `UserError`."""
    manifest = Manifest.read(folder)
    counts = torch.zeros(manifest.depth, manifest.codebook_size, dtype=torch.long)
    shift = manifest.codebook_size * torch.arange(manifest.depth)
    grids, splits = 0, []
    for split in manifest.splits:
        files = CodeFiles(folder, split)  # type: ignore[arg-type]
        if len(files):
            splits.append(split)
        for start in range(0, len(files), COUNT_BATCH):
            images = range(start, min(start + COUNT_BATCH, len(files)))
            for view in range(files.views):
                codes = files.gather(images, view).reshape(-1, manifest.depth)
                counts += torch.bincount((codes + shift).flatten(), minlength=counts.numel()).view_as(counts)
                grids += len(images)
    if not grids:
        raise UserError(f"{folder} holds no images; tokenize again")
    return Usage(grids, splits, counts)


def find_codes(tokenizer: Tokenizer, folders: Sequence[Path]) -> Path | None:
    """The first of `folders` with codes of this tokenizer."""
    marks = ((folder, Manifest.read(folder).tokenizer_fingerprint) for folder in folders)
    return next((folder for folder, mark in marks if mark == tokenizer.fingerprint), None)


def tiles(tokenizer: Tokenizer, indices: Tensor, common: Tensor, side: int) -> Tensor:
    """Decode, for each of `indices` (n,), depth * K + code, a grid filled with that code: uint8 (n, C, H, W).

    The grid has at most `side` rows and columns; `common` (depth,) are the codes at the other depths.
    """
    size, (rows, columns) = tokenizer.codebook_size, (min(side, length) for length in tokenizer.grid)
    found = []
    for part in indices.split(DECODE_BATCH):
        codes = common.repeat(len(part), 1)
        codes[torch.arange(len(part)), part // size] = part % size
        grid = codes[:, None, None].expand(-1, rows, columns, -1)
        found.append(to_uint8(tokenizer.decode(grid if tokenizer.depth > 1 else grid[..., 0])).cpu())
    return torch.cat(found)


@torch.no_grad()
def code_vectors(tokenizer: Tokenizer) -> Tensor:
    """Contribution of each code to the latent that the decoder gets: float32 (depth, K, D) on the CPU, for any
    quantizer on any device."""
    depth, size, device = tokenizer.depth, tokenizer.codebook_size, next(tokenizer.parameters()).device
    found = []
    for which in range(depth):
        codes = torch.zeros(size, 1, 1, depth, dtype=torch.long, device=device)
        codes[:, 0, 0, which] = torch.arange(size, device=device)
        found.append(tokenizer.quantizer.decode(codes if depth > 1 else codes[..., 0]).flatten(1))
    return torch.stack(found).cpu()


def nearest_codes(vectors: Tensor, index: int, k: int) -> list[tuple[int, float]]:
    """The k codes nearest to `index` (depth * K + code) at the same depth by `vectors` (depth, K, D), nearest first.

    With their Euclidean distances; ties by index.
    """
    depth, code = divmod(index, vectors.shape[1])
    distances = (vectors[depth] - vectors[depth, code]).norm(dim=1)
    distances[code] = math.inf
    nearest, order = distances.sort(stable=True)
    return list(zip((depth * vectors.shape[1] + order[:k]).tolist(), nearest[:k].tolist(), strict=True))


def inspect_codebook(config: CodebookConfig) -> None:
    """Write atlas.png, codebook.json and, with --neighbours, neighbours.png; print a summary. Raises `UserError`."""
    with locked(config.output):
        _refuse_foreign(config.output)
        names = (re.escape(name) for name in ("atlas.png", "neighbours.png", "codebook.json"))
        OutputFolder(config.output, patterns=tuple(names)).remove_leftovers()
        _inspect(config)


def _refuse_foreign(output: Path) -> None:
    """Raise `UsageError` where a file of the names that are written is not of an earlier call."""
    path, about = output / "codebook.json", {}
    if os.path.lexists(path):
        with suppress(UserError):
            about = read_json(path)
        if not {"version", "tokenizer_fingerprint", "codebook_size"} <= about.keys():
            raise UsageError(f"--output: {path} is of something else; move it or choose another folder")
    if not re.match(r"0\.1(?!\d)", str(about.get("version"))):  # which did not mark its pictures
        for name in ("atlas.png", "neighbours.png"):
            refuse_foreign_png(output / name, "--output")


def _inspect(config: CodebookConfig) -> None:
    tokenizer = Tokenizer.load(config.tokenizer)
    depth, size = tokenizer.depth, tokenizer.codebook_size
    for index in config.neighbours:
        if not 0 <= index < depth * size:
            raise UsageError(f"--neighbours: found {index}, expected 0 to {depth * size - 1}, the codes")
    about: dict[str, Any] = {"version": __version__, "tokenizer_fingerprint": tokenizer.fingerprint}
    about |= {"codebook_size": size, "depth": depth}
    common, order = torch.zeros(depth, dtype=torch.long), torch.arange(depth * size)
    if config.codes is not None:
        if find_codes(tokenizer, [config.codes]) is None:
            raise UserError(f"--codes: {config.codes} holds codes of another tokenizer than {config.tokenizer}")
        usage = count_codes(config.codes)
        common = usage.counts.argmax(1)
        order = (usage.counts.argsort(descending=True, stable=True) + size * torch.arange(depth)[:, None]).flatten()
        about |= {**usage.metrics, "images": usage.images, "splits": usage.splits, "counts": usage.counts.tolist()}
        print(
            f"{about['codes_used']:.0f} of {size} codes used over {usage.images} images ({about['usage']:.1%}), "
            f"perplexity {about['perplexity']:.1f}"
        )
    _write_sheet(config.output / "atlas.png", tiles(tokenizer, order, common, TILE), math.ceil(math.sqrt(depth * size)))
    if config.neighbours:
        vectors = code_vectors(tokenizer)
        near = {index: nearest_codes(vectors, index, min(config.k, size - 1)) for index in config.neighbours}
        about["neighbours"] = {str(index): found for index, found in near.items()}
        rows = torch.tensor([[index, *(other for other, _ in found)] for index, found in near.items()])
        _write_sheet(config.output / "neighbours.png", tiles(tokenizer, rows.flatten(), common, TILE), rows.shape[1])
        for index, found in near.items():
            print(f"near {index}: " + ", ".join(f"{other} ({distance:.3g})" for other, distance in found))
    write_json(config.output / "codebook.json", about)
    print(f"look at {config.output / 'atlas.png'}")


def _write_sheet(path: Path, images: Tensor, columns: int) -> None:
    write_png_atomic(path, image_grid(images, columns, 1), marked=True)
