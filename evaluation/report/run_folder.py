"""Run folders as the report reads them: what is missing or damaged becomes a note, not an error."""

import base64
import itertools
import math
import statistics
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor
from torchvision.io import encode_png

from vqgen.errors import UsageError, UserError
from vqgen.evaluation.receipt import MEASUREMENTS, flatten, read_receipt
from vqgen.files import DESCRIPTION, is_file, read_bytes, read_json
from vqgen.files.yaml_text import read_yaml
from vqgen.sampling.output import FINISHED as SAMPLES
from vqgen.sampling.output import GRID
from vqgen.tokenizer.codes.format import MANIFEST
from vqgen.tokenizer.data.decoding import PNG
from vqgen.training.folder import FINISHED, read_sessions
from vqgen.training.trackers import read_rows

Kind = Literal["tokenizer", "prior", "samples"]
MOST_PROMPTS = 10
"""Prompts that are named of a folder of samples."""
LARGEST = 1e15  # bound of the numbers shown; no axis has room for larger ones


@dataclass(frozen=True)
class Png:
    """A PNG file: its bytes and its size in pixels."""

    data: bytes
    width: int
    height: int

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.data).decode("ascii")

    @classmethod
    def read(cls, path: Path) -> "Png | None":
        """Read a file; None if it does not exist or is not a complete PNG."""
        with suppress(OSError, struct.error):
            data = read_bytes(path)
            if data.startswith(PNG) and data.rstrip(b"\0").endswith(b"IEND\xaeB`\x82"):
                return cls(data, *struct.unpack(">II", data[16:24]))
        return None

    @classmethod
    def encode(cls, image: Tensor) -> "Png":
        """Encode a uint8 image (1 or 3, H, W)."""
        return cls(encode_png(image).numpy().tobytes(), image.shape[2], image.shape[1])


@dataclass
class RunFolder:
    """A run, finished or not, or a folder of samples; `notes` say what the folder lacks."""

    path: Path
    kind: Kind
    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Readable rows of metrics.jsonl."""
    options: dict[str, Any] = field(default_factory=dict)
    """config.yaml, sections flattened: `run.steps` -> value."""
    description: dict[str, Any] = field(default_factory=dict)
    """vqgen.json of the model, or samples.json."""
    pictures: dict[int, Png] = field(default_factory=dict)
    """images/step-*.png by step, in order."""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    ended: int | None = None
    """Steps done, by finished.json."""
    receipts: list[dict[str, Any]] = field(default_factory=list)
    """Receipts of vqgen-eval in the folder that are of this model."""
    notes: list[str] = field(default_factory=list)

    @property
    def logged(self) -> list[str]:
        """Names of all logged numbers, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row if "/" in name))

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every finite number logged under `name`."""
        return [(row["step"], float(row[name])) for row in self.rows if _finite(row.get(name))]

    @property
    def steps(self) -> int:
        """Steps done, as far as known."""
        return max([*(row["step"] for row in self.rows), self.ended or 0])

    @property
    def drawn_of(self) -> str:
        """Of a folder of samples the classes of the images, and their first prompts; empty where they have neither."""
        images, found = self.description.get("images"), dict[str, list[str]]()
        for name in ("class", "text"):
            values = (
                [image.get(name) for image in images if isinstance(image, dict)] if isinstance(images, list) else []
            )
            found[name] = list(dict.fromkeys(value for value in values if isinstance(value, str)))
        classes, prompts = found.values()
        more = f" and {len(prompts) - MOST_PROMPTS} more" if len(prompts) > MOST_PROMPTS else ""
        of_text = f"drawn of {', '.join(f'“{text}”' for text in prompts[:MOST_PROMPTS])}{more}" if prompts else ""
        of_class = f"{'classes' if len(classes) > 1 else 'class'} {', '.join(classes)}" if classes else ""
        return "; ".join(filter(None, (of_text, of_class)))

    @property
    def findings(self) -> list[dict[str, Any]]:
        """Rows with a finding of the run's health checks."""
        return [row for row in self.rows if "health" in row]

    @property
    def rate(self) -> float | None:
        """Median of the logged rates in examples a second; the first one, a warm-up, is left out if there are more."""
        rates = [value for _, value in self.series("train/per_second")]
        return statistics.median(rates[1:] or rates) if rates else None

    @property
    def computed(self) -> float | None:
        """Seconds spent in training steps, from the logged rates, without validations and checkpoints."""
        batch, rates = self.options.get("run.batch_size"), self.series("train/per_second")
        if not isinstance(batch, int) or not rates:
            return None
        steps = itertools.pairwise([0.0, *(step for step, _ in rates)])
        taken = ((step - before) * batch / rate for (before, step), (_, rate) in zip(steps, rates) if rate > 0)
        found = sum(taken, 0.0)
        return found if math.isfinite(found) else None

    @property
    def wall(self) -> float | None:
        """Seconds of all sessions up to their last checkpoints; None if they were not recorded from step 0 on."""
        complete = self.sessions and self.sessions[0]["first_step"] == 0
        return float(sum(session["seconds"] for session in self.sessions)) if complete else None


class Found(NamedTuple):
    """Runs in a folder named on the command line, and folders of code files next to them."""

    runs: list[RunFolder]
    codes: list[Path]


def _finite(value: Any) -> bool:
    """Return whether a value is a number that a chart can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def _config(path: Path) -> dict[str, Any] | None:
    """Read config.yaml; None if it is missing or unreadable."""
    with suppress(UserError):
        tree = read_yaml(path / "config.yaml")
        return tree if isinstance(tree, dict) else None
    return None


def _kind(path: Path) -> Kind | None:
    """Kind of a run folder, by its configuration or its model; None if it is no run."""
    config = _config(path) or {}
    if isinstance(config.get("quantizer"), dict):
        return "tokenizer"
    if "codes" in config and isinstance(config.get("optimizer"), dict):
        return "prior"
    with suppress(UserError):
        kind = read_json(path / DESCRIPTION).get("kind")
        return kind if kind in ("tokenizer", "prior") else None
    return None


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not is_file(path):
        notes.append("There is no metrics.jsonl, so there are no curves.")
        return []
    rows, damaged = read_rows(path)
    if damaged:
        lines = "One line" if damaged == 1 else f"{damaged} lines"
        notes.append(f"{lines} of metrics.jsonl cannot be read; a run that was killed while writing leaves one.")
    if not rows:
        notes.append("Nothing has been logged yet, so there are no curves.")
    return rows


def _read_run(path: Path, kind: Kind) -> RunFolder:
    config, notes = _config(path), []
    run = RunFolder(
        path, kind, path.name, _rows(path / "metrics.jsonl", notes), dict(flatten(config or {})), notes=notes
    )
    numbers = ("first_step", "last_step", "seconds")
    run.sessions = [session for session in read_sessions(path) if all(_finite(session.get(name)) for name in numbers)]
    run.finished = (path / FINISHED).is_file()
    with suppress(UserError):
        ended = read_json(path / FINISHED).get("steps") if run.finished else None
        run.ended = ended if isinstance(ended, int) and 0 <= ended < LARGEST else None
    with suppress(UserError):
        run.description = read_json(path / DESCRIPTION)
    found = {file.stem[5:]: Png.read(file) for file in sorted(path.glob("images/step-*.png"))}
    run.pictures = {int(step): png for step, png in found.items() if png and step.isdecimal()}
    if config is None:
        notes.append("There is no config.yaml that can be read, so the configuration is not known.")
    if run.rows and not any(name.startswith("heldout/") for name in run.logged):
        notes.append("It has not been validated yet, so there are no held-out metrics.")
    if not run.pictures:
        what = "reconstructions" if kind == "tokenizer" else "samples"
        notes.append(f"There are no pictures of {what} in images/ yet.")
    if not run.description:
        notes.append(f"There is no {DESCRIPTION} yet: the model is written at the end of the run.")
    for file in sorted(path.glob("*.json")):
        with suppress(UserError):
            receipt = read_receipt(file)
            if receipt["program"] not in MEASUREMENTS:
                notes.append(f"{file.name} is a receipt of another version of vqgen, and is not shown.")
            elif receipt["fingerprints"].get(kind) == run.description.get("fingerprint"):
                run.receipts.append(receipt)
            else:
                notes.append(f"{file.name} is a receipt of other weights than the model's, and is not shown.")
    return run


def _read_samples(path: Path) -> RunFolder | None:
    """Read the grid and the settings that vqgen-sample wrote; None if there are none."""
    picture = Png.read(path / GRID)
    if not picture or not (path / SAMPLES).is_file():
        return None
    samples = RunFolder(path, "samples", path.name, pictures={0: picture})
    with suppress(UserError):
        found = read_json(path / SAMPLES)
        if isinstance(found.get("settings", {}), dict) and isinstance(found.get("class_names") or [], list):
            samples.description = found
    return samples


def open_folder(path: Path) -> Found:
    """Read a run, or a folder with tokenizer/, codes/, prior/ and samples/ or some of them, as vqgen-demo makes.

    Raises `UsageError` if it is neither.
    """
    advice = "name the folder of a tokenizer run, a prior run or a demo"
    if not path.is_dir():
        raise UsageError(f"RUN: {path} {'is a file' if path.exists() else 'does not exist'}; {advice}")
    if (path / MANIFEST).is_file():
        raise UsageError(f"RUN: {path} holds code files; give them as --codes, and {advice}")
    kind, samples = _kind(path), _read_samples(path)
    if kind or samples:
        return Found([_read_run(path, kind)] if kind else [cast(RunFolder, samples)], [])
    parts = [path / name for name in ("tokenizer", "prior")]
    runs = [_read_run(part, kind) for part in parts if (kind := _kind(part))]
    if not runs:
        there = sorted(item.name for item in path.iterdir() if not item.name.startswith("."))
        held = ", ".join(there[:3]) + " …" * (len(there) > 3) or "nothing"
        raise UsageError(f"RUN: {path} is no run, it holds {held}; {advice}")
    samples = _read_samples(path / "samples")
    codes = path / "codes"
    return Found([*([samples] if samples else []), *runs], [codes] if (codes / MANIFEST).is_file() else [])


def assign_names(runs: list[RunFolder]) -> None:
    """Name each run by the shortest end of its path that no other run has."""
    parts = [run.path.resolve().parts for run in runs]
    for run, own in zip(runs, parts):
        lengths = range(1, len(own))
        count = next((n for n in lengths if sum(other[-n:] == own[-n:] for other in parts) == 1), 1)
        run.name = "/".join(own[-count:])
