"""What vqgen-reconstruct is asked for: the images that were named, each at a size that the tokenizer takes."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from vqgen.errors import UsageError, UserError
from vqgen.options import at_least
from vqgen.tokenizer.data.pixels import BrokenImage, centre, decode, fit
from vqgen.tokenizer.data.sources import SUFFIXES, Files, Rows, find_parts, open_source
from vqgen.tokenizer.losses.lpips import check_size

from .metrics import SMALLEST
from .model import Tokenizer

Place = tuple[Files | Rows, int]
"""The items of a source and the number of one of them."""
Change = Literal["", "resized", "shrunk", "cropped"]


@dataclass
class ReconstructConfig:
    """What is reconstructed, with what, and where to."""

    data: list[str] = field(metadata={"positional": "IMAGES"})
    """Image files, folders of images, parquet files, save_to_disk folders, names that `datasets` knows, or demo."""
    tokenizer: Path
    """Run or model folder of the tokenizer."""
    output: Path = Path("reconstructions")
    """Folder for the pictures and figures; one that holds files already is refused."""
    overwrite: bool = False
    """Replace the reconstructions of a former run in --output; no other file is touched."""
    split: Literal["auto", "train", "heldout"] = "auto"
    """Which images of a source: auto takes its held-out split where it has one of its own, else all of them; train and
    heldout are those of training."""
    holdout: float = 0.05
    """Share that the training held out where the source has no split of its own; for --split train and heldout."""
    n: int = 0
    """Images to take, the first ones; 0 = all."""
    resize: bool = False
    """Resize and crop (or pad) as in training, so that figures compare with those of the run. Without it every image
    keeps its own size, less what is over at its edges where the tokenizer's factor does not divide it."""
    largest: int = 1024
    """Images with a longer side are first shrunk to this many pixels; 0 = never."""
    pictures: int = 32
    """Side-by-side pictures, of the first images."""
    amplify: float = 4.0
    """The difference, third in a picture, is shown times this; 0 leaves it out."""
    batch_size: int = 64
    """Images of the training's size reconstructed at once; fewer of larger ones."""
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    """Backbone of LPIPS."""
    perceptual_weights: str | None = None
    """Convolutions of that backbone: a safetensors file with torchvision's names, or "torchvision" to let torchvision
    fetch them once. Without it LPIPS is not measured."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto takes bf16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes what Accelerate finds."""

    def __post_init__(self) -> None:
        at_least(self, n=0, largest=0, pictures=0, amplify=0, batch_size=1)
        if not self.data:
            raise UsageError("--data: found nothing; name image files, a folder of images or another source")
        if not 0 < self.holdout < 1:
            raise UsageError(f"--holdout: found {self.holdout}, expected a share between 0 and 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device: found cuda, but torch sees no CUDA device; use auto or cpu")


@dataclass(frozen=True)
class Picture:
    """Image `index` as it is reconstructed, uint8 (C, H, W); where it came from, its size there, and what was done."""

    index: int
    name: str
    image: Tensor
    original_size: list[int]
    change: Change


def find_images(config: ReconstructConfig) -> list[Place]:
    """Every image that was named, in order. Raises `UserError` where there is nothing to read."""
    found: list[Place] = []
    for word in config.data:
        path = Path(word).expanduser()
        if path.is_file() and path.suffix.lower() != ".parquet":
            found.append((Files(path.parent, [path.name]), 0))
        elif path.suffix.lower() in SUFFIXES and not path.exists():  # no dataset to ask the network for
            raise UserError(f"--data: {word} does not exist; give image files, folders or other sources")
        elif config.split == "auto":
            parts = find_parts(word)
            items = parts["heldout" if "heldout" in parts else "all"].items
            found += [(items, row) for row in range(len(items))]
        else:
            source = open_source(word, config.split, config.holdout)
            found += [(source.items, int(row)) for row in source.rows]
    if not found:
        raise UserError(f"--data: {' '.join(config.data)} holds no images; add some")
    return found[: config.n or None]


def prepare(image: Tensor, tokenizer: Tokenizer, config: ReconstructConfig) -> tuple[Tensor, Change]:
    """uint8 (C, h, w) as decoded -> (C, H, W) that the tokenizer takes, and the change. Raises `BrokenImage`."""
    if config.resize:
        size = tokenizer.config.image_size
        return centre(fit(image, size, tokenizer.config.fit), size), "resized"
    factor, before = tokenizer.factor, image.shape[-2:]
    scale = min(1.0, config.largest / max(before)) if config.largest else 1.0
    if scale < 1:
        image = fit(image, [max(1, round(side * scale)) for side in before], "crop")
    size = [side - side % factor for side in image.shape[-2:]]
    if min(size) < SMALLEST:
        least = -(-SMALLEST // factor) * factor
        raise BrokenImage(f"too small: {before[0]}x{before[1]} pixels, at least {least} a side are needed")
    if config.perceptual_weights:
        try:
            check_size(config.perceptual_net, *size)
        except UsageError as error:
            raise BrokenImage(str(error)) from error
    change = "shrunk" if scale < 1 else "" if size == list(before) else "cropped"
    return centre(image, size), change


def read_images(
    places: Sequence[Place], tokenizer: Tokenizer, config: ReconstructConfig, skipped: list[str]
) -> Iterator[Picture]:
    """The images one by one; what cannot be shown is said, and put into `skipped`."""
    for index, (items, row) in enumerate(places):
        try:
            given = decode(items.read(row), tokenizer.config.channels)
            image, change = prepare(given, tokenizer, config)
        except (BrokenImage, OSError) as error:
            skipped.append(f"{items.name(row)} ({error})")
            tqdm.write(f"skipped: {skipped[-1]}", file=sys.stderr)
            continue
        yield Picture(index, items.name(row), image, list(given.shape[-2:]), change)


def grouped(pictures: Iterable[Picture], batch_size: int, size: Sequence[int]) -> Iterator[list[Picture]]:
    """Neighbours of one shape together: as many pixels at most as `batch_size` images of `size` have, or one image."""
    group: list[Picture] = []
    for picture in pictures:
        pixels = (len(group) + 1) * picture.image[0].numel()
        if group and (picture.image.shape != group[0].image.shape or pixels > batch_size * size[0] * size[1]):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group
