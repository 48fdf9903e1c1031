"""vqgen-reconstruct: pictures of images next to their reconstructions, and the metrics of both.

The output folder gets a picture (original, reconstruction, difference) for each of the first images, grid.png of them,
and, written last, metrics.json, which lists them. metrics.partial.json marks the folder of an unfinished run.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from vqgen.config import command, one_line
from vqgen.errors import UsageError
from vqgen.options import CountOrZero, NotNegative, Range, Size
from vqgen.tokenizer.losses.options import PerceptualOptions


@dataclass
class ReconstructConfig(PerceptualOptions):
    """What is reconstructed, with what, and where to."""

    COMMON: ClassVar[tuple[str, ...]] = ("data", "tokenizer", "output", "overwrite", "split", "n", "resize", "pictures")

    data: list[str] = field(metadata={"positional": "IMAGES"})
    """Image files, folders of images, parquet files, save_to_disk folders, names that `datasets` knows, or demo."""
    tokenizer: Path
    """Run or model folder of the tokenizer, or the name of a model in the package."""
    output: Path = Path("reconstructions")
    """Folder for the pictures and metrics.json; it must be new or empty."""
    overwrite: bool = False
    """Replace the reconstructions of an earlier run in --output; no other file is touched."""
    split: Literal["auto", "train", "heldout", "test"] = "auto"
    """Which images of a source. auto: its validation split, else its test split, else all images. train and heldout:
    the same images as in training. test: its test split."""
    holdout: Annotated[float, Range(above=0, below=1)] | None = None
    """Share of the images held out in training where the source has no validation split, for --split train, heldout;
    by default that of the run, where it is recorded, else 0.05."""
    n: CountOrZero = 0
    """Number of images, the first ones; 0 = all."""
    resize: bool = False
    """Resize and crop (or pad) as in training, so that the metrics compare with those of the run. Without it every
    image keeps its size, cropped to multiples of the tokenizer's downsampling factor."""
    largest: CountOrZero = 1024
    """Longest side in pixels; larger images are first shrunk to it. 0 = no limit."""
    pictures: CountOrZero = 32
    """Number of side-by-side pictures, of the first images."""
    amplify: NotNegative = 4.0
    """Factor of the difference, the third image in a picture; 0 leaves it out."""
    batch_size: Size = 64
    """Images of the training size reconstructed at once; correspondingly fewer larger ones."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast of the tokenizer; auto takes bf16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes what Accelerate finds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise UsageError("--data: found nothing; name image files, a folder of images or another source")
        if self.resize and self.largest != type(self).largest:
            raise UsageError(f"--largest: found {self.largest} with --resize, which decides the size; leave it out")
        if self.holdout is not None and self.split in ("auto", "test"):
            text = f"found {self.holdout:g}, but --split {self.split} holds nothing out"
            raise UsageError(f"--holdout: {text}; leave it out, or add --split heldout")
        if not self.pictures and self.amplify != type(self).amplify:
            raise UsageError(
                f"--amplify: found {self.amplify:g}, but --pictures 0 makes no picture; leave one of them out"
            )


def run(config: ReconstructConfig) -> None:
    """Show how well a tokenizer reconstructs images: side-by-side pictures, and metrics over all images."""
    from .comparison import compare, summary

    for line in summary(compare(config), config):
        print(one_line(line))


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-reconstruct", ReconstructConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
