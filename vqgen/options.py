"""Options of a program as documented dataclasses: ranges of numbers, and sections that depend on a choice."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from .errors import UsageError


@dataclass(frozen=True)
class Range:
    """The numbers that an option accepts, as in `Annotated[int, Range(least=1)]`; NaN is in no range."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def contains(self, value: float) -> bool:
        """Return whether `value` satisfies every bound."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


Count = Annotated[int, Range(least=1)]
"""A number of things of which there must be one."""
CountOrZero = Annotated[int, Range(least=0)]
NotNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
Fraction = Annotated[float, Range(least=0, below=1)]
"""A share that may be 0 but not the whole, e.g. a dropout or a decay."""


def option_name(field: str) -> str:
    """Name of a field on the command line: `class_` -> `--class`, `batch_size` -> `--batch-size`."""
    return "--" + field.removesuffix("_").replace("_", "-")


def ranges_of(hint: Any) -> list[Range]:
    """Every `Range` in a type, also inside of a union such as `Count | None` or a list such as `list[Count]`."""
    found = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
    return found + [each for part in typing.get_args(hint) if part is not hint for each in ranges_of(part)]


class Options:
    """Base of every dataclass of options: values outside of their declared ranges raise `UsageError`."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            numbers = value if isinstance(value, (list, tuple)) else [value]
            for bounds in ranges_of(hints[field.name]):
                for number in numbers:
                    # Other types are for the type check, which has a message of its own.
                    if isinstance(number, (int, float)) and not bounds.contains(number):
                        raise UsageError(f"{option_name(field.name)}: found {number}, expected {bounds}")


@dataclass(frozen=True)
class Choice:
    """A section whose options depend on one of its own: kind -> dataclass of that kind's options."""

    selector: str
    """Name of the option that chooses, e.g. `quantizer`."""
    kinds: Mapping[str, type]
    """Every dataclass has a class attribute `kind: ClassVar[str]`, its key here."""
    default: str


def choice(selector: str, kinds: Mapping[str, type], default: str) -> Any:
    """Declare a section as a choice between kinds with their own options.

    With `quantizer: QuantizerConfig = choice("quantizer", QUANTIZERS, default="vq")` the option `--quantizer fsq`, or
    `quantizer: {quantizer: fsq, levels: [8, 5]}` in YAML, makes the section an instance of `QUANTIZERS["fsq"]`.
    """
    return dataclasses.field(
        default_factory=lambda: kinds[default](), metadata={"choice": Choice(selector, kinds, default)}
    )


def at_least(config: Any, **lowest: float) -> None:
    """Raise a `UsageError` that names the first option below its least value; None, where an option may be, passes."""
    for name, least in lowest.items():
        found = getattr(config, name)
        if found is not None and not found >= least:
            raise UsageError(f"--{name.replace('_', '-')}: found {found}, expected at least {least}")
