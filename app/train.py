"""vqgen-train: the whole path from a data set to new images in a given time, planned from the data and the machine.

`plan.py` chooses, `stages.py` has what is run; here are the options, and which stage runs when with what.
"""

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from vqgen.config import command
from vqgen.config_layers import read_arguments
from vqgen.errors import UsageError
from vqgen.files import locked
from vqgen.options import Options, Range, option_name

if TYPE_CHECKING:
    from .plan import Plan, Request

RESERVED = {"data", "output", "overwrite", "config", "size", "channels", "text-column", "perceptual-weights"}
RESERVED |= {"codes", "tokenizer", "model", "minutes"}
"""Options of the stages that vqgen-train sets, by its own options or by its folders."""


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
    """Time for all of it. A finished run that is given more of it trains its prior further."""
    plan: bool = False
    """Only make the plan, print it with the command line of each stage, and save it in --output."""
    overwrite: bool = False
    """Remove an earlier run in --output and start anew; to continue it, leave it out."""
    size: list[Annotated[int, Range(least=8, most=2**14)]] | None = None
    """Height and width in pixels; by default 32, 64, 128 or 256, from the images and the time."""
    channels: Annotated[int, Range(least=1, most=3)] | None = None
    """3 for colour, 1 for grey; by default what the images have."""
    flip: bool = True
    """Mirror half of the training images left to right; --no-flip for digits, letters and the like."""
    text_column: str | None = None
    """Captions to draw from, as in vqgen-tokenize."""
    perceptual_weights: str | None = None
    """Weights of VGG16 for LPIPS and a discriminator, which make pictures sharper: a file, or torchvision, which
    downloads them."""
    tokenizer: list[str] = field(default_factory=list)
    """Options of vqgen-train-tokenizer that replace what is planned: codebook-size=2048 no-attention."""
    codes: list[str] = field(default_factory=list)
    """Options of vqgen-tokenize: views=4."""
    prior: list[str] = field(default_factory=list)
    """Options of vqgen-train-prior: dim=512 patience=0."""
    samples: list[str] = field(default_factory=list)
    """Options of vqgen-sample: n=100 guidance-scale=3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            self.size = self.size * 2 if len(self.size) == 1 else self.size
            if len(self.size) != 2:
                raise UsageError(f"--size: found {' '.join(map(str, self.size))}, expected height and width")
        if self.channels == 2:
            raise UsageError("--channels: found 2, expected 1 or 3")
        for name in ("tokenizer", "codes", "prior", "samples"):
            for word in getattr(self, name):
                key = word.partition("=")[0].replace("_", "-")
                if not re.fullmatch("[a-z][a-z0-9-]*", key):
                    raise UsageError(f"--{name}: found {word}, expected NAME=VALUE with an option of that stage")
                if key in RESERVED:
                    raise UsageError(f"--{name}: {word}: vqgen-train sets this option itself; leave it out")

    def request(self) -> "Request":
        """What the plan depends on."""
        from .plan import Request

        words = {n: [f"--{word}" for word in getattr(self, n)] for n in ("tokenizer", "codes", "prior", "samples")}
        weights = self.perceptual_weights
        return Request(self.data, self.size, self.channels, self.flip, self.text_column, weights, **words)


def words_of(plan: "Plan", output: Path, name: str, overwrite: bool = False) -> list[str]:
    """The command line of a stage, without its program."""
    from .plan import file_of
    from .stages import folders

    given: list[str] = getattr(plan.request, name)
    words = ["--config", str(file_of(output, name)), *folders(output, name, overwrite)]
    budget = {"tokenizer": plan.tokenizer_minutes, "prior": plan.prior_minutes or plan.planned_prior_minutes}
    own = {"--steps", "--epochs"} & {word.partition("=")[0] for word in given}
    if name in budget and not own:
        words += ["--minutes", f"{budget[name]:.4g}"]
    return [*words, *given]


def check_words(config: type, name: str, words: Sequence[str]) -> None:
    """Raise `UsageError` where words given to a stage are none of its options."""
    try:
        read_arguments(config, words)
    except UsageError as error:
        raise UsageError(f"--{name}: {error}") from error


def made_or_found(config: TrainConfig) -> "Plan":
    """The plan of the folder, made where there is none. Raises `UsageError` where it is another request's."""
    from .plan import FOLDER, RECORD, Plan, saved_plan
    from .stages import STAGES

    request, output, began = config.request(), config.output, time.perf_counter()
    found = None if config.overwrite else saved_plan(output)
    if found and any((output / name).exists() for name in STAGES):
        if found.request != request:
            before, now = asdict(found.request), asdict(request)
            name = next(key for key in now if now[key] != before[key])
            what = f"found {now[name]}, the run in {output} has {before[name]}"
            raise UsageError(f"{option_name(name)}: {what}; use the same, another --output, or --overwrite")
        if config.minutes < found.minutes:
            what = f"found {config.minutes:g}, the run in {output} has {found.minutes:g}"
            raise UsageError(f"--minutes: {what}, and it can only be lengthened; give as many or more")
        if config.minutes > found.minutes:
            found = found.lengthened(config.minutes)
            found.save(output)
        return found
    if found and (found.request, found.minutes) == (request, config.minutes):
        return found
    from .machine import machine
    from .planner import Planner
    from .survey import look

    (output / FOLDER / RECORD).unlink(missing_ok=True)
    print("planning: the images are looked at, and some steps of each training are timed", file=sys.stderr)
    for name, stage in STAGES.items():
        check_words(stage.config, name, getattr(request, name))
    survey = look(config.data, config.text_column)
    rows, expected = Planner(request, survey, machine(), began + 60 * config.minutes, output).plan()
    plan = Plan(request, config.minutes, None, rows, expected, {"plan": time.perf_counter() - began})
    for name, stage in STAGES.items():
        stage.parsed(words_of(plan, output, name))
    plan.save(output)
    return plan


@contextmanager
def counted(plan: "Plan", output: Path, name: str) -> Iterator[None]:
    """Add the time of a stage to the plan's record, also where it is interrupted."""
    began = time.perf_counter()
    try:
        yield
    finally:
        plan.spent[name] = plan.spent.get(name, 0.0) + time.perf_counter() - began
        plan.save(output)


def train(config: TrainConfig) -> None:
    """Plan and train a tokenizer and a prior on images within a time, then draw new images and write a report."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("accelerate: vqgen-train is one process; launch the command lines that --plan prints")
    from vqgen.evaluation.report.program import check_output

    from .show import outcome, text_of
    from .stages import STAGES, write_page

    with locked(config.output):
        check_output(config.output / "report.html")  # before any work
        plan = made_or_found(config)
        print(text_of(plan, {name: words_of(plan, config.output, name) for name in STAGES}), flush=True)
        if config.plan:
            return
        for number, (name, stage) in enumerate(STAGES.items(), 1):
            if name == "prior" and plan.prior_minutes is None:
                plan = plan.settled()
            with counted(plan, config.output, name):
                stage(words_of(plan, config.output, name, config.overwrite or name == "samples"), number)
        page = write_page(config.output)
    print(f"\n{outcome(plan)}\nLook at {config.output / 'samples' / 'grid.png'}, and at all of it in {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-train", TrainConfig, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
