"""Which images a training run held out, by its config.yaml, so that measurements count no other image as held out."""

import glob
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqgen.config import read_saved, shown
from vqgen.errors import UsageError, UserError
from vqgen.training.folder import CONFIG

from .options import STREAM, is_stream
from .sources import find_splits


def saved_options(folder: Path, config: type) -> dict[str, Any] | None:
    """Option name -> value in the config.yaml of a folder of ours; None where none can be read."""
    with suppress(UserError):
        return read_saved(folder / CONFIG, config)
    return None


def reading_of(folder: Path, config: type) -> dict[str, Any] | None:
    """`saved_options` of a folder that was made of images; None where they do not say which and how many were held
    out."""
    found = saved_options(folder, config)
    return found if found and {"data", "holdout"} <= found.keys() else None


def is_same_data(data: str, recorded: str) -> bool:
    """Whether `data` is that of a run: by its real path, or by its name where the run's may be elsewhere: not on this
    machine, or relative to the folder that the run was started in."""
    if data == recorded:
        return True
    if "demo" in (data, recorded):  # the images of the package, not a folder of that name
        return False
    here, there = (os.path.expanduser(each) for each in (data, recorded))
    if os.path.exists(here) and os.path.realpath(here) == os.path.realpath(there):
        return True
    if os.path.exists(here) and os.path.exists(there) and os.path.isabs(there):
        return False
    return os.path.basename(os.path.realpath(here)) == os.path.basename(os.path.normpath(there))


def _is_of_stream(data: str, stream: str) -> bool:
    """Whether `data` is, holds or lies in the folder or file that a stream reads, see `is_same_data`."""
    pattern = shown(stream.removeprefix(STREAM))
    start = re.split(r"[*?\[{]", pattern)[0]
    start = start if start == pattern else os.path.dirname(start) or "."
    if is_same_data(data, start):
        return True
    if data == "demo" or "://" in start:
        return False
    here, there = (Path(os.path.realpath(os.path.expanduser(each))) for each in (data, start))
    files = re.sub(r"\{[^}]*\}", "*", os.path.expanduser(pattern))
    if not os.path.isabs(files) and not glob.glob(files, recursive=True):
        # The run was started in another folder: by name, as far as the pattern has one.
        name = os.path.basename(os.path.normpath(start))
        return name in {".", "..", *here.parts} or (here / name).exists()
    deep = (os.path.dirname(pattern) or ".") != start  # files of the stream may lie in folders below its start
    inside = here.is_relative_to(there) and (deep or here.is_file())
    return here.exists() and (inside or there.is_relative_to(here))


def check_held_out(data: str, holdout: float, run: Mapping[str, Any], splits: bool = True) -> str:
    """Raise `UsageError` where `holdout` of `data` would have images that a run with these options was trained on.

    `splits` says whether the command has --split. Returns what is to be said of other images than those of a stream.
    """
    recorded = str(run["data"])
    if is_stream(recorded):
        if "heldout" in (found := find_splits(data)):
            return ""
        if not _is_of_stream(data, recorded):
            return f"--data: {data} is taken for other images than those of {shown(recorded)}, which the run read"
        text = f"{data} has no validation split, and other images than its own count as held out in the stream"
        advice = "give data with a validation" + (" or a test split" if splits else " split")
        advice = "give --split test" if splits and "test" in found else advice
        raise UsageError(f"--data: {text} {shown(recorded)}, which the run read; {advice}")
    if holdout > run["holdout"] and is_same_data(data, recorded):
        text = f"found {holdout:g}, but the run held out {run['holdout']:g} of {recorded} and was trained on the others"
        raise UsageError(f"--holdout: {text}; leave it out, or give at most that")
    return ""
