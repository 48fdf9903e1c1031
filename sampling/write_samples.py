"""Draw a series of images into a folder: PNG files, a grid of the first ones, samples.json."""

import hashlib
import math
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
from vqgen.prior.options import GENERATION
from vqgen.prior.parts import ABSENT
from vqgen.progress import progress
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.reconstruction import write_png_atomic

from .filling import Filling
from .generator import Generator, find_model
from .init_images import SourceImages, chosen_filling, chosen_sources
from .known import Sources
from .output import GRID, PARTS, UNFINISHED, Found, Names, begin, check_output, finish, samples_folder
from .oversample import batches, with_candidates
from .sample import SampleConfig
from .settings import SamplingSettings, in_words

GRID_IMAGES = 100


def chosen_conditions(config: SampleConfig, generator: Generator, sources: SourceImages | None) -> dict[str, list[Any]]:
    """The values of every part of the prefix, from the options; by default completions and translations have no other
    condition than their image."""
    given = {**config.conditions, "source": sources.read.codes} if sources else config.conditions
    return generator.conditioning.conditions(given, absent=bool(config.init_image or sources))


def given_options(config: SampleConfig, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names that were given, as plain values."""
    found = {name: value for name, value in as_dict(config).items() if name in names}
    return {name: value for name, value in found.items() if value is not None}


def write_grid(output: Path, names: Names, n: int, columns: int | None, cycle: int, channels: int) -> None:
    """Write grid.png from the first images on disk: whole rows of at most `GRID_IMAGES` images.

    By default each of the `cycle` conditions has a column, where they are few.
    """
    shown = min(n, GRID_IMAGES)
    if columns is None:
        columns = cycle if 1 < cycle <= min(shown, 20) else math.ceil(math.sqrt(shown))
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
    config: SampleConfig,
    generator: Generator,
    settings: SamplingSettings,
    names: Names,
    n: int,
    conditions: Conditions,
    filling: Filling | None,
) -> dict[str, Any]:
    """The description of a run: enough to draw every image again, together with the files of given images."""
    about: dict[str, Any] = {
        "version": __version__,
        "model": str(find_model(config.model)),
        "prior_fingerprint": generator.prior.fingerprint,
        "tokenizer_fingerprint": generator.tokenizer.fingerprint,
        "settings": as_dict(settings),
        "seed": config.seed,
        "n": n,
        "precision": generator.precision,
        "device": generator.device.type,
        "layout": names.layout,
        "labels": list(names.labels),
        "class_names": names.class_names,
    }
    if others := generator.conditioning.record(conditions):
        about["conditions"] = others
    if names.stems:
        about["stems"] = names.stems
    if filling:
        about |= given_options(config, PARTS)
        kept = filling.kept
        about["init_images"] = [str(path) for path in config.init_image or []]
        about["kept_codes"] = len(kept) // len(filling)
        about["kept_fingerprint"] = hashlib.sha256(kept.numpy().tobytes()).hexdigest()
        if filling.grid != generator.vocabulary.grid:
            about["code_grid"] = list(filling.grid)
        if filling.sourced:
            about["mask_fingerprint"] = filling.fingerprint
            about["paste"] = filling.originals is not None
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
    filling = chosen_filling(config, generator)
    sources = chosen_sources(config, generator)
    conditions = chosen_conditions(config, generator, sources)
    seen = generator.seen(conditions, filling) if filling else conditions
    settings = generator.settings(config.given_settings, seen)
    generator.check(settings, seen)
    classes = conditions["class"]
    if config.layout != "flat" and classes == [ABSENT]:
        raise UsageError(f"--layout: {config.layout} needs classes, and these images have none; use flat")
    if config.num_per_class and classes == [ABSENT]:
        raise UsageError("--num-per-class: these images have no classes; use --n")
    if config.num_per_class and len(set(classes)) < len(classes):
        raise UsageError("--num-per-class: --class names a class twice; name each once")
    channels = generator.tokenizer.config.channels
    n = config.count(len(classes), len(sources) if sources else max(64, len(config.prompts or [])))
    stems = sources.stems() if sources and n == len(sources) and config.layout == "flat" else None
    names = Names(config.layout, classes, generator.conditioning.classes.names, stems)
    about = describe(config, generator, settings, names, n, conditions, filling)
    if sources:
        about["source_images"] = [str(path) for path in sources.paths]
        if config.source:
            about["degradations"] = config.source
        if generator.keep:
            about["paste"] = config.paste
            about["source_fingerprint"] = sources.read.fingerprint
    with locked_by_main(output):
        factor, grid = generator.tokenizer.factor, filling.grid if filling else generator.tokenizer.grid
        size = grid[1] * factor, grid[0] * factor
        found = on_main(lambda: check_output(output, names, about, config.overwrite, size))
        if found.status == "done":
            if state.is_main_process:
                samples_folder(output).remove_leftovers()
                if config.columns:
                    write_grid(output, names, n, config.columns, generator.conditioning.cycle(conditions), channels)
                print(f"{output} holds these {n} images already; --overwrite draws them again")
            return state
        about["n"] = found.n
        if state.is_main_process and config.model is None:
            print(f"drawing from {about['model']}")
        if state.is_main_process:
            print(_stated(settings, config, generator))
        on_main(lambda: _begin(output, about, found))
        read = sources.read if sources else None
        _draw(config, generator, settings, names, about, conditions, filling, read, state)
    return state


def _stated(settings: SamplingSettings, config: SampleConfig, generator: Generator) -> str:
    """The settings of a series as text: those that were given, and those that the prior recommends."""
    given, recommended, plain = config.given_settings, generator.recommended, vars(SamplingSettings())
    used = {name: value for name, value in vars(settings).items() if value != plain[name] or name in recommended}
    own = in_words({name: value for name, value in used.items() if name in given})
    others = in_words({name: value for name, value in used.items() if name not in given and value != plain[name]})
    origin = f"recommended by {find_model(config.model) / GENERATION}"
    return f"settings: {', '.join(filter(None, [own, others and f'{others} ({origin})'])) or '--temperature 1'}"


def _begin(output: Path, about: dict[str, Any], found: Found) -> None:
    """Open the folder for the run; name the files that are damaged."""
    begin(output, about, found)
    for name in found.damaged:
        print(f"{output / name} was damaged and is written again", file=sys.stderr)


def _draw(
    config: SampleConfig,
    generator: Generator,
    settings: SamplingSettings,
    names: Names,
    about: dict[str, Any],
    conditions: Conditions,
    filling: Filling | None,
    sources: Sources | None,
    state: PartialState,
) -> None:
    """Draw the images that are missing in the folder, this process its share of them; write grid and list."""
    output, n, device = config.output, about["n"], generator.device
    missing = [index for index in range(n) if not (output / names.file(index)).is_file()]
    state.wait_for_everyone()  # no process draws before all have listed the missing images

    start = time.perf_counter()
    cycle = math.lcm(generator.conditioning.cycle(conditions), len(filling) if filling else 1)
    batch_size = min(config.batch_size, max(1, math.ceil(len(missing) / state.num_processes)))
    oversample = settings.oversample
    own = batches(missing, cycle, oversample, batch_size)[state.process_index :: state.num_processes]

    def write(indices: Sequence[int], codes: Tensor) -> None:
        decoded = generator.decode(codes)
        if given := filling or sources:
            decoded = given.finished(indices, decoded)
        if not (output / UNFINISHED).is_file():
            raise UserError(
                f"{output} was moved or removed while images were drawn into it; run the same command again"
            )
        for index, image in zip(indices, decoded, strict=True):
            write_png_atomic(output / names.file(index), image)

    length = generator.tokens_of(filling) if filling else generator.vocabulary.length
    total = sum(len(with_candidates(batch, cycle, oversample)[0]) for batch in own) * length
    written: Future[None] | None = None
    # One batch is decoded and written while the next one is drawn.
    with progress(total, "drawing", "code", state.is_main_process) as bar, ThreadPoolExecutor(1) as writer:

        def advance(tokens: Tensor) -> None:
            bar.update(len(tokens))

        for indices in own:
            try:
                given = indices, conditions, settings, config.seed, config.batch_size, advance
                codes, _ = generator.draw_filling(filling, *given) if filling else generator.draw_codes(*given)
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
        columns = generator.conditioning.cycle(conditions)
        write_grid(output, names, n, config.columns, columns, generator.tokenizer.config.channels)
        finish(output, names, about)
        place = f"{device} in {generator.precision}"
        present = f" ({n - len(missing)} were there)" if len(missing) < n else ""
        print(f"{len(missing)} images in {seconds:.1f} s, {len(missing) / seconds:.1f} images/s on {place}{present}")
        print(f"look at {output / GRID}")
    state.wait_for_everyone()
