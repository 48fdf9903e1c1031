"""Draw the pictures of docs/gallery.md, each by the commands above it, with the models in the package.

    python benchmarks/gallery.py                # all of them
    python benchmarks/gallery.py guided filling # some, by name

A picture has the images that a command reads in its first row, what is to be drawn of them in grey, and below them what
it draws. Every command has `--precision fp32`: then another processor draws the same codes, unless a draw hangs on the
last bits of a probability. A seed with such a draw is replaced; other sums show it, as by `MKL_CBWR=COMPATIBLE
ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41`.
"""

import argparse
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.config import parse
from vqgen.files import read_bytes
from vqgen.sampling import sample
from vqgen.sampling.generator import Generator
from vqgen.sampling.init_images import image_files
from vqgen.sampling.sample import SampleConfig
from vqgen.tokenizer.codes.degrade import Degradations, degrade, parse_degradations, source_seed
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.data.pixels import image_grid
from vqgen.tokenizer.reconstruction import write_png_atomic

ROOT = Path(__file__).parents[1]
PAGE, FOLDER = ROOT / "docs" / "gallery.md", ROOT / "docs" / "images" / "gallery"
SMALLEST = 64
"""Pixels that an image has at least on the page; smaller ones are enlarged by a whole number."""
GREY = 160
"""Shade of what is to be drawn."""
FIGURE = re.compile(r"^```\n((?:vqgen-sample .*\n)+)```\n\n!\[[^]]*\]\(images/gallery/([\w-]+)\.png\)", re.MULTILINE)


@dataclass(frozen=True)
class Figure:
    """A picture of the page."""

    name: str
    commands: list[list[str]]
    """Words of vqgen-sample."""

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.png"

    def draw(self) -> Tensor:
        """Run the commands; returns the picture, uint8 (3, H, W)."""
        rows: list[Tensor] = []
        for words in self.commands:
            given, drawn = run(words)
            if given is not None and not any(torch.equal(given, row) for row in rows):
                rows.append(given)
            columns = len(drawn) if given is None else len(given)
            rows += drawn.split(columns)
        scale = -(-SMALLEST // min(rows[0].shape[-2:]))
        images = F.interpolate(torch.cat(rows), scale_factor=scale)
        return image_grid(images, self.columns or len(rows[0]), 2 * scale)

    @property
    def columns(self) -> int | None:
        return parse(SampleConfig, self.commands[0]).columns


def figures() -> Iterator[Figure]:
    """Those of the page, in its order."""
    for commands, name in FIGURE.findall(PAGE.read_text()):
        yield Figure(name, [shlex.split(line)[1:] for line in commands.splitlines()])


def run(words: list[str]) -> tuple[Tensor | None, Tensor]:
    """Run vqgen-sample; returns the images that it read, None without any, and drew, uint8 (n, 3, H, W)."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "drawn")
        if sample.main([*words, "--output", str(output)]):
            raise SystemExit(1)
        paths = sorted(path for path in output.rglob("*.png") if path.name != "grid.png")
        drawn = torch.stack([decode(read_bytes(path), 3) for path in paths])
    return given_images(parse(SampleConfig, words)), drawn


def given_images(config: SampleConfig) -> Tensor | None:
    """The images that a command reads, uint8 (m, 3, H, W) of the size of those that it draws; grey is to be drawn."""
    given = config.init_image or config.source_image
    if not given:
        return None
    generator, images = Generator.load(config.model, "cpu", "fp32"), []
    degradations = parse_degradations(config.source) if config.source else Degradations()
    for number, path in enumerate(image_files(given, "--init-image")):
        image = decode(read_bytes(path), 3)
        for left, top, width, height in zip(*[iter(config.box or [])] * 4, strict=True):
            image[:, top : top + height, left : left + width] = GREY
        image = generator.fitted(image[None])
        if config.keep_rows:
            image[..., config.keep_rows * generator.tokenizer.factor :, :] = GREY
        images.append(degrade(image, degradations, [source_seed(config.seed, number)]))
    left, top, right, bottom = config.extend or [0, 0, 0, 0]
    return F.pad(torch.cat(images), (left, right, top, bottom), value=GREY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pictures; by default all")
    names = parser.parse_args().names
    FOLDER.mkdir(exist_ok=True)
    for figure in figures():
        if not names or figure.name in names:
            write_png_atomic(figure.path, figure.draw())
            print(figure.path)


if __name__ == "__main__":
    main()
