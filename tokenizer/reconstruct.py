"""vqgen-reconstruct: images beside their reconstructions, as pictures and in figures.

The output folder gets one picture an image (original, reconstruction, their difference) of the first ones, grid.png of
these, and at the very end figures.json, which lists them. While a run has not ended, figures.partial.json does.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen import __version__
from vqgen.config import command
from vqgen.devices import precision_of, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import read_json, write_json
from vqgen.output_folder import remove
from vqgen.progress import progress
from vqgen.tokenizer.data.pixels import centre, fit
from vqgen.tokenizer.losses.lpips import PerceptualDistance, check_size, check_weights

from .metrics import ReconstructionMetrics
from .model import Tokenizer
from .reconstruct_inputs import Picture, ReconstructConfig, find_images, grouped, read_images
from .reconstruction import SHOWN, Reconstructions, pass_through, write_comparison, write_png_atomic

FIGURES, UNFINISHED, GRID = "figures.json", "figures.partial.json", "grid.png"
# Longest side of an image in the grid.
CELL = 256
# So few images are told one by one.
FEW = 16
# What a killed process leaves of a file it was writing; see `atomic_path`.
PART = re.compile(r"\.(\d{5,}-.*\.png|grid\.png|figures(\.partial)?\.json)\..*part")


def file_name(index: int, name: str) -> str:
    """The file of the picture of image `index`, which came from `name`."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:60]
    return f"{index:05d}-{stem}.png"


def former_run(output: Path) -> list[Path]:
    """The files in `output` that a former run said were its own, its lists last. Raises `UserError`."""
    lists = [output / name for name in (UNFINISHED, FIGURES) if (output / name).is_file()]
    names = {GRID} if lists else set()
    for path in lists:
        listed = read_json(path).get("pictures")
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise UserError(f"{path} is no list of reconstructions; remove it or choose another --output")
        names |= {Path(str(entry.get("file"))).name for entry in listed}
    leftovers = [path for path in output.glob(".*") if PART.fullmatch(path.name)]
    return [path for name in sorted(names) if (path := output / name).is_file()] + leftovers + lists


def check_output(output: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raise `UsageError` where `output` cannot take the pictures called `names`.

    What an interrupted run left it can, and what a finished one left with `overwrite`.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; name a folder")
    there = {path.name for path in output.glob("[!.]*")}
    if FIGURES in there and not overwrite:
        raise UsageError(
            f"--output: {output} holds reconstructions already; --overwrite replaces them, or choose another folder"
        )
    strangers = there - {path.name for path in former_run(output)}
    if overwrite:
        strangers &= {*names, GRID}
    if strangers:
        raise UsageError(
            f"--output: {output} holds {min(strangers)}, which vqgen-reconstruct did not write; choose another folder"
        )


def beside(original: Tensor, result: Tensor, amplify: float) -> Tensor:
    """uint8 (C, H, W) in a row: the original, its reconstruction and, unless `amplify` is 0, their difference."""
    parts = [original, result]
    if amplify:
        parts.append(((original.float() - result.float()).abs() * amplify).clamp(max=255).to(torch.uint8))
    bar = original.new_full((*original.shape[:2], 4), 255)
    return torch.cat([tensor for part in parts for tensor in (bar, part)][1:], dim=2)


def in_cells(images: Sequence[Tensor]) -> Tensor:
    """uint8 (C, h, w) of any sizes -> (n, C, H, W): each shrunk to `CELL` pixels where it is larger, or enlarged by a
    whole factor where others are larger, on white."""
    small = []
    for image in images:
        scale = min(1.0, CELL / max(image.shape[-2:]))
        small.append(fit(image, [max(1, round(side * scale)) for side in image.shape[-2:]], "crop"))
    height, width = (max(image.shape[axis] for image in small) for axis in (1, 2))
    cells = torch.full((len(small), len(small[0]), height, width), 255, dtype=torch.uint8)
    for cell, image in zip(cells, small):
        factor = min(height // image.shape[1], width // image.shape[2])
        image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        centre(cell, image.shape[-2:]).copy_(image)
    return cells


def measured(
    groups: Iterable[list[Picture]],
    tokenizer: Tokenizer,
    metrics: ReconstructionMetrics,
    device: torch.device,
    precision: str,
) -> Iterator[tuple[Picture, Tensor, dict[str, float]]]:
    """Each picture with its reconstruction, uint8 (C, H, W) on the CPU, and its figures; the set's go to `metrics`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    for group in groups:
        originals = torch.stack([picture.image for picture in group]).to(device)
        try:
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                results, each = pass_through(tokenizer, originals, metrics)
        except torch.OutOfMemoryError as error:
            size = "x".join(map(str, originals.shape[2:]))
            text = f"{len(group)} images of {size} do not fit into the memory of {device}; use fewer, or --largest"
            raise UserError(f"--batch-size: {text}") from error
        rows = torch.stack(list(each.values()), dim=1).tolist()
        yield from zip(group, results.cpu(), (dict(zip(each, row)) for row in rows))


def compare(config: ReconstructConfig) -> dict[str, Any]:
    """Reconstruct the images and write everything; returns what figures.json holds. Raises `UserError`."""
    state = processes(cpu=config.device == "cpu")
    if state.num_processes > 1:
        raise UsageError(f"vqgen-reconstruct is one process, found {state.num_processes}; start it without a launcher")
    device = torch.device(state.device or "cpu")
    precision = precision_of(config.precision, device).replace("no", "fp32")
    if config.perceptual_weights:
        check_weights(config.perceptual_net, config.perceptual_weights)
    tokenizer = Tokenizer.load(config.tokenizer, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = tokenizer.config.image_size
    if config.resize and config.perceptual_weights:
        check_size(config.perceptual_net, *size)
    places, output = find_images(config), config.output
    names = [file_name(index, items.name(row)) for index, (items, row) in enumerate(places[: config.pictures])]
    check_output(output, names, config.overwrite)
    perceptual = None
    if config.perceptual_weights:
        perceptual = PerceptualDistance(config.perceptual_net, config.perceptual_weights).to(device)

    metrics, skipped = ReconstructionMetrics(tokenizer, perceptual, device), list[str]()
    groups = grouped(read_images(places, tokenizer, config, skipped), config.batch_size, size)
    first = next(groups, None)
    if first is None:
        raise UserError(f"--data: none of {len(places)} images can be reconstructed; the first is {skipped[0]}")
    remove(former_run(output))
    write_json(output / UNFINISHED, {"pictures": [{"file": name} for name in names]})
    counts, entries, shown = Counter[str](), list[dict[str, Any]](), list[tuple[Tensor, Tensor]]()
    with progress(len(places), "reconstructing", "img", True) as bar:
        for picture, result, figures in measured(chain([first], groups), tokenizer, metrics, device, precision):
            bar.update(picture.index + 1 - bar.n)
            counts.update(["images", picture.change])
            counts["other_size"] += list(picture.image.shape[1:]) != size
            if picture.index >= config.pictures:
                continue
            name = file_name(picture.index, picture.name)
            write_png_atomic(output / name, beside(picture.image, result, config.amplify))
            sizes = {"size": list(picture.image.shape[1:]), "original_size": picture.original_size}
            entries.append({"file": name, "image": picture.name, **sizes, **figures})
            if len(shown) < SHOWN:
                shown.append((picture.image, result))

    found = {
        "version": __version__,
        "tokenizer": str(config.tokenizer),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data": config.data,
        "split": config.split,
        **{name: counts[name] for name in ("images", "resized", "shrunk", "cropped", "other_size")},
        "training_size": size,
        "skipped": skipped,
        "codebook_size": tokenizer.codebook_size,
        "figures": metrics.figures(),
        "perceptual_net": config.perceptual_net if perceptual is not None else None,
        "precision": precision,
        "device": device.type,
        "pictures": entries,
    }
    if shown:
        originals, results = (in_cells(images) for images in zip(*shown))
        write_comparison(output / GRID, Reconstructions(found["figures"], originals, results))
    write_json(output / FIGURES, found)
    remove([output / UNFINISHED])
    return found


def told(found: dict[str, Any], config: ReconstructConfig) -> Iterator[str]:
    """What was measured, in lines for people."""

    def quality(figures: dict[str, float]) -> str:
        lpips = f", LPIPS {figures['lpips']:.3f}" if "lpips" in figures else ""
        return f"{figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}{lpips}"

    for entry in found["pictures"] if found["images"] <= FEW else []:
        now, before = ("x".join(map(str, entry[key])) for key in ("size", "original_size"))
        yield f"{entry['image']}: {now}{f' of {before}' if now != before else ''} pixels, {quality(entry)}"
    figures, images = found["figures"], found["images"]
    codes = f"{figures['codes_used']:.4g} of {found['codebook_size']} codes in use"
    yield (
        f"{images} image{'s' * (images > 1)}: {quality(figures)}; {figures['psnr_of_mse']:.2f} dB of the mean square "
        f"error; {codes}, perplexity {figures['perplexity']:.4g}"
    )
    changes = {
        "cropped": "cropped at the edges to what the tokenizer's factor divides",
        "shrunk": f"shrunk to --largest {config.largest} pixels",
        "resized": "resized as in training",
        "other_size": f"of another size than the {'x'.join(map(str, found['training_size']))} of training (--resize)",
    }
    notes = [f"{found[name]} {text}" for name, text in changes.items() if found[name]]
    notes += [f"{len(found['skipped'])} skipped"] if found["skipped"] else []
    if notes:
        yield "; ".join(notes)
    yield f"look at {config.output / (GRID if found['pictures'] else FIGURES)}"


def run(config: ReconstructConfig) -> None:
    """See how well a tokenizer does on images: each beside its reconstruction, and figures over all of them."""
    for line in told(compare(config), config):
        print(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-reconstruct", ReconstructConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
