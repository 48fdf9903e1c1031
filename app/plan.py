"""The plan of vqgen-train as it is saved: what was asked for, the choices with reasons, and what each stage takes."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vqgen.files import read_record, write_json

FOLDER = "plan"
RECORD = "plan.json"
TRIAL = 25.0
"""Seconds that each training measures its speed for, before its own time begins."""


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

    @property
    def tokenizer_minutes(self) -> float:
        """Time that the tokenizer trains for, the trial that finds its speed left out."""
        return (self.expected["tokenizer"].seconds - TRIAL) / 60

    @property
    def planned_prior_minutes(self) -> float:
        """The same of the prior, as planned."""
        return (self.expected["prior"].seconds - TRIAL) / 60

    def settled(self) -> "Plan":
        """The plan with the time of the prior settled: what the stages before it left, half to twice its share."""
        left = 60 * self.minutes - sum(self.spent.values()) - self.expected["samples"].seconds - TRIAL
        share = self.planned_prior_minutes
        return replace(self, prior_minutes=round(max(share / 2, min(left / 60, 2 * share)), 3))

    def lengthened(self, minutes: float) -> "Plan":
        """The plan with more time, all of which the prior gets: what it stands on cannot change any more."""
        before = self.prior_minutes
        longer = before and before + minutes - self.minutes
        return replace(self, minutes=minutes, prior_minutes=longer)

    def save(self, output: Path) -> None:
        """Write the record."""
        write_json(output / FOLDER / RECORD, asdict(self))


def saved_plan(output: Path) -> Plan | None:
    """The plan in a folder, None where there is none. Raises `UserError` where it cannot be read."""
    path = output / FOLDER / RECORD
    return read_record(path, Plan) if path.is_file() else None


def file_of(output: Path, stage: str) -> Path:
    """The configuration of a stage."""
    return output / FOLDER / f"{stage}.yaml"
