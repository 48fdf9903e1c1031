"""Which images a training run held out, by its config.yaml, so that measurements count no other image as held out."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqgen.config import read_saved, shown
from vqgen.errors import UsageError, UserError
from vqgen.training.folder import CONFIG

from .options import is_stream
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
    """Whether `data` is that of a run: by its real path, or by its name where the run's is not on this machine."""
    if data == recorded:
        return True
    if "demo" in (data, recorded):  # the images of the package, not a folder of that name
        return False
    here, there = (os.path.expanduser(each) for each in (data, recorded))
    if os.path.exists(here) and os.path.exists(there):
        return os.path.realpath(here) == os.path.realpath(there)
    return os.path.basename(os.path.realpath(here)) == os.path.basename(os.path.normpath(there))


def check_held_out(data: str, holdout: float, run: Mapping[str, Any]) -> None:
    """Raise `UsageError` where `holdout` of `data` would have images that a run with these options was trained on."""
    recorded = str(run["data"])
    if is_stream(recorded):
        if "heldout" not in find_splits(data):
            found = f"{data} has no validation split, and other images than its own count as held out in"
            advice = "give data with a validation or a test split"
            raise UsageError(f"--data: {found} the stream {shown(recorded)}, which the run read; {advice}")
    elif holdout > run["holdout"] and is_same_data(data, recorded):
        text = f"found {holdout:g}, but the run held out {run['holdout']:g} of {recorded} and was trained on the others"
        raise UsageError(f"--holdout: {text}; leave it out, or give at most that")
