"""Options that are given to the stages of vqgen-train, and what they name: checked before hours of training."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqgen.config import options, parse
from vqgen.config_layers import merged, read_arguments
from vqgen.errors import UsageError, UserError
from vqgen.files import is_file
from vqgen.options import option_name
from vqgen.tokenizer.data.options import ImageConfig

if TYPE_CHECKING:
    from .plan import Plan, Request

RESERVED = {"data", "output", "overwrite", "config", "size", "channels", "text-column", "perceptual-weights"}
RESERVED |= {"codes", "tokenizer", "model", "minutes", "threads", "verify"}
"""Options of the stages that vqgen-train sets, by its own options or by its folders."""
GIVEN = ("tokenizer", "codes", "prior", "samples")
"""Stages whose options can be given, by an option of the stage's name."""


def given_options(request: "Request", name: str) -> dict[str, Any]:
    """Option -> value of what is given to a stage. Raises `UsageError` for what is no option of it, and for values of
    another type."""
    from .stages import STAGES

    config = STAGES[name].config
    try:
        return merged(config, [read_arguments(config, getattr(request, name))[0]])
    except UsageError as error:
        raise UsageError(f"--{name}: {error}") from error


def holdout_of(request: "Request") -> float:
    """The share of the images that is held out where there is no validation split. Raises `UsageError`."""
    share = given_options(request, "tokenizer").get("holdout", ImageConfig.holdout)
    with explained("tokenizer"):
        return ImageConfig(holdout=share).holdout  # checks the range


def check_given_files(request: "Request") -> None:
    """Raise `UserError` where an image that --samples names is not there. A trial draws of made-up ones."""
    if not {"init_image", "source_image", "mask"} & given_options(request, "samples").keys():
        return
    from vqgen.sampling.init_images import given_files
    from vqgen.sampling.sample import SampleConfig

    with explained("samples"):
        for option, files in given_files(parse(SampleConfig, request.samples)).items():
            if missing := [path for path in files if not is_file(path)]:
                raise UserError(f"{option}: {missing[0]} is no file; name image files")


def check_pairs(request: "Request") -> None:
    """Raise `UserError` where images have no partner in the data that --codes names. A trial makes sources up."""
    given = given_options(request, "codes")
    if "source_data" not in given:
        return
    from vqgen.tokenizer.codes.pairs import pair
    from vqgen.tokenizer.data.options import Split
    from vqgen.tokenizer.data.sources import Source, open_source
    from vqgen.tokenizer.encode import TokenizeConfig

    with explained("codes"):
        train = open_source(request.data, "train", holdout_of(request))
        splits: list[Split] = ["heldout", *(["test"] if train.test_images else [])]
        sources: dict[Split, Source] = {"train": train}
        sources |= {split: open_source(request.data, split, holdout_of(request)) for split in splits}
        by, unpaired = (given.get(name, getattr(TokenizeConfig, name)) for name in ("pair_by", "unpaired"))
        pair(sources, str(given["source_data"]), by, unpaired, ImageConfig())


def check_stages(plan: "Plan", folder: Path) -> None:
    """Raise `UsageError` where a configuration of the plan in `folder`, with what is given, is none of its stage."""
    from .stages import STAGES, words_of

    for name in plan.stages:
        with explained(name):
            STAGES[name].parsed(words_of(plan, folder, name))


@contextmanager
def explained(name: str, output: Path | None = None) -> Iterator[None]:
    """Add to an error about an option of a stage how it is set here; of one that runs in `output`, whose options cannot
    be changed before what it has written is removed."""
    from .stages import STAGES

    try:
        yield
    except UserError as error:
        known = {option_name(option.name).removeprefix("--") for option in options(STAGES[name].config)} - RESERVED
        option = next((key for key in re.findall(r"--([a-z][a-z0-9-]*)", str(error)) if key in known), None)
        if name not in GIVEN or option is None:
            raise
        removed = f"remove {output / name}, then " if output and (output / name).exists() else ""
        raise type(error)(f"{error} (in vqgen-train: {removed}--{name} {option}=...)") from error
