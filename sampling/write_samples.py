"""Draw a series of images into a folder: PNG files, a grid of the first ones, samples.json."""

import hashlib
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torchvision.utils import make_grid

from vqgen import __version__
from vqgen.config import as_dict
from vqgen.devices import find_device, locked_by_main, on_main, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import read_bytes
from vqgen.prior.conditioning import Conditions
from vqgen.prior.parts import ABSENT
from vqgen.progress import progress
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.data.sources import SUFFIXES
from vqgen.tokenizer.reconstruction import write_png_atomic

from .generator import Generator, find_model
from .known import Known
from .output import GRID, Found, Names, begin, check_output, finish
from .oversample import batches, with_candidates
from .sample import SampleConfig

GRID_IMAGES = 100


def read_image(path: Path, channels: int) -> Tensor:
    """Read an image file as uint8 (channels, h, w). Raises `UserError`."""
    try:
        return decode(read_bytes(path), channels)
    except (OSError, BrokenImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--init-image: {path} cannot be read ({reason}); name image files") from error


def known_codes(config: SampleConfig, generator: Generator) -> Known | None:
    """The codes that are kept of --init-image, or None without it. Raises `UserError`, `UsageError`."""
    if not config.init_image:
        return None
    paths: list[Path] = []
    for path in config.init_image:
        inside = (
            sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in SUFFIXES) if os.path.isdir(path) else [path]
        )
        if not inside:
            raise UserError(f"--init-image: {path} holds no images; name image files or a folder of them")
        paths += inside
    rows = generator.tokenizer.grid[0]
    kept = rows // 2 if config.keep_rows is None else config.keep_rows
    if not 0 < kept < rows:
        raise UsageError(f"--keep-rows: found {kept}, but an image has {rows} rows of codes; keep 1 to {rows - 1}")
    channels = generator.tokenizer.config.channels
    codes = torch.cat([generator.encode(read_image(path, channels)) for path in paths])
    mask = torch.zeros(codes.shape[:3], dtype=torch.bool)
    mask[:, :kept] = True
    return Known(codes, mask, generator.vocabulary)


def chosen_conditions(config: SampleConfig, generator: Generator) -> dict[str, list[Any]]:
    """The values of every part of the prefix, from the options; by default completions have no condition."""
    return generator.conditioning.conditions(config.conditions, absent=bool(config.init_image))


def write_grid(output: Path, names: Names, n: int, columns: int | None, classes: int, channels: int) -> None:
    """Write grid.png from the first images on disk: whole rows of at most `GRID_IMAGES` images."""
    shown = min(n, GRID_IMAGES)
    if columns is None:
        columns = classes if 1 < classes <= min(shown, 20) else math.ceil(math.sqrt(shown))
    if n > shown > columns:
        shown -= shown % columns
    images = []
    for path in (output / names.file(index) for index in range(shown)):
        try:
            images.append(decode(read_bytes(path), channels))
        except (OSError, BrokenImage) as error:
            raise UserError(f"{path} is damaged; remove it and run the same command to have it drawn again") from error
    write_png_atomic(output / GRID, make_grid(images, nrow=columns, padding=2, pad_value=255))


def describe(
    config: SampleConfig, generator: Generator, names: Names, n: int, conditions: Conditions, known: Known | None
) -> dict[str, Any]:
    """The description of a run: enough to draw every image again, together with the --init-image files."""
    about = {
        "version": __version__,
        "model": str(find_model(config.model)),
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
    if others := {name: list(values) for name, values in conditions.items() if name != "class"}:
        about["conditions"] = others
    if known is not None:
        tokens = known.tokens[known.tokens >= 0]
        about["init_images"] = [str(path) for path in config.init_image or []]
        about["kept_codes"] = len(tokens) // len(known)
        about["kept_fingerprint"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    if generator.device.type == "cuda":
        about["batch_size"] = config.batch_size  # there it may change the last bits
    return about


def write_samples(config: SampleConfig) -> PartialState:
    """Draw images into a folder, see `sample.py`; return the state of the processes. Raises `UserError`."""
    output, device = config.output, find_device(config.device)
    state = processes(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if state.num_processes > 1 and device.type == "cuda":
        device = torch.device(state.device or device)
    # Every process checks everything before any of them writes, so that all stop together.
    generator = Generator.load(config.model, device, config.precision)
    conditions = chosen_conditions(config, generator)
    generator.check(config.sampling, conditions)
    classes = conditions["class"]
    if config.layout != "flat" and classes == [ABSENT]:
        raise UsageError(f"--layout: {config.layout} needs classes, and these images have none; use flat")
    if config.num_per_class and classes == [ABSENT]:
        raise UsageError("--num-per-class: these images have no classes; use --n")
    if config.num_per_class and len(set(classes)) < len(classes):
        raise UsageError("--num-per-class: --class names a class twice; name each once")
    channels = generator.tokenizer.config.channels
    names, n = Names(config.layout, classes, generator.conditioning.classes.names), config.count(len(classes))
    known = known_codes(config, generator)
    about = describe(config, generator, names, n, conditions, known)
    with locked_by_main(output):
        size = (generator.tokenizer.config.image_size[1], generator.tokenizer.config.image_size[0])
        found = on_main(lambda: check_output(output, names, about, config.overwrite, size))
        if found.status == "done":
            if state.is_main_process:
                if config.columns:
                    write_grid(output, names, n, config.columns, len(classes), channels)
                print(f"{output} holds these {n} images already; --overwrite draws them again")
            return state
        about["n"] = found.n
        if state.is_main_process and config.model is None:
            print(f"drawing from {about['model']}")
        on_main(lambda: _begin(output, about, found))
        _draw(config, generator, names, about, conditions, known, state)
    return state


def _begin(output: Path, about: dict[str, Any], found: Found) -> None:
    """Open the folder for the run; name the files that are damaged."""
    begin(output, about, found)
    for name in found.damaged:
        print(f"{output / name} was damaged and is written again", file=sys.stderr)


def _draw(
    config: SampleConfig,
    generator: Generator,
    names: Names,
    about: dict[str, Any],
    conditions: Conditions,
    known: Known | None,
    state: PartialState,
) -> None:
    """Draw the images that are missing in the folder, this process its share of them; write grid and list."""
    output, n, device, classes = config.output, about["n"], generator.device, conditions["class"]
    missing = [index for index in range(n) if not (output / names.file(index)).is_file()]
    state.wait_for_everyone()  # no process draws before all have listed the missing images

    start = time.perf_counter()
    cycle = math.lcm(generator.conditioning.cycle(conditions), len(known) if known else 1)
    batch_size = min(config.batch_size, max(1, math.ceil(len(missing) / state.num_processes)))
    oversample = config.sampling.oversample
    own = batches(missing, cycle, oversample, batch_size)[state.process_index :: state.num_processes]

    def write(indices: Sequence[int], codes: Tensor) -> None:
        for index, image in zip(indices, generator.decode(codes), strict=True):
            write_png_atomic(output / names.file(index), image)

    length = generator.vocabulary.length - (known.leading if known else 0)
    total = sum(len(with_candidates(batch, cycle, oversample)[0]) for batch in own) * length
    written: Future[None] | None = None
    # One batch is decoded and written while the next one is drawn.
    with progress(total, "drawing", "code", state.is_main_process) as bar, ThreadPoolExecutor(1) as writer:

        def advance(tokens: Tensor) -> None:
            bar.update(len(tokens))

        for indices in own:
            try:
                codes, _ = generator.draw_codes(
                    indices, conditions, config.sampling, config.seed, config.batch_size, advance, known
                )
            except torch.OutOfMemoryError as error:
                text = f"{config.batch_size} images do not fit into the memory of {device}; use fewer"
                raise UserError(f"--batch-size: {text}") from error
            if written:
                written.result()
            written = writer.submit(write, indices, codes)
        if written:
            written.result()
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    if state.is_main_process:
        write_grid(output, names, n, config.columns, len(classes), generator.tokenizer.config.channels)
        finish(output, names, about)
        place = f"{device} in {generator.precision}"
        present = f" ({n - len(missing)} were there)" if len(missing) < n else ""
        print(f"{len(missing)} images in {seconds:.1f} s, {len(missing) / seconds:.1f} images/s on {place}{present}")
        print(f"look at {output / GRID}")
    state.wait_for_everyone()
