"""A run folder: whose it is, what of it may be resumed, and what --overwrite removes."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vqgen.training.checkpoint import checkpoints
from vqgen.training.sessions import MACHINE

from . import config as configuration
from .errors import UsageError, UserError

# Options that do not change what a run computes, so that they may differ when it resumes.
_OPERATIONAL = {"output", "overwrite", "workers", "cache_mb", "broken", "max_broken", "log_with", "log_every"}
_OPERATIONAL |= {"checkpoint_every", "keep_checkpoints", "steps", "patience"}
FINISHED = "finished.json"
# What a run writes, and all that --overwrite removes; config.yaml comes last, by it the folder is known as a run's.
_OWN = ("checkpoints/step-*", "images/step-*.png", "logs/vqgen", "tokenizer/vqgen.json", "tokenizer/model.safetensors")
_OWN += (FINISHED, MACHINE, "metrics.jsonl", "config.json", "vqgen.json", "model.safetensors", "config.yaml")
_FOLDERS = ("checkpoints", "images", "logs", "tokenizer")
# A config.yaml of somebody's own may lie beside images of somebody's own: only this line makes a folder a run's.
_MARK = "# Written by vqgen: the resolved configuration of the run in this folder.\n"


def check_folder(folder: Path, config: Any, overwrite: bool) -> None:
    """See that `folder` is new, or that what it holds is the run of `config` or may be overwritten.

    Raises `UserError` where it is another program's or was begun with options that compute something else.
    """
    saved = folder / "config.yaml"
    if not _marked(saved):
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"--output: {folder} holds files of something else; choose another folder")
        return
    try:
        before = configuration.read_saved(saved, type(config))
    except UsageError as error:
        raise UserError(f"--output: {saved} is of another program ({error}); choose another folder") from error
    begun = checkpoints(folder / "checkpoints") or (folder / "vqgen.json").exists()
    if not begun or overwrite:
        return
    # An option that came with a later version did then what its default does now.
    defaults = {option.name: option.default for option in configuration.options(type(config))}
    for name, value in configuration.values_of(config).items():
        was = before.get(name, defaults.get(name))
        if name not in _OPERATIONAL and was != value:
            raise UserError(
                f"{folder} was started with --{name.replace('_', '-')} {was}, now {value}: "
                "give the same options to resume, --overwrite to start anew, or another --output"
            )


def take_folder(folder: Path, config: Any, overwrite: bool) -> None:
    """Clear `folder` of what is not to be resumed, and write the configuration."""
    if overwrite:
        remove(path for pattern in _OWN for path in folder.glob(pattern))
        for name in _FOLDERS:
            with suppress(OSError):  # not there, or not empty: then something else is in it
                (folder / name).rmdir()
    # A kill while a file was being written leaves its temporary.
    patterns = (f"{where}.*.{kind}" for where in ("", "checkpoints/", "images/") for kind in ("part", "old.*"))
    remove(path for pattern in patterns for path in folder.glob(pattern))
    configuration.save(config, folder / "config.yaml", _MARK)


def _marked(saved: Path) -> bool:
    """Whether a config.yaml is one that a run wrote."""
    try:
        return saved.read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def remove(paths: Iterable[Path]) -> None:
    """Remove files and folders that may be there. Raises `UserError` naming the first that cannot be removed."""
    for path in paths:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}") from error
