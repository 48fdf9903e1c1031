"""The images given to vqgen-reconstruct, each at a size that the tokenizer accepts."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from vqgen.config import one_line
from vqgen.errors import UsageError, UserError
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.data.holdout import check_held_out, reading_of
from vqgen.tokenizer.data.items import Files, Items
from vqgen.tokenizer.data.options import SUFFIXES, ImageConfig, check_outside
from vqgen.tokenizer.data.pixels import center_crop, fit
from vqgen.tokenizer.data.sources import find_splits, open_source
from vqgen.tokenizer.losses.options import check_size

from .metrics import SMALLEST
from .model import Tokenizer
from .reconstruct import ReconstructConfig
from .train import TokenizerTraining

Location = tuple[Items, int]  # the items of a source, and the index of one of them
Change = Literal["", "resized", "shrunk", "cropped"]


@dataclass(frozen=True)
class InputImage:
    """An image as it is reconstructed, uint8 (C, H, W), with the height and width as decoded, and what was changed."""

    index: int
    name: str
    image: Tensor
    original_size: list[int]
    change: Change


def find_images(config: ReconstructConfig) -> list[Location]:
    """List every image that `config` names, in order. Raises `UserError` where there is nothing to read, or the
    output folder is inside of a folder of images, or where images that the tokenizer was trained on would count as
    held out."""
    run, found = reading_of(config.tokenizer, TokenizerTraining), list[Location]()
    holdout = config.holdout or (run or {}).get("holdout", ImageConfig.holdout)
    for word in config.data:
        path = Path(os.path.expanduser(word))
        if os.path.isfile(path) and path.suffix.lower() != ".parquet":
            if config.split != "auto":
                raise UsageError(
                    f"--split: found {config.split}, but {word} is an image, which has no splits; leave it out"
                )
            found.append((Files(path.parent, [path.name]), 0))
        elif path.suffix.lower() in SUFFIXES and not os.path.lexists(path):  # a file name, not that of a dataset
            raise UserError(f"--data: {word} does not exist; give image files, folders or other sources")
        else:
            if config.split == "auto":
                splits = find_splits(word)
                items = next(splits[name] for name in ("heldout", "test", "all") if name in splits).items
                rows = range(len(items))
            else:
                if config.split == "heldout" and (note := _note(config, word, run)):
                    tqdm.write(one_line(note), file=sys.stderr)
                source = open_source(word, config.split, holdout)
                items, rows = source.items, source.rows.tolist()
            if isinstance(items, Files):
                check_outside(config.output, items.root)
            found += [(items, row) for row in rows]
    if not found:
        raise UserError(f"--data: {' '.join(config.data)} holds no images; add some")
    return found[: config.n or None]


def _note(config: ReconstructConfig, word: str, run: Mapping[str, Any] | None) -> str:
    """What is to be said of the images of a source that count as held out; see `find_images`."""
    if run:
        return check_held_out(word, config.holdout or run["holdout"], run)
    if config.holdout is not None or "heldout" in find_splits(word):
        return ""
    return f"--holdout {ImageConfig.holdout:g} of {word}, as no run of the tokenizer records another"


def shrink(image: Tensor, largest: int) -> Tensor:
    """Resize uint8 (C, h, w) so that its longest side is at most `largest` pixels; never enlarges."""
    scale = min(1.0, largest / max(image.shape[-2:]))
    return fit(image, [max(1, round(side * scale)) for side in image.shape[-2:]], "crop")


def prepare(image: Tensor, tokenizer: Tokenizer, config: ReconstructConfig) -> tuple[Tensor, Change]:
    """Bring uint8 (C, h, w) to a size that the tokenizer accepts; also returns what was done. Raises `BrokenImage`."""
    if config.resize:
        size = tokenizer.config.image_size
        return center_crop(fit(image, size, tokenizer.config.fit), size), "resized"
    factor, before = tokenizer.factor, list(image.shape[-2:])
    too_large = 0 < config.largest < max(before)
    image = shrink(image, config.largest) if too_large else image
    size = [side - side % factor for side in image.shape[-2:]]
    if min(size) < SMALLEST:
        least = -(-SMALLEST // factor) * factor
        raise BrokenImage(f"too small: {before[0]}x{before[1]} pixels, at least {least} a side are needed")
    if config.perceptual_weights:
        try:
            check_size(config.perceptual_net, *size)
        except UsageError as error:
            raise BrokenImage(str(error)) from error
    return center_crop(image, size), "shrunk" if too_large else "" if size == before else "cropped"


def read_images(
    locations: Sequence[Location], tokenizer: Tokenizer, config: ReconstructConfig, skipped: list[str]
) -> Iterator[InputImage]:
    """Decode and prepare the images one by one; broken ones are printed and appended to `skipped` with the reason."""
    for index, (items, row) in enumerate(locations):
        try:
            decoded = decode(items.read(row), tokenizer.config.channels)
            image, change = prepare(decoded, tokenizer, config)
        except (BrokenImage, OSError) as error:
            skipped.append(f"{items.name(row)} ({error})")
            tqdm.write(one_line(f"skipped: {skipped[-1]}"), file=sys.stderr)
            continue
        yield InputImage(index, items.name(row), image, list(decoded.shape[-2:]), change)


def batches_of_one_size(
    images: Iterable[InputImage], batch_size: int, size: Sequence[int]
) -> Iterator[list[InputImage]]:
    """Batch consecutive images of equal shape: at most the pixels of `batch_size` images of `size`, or one image."""
    batch: list[InputImage] = []
    for item in images:
        pixels = (len(batch) + 1) * item.image[0].numel()
        if batch and (item.image.shape != batch[0].image.shape or pixels > batch_size * size[0] * size[1]):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
