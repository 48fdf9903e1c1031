"""The work of vqgen-reconstruct: reconstruct images, write pictures and metrics into the output folder."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen import __version__
from vqgen.devices import find_device, precision_of, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import locked, read_record, write_json
from vqgen.files.output_folder import OutputFolder
from vqgen.metric import written
from vqgen.progress import progress
from vqgen.tokenizer.data.pixels import center_crop
from vqgen.tokenizer.losses.lpips import PerceptualDistance, check_size, check_weights

from .metrics import RECONSTRUCTION, ReconstructionMetrics
from .model import Tokenizer
from .reconstruct import ReconstructConfig
from .reconstruct_inputs import InputImage, batches_of_one_size, find_images, read_images, shrink
from .reconstruction import SHOWN, Reconstructions, write_comparison, write_png_atomic

METRICS, PARTIAL, GRID = "metrics.json", "metrics.partial.json", "grid.png"
# Lists of pictures in folders that version 0.1 wrote.
_LISTS_0_1 = ("figures.partial.json", "figures.json")
CELL = 256  # longest side of an image in the grid, in pixels
LISTED = 16  # up to this many images have a line of their own in the summary


# Names that pictures can have.
_OWN = (r"[0-9]{5,}-[\w.-]+\.png", r"grid\.png")


@dataclass(frozen=True)
class _Picture:
    file: str


@dataclass(frozen=True)
class _List:
    """What metrics.json says of the files beside it."""

    pictures: list[_Picture]


def file_name(index: int, name: str) -> str:
    """Return the file name of the picture of image `index`, which was read from `name`."""
    stem = re.sub(r"[^\w.-]+", "_", Path(name).stem)[:60]
    return f"{index:05d}-{stem}.png"


def open_output(output: Path, names: Sequence[str], overwrite: bool) -> OutputFolder:
    """The output folder, with the pictures that the lists of earlier runs name.

    A new or empty folder and that of an interrupted run are accepted, and with `overwrite` that of a finished run.
    Raises `UserError` where pictures called `names` cannot be written to it.
    """
    marks = (PARTIAL, METRICS, *_LISTS_0_1)
    lists = [path for name in marks if (path := output / name).is_file()]
    own = {GRID} if lists else set[str]()
    for path in lists:
        own |= {picture.file for picture in read_record(path, _List).pictures}
    folder = OutputFolder(output, marks, _OWN, own.__contains__)
    folder.refuse_links()
    if {METRICS, "figures.json"} & set(folder.present) and not overwrite:
        raise UsageError(f"--output: {output} holds reconstructions already; add --overwrite or use another folder")
    foreign = set(folder.present) - {path.name for path in folder.own_files()}
    if overwrite:
        foreign &= {*names, GRID}
    if foreign:
        name = min(foreign)
        raise UsageError(f"--output: {output} holds {name}, which vqgen-reconstruct did not write; use another folder")
    return folder


def difference(original: Tensor, result: Tensor, amplify: float) -> Tensor:
    """Absolute difference of two uint8 images, times `amplify` and clamped, uint8 of the same shape."""
    return ((original.float() - result.float()).abs() * amplify).clamp(max=255).to(torch.uint8)


def side_by_side(original: Tensor, result: Tensor, amplify: float) -> Tensor:
    """Join uint8 images (C, H, W) into a row: original, reconstruction and, unless `amplify` is 0, the difference."""
    parts = [original, result]
    if amplify:
        parts.append(difference(original, result, amplify))
    bar = original.new_full((*original.shape[:2], 4), 255)
    return torch.cat([tensor for part in parts for tensor in (bar, part)][1:], dim=2)


def grid_cells(images: Sequence[Tensor]) -> Tensor:
    """Center uint8 images (C, h, w) of any size on white cells of one size -> (n, C, H, W).

    Larger images are shrunk to `CELL` pixels; smaller ones are enlarged by an integer factor where others are larger.
    """
    small = [shrink(image, CELL) for image in images]
    height, width = (max(image.shape[axis] for image in small) for axis in (1, 2))
    cells = torch.full((len(small), len(small[0]), height, width), 255, dtype=torch.uint8)
    for cell, image in zip(cells, small):
        factor = min(height // image.shape[1], width // image.shape[2])
        image = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        center_crop(cell, image.shape[-2:]).copy_(image)
    return cells


def reconstruct_batches(
    batches: Iterable[list[InputImage]], metrics: ReconstructionMetrics
) -> Iterator[tuple[InputImage, Tensor, dict[str, float]]]:
    """Yield each image with its reconstruction, uint8 (C, H, W) on the CPU, and its metrics by name."""
    for batch in batches:
        originals = torch.stack([item.image for item in batch])
        try:
            results, each = metrics.reconstruct(originals)
        except torch.OutOfMemoryError as error:
            size = "x".join(map(str, originals.shape[2:]))
            found = f"{len(batch)} images of {size} do not fit into the memory of {metrics.device}"
            raise UserError(f"--batch-size: {found}; use fewer, or --largest") from error
        rows = zip(*(column.tolist() for column in each.values()))
        yield from zip(batch, results.cpu(), (dict(zip(each, row)) for row in rows))


def compare(config: ReconstructConfig) -> dict[str, Any]:
    """Reconstruct the images and write all files; returns the content of metrics.json. Raises `UserError`."""
    with locked(config.output):
        return _compare(config)


def _compare(config: ReconstructConfig) -> dict[str, Any]:
    find_device(config.device)  # raises where CUDA is asked for and missing
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
    locations, output = find_images(config), config.output
    names = [file_name(index, items.name(row)) for index, (items, row) in enumerate(locations[: config.pictures])]
    folder, perceptual = open_output(output, names, config.overwrite), None
    if config.perceptual_weights:
        perceptual = PerceptualDistance(config.perceptual_net, config.perceptual_weights).to(device)
    metrics, skipped = ReconstructionMetrics(tokenizer, perceptual, device, precision), list[str]()
    images = read_images(locations, tokenizer, config, skipped)
    batches = batches_of_one_size(images, config.batch_size, size)
    first = next(batches, None)
    if first is None:
        raise UserError(f"--data: none of {len(locations)} images can be reconstructed; the first is {skipped[0]}")
    results = reconstruct_batches(chain([first], batches), metrics)
    results = chain([next(results)], results)  # an earlier run is removed once the first images were reconstructed
    folder.clear()
    write_json(output / PARTIAL, {"pictures": [{"file": name} for name in names]})
    counts, entries, shown = Counter[str](), list[dict[str, Any]](), list[tuple[Tensor, Tensor]]()
    with progress(len(locations), "reconstructing", "img", True) as bar:
        for item, result, values in results:
            bar.update(item.index + 1 - bar.n)
            now = list(item.image.shape[1:])
            counts.update(["images", item.change, *(["other_size"] if now != size else [])])
            if item.index >= config.pictures:
                continue
            name = file_name(item.index, item.name)
            write_png_atomic(output / name, side_by_side(item.image, result, config.amplify))
            sizes = {"size": now, "original_size": item.original_size}
            entries.append({"file": name, "image": item.name, **sizes, **values})
            if len(shown) < SHOWN:
                shown.append((item.image, result))

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
        "metrics": metrics.compute(),
        "perceptual_net": config.perceptual_net if perceptual is not None else None,
        "precision": precision,
        "device": device.type,
        "pictures": entries,
    }
    if shown:
        originals, results = (grid_cells(images) for images in zip(*shown))
        write_comparison(output / GRID, Reconstructions(found["metrics"], originals, results))
    write_json(output / METRICS, found)
    folder.remove([output / PARTIAL])
    return found


def _in_words(values: dict[str, float]) -> str:
    known = [(RECONSTRUCTION[name], value) for name, value in values.items() if name in RECONSTRUCTION]
    return ", ".join(f"{metric.title} {written(value, metric.unit, 4)}" for metric, value in known)


def summary(found: dict[str, Any], config: ReconstructConfig) -> Iterator[str]:
    """Yield the lines to print: images where they are few, the metrics of all, and what was changed."""
    for entry in found["pictures"] if found["images"] <= LISTED else []:
        now, before = ("x".join(map(str, entry[key])) for key in ("size", "original_size"))
        yield f"{entry['image']}: {now}{f' of {before}' if now != before else ''} pixels, {_in_words(entry)}"
    images = found["images"]
    yield f"{images} image{'s' * (images > 1)}: {_in_words(found['metrics'])} (codebook of {found['codebook_size']})"
    changes = {
        "cropped": "cropped at the edges to multiples of the tokenizer's downsampling factor",
        "shrunk": f"shrunk to --largest {config.largest} pixels",
        "resized": "resized as in training",
        "other_size": f"of another size than the {'x'.join(map(str, found['training_size']))} of training (--resize)",
    }
    notes = [f"{found[name]} {text}" for name, text in changes.items() if found[name]]
    notes += [f"{len(found['skipped'])} skipped"] if found["skipped"] else []
    if notes:
        yield "; ".join(notes)
    yield f"written to {config.output / (GRID if found['pictures'] else METRICS)}"
