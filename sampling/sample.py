"""vqgen-sample: options and entry point; `write_samples.py` does the work.

The folder gets the images as they are drawn, grid.png of the first of them, and at the very end samples.json. Called
again after an interruption, it draws only what is missing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from vqgen.config import command
from vqgen.errors import UsageError, UserError
from vqgen.files import read_text
from vqgen.option_types import problem_of
from vqgen.options import MOST_IMAGES, CountOrZero, Images, Options, Range, Seed, Size

from .settings import SamplingOptions

MAX_PROMPTS = 2**24
"""Largest --prompt-file, in bytes."""


def check_boxes(box: list[int] | None) -> None:
    """Raise `UsageError` where --box is given and is not rectangles of four numbers each."""
    if box is not None and (len(box) % 4 or not box or 0 in box[2::4] + box[3::4]):
        raise UsageError(f"--box: found {' '.join(map(str, box))}, expected X Y WIDTH HEIGHT, or several such")


@dataclass
class SampleConfig(Options):
    """Model, images, conditions and output of vqgen-sample."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "model", "n", "class", "prompt", "output", "overwrite", "init_image", "source_image", "seed", "temperature",
        "top_p", "guidance_scale",
    )  # fmt: skip

    model: Path | None = None
    """Run or model folder of the prior, or cifar10, cifar10-restorer or emoji, the models in the package; by default
    $VQGEN_MODEL, then runs/demo/prior, then cifar10."""
    n: Images | None = None
    """Number of images; by default, without --num-per-class, 64, or one for each --source-image, and more where there
    are more --init-image, prompts (in several classes) or named classes."""
    num_per_class: Images | None = None
    """Number of images of each class, in place of --n."""
    class_: list[str] | None = None
    """Classes by name (in any case) or index, one or several, given to the images in turn; of several prompts each is
    drawn in every class, unless images are given. By default every class; with --prompt none."""
    prompt: list[str] | None = field(default=None, metadata={"repeatable": True})
    """Texts, each in quotes, given to the images in turn, for a prior that was trained with captions; an empty
    one is none."""
    prompt_file: Path | None = None
    """Text file of prompts, one a line, in place of --prompt."""
    output: Path = Path("samples")
    """Folder for the images. Samples of the same run are completed there; other files are refused."""
    overwrite: bool = False
    """Remove the samples of a former run from --output, no other file; after an interruption leave it out."""
    layout: Literal["flat", "folders"] = "flat"
    """Names of the files: flat = 00000.png, folders = images/cat/00000.png, which any program of vqgen takes as --data
    with labels."""
    init_image: list[Path] | None = None
    """Image files, or folders of them, to complete: image i keeps codes of the i-th of them, in turn; its class is
    that of the i-th --class, or none without --class."""
    keep_rows: Size | None = None
    """Rows of codes that are kept of each --init-image, from the top; by default half of them."""
    mask: list[Path] | None = None
    """Images of the sizes of the --init-image, in turn: what is white is drawn anew, given all the rest. Needs a prior
    that was trained with --inpainting, as do --box and --vary."""
    box: list[CountOrZero] | None = field(default=None, metadata={"repeatable": True})
    """Rectangles that are drawn anew, in pixels of the --init-image: X Y WIDTH HEIGHT; may be repeated."""
    vary: Annotated[float, Range(above=0, most=1)] | None = None
    """Share of the codes of --init-image, at random, that is drawn anew."""
    extend: list[CountOrZero] | None = None
    """Pixels that are drawn around the --init-image: LEFT TOP RIGHT BOTTOM. Needs a prior with --inpainting."""
    size: list[Size] | None = None
    """Height and width of the images, when larger than those of training: they are drawn in overlapping windows."""
    paste: bool = True
    """Keep what is known exactly, with --no-paste all is decoded: of --init-image the pixels around what --mask, --box
    and --extend draw; of --source-image the luma, or the coarse structure, where the prior was
    trained on --source grey or downscale:FACTOR; if on several, those of --source."""
    source_image: list[Path] | None = None
    """Image files, or folders of them, to translate, for a prior that was trained on source codes: image i is made of
    the i-th of them, in turn; its class is that of the i-th --class, or none without --class. With one image for each,
    they keep their names, translated/NAME.png."""
    source: list[str] | None = None
    """Degradations of each --source-image before it is translated, as those of vqgen-tokenize: noise:0.1, grey."""
    seed: Seed = 0
    """Image i depends on the seed, i, its class and the settings below, not on the other images."""
    batch_size: Size = 64
    """Images drawn at once by each process."""
    columns: Size | None = None
    """Images a row of grid.png, which shows the first 100; by default one column for each given
    image or class, or a square."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the prior; auto takes 16 bits where the hardware computes in them."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n is not None and self.num_per_class is not None:
            raise UsageError("--num-per-class: --n is given too; give one of them")
        if self.prompt is not None and self.prompt_file is not None:
            raise UsageError("--prompt-file: --prompt is given too; give one of them")
        ways = {
            "--keep-rows": self.keep_rows,
            "--mask or --box": self.mask or self.box,
            "--vary": self.vary,
            "--extend": self.extend,
        }
        given = [name for name, value in ways.items() if value]
        if given and not self.init_image:
            raise UsageError(f"{given[0]}: needs --init-image, the image of which a part is kept")
        if len(given) > 1:
            raise UsageError(f"{given[0]}: {given[1]} is given too; give one of them")
        others = {"--init-image": self.init_image, "--size": self.size}
        if self.source_image and (given := [name for name, value in others.items() if value]):
            raise UsageError(f"--source-image: {given[0]} is given too; give one of them")
        if self.source is not None and not self.source_image:
            raise UsageError("--source: needs --source-image, the images that are degraded")
        if not self.paste and not (self.mask or self.box or self.extend or self.source_image):
            raise UsageError("--no-paste: these images are decoded as a whole anyway; leave it out")
        if self.size and self.init_image:
            raise UsageError("--size: with --init-image the size is that of training; --extend makes images larger")
        check_boxes(self.box)

    @property
    def conditions(self) -> dict[str, Any]:
        """What was given for each part of the prefix, by the part's name."""
        return {"class": self.class_, "text": self.prompts}

    @property
    def given_settings(self) -> dict[str, Any]:
        """The settings that files or the command line gave, by name; all where the configuration comes from neither."""
        return {name: v for name, v in vars(self.sampling).items() if self.stated is None or name in self.stated}

    @property
    def prompts(self) -> list[str] | None:
        """The texts of --prompt, or the lines of --prompt-file that are not empty. Raises `UserError`, also for
        lines that --prompt would not take: no list of samples could hold them."""
        if self.prompt_file is None:
            return self.prompt
        try:
            text = read_text(self.prompt_file, MAX_PROMPTS).removeprefix("\ufeff")
        except UserError as error:
            raise UserError(f"--prompt-file: {error}") from error
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            if problem := problem_of(line):
                shown = f"{self.prompt_file} line {number}: found {line[:80]!r}, {problem}"
                raise UserError(f"--prompt-file: {shown}; remove it")
        if not (found := [line for line in lines if line.strip()]):
            raise UserError(f"--prompt-file: {self.prompt_file} holds no text; write one prompt a line")
        return found

    def count(self, classes: int, otherwise: int = 64) -> int:
        """Number of images of a series that goes through `classes` classes; `otherwise` where no option says it."""
        found = self.num_per_class * classes if self.num_per_class else self.n or otherwise
        if found > MOST_IMAGES:
            raise UsageError(f"--num-per-class: of {classes} classes these are {found} images, at most {MOST_IMAGES}")
        return found


def sample(config: SampleConfig) -> None:
    """Draw images from a trained prior: PNG files, a grid of them, and a list of what they are. Settings of sampling
    that are not given are as the prior's folder recommends, if it does, or as below."""
    from .write_samples import write_samples

    write_samples(config).destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-sample", SampleConfig, sample, arguments)


if __name__ == "__main__":
    sys.exit(main())
