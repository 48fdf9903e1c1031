"""The models that the page offers: folders found at start, each read when it is first chosen."""

import os
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from vqgen.config import one_line
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION, read_json
from vqgen.sampling.generator import SHIPPED, Generator
from vqgen.tokenizer.codes.degrade import alternatives, parse_degradations

LOADED = 3
"""Models that stay in memory."""


def is_prior(folder: Path) -> bool:
    """Whether a folder is a model or run folder of a prior; False where its description cannot be read."""
    try:
        return read_json(folder / DESCRIPTION).get("kind") == "prior"
    except (UserError, OSError):
        return False


def find_models(folder: Path | None) -> dict[str, Path]:
    """Name -> folder of the priors in the sub-folders of `folder`, by name, then the models in the package.

    Raises `UserError` where there is a folder and none in it.
    """
    found: dict[str, Path] = {}
    if folder is not None:
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise UserError(f"--models: {folder} cannot be read ({error.strerror}); name a folder of models") from error
        for name in names:
            places = (folder / name, folder / name / "prior")
            if priors := [place for place in places if place.is_dir() and is_prior(place)]:
                found[name] = priors[0]
        if not found:
            raise UserError(f"--models: no sub-folder of {folder} is a prior ({DESCRIPTION}); name a folder of models")
    return found | {name if name not in found else f"{name} (package)": path for name, path in SHIPPED.items()}


def translators_of(folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Name -> description of the models that were trained on source images.

    Those whose description cannot be read, or is malformed, are left out with a line on standard error.
    """
    found: dict[str, Any] = {}
    for name, folder in folders.items():
        try:
            about = read_json(folder / DESCRIPTION)
            if "source" in about:
                _check_source(about["source"], folder / DESCRIPTION)
                found[name] = about
        except UserError as error:
            print(f"vqgen-app: left out of the tab Translate: {one_line(str(error))}", file=sys.stderr)
    return found


def _check_source(source: Any, where: Path) -> None:
    """Raise `UserError` for a key `source` that describes no degradations and no pairs."""
    specs = source.get("degradations") or [] if isinstance(source, dict) else None
    if not isinstance(specs, list) or not all(isinstance(spec, str) for spec in specs):
        raise UserError(f"{where}: found {str(source)[:80]!r} as its source, expected degradations or pairs")
    if specs:
        try:
            parse_degradations(specs)
        except UsageError as error:
            raise UserError(f"{where}: {error}") from error


def chains_of(source: Any) -> list[list[str]]:
    """The chains of degradations that a prior with this key `source` in its description was trained to undo."""
    about = source if isinstance(source, dict) else {}
    return [chain for chain in alternatives([str(spec) for spec in about.get("degradations") or []]) if chain]


def task_of(source: Any) -> str:
    """What a prior with this key `source` in its description was trained to do, in words."""
    if chains := chains_of(source):
        return f"undo {' or '.join(map(', '.join, chains))}"
    return str((isinstance(source, dict) and source.get("description")) or "translate")


@dataclass(frozen=True)
class Loaded:
    """A model and the name by which it is offered."""

    name: str
    generator: Generator

    @property
    def classes(self) -> list[str]:
        """Names of the classes, or their indices; empty for an unconditional prior."""
        found = self.generator.conditioning.classes
        return found.names or [str(index) for index in range(found.count)]

    @property
    def takes_text(self) -> bool:
        return self.generator.conditioning.text is not None

    @property
    def inpaints(self) -> bool:
        return self.generator.conditioning.masked_source is not None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.generator.tokenizer.config.image_size
        return height, width

    @property
    def summary(self) -> str:
        """One line: sizes, conditions, and what it was trained for."""
        tokenizer, (height, width) = self.generator.tokenizer, self.size
        rows, columns = tokenizer.grid
        depth = f" × {tokenizer.depth}" if tokenizer.depth > 1 else ""
        parts = [f"{width}×{height} pixels, {columns}×{rows}{depth} codes of {tokenizer.codebook_size}"]
        parts.append(f"{len(self.classes)} classes" if self.classes else "no classes")
        parts += ["text"] * self.takes_text + ["fills in"] * self.inpaints
        if source := self.generator.conditioning.paired_source:
            parts.append(f"trained to {task_of(source.describe()['source'])}")
        return ", ".join(parts)


class Models:
    """Models by name. Those used last stay in memory, and the summaries of all that were read."""

    def __init__(self, folder: Path | None, device: str, precision: str) -> None:
        """Find the models. Raises `UserError`."""
        self.folders = find_models(folder)
        self.translators = translators_of(self.folders)
        self._device, self._precision = device, precision
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._summaries: dict[str, str] = {}
        self._lock = Lock()

    @property
    def names(self) -> list[str]:
        return list(self.folders)

    @property
    def tasks(self) -> dict[str, str]:
        """What a model was trained to do with source images, with its name -> its name."""
        return {f"{task_of(about['source'])} ({name})": name for name, about in self.translators.items()}

    @property
    def translate_text(self) -> bool:
        """Whether one of those that translate reads a text, too."""
        return any("text" in about for about in self.translators.values())

    @property
    def degradations(self) -> list[str]:
        """Every chain of degradations that one of the models was trained to undo, as `grey jpeg:10`."""
        return list(dict.fromkeys(chain for name in self.translators for chain in self.degradations_of(name)))

    def degradations_of(self, name: str) -> list[str]:
        """Those of one model."""
        return [" ".join(chain) for chain in chains_of(self.translators.get(name, {}).get("source"))]

    def first(self) -> Loaded:
        """The first model that can be read. Raises the first `UserError` where none can."""
        failures: list[UserError] = []
        for name in self.names:
            try:
                found = self.load(name)
            except UserError as error:
                failures.append(error)
            else:
                for failure in failures:
                    print(f"vqgen-app: left out for now: {one_line(str(failure))}", file=sys.stderr)
                return found
        raise failures[0]

    def load_or(self, name: str, other: Loaded) -> Loaded:
        """The model of this name, or another where it cannot be read."""
        try:
            return self.load(name)
        except UserError:
            return other

    def summary(self, name: str) -> str:
        """The summary of the model of this name, which is read only if it was not before. Raises `UserError`."""
        return self._summaries.get(name) or self.load(name).summary

    def load(self, name: str) -> Loaded:
        """The model of this name. Raises `UserError`, in which its folder has no path."""
        if not isinstance(name, str) or name not in self.folders:
            raise UserError(f"model: found {str(name)[:80]!r}, expected one of {', '.join(self.names)}")
        with self._lock:
            if name not in self._loaded:
                folder = self.folders[name]
                try:
                    self._loaded[name] = Loaded(name, Generator.load(folder, self._device, self._precision))
                except UserError as error:
                    text = str(error).replace(str(folder), name)
                    raise type(error)(
                        f"the model {text}" if text.startswith((f"{name} ", f"{name}:")) else text
                    ) from error
                self._summaries[name] = self._loaded[name].summary
                if len(self._loaded) > LOADED:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(name)
            return self._loaded[name]
