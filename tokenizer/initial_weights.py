"""--init: what a run takes from another tokenizer, compared before anything in its folder changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen.config import values_of
from vqgen.errors import UserError
from vqgen.options import option_name

from .model import Tokenizer
from .options import TokenizerConfig


@dataclass(frozen=True)
class InitialWeights:
    """The tensors that a run begins with, by their names in the tokenizer's state dict."""

    tensors: dict[str, Tensor]
    with_quantizer: bool
    """Whether the quantizer's are among them; else the run initializes its own."""
    notes: list[str]
    """What the user is told of it, one line each."""


def initial_weights(folder: Path, config: TokenizerConfig, decoder_only: bool) -> InitialWeights:
    """Load the tokenizer in `folder` and compare it with the one that a run of `config` trains.

    Raises `UserError` where it has another network or other sizes of one; with `decoder_only` also where an option that
    decides codes differs.
    """
    other = Tokenizer.load(folder)
    theirs, ours = other.config.codes_options(), config.codes_options()
    if decoder_only and (different := _differing(theirs, ours)):
        name, *found = different[0]
        text = f"{folder} has {found[0]}, this run has {found[1]}, with which images have other codes"
        raise UserError(f"--decoder-only: {text}; use the same {option_name(name)}")
    if theirs["network"] != ours["network"]:
        kinds = f"has --network {theirs['network']}, this run has --network {ours['network']}"
        raise UserError(f"--init: {folder} {kinds}; use the same")
    with torch.device("meta"):
        own = Tokenizer(config).inference_state()
    given = other.inference_state()
    others = [key for key in sorted({**own, **given}) if _shape(own, key) != _shape(given, key)]
    for key in others:
        if not _is_of_quantizer(key):
            shapes = [_shape(of, key) or "no such tensor" for of in (given, own)]
            raise UserError(f"--init: {folder} has {key} as {shapes[0]}, this run has {shapes[1]}; use its sizes")
    unused, notes = {"size", "fit"}, list[str]()  # of the images, not of a function of them
    if others:
        given = {key: value for key, value in given.items() if not _is_of_quantizer(key)}
        unused |= {"quantizer", *values_of(config.quantizer)}
        notes.append(f"--init: the quantizer of {folder} has other sizes; this run initializes its own")
    if different := [each for each in _differing(theirs, ours) if each[0] not in unused]:
        _, before, now = (" ".join(words) for words in zip(*different))
        notes.append(f"--init: {folder} has {before}, this run has {now}: its weights compute another function here")
    return InitialWeights(given, not others, notes)


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _is_of_quantizer(key: str) -> bool:
    return key.startswith("quantizer.")


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Names of options that both have with different values, each with the words of both command lines."""
    both = [name for name in theirs if name in ours and theirs[name] != ours[name]]
    return [(name, _words(name, theirs[name]), _words(name, ours[name])) for name in both]


def _words(name: str, value: Any) -> str:
    """An option as a command line gives it."""
    if isinstance(value, bool):
        return option_name(name if value else f"no_{name}")
    return " ".join([option_name(name), *map(str, value if isinstance(value, list) else [value])])
