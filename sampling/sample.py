"""vqgen-sample: draw images from a trained prior into a folder of PNG files.

The folder gets the images as they are drawn, grid.png of the first of them, and at the very end samples.json. Called
again after an interruption, it draws only what is missing.
"""

import hashlib
import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.utils import make_grid

from vqgen import __version__
from vqgen.config import as_dict, command
from vqgen.devices import find_device, processes
from vqgen.errors import UsageError, UserError
from vqgen.options import at_least
from vqgen.progress import progress
from vqgen.tokenizer.data.pixels import BrokenImage, decode
from vqgen.tokenizer.data.sources import SUFFIXES
from vqgen.tokenizer.reconstruction import write_png_atomic

from .generator import Generator, find_model
from .names import find_classes
from .output import GRID, Layout, Names, begin, check_output, finish
from .oversample import batches, selected
from .settings import SamplingSettings

GRID_IMAGES = 100


@dataclass
class SampleConfig:
    """What is drawn, from what, and where to."""

    model: Path | None = None
    """Run or model folder of the prior; by default $VQGEN_MODEL, then runs/demo/prior, then the model of CIFAR-10 that
    comes with the package."""
    n: int | None = None
    """Number of images; 64 unless --num-per-class says otherwise."""
    num_per_class: int | None = None
    """Number of images of each class, in place of --n."""
    class_: list[str] | None = None
    """Classes by name (in any case) or index, one or several, given to the images in turn. By default every class."""
    output: Path = Path("samples")
    """Folder for the images. Samples of the same run are completed there; other files are refused."""
    overwrite: bool = False
    """Remove the samples of a former run from --output, no other file; after an interruption leave it out."""
    layout: Layout = "flat"
    """Names of the files: flat = 00000.png, labels = 00000-cat.png, folders = images/cat/00000.png, which any program
    of vqgen takes as --data with labels."""
    init_image: list[Path] | None = None
    """Image files, or folders of them, to complete: image i begins like the i-th of them, in turn, as it is of the
    i-th class; of none unless --class names some."""
    keep_rows: int | None = None
    """Rows of codes that are kept of each --init-image, from the top."""
    keep_share: float | None = None
    """Share of the codes that is kept of each --init-image, from the top left; 0.5 if neither is given."""
    seed: int = 0
    """Image i depends on the seed, i, its class and the settings below, not on what is drawn beside it."""
    batch_size: int = 64
    """Images drawn at once by each process."""
    columns: int | None = None
    """Images a row of grid.png, which shows the first 100; by default one column a class, or a square."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the prior; auto takes 16 bits where the hardware computes in them."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def __post_init__(self) -> None:
        at_least(self, n=1, num_per_class=1, batch_size=1, columns=1, keep_rows=1)
        if self.n is not None and self.num_per_class is not None:
            raise UsageError("--num-per-class: --n is given too; give one of them")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed: found {self.seed}, expected 0 to 2^64-1")
        for name in ("keep_rows", "keep_share"):
            if getattr(self, name) is not None and not self.init_image:
                raise UsageError(f"--{name.replace('_', '-')}: needs --init-image, the image to keep some of")
        if self.keep_rows is not None and self.keep_share is not None:
            raise UsageError("--keep-share: --keep-rows is given too; give one of them")
        if self.keep_share is not None and not 0 < self.keep_share < 1:
            raise UsageError(f"--keep-share: found {self.keep_share}, expected a share between 0 and 1")

    def count(self, classes: int) -> int:
        """Number of images where a series goes through `classes` classes."""
        return self.num_per_class * classes if self.num_per_class else self.n or 64


def read_image(path: Path, channels: int) -> Tensor:
    """uint8 (channels, h, w) of an image file. Raises `UserError`."""
    try:
        return decode(path.read_bytes(), channels)
    except (OSError, BrokenImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--init-image: {path} cannot be read ({reason}); name image files") from error


def beginnings(config: SampleConfig, generator: Generator) -> Tensor | None:
    """The tokens (m, k) that images begin with, or None. Raises `UserError`, `UsageError`."""
    if not config.init_image:
        return None
    paths: list[Path] = []
    for path in config.init_image:
        inside = sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"--init-image: {path} holds no images; name image files or a folder of them")
        paths += inside
    vocabulary, (rows, _) = generator.prior.vocabulary, generator.tokenizer.grid
    if config.keep_rows is not None and config.keep_rows >= rows:
        raise UsageError(f"--keep-rows: found {config.keep_rows}, but an image has {rows} rows of codes; keep fewer")
    channels = generator.tokenizer.config.channels
    codes = torch.cat([generator.encode(read_image(path, channels)) for path in paths])
    each = vocabulary.length // vocabulary.depth  # positions
    share = 0.5 if config.keep_share is None else config.keep_share
    kept = round(share * each) if config.keep_rows is None else config.keep_rows * (each // rows)
    if not 0 < kept < each:
        raise UsageError(f"--keep-share: {share} of {each} codes is {kept}; keep at least one and not all")
    return vocabulary.to_tokens(codes)[:, : kept * vocabulary.depth]


def write_grid(output: Path, names: Names, n: int, columns: int | None, classes: int) -> None:
    """Write grid.png from the first images on disk: whole rows of at most `GRID_IMAGES` images."""
    shown = min(n, GRID_IMAGES)
    if columns is None:
        columns = classes if 1 < classes <= min(shown, 20) else math.ceil(math.sqrt(shown))
    if n > shown > columns:
        shown -= shown % columns
    images = []
    for path in (output / names.file(index) for index in range(shown)):
        try:
            images.append(decode_image(str(path), ImageReadMode.UNCHANGED))
        except RuntimeError as error:
            raise UserError(f"{path} is damaged; remove it and run the same command to have it drawn again") from error
    write_png_atomic(output / GRID, make_grid(images, nrow=columns, padding=2, pad_value=255))


def describe(config: SampleConfig, folder: Path, generator: Generator, names: Names, n: int, kept: Any) -> dict:
    """What a run is: enough to draw every image again, with the --init-image files where there are any."""
    about = {
        "version": __version__,
        "model": str(folder),
        "prior_fingerprint": generator.prior.fingerprint,
        "tokenizer_fingerprint": generator.tokenizer.fingerprint,
        "settings": as_dict(config.sampling),
        "seed": config.seed,
        "n": n,
        "precision": generator.precision,
        "device": generator.device.type,
        "layout": names.layout,
        "labels": list(names.labels),
        "class_names": names.class_names,
    }
    if kept is not None:
        about["init_images"] = [str(path) for path in config.init_image or []]
        about["kept_codes"] = kept.shape[1]
        about["kept_fingerprint"] = hashlib.sha256(kept.numpy().tobytes()).hexdigest()
    if generator.device.type == "cuda":
        about["batch_size"] = config.batch_size  # there it may change the last bits
    return about


def sample(config: SampleConfig) -> None:
    """Draw images from a trained prior: PNG files, a grid of them, and a list of what they are."""
    folder, output = find_model(config.model), config.output
    device = find_device(config.device)
    state = processes(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if state.num_processes > 1 and device.type == "cuda":
        device = torch.device(state.device or device)
    # Every process checks everything before any writes: they refuse together, and none waits for another.
    generator = Generator.load(folder, device, config.precision)
    classes = [-1] if config.init_image and not config.class_ else find_classes(config.class_, generator.prior)
    generator.check(config.sampling, classes)
    if config.layout != "flat" and classes == [-1]:
        raise UsageError(f"--layout: {config.layout} needs classes, and these images have none; use flat")
    if config.num_per_class and classes == [-1]:
        raise UsageError("--num-per-class: these images have no classes; use --n")
    if config.num_per_class and len(set(classes)) < len(classes):
        raise UsageError("--num-per-class: --class names a class twice; name each once")
    names, n = Names(config.layout, classes, generator.prior.class_names), config.count(len(classes))
    kept = beginnings(config, generator)
    about = describe(config, folder, generator, names, n, kept)
    where = check_output(output, names, about, config.overwrite)
    if where == "done":
        if state.is_main_process:
            if config.columns:
                write_grid(output, names, n, config.columns, len(classes))
            print(f"{output} holds these {n} images already; --overwrite draws them again")
        return
    state.wait_for_everyone()
    if state.is_main_process:
        begin(output, about, anew=where == "new")
        if config.model is None:
            print(f"drawing from {folder}")
    state.wait_for_everyone()
    missing = [index for index in range(n) if not (output / names.file(index)).is_file()]
    state.wait_for_everyone()  # nobody draws before everybody has looked

    start = time.perf_counter()
    cycle = math.lcm(len(classes), 1 if kept is None else len(kept))
    together = min(config.batch_size, max(1, math.ceil(len(missing) / state.num_processes)))
    mine = batches(missing, cycle, config.sampling.oversample, together)
    mine = mine[state.process_index :: state.num_processes]

    def write(indices: Sequence[int], codes: Tensor) -> None:
        for index, image in zip(indices, generator.decode(codes), strict=True):
            write_png_atomic(output / names.file(index), image)

    length = generator.prior.vocabulary.length - (0 if kept is None else kept.shape[1])
    total = sum(len(selected(batch, cycle, config.sampling.oversample)[0]) for batch in mine) * length
    written: list[Future[None]] = []
    # One batch becomes pixels and files while the next one is drawn.
    with progress(total, "drawing", "code", state.is_main_process) as bar, ThreadPoolExecutor(1) as writer:
        for indices in mine:
            try:
                codes, _ = generator.draw_codes(
                    indices,
                    classes,
                    config.sampling,
                    config.seed,
                    config.batch_size,
                    lambda tokens: bar.update(len(tokens)),
                    kept,
                )
            except torch.OutOfMemoryError as error:
                text = f"{config.batch_size} images do not fit into the memory of {device}; use fewer"
                raise UserError(f"--batch-size: {text}") from error
            if written:
                written.pop().result()
            written.append(writer.submit(write, indices, codes))
        for one in written:
            one.result()
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    if state.is_main_process:
        write_grid(output, names, n, config.columns, len(classes))
        finish(output, names, about)
        place = f"{device} in {generator.precision}"
        there = f" ({n - len(missing)} were there)" if len(missing) < n else ""
        print(f"{len(missing)} images in {seconds:.1f} s, {len(missing) / seconds:.1f} images/s on {place}{there}")
        print(f"look at {output / GRID}")
    state.wait_for_everyone()


def run(config: SampleConfig) -> None:
    """Draw images from a trained prior: PNG files, a grid of them, and a list of what they are."""
    sample(config)
    processes(cpu=find_device(config.device).type == "cpu").destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-sample", SampleConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
