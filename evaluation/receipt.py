"""Receipts: a figure with all that it takes to measure it again, and what differs when that is done."""

import math
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vqgen.devices import describe
from vqgen.errors import UserError
from vqgen.files import read_json, write_json

PACKAGES = ("torchvision", "transformers", "torchmetrics", "torch-fidelity", "lpips")
KIND = "vqgen receipt"


def environment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """What the figures were computed on and with; `precision` is fp32, bf16 or fp16."""
    found = describe(device, precision, processes)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def write_receipt(
    path: Path,
    program: str,
    options: Mapping[str, Any],
    fingerprints: Mapping[str, str | None],
    counts: Mapping[str, int],
    figures: Mapping[str, Any],
    where: Mapping[str, Any],
) -> None:
    """Write a receipt.

    Args:
        program: the subcommand of vqgen-eval.
        options: all of its options, as plain values.
        fingerprints: of models, weights and pixels.
        counts: images on either side.
        figures: names to numbers, also nested.
        where: what `environment` gives.
    """
    parts = {"options": options, "fingerprints": fingerprints, "counts": counts, "figures": figures}
    write_json(path, {"kind": KIND, "program": program, **{k: dict(v) for k, v in parts.items()}, "environment": where})


def read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt. Raises `UserError` where it is none."""
    found = read_json(path)
    parts = ("options", "fingerprints", "counts", "figures", "environment")
    whole = all(isinstance(found.get(part), dict) for part in parts) and isinstance(found.get("program"), str)
    if found.get("kind") != KIND or not whole:
        raise UserError(f"{path} is no receipt of vqgen-eval; name one that it wrote")
    return found


def flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names as one, with dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def without_classifier(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a receipt but for what a classifier said."""
    kept = {k: without_classifier(v) if isinstance(v, Mapping) else v for k, v in part.items()}
    return {k: v for k, v in kept.items() if k not in ("classifier", "classifier_accuracy", "samples of a class")}


def differences(former: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> list[str]:
    """What a figure's replay does not share with its receipt, in words: counts and fingerprints must be equal, figures
    within a relative `tolerance`."""
    found = []
    for part in ("fingerprints", "counts", "figures"):
        old, new = dict(flat(former[part])), dict(flat(now[part]))
        for key in [*old, *(key for key in new if key not in old)]:
            one, two = old.get(key), new.get(key)
            numbers = part == "figures" and all(isinstance(v, (int, float)) for v in (one, two))
            if numbers and math.isclose(one, two, rel_tol=tolerance, abs_tol=1e-9):  # type: ignore[arg-type]
                continue
            if one != two:
                shown = [str(v)[:12] if part == "fingerprints" else v for v in (one, two)]
                found.append(f"{part}.{key} {shown[0]}, now {shown[1]}")
    return found
