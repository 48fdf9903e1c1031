"""Drawing for one request: its values as options of vqgen-sample, images as they are finished, and their archive.

A request is a `SampleConfig`, so the page draws what vqgen-sample draws. A session that is stopped ends its work
between two codes.
"""

import math
import textwrap
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from vqgen.config import build
from vqgen.errors import UsageError
from vqgen.files import read_json, write_json
from vqgen.option_types import checked
from vqgen.options import options
from vqgen.sampling.output import FINISHED, GRID, finish
from vqgen.sampling.oversample import GROUP
from vqgen.sampling.sample import SampleConfig
from vqgen.sampling.write_samples import Series, write_grid
from vqgen.tokenizer.reconstruction import write_png_atomic

from .models import Loaded
from .program import LimitConfig

BATCH = 8
"""Images that are drawn at once: the page shows them after each batch."""
MOST_CHARACTERS = 20_000
"""Of one option of a request but the prompts, which have their own limit: the conversion of more would take seconds."""
REMEMBERED = 10_000
"""Stops that are remembered: more than requests can wait."""


class Stopped(Exception):
    """Raised within a drawing whose session was stopped, or which took too long."""


class Session(str):
    """The session of a request, and when the request came, by `time.monotonic`."""

    arrived: float

    def __new__(cls, name: str, arrived: float) -> "Session":
        found = super().__new__(cls, name)
        found.arrived = arrived
        return found


class Job:
    """A drawing under way: called between its codes, it raises `Stopped` once the drawing has to end."""

    def __init__(self, most_seconds: float) -> None:
        self.stop = Event()
        self._ends = time.monotonic() + most_seconds

    def __call__(self, *_: Any) -> None:
        if self.stop.is_set() or self.late:
            raise Stopped

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() >= self._ends


class Jobs:
    """The drawings under way: one at a time, each of a session that can stop it, even before its turn comes.

    Args:
        most_seconds: time that each may take.
    """

    def __init__(self, most_seconds: float = math.inf) -> None:
        self.most_seconds = most_seconds
        self.turn = Lock()
        """Held while models compute."""
        self._stops: dict[tuple[str, str], list[Event]] = {}
        self._stopped: OrderedDict[tuple[str, str | None], float] = OrderedDict()
        self._lock = Lock()

    @contextmanager
    def job(self, session: str, kind: str = "") -> Iterator[Job]:
        """Register a drawing of a kind, which ends once the session was stopped, as a whole or in this kind, or where
        a `Session` was stopped since the request came."""
        job, key = Job(self.most_seconds), (str(session), kind)
        with self._lock:
            stopped = max(self._stopped.get(each, -math.inf) for each in (key, (key[0], None)))
            if isinstance(session, Session) and session.arrived <= stopped:
                job.stop.set()
            self._stops.setdefault(key, []).append(job.stop)
        try:
            yield job
        finally:
            with self._lock:
                self._stops[key].remove(job.stop)
                if not self._stops[key]:
                    del self._stops[key]

    def stop(self, session: str, kind: str | None = None) -> int:
        """Stop the drawings of a session, of one kind or of all, and those that wait; return how many were under
        way."""
        key = str(session), kind
        with self._lock:
            self._stopped[key] = time.monotonic()
            self._stopped.move_to_end(key)
            if len(self._stopped) > REMEMBERED:
                self._stopped.popitem(last=False)
            kinds = [each for each in self._stops if each[0] == key[0] and kind in (None, each[1])]
            found = [event for each in kinds for event in self._stops[each]]
        for event in found:
            event.set()
        return len(found)

    @property
    def running(self) -> int:
        """Number of drawings that have begun and not ended."""
        with self._lock:
            return sum(map(len, self._stops.values()))


def check_length(flag: str, value: Any, most: int) -> None:
    """Raise `UsageError` where the value of an option, a text or a list, is too long to be converted."""
    words = value if isinstance(value, list) else [value]
    if (found := sum(max(len(word), 1) if isinstance(word, str) else 1 for word in words)) > most:
        raise UsageError(f"{flag}: found {found} characters, at most {most} are read")


def series_of(model: Loaded, values: Mapping[str, Any], limits: LimitConfig, settings: Mapping[str, Any]) -> Series:
    """The images that a request asks for, checked. Raises `UserError`, `UsageError`.

    Args:
        values: of options of vqgen-sample, by name; None for those that are not given.
        settings: those of sampling that are given; the others are as the model recommends.
    """
    known = {option.name: option for option in options(SampleConfig)}
    for name, value in [*values.items(), *settings.items()]:
        most = limits.prompt_characters if name == "prompt" else MOST_CHARACTERS
        check_length(known[name].flag, value, most)
    given = {
        name: checked(known[name].type, value, known[name].flag)
        for name, value in [*values.items(), *settings.items()]
        if value is not None
    }
    if (found := len(given.get("class") or [])) > limits.most_images:
        raise UsageError(f"--class: found {found} classes, at most {limits.most_images} are drawn at once")
    for name in ("size", "extend"):
        if (side := max(given.get(name) or [0])) ** 2 > 1e6 * limits.most_megapixels:
            most = f"one request draws at most {limits.most_megapixels:g} million pixels"
            raise UsageError(f"{known[name].flag}: found a side of {side} pixels; {most}")
    config = build(SampleConfig, given | {"model": Path(model.name), "batch_size": BATCH})
    vars(config).update(stated=frozenset(given))
    series = Series.of(config, model.generator)
    if series.n > limits.most_images:
        raise UsageError(f"--n: found {series.n}, at most {limits.most_images} images are drawn at once")
    count, option = series.n, "--size"
    if (times := series.settings.oversample) != 1:
        count, option = candidates(series), "--oversample"
        if count > limits.most_images:
            found = f"{count} candidates are drawn for {series.n} images, as whole groups of {GROUP} of a class"
            raise UsageError(f"--oversample: found {times:g}, {found}; at most {limits.most_images} are drawn at once")
    pixels = count * series.size[0] * series.size[1]
    if pixels > 1e6 * limits.most_megapixels:
        found = f"{count} images of {series.size[0]}×{series.size[1]} pixels are {pixels / 1e6:.1f} million"
        raise UsageError(f"{option}: {found}, at most {limits.most_megapixels:g} are drawn at once")
    return series


def candidates(series: Series) -> int:
    """Number of images whose codes are drawn: with `oversample`, more than are kept."""
    generator = series.generator
    each = generator.tokens_of(series.filling) if series.filling else generator.vocabulary.length
    return series.tokens([range(series.n)]) // each


def defaults_of(model: Loaded) -> dict[str, Any]:
    """Name -> value of all sampling settings where a request gives none: as the model recommends, or plain."""
    plain = {option.name: option.default for option in options(SampleConfig) if option.path[0] == "sampling"}
    return plain | model.generator.recommended


@dataclass(frozen=True)
class Picture:
    """A drawn image: its file, its class by name and its prompt, or "", and the NLL of its drawn codes."""

    path: Path
    class_name: str
    prompt: str
    nats: float

    @property
    def caption(self) -> str:
        prompt = textwrap.shorten(self.prompt, 40, placeholder=" …")
        return " · ".join(filter(None, [self.class_name, prompt, f"{self.nats:.1f} nats"]))


def draw(series: Series, folder: Path, jobs: Jobs, check: Callable[..., None]) -> Iterator[list[Picture]]:
    """Draw the images into a folder; yields all that are there after each batch, in their order.

    Ends early, and without an error, where `check` raises `Stopped`.
    """
    found: dict[int, Picture] = {}
    for batch in series.batches(range(series.n), BATCH):
        try:
            with jobs.turn:
                check()
                codes, nats = series.codes(batch, check)
                images = series.images(batch, codes)
        except Stopped:
            return
        for index, image, value in zip(batch, images, nats.tolist(), strict=True):
            path = folder / series.names.file(index)
            path.parent.mkdir(exist_ok=True)
            write_png_atomic(path, image)
            name = series.names.class_name(series.names.label(index)) or ""
            prompts = series.conditions.get("text", [])
            prompt = prompts[index % len(prompts)] if prompts else ""
            found[index] = Picture(path, name, prompt if isinstance(prompt, str) else "", value)
        yield [found[index] for index in sorted(found)]


def pack(series: Series, folder: Path, pictures: list[Picture], given: Mapping[str, Path]) -> Path:
    """Complete a folder of drawn images as vqgen-sample does, with grid.png and samples.json, and return it as a zip.

    Of a drawing that was stopped it has all images that were finished; grid.png and samples.json have those before the
    first one that is missing, and are left out where that is the first of all. `samples.json` has the NLL of each
    image. `given` are the files that the images were made from, by their name in the zip.
    """
    names = {picture.path: picture.path.relative_to(folder).as_posix() for picture in pictures}
    count = next((i for i in range(series.n) if folder / series.names.file(i) not in names), series.n)
    if count:
        _describe(series, folder, pictures[:count], given)
    archive = folder / "samples.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name in [FINISHED, GRID] if count else []:
            file.write(folder / name, name)
        for path, name in names.items():
            file.write(path, name)
        for name, path in given.items():
            file.write(path, name)
    return archive


def _describe(series: Series, folder: Path, pictures: list[Picture], given: Mapping[str, Path]) -> None:
    """Write grid.png and samples.json of the first images of a series, which are in the folder."""
    count = len(pictures)
    # By the name that the page offers: `describe` takes each such name for that of the package, and has its path.
    about = {**series.describe(), "model": str(series.config.model), "n": count}
    about |= {"stems": series.names.stems[:count]} if series.names.stems else {}
    named = {str(path): name for name, path in given.items()}
    about |= {
        key: [named[path] for path in about[key]] for key in ("init_images", "source_images", "mask") if key in about
    }
    write_grid(folder, series, count)
    finish(folder, series.names, about)
    listed = read_json(folder / FINISHED)
    for image, picture in zip(listed["images"], pictures, strict=True):
        image["nats"] = picture.nats
    write_json(folder / FINISHED, listed)
