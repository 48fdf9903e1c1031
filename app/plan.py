"""The plan of vqgen-train as it is saved: what was asked for, the choices with reasons, and what each stage takes."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from vqgen.errors import UsageError, UserError
from vqgen.files import check_writable, is_file, read_bytes, read_json, read_record, read_text, write_json, write_text
from vqgen.files.output_folder import OutputFolder

FOLDER = "plan"
RECORD = "plan.json"
STAGES = ("tokenizer", "codes", "prior", "settings", "samples")
OPTIONAL = "settings"
"""The stage that not every plan has."""
HEADING = "# Planned by vqgen-train"
"""First words of the configurations."""
TRIAL = 25.0
"""Seconds that each training measures its speed for, before its own time begins."""
MOST_SECONDS = 1e9
"""Longest time in a plan."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, as far as the plan depends on it."""

    data: str
    size: list[int] | None
    channels: int | None
    flip: bool
    text_column: str | None
    perceptual_weights: str | None
    tokenizer: list[str]
    """Words of options for the programs of the stages; so are the next three."""
    codes: list[str]
    prior: list[str]
    samples: list[str]


@dataclass(frozen=True)
class Row:
    """A choice, for people."""

    name: str
    choice: str
    why: str


@dataclass(frozen=True)
class Expected:
    """What a stage is expected to take."""

    seconds: float
    memory: float
    """Peak, in bytes; 0 where it was not measured."""
    steps: int
    """Of a training, 0 of the others."""
    shared: "Expected | None" = None
    """Of a training whose steps are given: the same by its share of the time, without them."""

    @property
    def minutes(self) -> float:
        """Time that a training gets where its steps are not given, the trial that finds its speed left out."""
        return max((self.shared or self).seconds - TRIAL, 1.0) / 60


@dataclass(frozen=True)
class Plan:
    """A plan as it is saved. The configurations themselves are YAML files beside it, which may be edited."""

    request: Request
    minutes: float
    """Of all stages together."""
    prior_minutes: float | None
    """Settled when the prior begins, from what the stages before it took."""
    rows: list[Row]
    expected: dict[str, Expected]
    spent: dict[str, float]
    """Seconds of each stage so far, planning included."""
    replaced: list[str] = field(default_factory=list)
    """Stages of an earlier run that --overwrite has still to remove."""
    written: dict[str, str] = field(default_factory=dict)
    """Stage -> sha256 of its configuration as it was planned; none in plans of former versions."""
    removing: dict[str, float] = field(default_factory=dict)
    """Stage of `replaced` -> when its removal began, in seconds of the clock."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Training -> steps in its configuration as it was planned; none in plans of former versions."""
    unsearched: str = ""
    """Why the planned search of settings is left out, where options that were given later say so."""

    def __post_init__(self) -> None:
        stages = [name for name in STAGES if name in self.expected or name != OPTIONAL]
        if list(self.expected) != stages or not self.rows:
            raise ValueError(f"a plan has rows, and the stages {', '.join(stages)}")
        numbers = [self.minutes, *self.spent.values(), *(found.seconds for found in self.expected.values())]
        if not all(0 <= number <= MOST_SECONDS for number in numbers) or not (
            self.prior_minutes is None or self.prior_minutes > 0
        ):
            raise ValueError("a time is out of range")

    @property
    def stages(self) -> dict[str, Expected]:
        """The stages that are run, and what each is expected to take."""
        return {name: found for name, found in self.expected.items() if name != OPTIONAL or not self.unsearched}

    def settled(self, trained: Mapping[str, float] = MappingProxyType({})) -> "Plan":
        """The plan with the time of the prior settled: what the stages before it left, half to twice its share.

        `trained` has the seconds of trainings by their own records: `spent` lacks those of a process that was killed,
        and of one that was started by hand. A prior that has begun already has its share, which its command line gave.
        """
        share = self.expected["prior"].minutes
        if "prior" in trained and "prior" not in self.replaced:
            return replace(self, prior_minutes=round(share, 3))
        known = {name: seconds for name, seconds in trained.items() if name not in self.replaced}
        spent = {name: max(known.get(name, 0.0), self.spent.get(name, 0.0)) for name in {**known, **self.spent}}
        later = sum(found.seconds for name, found in self.stages.items() if name in ("settings", "samples"))
        left = 60 * self.minutes - sum(spent.values()) - later - TRIAL
        return replace(self, prior_minutes=round(max(share / 2, min(left / 60, 2 * share)), 3))

    def lengthened(self, minutes: float) -> "Plan":
        """The plan with more time, all of which the prior gets: what it stands on cannot change any more."""
        more, prior = minutes - self.minutes, self.expected["prior"]
        steps = round(prior.steps * (1 + more / prior.minutes))
        expected = {**self.expected, "prior": replace(prior, seconds=prior.seconds + 60 * more, steps=steps)}
        longer = self.prior_minutes and self.prior_minutes + more
        return replace(self, minutes=minutes, prior_minutes=longer, expected=expected)

    def forget_removed(self, output: Path, stage: str) -> None:
        """Take a stage out of `replaced` where another run has begun in its place: that one is to go on."""
        marks = [
            output / stage / name for name in ("config.yaml", "manifest.json", "samples.partial.json", "samples.json")
        ]
        since = self.removing.get(stage, math.inf)
        if stage in self.replaced and any(mark.exists() and mark.stat().st_mtime >= since for mark in marks):
            self.replaced.remove(stage)

    def save(self, output: Path) -> None:
        """Write the record."""
        write_json(output / FOLDER / RECORD, asdict(self))

    def install(self, made: Path, output: Path) -> None:
        """Put this plan, whose configurations are in the folder `made`, in place of the one in `output`.

        Its record comes last: where this is killed, there is no plan.
        """
        (output / FOLDER / RECORD).unlink(missing_ok=True)
        for name in STAGES:
            if name in self.written:
                write_text(file_of(output, name), read_text(file_of(made, name)))
            else:
                file_of(output, name).unlink(missing_ok=True)
        self.save(output)


def written(output: Path) -> dict[str, str]:
    """Stage -> sha256 of the configuration in the folder of a plan, where there is one."""
    files = {name: file_of(output, name) for name in STAGES}
    return {name: hashlib.sha256(read_bytes(file)).hexdigest() for name, file in files.items() if file.exists()}


def unedited(plan: Plan, output: Path) -> set[str]:
    """Stages whose configuration in the folder of a plan is as it was planned."""
    return {name for name, digest in written(output).items() if plan.written.get(name) == digest}


def refuse_edited(plan: Plan, output: Path) -> None:
    """Raise `UsageError` where a configuration is no longer as it was planned, so that another plan would lose that."""
    found = written(output)
    if name := next((name for name, digest in plan.written.items() if found.get(name, digest) != digest), None):
        text = f"{file_of(output, name)} was edited, and other options make another plan, which replaces it"
        raise UsageError(f"--output: {text}; give the options of before, another --output, or --overwrite")


def _is_ours(path: Path) -> bool:
    """Whether a file is one that a plan consists of."""
    if not is_file(path):
        return False
    try:
        return "request" in read_json(path) if path.name == RECORD else read_text(path).startswith(HEADING)
    except UserError:
        return path.name == RECORD  # what is wrong with a record is said when it is read


def check_output(output: Path) -> None:
    """Raise `UsageError` where the folder of a plan is none, or holds files of something else."""
    check_writable(output)
    OutputFolder(output)
    if (output / FOLDER).is_symlink():
        raise UsageError(f"--output: {output / FOLDER} is a link; choose another folder")
    names = (RECORD, *(f"{name}.yaml" for name in STAGES))
    folder = OutputFolder(output / FOLDER, names, tuple(name.replace(".", r"\.") for name in names), is_mark=_is_ours)
    folder.refuse_foreign()
    if foreign := next((name for name in names if (path := folder.path / name).exists() and not _is_ours(path)), None):
        raise UsageError(f"--output: {folder.path / foreign} is not of vqgen-train; choose another folder")


def saved_plan(output: Path) -> Plan | None:
    """The plan in a folder, None where there is none. Raises `UserError` where it cannot be read."""
    path = output / FOLDER / RECORD
    return read_record(path, Plan) if path.exists() else None


def file_of(output: Path, stage: str) -> Path:
    """The configuration of a stage."""
    return output / FOLDER / f"{stage}.yaml"
