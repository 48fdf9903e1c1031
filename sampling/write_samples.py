"""Draw a series of images into a folder: PNG files, a grid of the first ones, samples.json."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from vqgen import __version__
from vqgen.config import as_dict
from vqgen.devices import find_device, locked_by_main, on_main, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import read_bytes
from vqgen.options import MOST_IMAGES
from vqgen.prior.conditioning import Conditions
from vqgen.prior.options import GENERATION
from vqgen.prior.parts.part import ABSENT, is_absent
from vqgen.progress import progress
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.data.pixels import image_grid
from vqgen.tokenizer.reconstruction import write_png_atomic

from .drawing import Recipe
from .filling import Filling
from .generator import Generator, find_model
from .init_images import SourceImages, chosen_filling, chosen_sources, given_files
from .output import GRID, PARTS, UNFINISHED, Found, Names, begin, check_list, check_output, finish, samples_folder
from .oversample import batches, with_candidates
from .sample import SampleConfig
from .settings import SamplingSettings, in_words

GRID_IMAGES, GRID_PIXELS = 100, 2**26
"""Most images of the grid, and most pixels of all but a single one: fewer than are read from a file."""


def chosen_conditions(config: SampleConfig, generator: Generator, sources: SourceImages | None) -> dict[str, list[Any]]:
    """The values of every part of the prefix, from the options; by default completions and translations have no other
    condition than their image.

    Of several prompts and several classes without an image every prompt is drawn in every class, the classes in turn.
    Raises `UsageError`.
    """
    conditioning = generator.conditioning
    given = {**config.conditions, "source": sources.read.codes if sources else None}
    if given["text"] and conditioning.text is None:
        model = config.model or find_model(None)  # as it was named: the page shows it
        raise UsageError(f"--prompt: {model} was trained without text; give a --model with captions, such as emoji")
    try:
        found = conditioning.conditions(given, absent=bool(config.init_image or sources))
    except UsageError as error:
        if config.prompt_file and str(error).startswith("--prompt:"):
            raise UsageError(f"--prompt-file: {config.prompt_file}:{str(error).partition(':')[2]}") from error
        raise
    if config.init_image or sources or min(len(found["class"]), len(found.get("text", []))) < 2:
        return found
    if (count := len(found["text"]) * len(found["class"])) > MOST_IMAGES:
        raise UsageError(
            f"--prompt: each of them in every class makes {count} images, at most {MOST_IMAGES}; give fewer"
        )
    return found.crossed("text", "class")


def in_turn(values: Sequence[Any]) -> int | None:
    """How many different values a series goes through in turn; None where it does not."""
    count = len(set(values))
    return count if list(values) == list(values[:count]) * (len(values) // count) else None


def _naming(generator: Generator) -> str:
    """What to do about images without a class, where the prior has classes."""
    return "name them with --class, or " if generator.conditioning.classes.count else ""


def given_options(config: SampleConfig, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names that were given, as plain values."""
    found = {name: value for name, value in as_dict(config).items() if name in names}
    return {name: value for name, value in found.items() if value is not None}


def write_grid(output: Path, series: "Series", n: int) -> None:
    """Write grid.png from the first images on disk of `n`: whole rows of at most `GRID_IMAGES` and `GRID_PIXELS`.

    By default each condition has a column, where they are few, else each given image, else each class.
    """
    shown, columns = min(n, GRID_IMAGES, max(1, GRID_PIXELS // math.prod(series.size))), series.config.columns
    cycle, channels = series.generator.conditioning.cycle(series.conditions), series.generator.tokenizer.config.channels
    if columns is None:
        given = sum(len(files) for option, files in given_files(series.config).items() if option != "--mask")
        found = cycle, given, in_turn(series.conditions["class"])
        fitting = (each for each in found if each and 1 < each <= min(shown, 20))
        columns = next(fitting, math.ceil(math.sqrt(shown)))
    if n > shown > columns:
        shown -= shown % columns
    images = []
    for path in (output / series.names.file(index) for index in range(shown)):
        try:
            images.append(decode(read_bytes(path), channels))
        except (OSError, BrokenImage) as error:
            raise UserError(f"{path} is damaged; remove it and run the same command to have it drawn again") from error
    write_png_atomic(output / GRID, image_grid(torch.stack(images), columns))


@dataclass(frozen=True)
class Series:
    """The images that options ask for, checked: what is given of them, their conditions, and how they are drawn."""

    config: SampleConfig
    generator: Generator
    filling: Filling | None
    sources: SourceImages | None
    conditions: Conditions
    settings: SamplingSettings
    names: Names
    n: int

    @classmethod
    def of(cls, config: SampleConfig, generator: Generator) -> "Series":
        """Read the given images and check everything. Raises `UserError`, `UsageError`."""
        sources = chosen_sources(config, generator)
        conditions = chosen_conditions(config, generator, sources)
        classes, named = conditions["class"], generator.conditioning.classes.parse(config.class_ or [])
        if config.layout != "flat" and classes == [ABSENT]:
            text = f"{config.layout} needs classes, and these images have none"
            raise UsageError(f"--layout: {text}; {_naming(generator)}use flat")
        if config.num_per_class and classes == [ABSENT]:
            raise UsageError(f"--num-per-class: these images have no classes; {_naming(generator)}use --n")
        if config.num_per_class and len(set(named)) < len(named):
            raise UsageError("--num-per-class: --class names a class twice; name each once")
        given, pairs = len(config.prompts or [""]), len(conditions.get("text", [""]))
        if config.num_per_class and config.num_per_class < given < pairs:
            text = f"found {config.num_per_class}, but each of {given} prompts is drawn in every class"
            raise UsageError(f"--num-per-class: {text}; give {given} or more, or --n")
        stated = [len(conditions[name]) for name, values in config.conditions.items() if values]
        files = map(len, given_files(config).values())
        n = config.count(len(set(classes)), max([0 if sources else 64, *stated, *files]))
        filling = chosen_filling(config, generator, n)
        settings = generator.settings(config.given_settings, conditions, filling)
        if filling:
            generator.check_filling(filling, settings, conditions)
        else:
            generator.check(settings, conditions)
        stems = sources.stems() if sources and n == len(sources) and config.layout == "flat" else None
        names = Names(config.layout, classes, generator.conditioning.classes.names, stems)
        return cls(config, generator, filling, sources, conditions, settings, names, n)

    def of_more(self, n: int) -> "Series":
        """The series with `n` images, the first of which are the same."""
        own_masks = self.filling is not None and self.filling.given is not None
        return replace(self, n=n, filling=chosen_filling(self.config, self.generator, n) if own_masks else self.filling)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the images in pixels."""
        rows, columns = self.filling.grid if self.filling else self.generator.tokenizer.grid
        return columns * self.generator.tokenizer.factor, rows * self.generator.tokenizer.factor

    @property
    def _cycle(self) -> int:
        """Number of images after which conditions and given codes repeat."""
        return math.lcm(self.generator.conditioning.cycle(self.conditions), len(self.filling) if self.filling else 1)

    def batches(self, indices: Sequence[int], batch_size: int) -> list[list[int]]:
        """The images that are drawn at once; with `oversample`, whole groups of candidates."""
        return batches(indices, self._cycle, self.settings.oversample, batch_size)

    def tokens(self, parts: Sequence[Sequence[int]]) -> int:
        """Number of codes that are drawn for batches."""
        length = self.generator.tokens_of(self.filling) if self.filling else self.generator.vocabulary.length
        return length * sum(len(with_candidates(p, self._cycle, self.settings.oversample)[0]) for p in parts)

    def codes(
        self, indices: Sequence[int], on_token: Callable[[Tensor], object] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw the codes (B, h, w[, depth]) of images and their NLL (B,); `on_token` as in `Recipe`."""
        config, generator = self.config, self.generator
        recipe = Recipe(self.conditions, self.settings, config.seed, config.batch_size, on_token)
        return (
            generator.draw_filling(self.filling, indices, recipe)
            if self.filling
            else generator.draw_codes(indices, recipe)
        )

    def images(self, indices: Sequence[int], codes: Tensor) -> Tensor:
        """Images uint8 (B, C, H, W) of their codes, with what is kept of the given ones."""
        decoded, read = self.generator.decode(codes), self.sources.read if self.sources else None
        given = self.filling or read
        return given.finished(indices, decoded) if given else decoded

    def describe(self) -> dict[str, Any]:
        """The description of the series: enough to draw every image again, together with the files of given images."""
        config, generator, filling = self.config, self.generator, self.filling
        about: dict[str, Any] = {
            "version": __version__,
            "model": str(find_model(config.model)),
            "prior_fingerprint": generator.prior.fingerprint,
            "tokenizer_fingerprint": generator.tokenizer.fingerprint,
            "fit": generator.tokenizer.config.fit,
            "settings": as_dict(self.settings),
            "seed": config.seed,
            "n": self.n,
            "precision": generator.precision,
            "device": generator.device.type,
            "layout": self.names.layout,
            "labels": list(self.names.labels),
            "class_names": self.names.class_names,
        }
        if others := generator.conditioning.record(self.conditions):
            about["conditions"] = others
        if self.names.stems:
            about["stems"] = self.names.stems
        if filling:
            about |= given_options(config, PARTS)
            about["init_images"] = [str(path) for path in config.init_image or []]
            about["kept_codes"] = int((~filling.cells).sum()) * generator.vocabulary.depth // len(filling)
            about["kept_fingerprint"] = hashlib.sha256(filling.kept.numpy().tobytes()).hexdigest()
            if filling.grid != generator.vocabulary.grid:
                about["code_grid"] = list(filling.grid)
            if filling.sourced:
                about["mask_fingerprint"] = filling.fingerprint
                about["paste"] = filling.originals is not None
                if pasted := filling.pasted_fingerprint:
                    about["pasted_fingerprint"] = pasted
        if self.sources:
            about["source_images"] = [str(path) for path in self.sources.paths]
            if config.source:
                about["degradations"] = config.source
            if generator.keep(config.source):
                about["paste"] = config.paste
                about["source_fingerprint"] = self.sources.read.fingerprint
        if generator.device.type == "cuda":
            about["batch_size"] = config.batch_size  # there it may change the last bits
        return about


def write_samples(config: SampleConfig) -> PartialState:
    """Draw images into a folder, see `sample.py`; return the state of the processes. Raises `UserError`."""
    output, device = config.output, find_device(config.device)
    state = processes(cpu=device.type == "cpu", timeout=timedelta(days=7))  # for one with a larger share
    if state.num_processes > 1 and device.type == "cuda":
        device = torch.device(state.device or device)
    # Every process checks everything before any of them writes, so that all stop together.
    generator = Generator.load(config.model, device, config.precision)
    series = Series.of(config, generator)
    names, about = series.names, series.describe()
    check_list(names, about)
    with locked_by_main(output):
        given = given_files(config)
        found = on_main(lambda: check_output(output, names, about, config.overwrite, series.size, given))
        if found.status == "done":
            if state.is_main_process:
                samples_folder(output).remove_leftovers()
                if config.columns:
                    write_grid(output, series, found.n)
                print(f"{output} holds these {found.n} images already; --overwrite draws them again")
            return state
        if found.n > series.n:
            series = series.of_more(found.n)
        about["n"] = found.n
        if state.is_main_process and config.model is None:
            print(f"drawing from {about['model']}")
        if state.is_main_process:
            if all(map(is_absent, series.conditions.get("text", [""]))):
                print("the model reads text, and these images are drawn without a --prompt")
            print(_stated(series.settings, config, generator))
        on_main(lambda: _begin(output, about, found))
        _draw(series, about, state)
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


def _draw(series: Series, about: dict[str, Any], state: PartialState) -> None:
    """Draw the images that are missing in the folder, this process its share of them; write grid and list."""
    config, names, n, device = series.config, series.names, about["n"], series.generator.device
    output = config.output
    missing = [index for index in range(n) if not (output / names.file(index)).is_file()]
    state.wait_for_everyone()  # no process draws before all have listed the missing images

    start = time.perf_counter()
    batch_size = min(config.batch_size, max(1, math.ceil(len(missing) / state.num_processes)))
    own = series.batches(missing, batch_size)[state.process_index :: state.num_processes]

    def write(indices: Sequence[int], codes: Tensor) -> None:
        images = series.images(indices, codes)
        if not (output / UNFINISHED).is_file():
            raise UserError(
                f"{output} was moved or removed while images were drawn into it; run the same command again"
            )
        for index, image in zip(indices, images, strict=True):
            write_png_atomic(output / names.file(index), image)

    written: Future[None] | None = None
    # One batch is decoded and written while the next one is drawn.
    with (
        progress(series.tokens(own), "drawing", "code", state.is_main_process) as bar,
        ThreadPoolExecutor(1) as writer,
    ):

        def advance(tokens: Tensor) -> None:
            bar.update(len(tokens))

        for indices in own:
            try:
                codes, _ = series.codes(indices, advance)
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
        write_grid(output, series, n)
        finish(output, names, about)
        place = f"{device} in {series.generator.precision}"
        present = f" ({n - len(missing)} were there)" if len(missing) < n else ""
        print(f"{len(missing)} images in {seconds:.1f} s, {len(missing) / seconds:.1f} images/s on {place}{present}")
        print(f"look at {output / GRID}")
    state.wait_for_everyone()
