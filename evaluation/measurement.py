"""What measuring images needs whatever is measured: counts that fit, features as they come, all processes' together."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from vqgen.errors import UsageError

from .classifier import Classifier
from .extractors import Extractor, extract

UNKNOWN = torch.tensor(-1, dtype=torch.int8)
"""Whether a classifier is right about an image that has no class."""


@dataclass
class Measured:
    """What goes into a receipt; the same in all processes."""

    fingerprints: dict[str, str | None]
    counts: dict[str, int]
    figures: dict[str, Any]
    environment: dict[str, Any]


def check_weights_are_used(extractor: str, weights: str | None) -> None:
    if extractor == "none" and weights:
        raise UsageError("--weights: found with --extractor none, which has none; name the extractor they are for")


def warn(text: str) -> None:
    """Print a line above any progress bar."""
    tqdm.write(text, file=sys.stderr)


def many(asked: int, there: int, option: str, what: str) -> int:
    """How many of `there` images are measured. Raises `UsageError` where fewer are there than asked for."""
    if asked > there:
        raise UsageError(f"{option}: found {asked}, but {what} holds {there}; ask for fewer")
    return asked or there


def everywhere(value: Any) -> list[Any]:
    """What each process has of something."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _in_order(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of several processes by their indices."""
    names = [name for name in parts[0] if all(name in part for part in parts)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in names}
    order = joined["index"].argsort()
    return {name: rows[order] for name, rows in joined.items()}


class Collected:
    """Features, logits and choices of images, as they come."""

    def __init__(self, extractor: Extractor | None, device: torch.device, classifier: Classifier | None = None) -> None:
        self.extractor, self.device, self.classifier = extractor, device, classifier
        self.rows: dict[str, list[Tensor]] = {"index": []}

    def add(self, indices: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        """Take in uint8 (B, C, H, W)."""
        found = {"index": indices}
        if self.extractor is not None:
            features, logits = extract(self.extractor, images, self.device)
            found["features"] = features
            if logits is not None:
                found["logits"] = logits
        if self.classifier is not None:
            assert labels is not None
            chosen = self.classifier.choose(images)
            found["right"] = torch.where(labels < 0, UNKNOWN, (chosen == labels).to(torch.int8))
        for name, rows in found.items():
            self.rows.setdefault(name, []).append(rows)

    def joined(self) -> dict[str, Tensor]:
        """Everything, of all processes, in order."""
        return _in_order([p for p in everywhere({k: torch.cat(v) for k, v in self.rows.items() if v}) if p])


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
