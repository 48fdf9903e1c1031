"""Receipts: a measurement with everything needed to repeat it, and its repetition."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqgen.config import build, options, values_of
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.tasks.options import (
    AccuracyConfig,
    InpaintingConfig,
    SettingsConfig,
    TextConfig,
    TranslationConfig,
    WindowsConfig,
)
from vqgen.files import read_json, write_json
from vqgen.option_types import checked
from vqgen.options import option_name
from vqgen.tokenizer.data.options import ImageConfig

from .options import LikelihoodConfig, ReconstructionConfig, ReplayConfig, SamplesConfig

if TYPE_CHECKING:
    import torch

    from .measurement import Measurement

MEASUREMENTS: dict[str, type] = {
    "reconstruction": ReconstructionConfig,
    "likelihood": LikelihoodConfig,
    "samples": SamplesConfig,
    "accuracy": AccuracyConfig,
    "inpainting": InpaintingConfig,
    "windows": WindowsConfig,
    "translation": TranslationConfig,
    "text": TextConfig,
    "settings": SettingsConfig,
}
"""Commands that write a receipt. Beside the module of their options, one of the same name has `measure_NAME` and the
registry `METRICS`."""
KIND = "vqgen receipt"
COMPARED = ("fingerprints", "counts", "metrics")  # by a replay


def environment(device: "torch.device", precision: str, processes: int) -> dict[str, Any]:
    """Hardware and versions behind a measurement; `precision` is Accelerate's name or ours."""
    from vqgen.devices import describe

    found = dict.fromkeys(("torchvision", "transformers", "torchmetrics", "torch-fidelity", "lpips", "timm"))
    for package in found:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return describe(device, precision, processes) | found


def write_receipt(path: Path, program: str, options: Mapping[str, Any], found: "Measurement") -> None:
    """Write a receipt of a command of vqgen-eval, with all of its options as plain values."""
    parts = {"kind": KIND, "program": program, "options": dict(options), **vars(found)}
    write_json(path, {name: value for name, value in parts.items() if name != "details" or value})


def read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt, also one of version 0.1, which called the metrics "figures". Raises `UserError`."""
    found = read_json(path)
    if "figures" in found:
        found["metrics"] = found.pop("figures")
    complete = all(isinstance(found.get(part), dict) for part in ("options", "environment", *COMPARED))
    complete = complete and all(type(count) is int for count in found["counts"].values())
    if found.get("kind") != KIND or not complete or not isinstance(found.get("program"), str):
        raise UserError(f"{path} is no receipt of vqgen-eval; name one that it wrote")
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries, their keys joined by dots."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def without_classifier(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a receipt without what the classifier contributed."""
    kept = {k: without_classifier(v) if isinstance(v, Mapping) else v for k, v in part.items()}
    return {k: v for k, v in kept.items() if k not in ("classifier", "classifier_accuracy", "samples of a class")}


def differences(former: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> list[str]:
    """Describe what differs: counts and fingerprints must be equal, metrics of `former` within a relative `tolerance`.

    Metrics and fingerprints that `former` lacks are no difference: a later version added them.
    """
    found = []
    for part in COMPARED:
        old, new = dict(flatten(former[part])), dict(flatten(now[part]))
        for key in dict.fromkeys([*old, *new]) if part == "counts" else old:
            one, two = old.get(key), new.get(key)
            same = one == two or one != one  # earlier versions wrote NaN for classes without images
            if part == "metrics" and isinstance(one, (int, float)) and isinstance(two, (int, float)):
                same = same or math.isclose(one, two, rel_tol=tolerance, abs_tol=1e-9)
            if not same:
                one, two = (str(v)[:12] if part == "fingerprints" else v for v in (one, two))
                found.append(f"{part}.{key} {one}, now {two}")
    return found


def replay_receipts(config: ReplayConfig) -> None:
    """Repeat every measurement, after all receipts are read.

    Raises one `UserError` that says what differs, in all receipts, and what could not be measured.
    """
    from vqgen.devices import processes

    read = [(path, *_read(path, config)) for path in config.receipts]
    different = list[str]()
    for path, former, values in read:
        try:
            different.append(_replay(path, former, values, config))
        except UserError as error:
            if processes().num_processes > 1:  # others may be in the midst of it
                raise
            different.append(f"{path}: {error}")
    processes().destroy_process_group()
    if any(different):
        raise UserError(" | ".join(filter(None, different)))


def _read(path: Path, config: ReplayConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A receipt, and the options of its repetition. Raises `UserError`."""
    former = read_receipt(path)
    if (program := former["program"]) not in MEASUREMENTS:
        raise UserError(f"{path} is of {program!r}, which this version of vqgen does not know")
    return former, _options(path, former, config)


def _replay(path: Path, former: dict[str, Any], values: dict[str, Any], config: ReplayConfig) -> str:
    """Describe what differs from a receipt; if nothing does, the main process prints that."""
    from vqgen.devices import rank_and_world

    from .measurement import measure

    program = former["program"]
    found = measure(program, build(MEASUREMENTS[program], values))
    now: dict[str, Any] = vars(found)
    if program == "likelihood" and values.get("split") != former["options"].get("split"):
        # The data fingerprint of code files covers all splits; that of the codes shows whether these are the same.
        former["fingerprints"]["data"] = now["fingerprints"]["data"]
    parts = (*COMPARED, "environment")
    if config.without_classifier:
        former, now = ({part: without_classifier(side[part]) for part in parts} for side in (former, now))
    machine = {key: (value, found.environment.get(key)) for key, value in former["environment"].items()}
    changed = [f"{key} {value}, now {new}" for key, (value, new) in machine.items() if new != value]
    elsewhere = f" (with {'; '.join(changed)})" if changed else ""
    if differs := differences(former, now, config.tolerance):
        return f"{path} does not come out the same: {'; '.join(differs)}{elsewhere}"
    if rank_and_world()[0] == 0:
        compared, measured = (dict(flatten(side["metrics"])) for side in (former, now))
        new = ", ".join(key for key in measured if key not in compared)
        added = f"; new, not in the receipt: {new}" if new else ""
        print(f"same: {len(compared)} metrics within {config.tolerance:g} of {path}{added}{elsewhere}", flush=True)
    return ""


def _options(path: Path, former: dict[str, Any], config: ReplayConfig) -> dict[str, Any]:
    """Option name -> value of the repetition: those of the receipt, and in their place those given now."""
    known = {option.name: option for option in options(MEASUREMENTS[former["program"]])}
    own = ("receipts", "tolerance", "without_classifier")
    given = {k: v for k, v in values_of(config).items() if v is not None and k not in own}
    for name in former["options"]:
        if name not in known:
            raise UserError(f"{path}: unknown option {name}; another version of vqgen wrote it")
    if config.without_classifier and former["program"] == "settings":
        text = f"{path} is of vqgen-eval settings, all of which depends on the classifier"
        raise UsageError(f"--without-classifier: {text}; leave it out")
    for name in given:
        if name not in known:
            raise UsageError(f"{option_name(name)}: a receipt of {former['program']} has no such option; leave it out")
    left_out = {"cache", "map", *(["classifier"] if config.without_classifier else [])}
    values = {name: value for name, value in former["options"].items() if name not in left_out} | given
    values = {name: checked(known[name].type, value, f"{path}: {name}") for name, value in values.items()}
    if "holdout" in known and values.get("holdout") is None:
        values["holdout"] = ImageConfig.holdout  # of that time
    if missing := next((name for name, o in known.items() if o.default is MISSING and name not in values), None):
        raise UserError(f"{path}: it has no option {missing}; measure again")
    of_0_1 = re.match(r"0\.[01](?!\d)|$", str(former["environment"].get("vqgen", ""))) is not None
    if "split" not in given and values.get("split") == "heldout" and of_0_1:
        values["split"] = _split_of_version_0_1(former, values)
    return values


def _split_of_version_0_1(former: dict[str, Any], values: dict[str, Any]) -> str:
    """The split that version 0.1 called heldout: test, if a source has train and test only."""
    from vqgen.tokenizer.codes.format import Manifest
    from vqgen.tokenizer.data.sources import find_splits

    if former["program"] == "likelihood":
        manifest = Manifest.read(values["codes"])
        unchanged = manifest.data_fingerprint == former["fingerprints"].get("data")
        return "test" if "test" in manifest.splits and not unchanged else "heldout"
    splits = find_splits(values["data"]) if values.get("data") else {}
    return "test" if "test" in splits and "heldout" not in splits else "heldout"
