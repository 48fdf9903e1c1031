"""Result of a measurement, and what every measurement needs: fingerprints of images, and work shared by processes."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vqgen.devices import find_device, gather_objects, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import is_file, read_json
from vqgen.metric import Metric
from vqgen.prior.model import Prior
from vqgen.prior.train import PriorTraining
from vqgen.sampling.generator import SHIPPED, find_model
from vqgen.sampling.output import FINISHED
from vqgen.tokenizer.data.holdout import check_held_out, reading_of, saved_options
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.train import TokenizerTraining

from .receipt import MEASUREMENTS


@dataclass
class Measurement:
    """Contents of a receipt; the same in all processes."""

    fingerprints: dict[str, str | None]
    counts: dict[str, int]
    metrics: dict[str, Any]
    """Name -> number, or a dictionary of the same kind."""
    environment: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    """JSON values for people and reports, which a replay does not compare."""


def measure(program: str, config: Any) -> Measurement:
    """Run the measurement of a command of `MEASUREMENTS`, without printing or writing. Raises `UserError`."""
    return getattr(_module_of(program), f"measure_{program}")(config)


def _module_of(program: str) -> ModuleType:
    package = MEASUREMENTS[program].__module__.rpartition(".")[0]
    return import_module(f"{package}.{program}")


def metrics_of(program: str) -> Mapping[str, Metric]:
    """Metrics that a measurement may report, by name."""
    return _module_of(program).METRICS


def label_of(program: str, name: str) -> tuple[str, str]:
    """Title and unit of a flattened name in a receipt, e.g. `psnr`, `nats_by_class.boot` or `at.1000.fid`."""
    head, _, rest = name.partition(".")
    if head == "at" and "." in rest:
        count, _, rest = rest.partition(".")
        title, unit = label_of(program, rest)
        return f"{title}, first {count} samples", unit
    metric = metrics_of(program).get(head, Metric(head, head))
    return f"{metric.title}, {rest}" if rest else metric.title, metric.unit


def warn(text: str) -> None:
    """Print a line to stderr, above any progress bar."""
    tqdm.write(text, file=sys.stderr)


def check_count(requested: int, available: int, option: str, source: str) -> int:
    """Number of images to measure; 0 requests all. Raises `UsageError` if fewer are available."""
    if requested > available:
        raise UsageError(f"{option}: found {requested}, but {source} holds {available}; ask for fewer")
    return requested or available


def check_classes(prior: Prior, names: Sequence[str] | None, unconditional: bool, source: str) -> None:
    """Raise `UserError` where the classes of `source` are not the prior's, unless it is measured without, and
    `UsageError` where it was never trained without."""
    classes = prior.conditioning.classes
    ours = classes.names or []
    if classes.count and list(names or []) != ours and not unconditional:
        found = f"{source} has the classes {', '.join(names or []) or 'none'}, the prior has {', '.join(ours)}"
        raise UserError(f"{found}; give images of its classes, or --unconditional")
    if unconditional and classes.informative and not classes.guidable:
        text = f"the prior was trained with {classes.dropout_option} 0, always with its class"
        raise UsageError(f"--unconditional: {text}; leave it out")
    if unconditional and any(part.informative for part in prior.conditioning.plain.parts):
        prior.conditioning.check_absence("--unconditional:")


def held_out(config: Any) -> float:
    """Share of the images that is held out: as given, by default as in the run that is measured, else as usual."""
    if config.holdout is not None:
        return config.holdout
    found = _of_run(config)
    return found["holdout"] if found else ImageConfig.holdout


def reading(config: Any, size: Sequence[int], channels: int, fit: Any) -> ImageConfig:
    """How the images of a measurement are read, each once, at the size, the channels and with the fit of a model."""
    found = ImageConfig(list(size), channels, fit, holdout=held_out(config), cache_mb=0)
    found.max_broken, found.workers = config.max_broken, config.workers
    return found


def settle_holdout(config: Any) -> str:
    """Set the share of images held out where none is given, so that a receipt has it; return what is to be said of it.

    Raises `UsageError` where images that the run was trained on would count as held out, see `check_held_out`.
    """
    if not hasattr(config, "holdout"):
        return ""
    given, found = config.holdout, _of_run(config)
    config.holdout = held_out(config)
    judged = getattr(config, "split", "heldout") == "heldout"
    if found and judged:
        return check_held_out(config.data, config.holdout, found, splits=hasattr(config, "split"))
    if found or given is not None or not judged:
        return ""
    return f"--holdout {config.holdout:g} of images without a validation split, as no run of the model records another"


def _of_run(config: Any) -> dict[str, Any] | None:
    """Options by which the run that is measured, or whose samples are, read its images; None where they are unknown.

    For a prior these are the options of its codes.
    """
    model, samples = getattr(config, "model", None), getattr(config, "samples", None)
    if model is None and samples is not None and is_file(samples / FINISHED):
        model = read_json(samples / FINISHED).get("model")
    if model is None:
        tokenizer = getattr(config, "tokenizer", None)
        return tokenizer and reading_of(tokenizer, TokenizerTraining)
    folder = find_model(Path(str(model)))
    if not (prior := saved_options(folder, PriorTraining)) or "codes" not in prior:
        return None
    codes = Path(prior["codes"])
    return reading_of(codes, TokenizeConfig) or reading_of(folder.parent / codes.name, TokenizeConfig)


def is_shipped(folder: Path) -> bool:
    """Whether a folder is that of a model in the package, or in one."""
    return any(folder.resolve().is_relative_to(each.resolve()) for each in SHIPPED.values())


def start_processes(name: str) -> torch.device:
    """Join the other processes, if a launcher started several; return the device of this one, by option --device."""
    device = find_device(name)
    state = processes(cpu=device.type == "cpu")
    return torch.device(state.device or device) if state.num_processes > 1 else device


@dataclass
class SetHash:
    """Fingerprint of a set whatever the order of its members: the sum of their sha256 hashes."""

    total: int = 0
    count: int = 0

    def add_images(self, images: Tensor, labels: Tensor) -> None:
        """Add the pixels of uint8 images (B, C, H, W), or token ids (B, N), each with its label (B,), -1 for none."""
        head = " ".join(map(str, images.shape[1:])).encode()
        for image, label in zip(images.cpu().contiguous().numpy(), labels.tolist(), strict=True):
            self.add(head + b" %d\n" % label + image.tobytes())

    def add(self, content: bytes) -> None:
        """Add one member."""
        digest = hashlib.sha256(content).digest()
        self.total = (self.total + int.from_bytes(digest, "big")) % 2**256
        self.count += 1

    def over_processes(self) -> "SetHash":
        """The fingerprint of the sets of all processes together."""
        parts = gather_objects(self)
        return SetHash(sum(part.total for part in parts) % 2**256, sum(part.count for part in parts))

    def hexdigest(self) -> str:
        return hashlib.sha256(b"%d %064x" % (self.count, self.total)).hexdigest()
