"""The pictures of docs/: what one prior does with images of the test split, each by a command that is printed.

    python benchmarks/pictures.py filling  --model runs/cifar10-inpainting --data cifar10
    python benchmarks/pictures.py restored --model runs/cifar10-x4 --data cifar10 --name super-resolution

The images are the first of each class in the test split, one a column, whatever comes of them. `filling` draws
filling.png, extending.png, varying.png and larger.png with a prior that was trained with --inpainting; `restored` the
images before and after `--source`, which is what the prior was trained on unless it is given, with `--drawn` results.
Further options are those of vqgen-sample.
"""

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vqgen.sampling.sample as sample
from vqgen.files import read_bytes
from vqgen.prior.model import Prior
from vqgen.tokenizer.codes.degrade import degrade, parse_degradations
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import image_grid
from vqgen.tokenizer.reconstruction import write_png_atomic

SCALE = 3
"""Screen pixels of a pixel."""
GREY = 128
"""Shade of what is to be drawn."""


def first_of_each_class(data: str, model: Path) -> tuple[Tensor, list[str]]:
    """The first test image of each class, uint8 (classes, C, H, W), and the names of the classes."""
    channels, height, width = Prior.load(model).image_shape
    images = open_images(data, "test", ImageConfig(size=[height, width], channels=channels, cache_mb=0))
    names = images.class_names or []
    chosen = [int((images.labels == label).nonzero()[0]) for label in range(len(names))]
    return images.__getitems__(chosen).images, names


def drawn(folder: Path, *words: Any) -> list[Tensor]:
    """Print and run a command of vqgen-sample; return its images in order."""
    given = [str(word) for word in words]
    print("vqgen-sample", shlex.join(given).replace(f"{folder}/", ""), flush=True)
    output = Path(tempfile.mkdtemp(dir=folder)) / "drawn"
    if sample.main([*given, "--output", str(output)]):
        raise SystemExit(1)
    paths = sorted(path for path in output.rglob("*.png") if path.name != "grid.png")
    return [decode(read_bytes(path), 3) for path in paths]


def write(path: Path, rows: Sequence[Sequence[Tensor]]) -> None:
    """Write rows of images as one picture."""
    images = torch.stack([image.expand(3, -1, -1) for row in rows for image in row])
    images = F.interpolate(images, scale_factor=SCALE)
    write_png_atomic(path, image_grid(images, len(rows[0]), 2 * SCALE))
    print(f"  {path}: {len(rows)} rows of {len(rows[0])}")


def write_photos(folder: Path, images: Tensor, names: Sequence[str]) -> Path:
    """Write images as files `NUMBER-NAME.png`, in their order."""
    photos = folder / "photos"
    photos.mkdir()
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        write_png_atomic(photos / f"{number}-{name.replace('/', '-')}.png", image)
    return photos


def in_rows(images: Sequence[Tensor], columns: int) -> list[list[Tensor]]:
    return [list(images[start : start + columns]) for start in range(0, len(images), columns)]


def filling(options: argparse.Namespace, folder: Path) -> None:
    """Draw what a prior with --inpainting is for."""
    images, names = first_of_each_class(options.data, options.model)
    photos, count = write_photos(folder, images, names), len(images)
    height, width = images.shape[2:]
    common = ["--model", options.model, "--init-image", photos, "--class", *names, *options.settings]
    box = [width // 4, height // 4, width // 2, height // 2]
    hole = images.clone()
    hole[:, :, box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = GREY
    found = drawn(folder, *common, "--box", *box, "--n", 3 * count)
    write(options.output / "filling.png", [list(images), list(hole), *in_rows(found, count)])
    found = drawn(folder, *common, "--vary", 0.4, "--n", 2 * count)
    write(options.output / "varying.png", [list(images), *in_rows(found, count)])
    margin = width // 2
    found = drawn(folder, *common, "--extend", margin, 0, margin, 0, "--n", count)
    given = F.pad(images, (margin, margin), value=GREY)
    half = count // 2
    rows = [part for start in (0, half) for part in (list(given[start : start + half]), found[start : start + half])]
    write(options.output / "extending.png", rows)
    size = ["--size", 2 * height, 3 * width]
    found = drawn(folder, "--model", options.model, *size, "--class", *names[:count], *options.settings, "--n", count)
    write(options.output / "larger.png", in_rows(found, 5))


def restored(options: argparse.Namespace, folder: Path) -> None:
    """Draw images before and after what a prior was trained to restore."""
    images, names = first_of_each_class(options.data, options.model)
    source = Prior.load(options.model).conditioning.paired_source
    specs = options.source or (list(source.about.degradations) if source else [])
    if not specs:
        raise SystemExit(f"{options.model} was not trained on degraded images; name them with --source")
    given = degrade(images, parse_degradations(specs), range(len(images)))
    photos, count = write_photos(folder, given, names), len(images)
    words = ["--model", options.model, "--source-image", photos, "--class", *names, *options.settings]
    found = [drawn(folder, *words, "--seed", seed) for seed in range(options.drawn)]
    write(options.output / f"{options.name}.png", [list(given), *found, list(images)])
    print(f"  {count} images of {', '.join(specs)}; the last row are the originals")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("use", choices=["filling", "restored"])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", default="restored")
    parser.add_argument("--source", nargs="*")
    parser.add_argument("--drawn", type=int, default=2)
    options, settings = parser.parse_known_args()
    options.settings = settings  # what is left is for vqgen-sample
    with tempfile.TemporaryDirectory() as folder:
        {"filling": filling, "restored": restored}[options.use](options, Path(folder))


if __name__ == "__main__":
    main()
