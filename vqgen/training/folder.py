"""The folder of a training run: what of it may be resumed, what --overwrite removes, and the record of its sessions."""

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from vqgen import config as configuration
from vqgen.config_layers import MARK
from vqgen.errors import UsageError, UserError
from vqgen.files import is_file, open_regular, read_json, read_record, write_json
from vqgen.files.output_folder import OutputFolder
from vqgen.options import option_name

# Options that do not change what a run computes, so that they may differ when it resumes. But --compile of a prior in
# bf16 on a CPU draws dropout in another order.
_OPERATIONAL = {"output", "overwrite", "workers", "cache_mb", "broken", "max_broken", "log_with", "log_every"}
_OPERATIONAL |= {"checkpoint_every", "keep_checkpoints", "steps", "minutes", "epochs", "patience", "compile"}
FINISHED = "finished.json"
MACHINE = "machine.json"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CHECKPOINT = r"step-[0-9]{8,}"
DAMAGED = r"damaged-[0-9]{8,}"
CHECKPOINT_FILE = r"(\w+\.safetensors|optimizers\.pt|state\.json)"
# In order of removal: without checkpoints nothing resumes, and until the model goes the run is finished.
_OWN = (
    rf"{CHECKPOINTS}/({CHECKPOINT}|{DAMAGED})/{CHECKPOINT_FILE}",
    FINISHED.replace(".", r"\."),
    r"(vqgen|config|machine|text_tokenizer|generation_config)\.json",
    r"model\.safetensors",
    r"tokenizer/(vqgen\.json|model\.safetensors)",
    r"metrics\.jsonl",
    r"images/step-[0-9]{8,}\.png",
    r"logs/vqgen/events\.out\.tfevents\..+",
    r"logs/vqgen/[0-9.]+/(events\.out\.tfevents\..+|hparams\.yml)",
)


def run_folder(folder: Path) -> OutputFolder:
    """The output folder of a run. Only the first line of config.yaml marks it: users have such files of their own."""
    return OutputFolder(folder, (CONFIG,), _OWN, is_mark=_is_marked)


def checkpoints(folder: Path, pattern: str = CHECKPOINT) -> list[Path]:
    """Checkpoints in a folder, oldest first, of two of one step that which is replaced: exact names of real folders."""
    found = [path for path in folder.glob("*-*") if re.fullmatch(pattern, path.name)]
    real = [path for path in found if path.is_dir() and not path.is_symlink()]
    return sorted(real, key=lambda path: (step_of(path), -len(path.name)))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("-")[2])


def has_trained(folder: Path) -> bool:
    """Whether a run folder has anything that training would go on from."""
    return bool(checkpoints(folder / CHECKPOINTS)) or (folder / "vqgen.json").exists()


def check_folder(folder: Path, config: Any, overwrite: bool) -> None:
    """Raise `UserError` where `folder` is another program's, its run has other options and is to be resumed, or the run
    is to start from the model that `overwrite` removes."""
    output = run_folder(folder)
    output.refuse_foreign()
    init: Path | None = getattr(config, "init", None)
    if overwrite and init is not None and Path(os.path.realpath(init)).is_relative_to(os.path.realpath(folder)):
        raise UsageError(f"--init: {init} is in {folder}, which --overwrite clears; choose another --output")
    if not output.recognised:
        return
    saved = folder / CONFIG
    try:
        before = configuration.read_saved(saved, type(config))
    except UsageError as error:
        raise UsageError(f"--output: {saved} is of another program ({error}); choose another folder") from error
    if overwrite or not has_trained(folder):
        return
    now, ignored = configuration.values_of(config), _OPERATIONAL | getattr(config, "unread", frozenset())
    # An option that a later version added did before what its default does now.
    defaults = {option.name: option.default for option in configuration.options(type(config), now)}
    for name, value in now.items():
        was = before.get(name, defaults[name])
        if isinstance(was, str) and isinstance(value, str):  # the query of a URL may be a token, which expires
            was, value = configuration.shown(was), configuration.shown(value)
        if name not in ignored and was != value:
            remedy = "give the same options to resume, --overwrite to start anew, or another --output"
            raise UserError(f"{folder} was started with {option_name(name)} {was}, now {value}: {remedy}")


def prepare_folder(folder: Path, config: Any, overwrite: bool) -> None:
    """Remove what is not to be resumed, and write the configuration of a run that begins."""
    output = run_folder(folder)
    if overwrite:
        output.clear(keep=[CONFIG])  # by which a removal that was killed is recognised
    else:
        output.remove_leftovers()
    if overwrite or not has_trained(folder):
        save_options(folder, config)


def save_options(folder: Path, config: Any) -> None:
    """Write the configuration of a run, with which it is resumed."""
    configuration.save(replace(config, overwrite=False), folder / CONFIG, MARK)


def _is_marked(saved: Path) -> bool:
    """Whether a config.yaml is one that a run wrote."""
    try:
        with open_regular(saved) as file:
            return file.read(len(MARK.encode())) == MARK.encode()
    except OSError:
        return False


@dataclass(frozen=True)
class Finished:
    """Content of `finished.json`."""

    steps: Annotated[int, Ge(0)] = 0
    stale: Annotated[int, Ge(0)] = 0
    """Validations without a better held-out loss at the end; --patience counts them."""


def finish(folder: Path, steps: int, stale: int) -> None:
    """Write `finished.json`: of `steps` steps, `stale` validations after the best."""
    write_json(folder / FINISHED, vars(Finished(steps, stale)))


def is_finished(folder: Path, steps: int, patience: int) -> bool:
    """Whether a folder holds a finished run, of at least `steps` steps or stopped early by `patience`, 0 for never."""
    if not (is_file(folder / FINISHED) and (folder / "vqgen.json").is_file()):
        return False
    ended = read_record(folder / FINISHED, Finished)
    return ended.steps >= steps or 0 < patience <= ended.stale


def completed(folder: Path, steps: int, patience: int, main: bool) -> bool:
    """`is_finished`; then the main process removes what a kill at the very end left in the folder."""
    done = is_finished(folder, steps, patience)
    if done and main:
        run_folder(folder).remove_leftovers()
    return done


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Sessions of a run folder, oldest first; none where `machine.json` is missing or damaged."""
    sessions = None
    with suppress(UserError):
        sessions = read_json(folder / MACHINE).get("sessions")
    return [each for each in sessions if isinstance(each, dict)] if isinstance(sessions, list) else []


class Session:
    """One entry of `machine.json`: from a start or resume of a run, after `first_step` steps, until it ends.

    `seconds` is the wall time up to the last checkpoint and `last_step` the steps done by then; the next session
    repeats the steps that a killed one did afterwards. A finished run that goes on is no longer finished. `about` is
    the machine and versions, see `devices.describe`.
    """

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        self.path, self.earlier, self.start = folder / MACHINE, read_sessions(folder), time.monotonic()
        began = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.entry = {"began": began, "first_step": first_step, "last_step": first_step, "seconds": 0.0, **about}
        (folder / FINISHED).unlink(missing_ok=True)
        self.saved(first_step)

    def saved(self, step: int) -> None:
        """Record that a checkpoint after `step` steps is on disk."""
        self.entry.update(last_step=step, seconds=round(time.monotonic() - self.start, 1))
        write_json(self.path, {"sessions": [*self.earlier, self.entry]})
