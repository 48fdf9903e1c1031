"""vqgen-sample: draw images from a trained prior into a folder of PNG files.

The folder gets 00000.png and so on, grid.png of the first of them, and at the very end samples.json. A run that has
not ended is marked by samples.partial.json; both say how many images are theirs.
"""

import difflib
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.utils import make_grid

from vqgen import __version__
from vqgen.artifact import read_json, write_json
from vqgen.config import as_dict, command
from vqgen.errors import UsageError, UserError
from vqgen.hardware import processes
from vqgen.tracking import progress

from ..prior.model import Prior
from ..tokenizer.reconstruct import write_png_atomic
from .logits import SamplingSettings
from .pipeline import Generator, find_device, find_model

FINISHED, UNFINISHED, GRID = "samples.json", "samples.partial.json", "grid.png"
GRID_IMAGES = 100
# What a killed process leaves of a file it was writing; see `atomic_path`.
PART = re.compile(r"\.(\d{5,}\.png|grid\.png|samples(\.partial)?\.json)\..*part")


@dataclass
class SampleConfig:
    """What is drawn, from what, and where to."""

    model: Path | None = None
    """Run or model folder of the prior; by default $VQGEN_MODEL, then runs/demo/prior."""
    n: int = 64
    """Number of images."""
    class_: list[str] | None = None
    """Classes by name (in any case) or index, one or several, given to the images in turn. By default every class."""
    output: Path = Path("samples")
    """Folder for the images; one that holds files already is refused."""
    overwrite: bool = False
    """Remove the samples of a former run from --output; no other file is touched."""
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
        for name in ("n", "batch_size", "columns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed: found {self.seed}, expected 0 to 2^64-1")


def find_classes(words: Sequence[str] | None, prior: Prior) -> list[int]:
    """The classes to draw in turn; [-1] for an unconditional prior.

    A word is a class's name or, where no class is called so, its index; None means every class. Raises `UsageError`.
    """
    count, names = prior.vocabulary.classes, prior.class_names or []
    if words is None:
        return list(range(count)) or [-1]
    if not count:
        raise UsageError(f"--class: found {' '.join(words)}, but the model is unconditional; leave --class out")
    found = []
    folded = [name.casefold() for name in names]
    for word in words:
        if word in names:
            found.append(names.index(word))
        elif folded.count(word.casefold()) == 1:
            found.append(folded.index(word.casefold()))
        elif re.fullmatch(r"-?\d+", word):
            if not 0 <= int(word) < count:
                raise UsageError(f"--class: found {word}, expected an index from 0 to {count - 1} or a name")
            found.append(int(word))
        else:
            close = difflib.get_close_matches(word.casefold(), folded, n=1)
            hint = (
                f"did you mean {names[folded.index(close[0])]!r}?" if close else f"give an index from 0 to {count - 1}"
            )
            listed = f" (the classes are {', '.join(names)})" if names and not close and count <= 20 else ""
            raise UsageError(f"--class: the model knows no class {word!r}; {hint}{listed}")
    if not found:
        raise UsageError("--class: found no class; name at least one")
    return found


def file_name(index: int) -> str:
    """The file of image `index`."""
    return f"{index:05d}.png"


def former_run(output: Path) -> list[Path]:
    """The files in `output` that a former run said were its own, its list last. Raises `UserError`."""
    lists = [output / name for name in (UNFINISHED, FINISHED) if (output / name).is_file()]
    most = 0
    for path in lists:
        count = read_json(path).get("n")
        if not isinstance(count, int):
            raise UserError(f"{path} is no list of samples; remove it or choose another --output")
        most = max(most, count)
    files = [output / file_name(index) for index in range(most)] + [output / GRID]
    leftovers = [path for path in output.iterdir() if PART.fullmatch(path.name)]
    return [path for path in files if lists and path.is_file()] + leftovers + lists


def check_output(output: Path, n: int, overwrite: bool) -> None:
    """Raise `UsageError` where `output` cannot take the samples."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; name a folder")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if overwrite and names:
        written = {*map(file_name, range(n)), GRID, FINISHED, UNFINISHED}
        foreign = sorted(written.intersection(names) - {path.name for path in former_run(output)})
        if foreign:
            raise UsageError(
                f"--output: {output} holds {foreign[0]}, which is no sample of a former run; choose another"
            )
    if names and not overwrite:
        if FINISHED in names:
            what = "the samples of another run"
        elif UNFINISHED in names:
            what = "the samples of a run that did not end"
        else:
            what = f"other files ({names[0]})"
        raise UsageError(f"--output: {output} holds {what}; choose another folder or add --overwrite")


def clear_output(output: Path, n: int) -> None:
    """Remove a former run's files from `output` and mark it as that of a run of `n` images that has not ended.

    Whenever it is killed, what remains is still listed.
    """
    files = former_run(output) if output.is_dir() else []
    listed = [int(path.stem) for path in files if path.stem.isdigit()]
    write_json(output / UNFINISHED, {"n": max([n, *(index + 1 for index in listed)])})
    try:
        for path in reversed(files):  # the finished list first: it must not outlive an image
            if path.name != UNFINISHED:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot remove from {output}: {error.strerror}; check its permissions") from error


def write_grid(output: Path, n: int, columns: int | None, classes: int) -> None:
    """Write grid.png from the first images on disk: whole rows of at most `GRID_IMAGES` images."""
    shown = min(n, GRID_IMAGES)
    if columns is None:
        columns = classes if 1 < classes <= min(shown, 20) else math.ceil(math.sqrt(shown))
    if n > shown > columns:
        shown -= shown % columns
    images = [decode_image(str(output / file_name(i)), ImageReadMode.UNCHANGED) for i in range(shown)]
    write_png_atomic(output / GRID, make_grid(images, nrow=columns, padding=2, pad_value=255))


def sample(config: SampleConfig) -> None:
    """Draw images from a trained prior: numbered PNG files, a grid of them, and a list of what they are."""
    folder, output = find_model(config.model), config.output
    device = find_device(config.device)
    state = processes(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if state.num_processes > 1 and device.type == "cuda":
        device = torch.device(state.device or device)
    # Every process checks everything before any writes: they refuse together, and none waits for another.
    check_output(output, config.n, config.overwrite)
    generator = Generator.load(folder, device, config.precision)
    generator.check(config.sampling)
    classes = find_classes(config.class_, generator.prior)
    state.wait_for_everyone()
    if state.is_main_process:
        clear_output(output, config.n)
    state.wait_for_everyone()

    mine = range(state.process_index, config.n, state.num_processes)
    start = time.perf_counter()
    codes = len(mine) * generator.prior.vocabulary.length
    with progress(codes, "drawing", "code", state.is_main_process) as bar:
        for first in range(0, len(mine), config.batch_size):
            indices = mine[first : first + config.batch_size]
            labels = [classes[index % len(classes)] for index in indices]
            try:
                drawn = generator.sample(
                    indices,
                    labels,
                    config.sampling,
                    config.seed,
                    config.batch_size,
                    lambda tokens: bar.update(len(tokens)),
                )
            except torch.OutOfMemoryError as error:
                text = f"{config.batch_size} images do not fit into the memory of {device}; use fewer"
                raise UserError(f"--batch-size: {text}") from error
            for index, image in zip(indices, drawn.images):
                write_png_atomic(output / file_name(index), image)
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    if state.is_main_process:
        write_grid(output, config.n, config.columns, len(classes))
        write_json(output / FINISHED, describe(config, folder, generator, classes))
        (output / UNFINISHED).unlink(missing_ok=True)
        where = f"{device} in {generator.precision}"
        print(f"{config.n} images in {seconds:.1f} s, {config.n / seconds:.1f} images/s on {where}")
        print(f"look at {output / GRID}")
    state.wait_for_everyone()


def describe(config: SampleConfig, folder: Path, generator: Generator, classes: Sequence[int]) -> dict[str, object]:
    """What samples.json holds: enough to draw every image again."""
    names = generator.prior.class_names
    labels = [classes[index % len(classes)] for index in range(config.n)]
    return {
        "version": __version__,
        "model": str(folder),
        "prior_fingerprint": generator.prior.fingerprint,
        "tokenizer_fingerprint": generator.tokenizer.fingerprint,
        "settings": as_dict(config.sampling),
        "seed": config.seed,
        "n": config.n,
        "batch_size": config.batch_size,
        "precision": generator.precision,
        "device": generator.device.type,
        "class_names": names,
        "grid": GRID,
        "images": [
            {"file": file_name(i), "label": label, "class": names[label] if names and label >= 0 else None}
            for i, label in enumerate(labels)
        ],
    }


def run(config: SampleConfig) -> None:
    """Draw images from a trained prior: numbered PNG files, a grid of them, and a list of what they are."""
    sample(config)
    processes(cpu=find_device(config.device).type == "cpu").destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-sample", SampleConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
