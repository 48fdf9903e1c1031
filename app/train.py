"""vqgen-train: the whole path from a data set to new images in a given time, planned from the data and the machine.

`planner.py` chooses, `stages.py` has what is run; here are the options, and which stage runs when with what.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from vqgen.config import command
from vqgen.errors import UsageError, UserError
from vqgen.files import locked, read_text, write_text
from vqgen.options import Options, Range, option_name
from vqgen.tokenizer.data.options import ImageConfig, check_outside

from .given import (
    GIVEN,
    RESERVED,
    check_given_files,
    check_pairs,
    check_stages,
    explained,
    given_options,
    holdout_of,
)

if TYPE_CHECKING:
    from .plan import Plan, Request


@dataclass
class TrainConfig(Options):
    """Options of vqgen-train."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "data", "output", "minutes", "plan", "overwrite", "size", "flip", "text_column", "perceptual_weights",
    )  # fmt: skip

    data: str
    """Images: demo, a folder, parquet files, a save_to_disk folder, or a name that `datasets` knows."""
    output: Path = Path("runs/train")
    """Folder for plan/, tokenizer/, codes/, prior/, samples/ and report.html. An interrupted run is continued."""
    minutes: Annotated[float, Range(above=0, most=1e6)] = 60.0
    """Time for all of it. A run that is given more trains its prior for longer, unless that has stopped early; without
    the option a run that has begun keeps its time."""
    plan: bool = False
    """Only make the plan, print it with the command line of each stage, and save it in --output. That of a run that
    has begun is not saved."""
    overwrite: bool = False
    """Remove an earlier run in --output and start anew; to continue it, leave it out."""
    size: list[Annotated[int, Range(least=8, most=2**14)]] | None = None
    """Height and width in pixels; by default 32, 64, 128 or 256, from the images and the time."""
    channels: Annotated[int, Range(least=1, most=3)] | None = None
    """3 for colour, 1 for grey; by default what the images have."""
    flip: bool = True
    """Mirror half of the training images left to right; --no-flip for digits, letters and the like."""
    text_column: str | None = None
    """Captions that the prior learns to follow, as in vqgen-tokenize."""
    perceptual_weights: str | None = None
    """Weights of VGG16, which turn on LPIPS and a discriminator and make pictures sharper: a file, or torchvision,
    which downloads them."""
    tokenizer: list[str] = field(default_factory=list, metadata={"placeholder": "NAME=VALUE"})
    """Options of vqgen-train-tokenizer that replace what is planned: codebook-size=2048 multipliers=1,2."""
    codes: list[str] = field(default_factory=list, metadata={"placeholder": "NAME=VALUE"})
    """Options of vqgen-tokenize: views=4."""
    prior: list[str] = field(default_factory=list, metadata={"placeholder": "NAME=VALUE"})
    """Options of vqgen-train-prior: dim=512 patience=0."""
    samples: list[str] = field(default_factory=list, metadata={"placeholder": "NAME=VALUE"})
    """Options of vqgen-sample: n=100 guidance-scale=3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            self.size = self.size * 2 if len(self.size) == 1 else self.size
            if len(self.size) != 2:
                raise UsageError(f"--size: found {' '.join(map(str, self.size))}, expected height and width")
        if self.channels == 2:
            raise UsageError("--channels: found 2, expected 1 or 3")
        for name in GIVEN:
            for word in getattr(self, name):
                key = word.partition("=")[0].replace("_", "-").removeprefix("no-")
                if not re.fullmatch("[a-z][a-z0-9-]*", key):
                    raise UsageError(f"--{name}: found {word}, expected NAME=VALUE with an option of that stage")
                if key in RESERVED:
                    raise UsageError(f"--{name}: {word}: vqgen-train sets this option itself; leave it out")

    def request(self) -> "Request":
        """What the plan depends on."""
        from .plan import Request

        words = {n: [f"--{word}" for word in getattr(self, n)] for n in GIVEN}
        weights = self.perceptual_weights
        data = str(Path(self.data)) if os.path.exists(self.data) else self.data
        data = "./demo" if data == "demo" != self.data else data  # demo is the images of the package
        return Request(data, self.size, self.channels, self.flip, self.text_column, weights, **words)


def check_places(config: TrainConfig) -> None:
    """Raise `UsageError` where the output would replace other files, or become data."""
    from vqgen.evaluation.report.program import check_output as check_page

    from .plan import check_output
    from .stages import check_folders

    check_output(config.output)
    check_page(config.output / "report.html")
    check_folders(config.output)
    check_outside(config.output, Path(os.path.expanduser(config.data)))


def made_or_found(config: TrainConfig) -> "Plan":
    """The plan of the folder, made where there is none. Raises `UsageError` where it is another request's."""
    from .plan import refuse_edited, saved_plan
    from .stages import STAGES

    output, request = config.output, config.request()
    given = {name: given_options(request, name) for name in GIVEN}
    found = None if config.overwrite else saved_plan(output)
    there = [name for name in STAGES if (output / name).exists()]
    begun = [name for name in there if not found or name not in found.replaced]  # others wait to be removed
    same = found is not None and (bool(there) or found.request == request)
    if found and same and config.stated is not None and "minutes" not in config.stated:
        config.minutes = found.minutes
    if both := [name for name in ("tokenizer", "prior") if {"steps", "epochs"} <= given[name].keys()]:
        raise UsageError(f"--{both[0]}: found steps and epochs; give one of them")
    ours, theirs = (given[name].get("holdout", ImageConfig.holdout) for name in ("tokenizer", "codes"))
    if ours != theirs and (config.overwrite or "codes" not in begun):
        text = f"found holdout={theirs:g}, --tokenizer has {ours:g}: held-out images would be trained on"
        raise UsageError(f"--codes: {text}; give both the same")
    drawn = (output / "samples" / "samples.json").exists()
    if config.overwrite or not drawn or (found and found.minutes != config.minutes):  # then they are drawn again
        check_given_files(request)
    if config.overwrite or "codes" not in begun:
        check_pairs(request)
    if found and there:
        return continued(found, request, config, begun)
    if found and (found.request, found.minutes) == (request, config.minutes):
        check_stages(found, output)  # its files may have been edited
        return found
    if found:
        refuse_edited(found, output)
    return new_plan(request, config, there if config.overwrite else [])


def continued(found: "Plan", request: "Request", config: TrainConfig, begun: Sequence[str]) -> "Plan":
    """The plan of a run that has begun, with more time or other options of later stages; saved, but for --plan.

    Raises `UsageError`.
    """
    from .stages import length_set

    later = {name: getattr(request, name) for name in GIVEN if name not in begun}
    if not (config.output / "samples" / "samples.json").exists():
        later["samples"] = request.samples
    plan = replace(found, request=replace(found.request, **later))
    before, now = asdict(plan.request), asdict(request)
    if name := next((key for key in now if now[key] != before[key]), None):
        values = (" ".join(map(str, v)) if isinstance(v, list) else v for v in (now[name], before[name]))
        this, that = ("nothing" if value in (None, "") else value for value in values)
        what = f"found {this}, the run in {config.output} has {that}"
        removed = f"remove {config.output / name} and what was made after it, " if name in GIVEN else ""
        raise UsageError(f"{option_name(name)}: {what}; use the same, another --output, {removed}or --overwrite")
    if config.minutes < found.minutes:
        what = f"found {config.minutes:g}, the run in {config.output} has {found.minutes:g}"
        raise UsageError(f"--minutes: {what}, and it can only be lengthened; give as many or more")
    if config.minutes > found.minutes and (setter := length_set(plan, config.output, "prior")):
        text = f"found {config.minutes:g}, but {setter} sets the prior's length, so that more time trains nothing more"
        raise UsageError(f"--minutes: {text}; give {found.minutes:g} as before")
    if plan.request == found.request:
        check_stages(plan, config.output)  # its files may have been edited
    else:
        plan = adapted(plan, config, begun)
    if config.minutes > plan.minutes:
        plan = plan.lengthened(config.minutes)
    if not config.plan:
        plan.save(config.output)
    return plan


def adapted(plan: "Plan", config: TrainConfig, begun: Sequence[str]) -> "Plan":
    """The plan of a run that has begun with what follows from its request, which has changed; its files are written,
    but for --plan, where all stages can read them. Raises `UsageError`."""
    from .configurations import Configurations
    from .machine import machine
    from .plan import FOLDER, file_of
    from .survey import look

    survey, before = look(config.data, config.text_column, holdout_of(plan.request)), plan.written
    with tempfile.TemporaryDirectory(prefix="vqgen-plan-") as name:
        made = Path(name)
        shutil.copytree(config.output / FOLDER, made / FOLDER)
        try:
            plan = Configurations(plan.request, survey, machine(), made).adapted(plan, begun)
            check_stages(plan, made)
        except UserError as error:
            raise type(error)(str(error).replace(str(made), str(config.output))) from error
        for stage in plan.written:
            if not config.plan and plan.written[stage] != before[stage]:
                write_text(file_of(config.output, stage), read_text(file_of(made, stage)))
    return plan


def new_plan(request: "Request", config: TrainConfig, replaced: list[str]) -> "Plan":
    """Make a plan, after which the stages `replaced` of an earlier run are removed. Raises `UserError`, and then an
    earlier plan is left as it was; so is that of a run that has begun with --plan."""
    from .machine import machine
    from .plan import Plan, written
    from .planner import Planner
    from .stages import planned_lengths
    from .survey import look

    began = time.perf_counter()
    print("planning: the images are looked at, and some steps of each training are timed", file=sys.stderr)
    survey = look(config.data, config.text_column, holdout_of(request))
    most = ImageConfig.max_broken
    every = survey.train + survey.heldout + survey.test  # as --max-broken counts them
    allowed = "max_broken" in given_options(request, "tokenizer")
    if survey.unreadable * survey.train > most * every and not allowed:
        share = f"{survey.unreadable:.1%} of the images that were looked at cannot be read, at most {most:.0%} may"
        raise UserError(f"--data: {share}; remove them, or set --tokenizer max-broken=…")
    with tempfile.TemporaryDirectory(prefix="vqgen-plan-") as name:
        made = Path(name)
        rows, expected = Planner(request, survey, machine(), began + 60 * config.minutes, made).plan()
        spent = {"plan": time.perf_counter() - began}
        plan = Plan(request, config.minutes, None, rows, expected, spent, replaced, written(made))
        plan = replace(plan, lengths=planned_lengths(made))
        check_stages(plan, made)
        if config.plan and replaced:
            told = f"not saved, as a run in {config.output} has begun; without --plan it is replaced by this"
            print(told, file=sys.stderr)
        else:
            plan.install(made, config.output)
    return plan


@contextmanager
def recorded(plan: "Plan", output: Path, name: str) -> Iterator[None]:
    """Record the time of a stage, also where it is interrupted, and that it has removed what was there before."""
    began = time.perf_counter()
    if name in plan.replaced:
        plan.removing[name] = time.time()
        plan.save(output)  # by which a run that is killed here is told from the one that it replaces
    try:
        yield
    finally:
        plan.spent[name] = plan.spent.get(name, 0.0) + time.perf_counter() - began
        plan.forget_removed(output, name)
        plan.save(output)


def train(config: TrainConfig) -> None:
    """Plan and train a tokenizer and a prior on images within a time, then draw new images and write a report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("accelerate: vqgen-train is one process; launch the command lines that --plan prints")
    from .show import outcome, text_of
    from .stages import STAGES, outdated, times_of, words_of, write_page

    output = config.output
    check_places(config)
    with locked(output):
        plan = made_or_found(config)
        shown = [] if config.plan and config.overwrite and plan.replaced else plan.stages  # no files of one not saved
        print(text_of(plan, {name: words_of(plan, output, name) for name in shown}), flush=True)
        if config.plan:
            return
        for number, name in enumerate(plan.stages, 1):
            if name == "prior" and plan.prior_minutes is None:
                plan = plan.settled(times_of(output))
                plan.save(output)  # a killed run keeps its steps
            plan.forget_removed(output, name)
            remove = name in plan.replaced or (name == "samples" and outdated(output / name, output / "prior"))
            with recorded(plan, output, name), explained(name, output):
                STAGES[name](words_of(plan, output, name, remove), f"{number}/{len(plan.stages)}")
        page = write_page(output)
    print(f"\n{outcome(plan)}\nLook at {output / 'samples' / 'grid.png'}, and at all of it in {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-train", TrainConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
