"""Options of a program as documented dataclasses: ranges of numbers, choices between kinds, and the list of all.

The fields of a configuration are options, sections (dataclasses again) or choices (sections whose dataclass depends on
an option of their own). A field `class_` is the option `--class`; the docstring below a field is its help text.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar

from .errors import UsageError

C = TypeVar("C")


@dataclass(frozen=True)
class Range:
    """The numbers that an option accepts, as in `Annotated[int, Range(least=1)]`; NaN is in no range."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def contains(self, value: float) -> bool:
        """Return whether `value` satisfies every bound."""
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    def __str__(self) -> str:
        words = {"at least": self.least, "more than": self.above, "at most": self.most, "less than": self.below}
        return " and ".join(f"{word} {_written(bound)}" for word, bound in words.items() if bound is not None)


def _written(bound: float) -> str:
    """A bound as a person writes it: powers of two as such."""
    for value, text in ((bound, ""), (bound + 1, " - 1")):
        if isinstance(value, int) and value >= 2**12 and not value & (value - 1):
            return f"2^{value.bit_length() - 1}{text}"
    return f"{bound:g}"


Count = Annotated[int, Range(least=1)]
"""A number of things of which there must be one."""
CountOrZero = Annotated[int, Range(least=0)]
Size = Annotated[int, Range(least=1, most=2**20)]
"""A side of a tensor: channels, dimensions, examples in a batch."""
Few = Annotated[int, Range(least=1, most=1000)]
"""A number of things that are built one by one, e.g. layers."""
MOST_IMAGES = 10**7
Images = Annotated[int, Range(least=1, most=MOST_IMAGES)]
"""A number of images that are drawn, each of which has a name in memory."""
Seed = Annotated[int, Range(least=0, most=2**64 - 1)]
"""A seed as torch takes it."""
NotNegative = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
Fraction = Annotated[float, Range(least=0, below=1)]
"""A share that may be 0 but not 1, e.g. a dropout or a decay."""


# What torch and NumPy take where no range is declared.
_INTEGERS, _NUMBERS = Range(-(2**63), 2**64 - 1), Range(-3.4e38, 3.4e38)

Place = tuple[str, ...]
"""Keys that lead to an option or a section, e.g. ("run", "steps")."""


def key_of(field: dataclasses.Field) -> str:
    """Name of a field in YAML and JSON."""
    return field.name.removesuffix("_")


def option_name(name: str) -> str:
    """Name of a field or key on the command line: `class_` -> `--class`, `batch_size` -> `--batch-size`."""
    return "--" + name.removesuffix("_").replace("_", "-")


def ranges_of(hint: Any) -> list[Range]:
    """Every `Range` in a type, also inside of a union such as `Count | None` or a list such as `list[Count]`."""
    found = [item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Range)]
    return found + [each for part in typing.get_args(hint) if part is not hint for each in ranges_of(part)]


class Options:
    """Base of every dataclass of options: values outside of their declared ranges raise `UsageError`.

    So do, of any option, integers of more than 64 bits and numbers that float32 does not have, NaN and infinity too.
    """

    given: ClassVar[frozenset[str]] = frozenset()
    """Names of the options that the command line gave, where the whole configuration comes from one."""
    stated: ClassVar[frozenset[str] | None] = None
    """Names of the options that files or the command line gave; None where the configuration comes from neither."""
    chosen: ClassVar[frozenset[str]] = frozenset()
    """Names of those that the command line or files of the user gave, which are no presets."""

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, field.name)
            # Other types are for the type check, which has a message of its own.
            for number in value if isinstance(value, (list, tuple)) else [value]:
                general = _INTEGERS if isinstance(number, int) else _NUMBERS
                for bounds in (*ranges_of(hints[field.name]), general) if isinstance(number, (int, float)) else ():
                    if not bounds.contains(number):
                        raise UsageError(f"{option_name(field.name)}: found {_shown(number)}, expected {bounds}")


def changed(config: C, **values: Any) -> C:
    """The configuration, or a section of it, with other values of its fields; keeps `given`, `stated` and `chosen`."""
    found = dataclasses.replace(typing.cast(Any, config), **values)
    vars(found).update({name: vars(config)[name] for name in ("given", "stated", "chosen") if name in vars(config)})
    return found


def _shown(number: float) -> str:
    """A number with 15 digits; an integer may be larger than every float."""
    try:
        return f"{number:.15g}"
    except OverflowError:
        exponent = int(int(number).bit_length() * math.log10(2)) - 15
        return f"{int(number) // 10**exponent}e+{exponent}"


@functools.cache
def _hints(config: type) -> dict[str, Any]:
    """Field -> type, with its `Annotated`."""
    return typing.get_type_hints(config, include_extras=True)


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
    Several kinds may have an option of the same name; it keeps its value where the kind changes.
    """
    declared = Choice(selector, kinds, default)
    return dataclasses.field(default_factory=lambda: kinds[default](), metadata={"choice": declared})


def is_section(hint: Any) -> TypeGuard[type]:
    """Return whether the type of a field is a dataclass of further options."""
    return dataclasses.is_dataclass(hint)


def choice_of(field: dataclasses.Field) -> Choice | None:
    """The `Choice` that a field was declared as."""
    return field.metadata.get("choice")


@dataclass(frozen=True)
class Option:
    """One option of a program: its place in the configuration and what it accepts."""

    owner: type
    """The dataclass that declares it, as the field `field`."""
    field: str
    path: Place
    type: Any
    default: Any
    """`dataclasses.MISSING` where a value must be given."""
    ranges: tuple[Range, ...] = ()
    positional: str = ""
    """What help calls the words of the command line that belong to no option, where they are this option's."""
    placeholder: str = ""
    """What help calls a word of a list, where its type does not say it."""
    needed: bool = False
    """Whether help calls it needed although it has a default: it is not where another option says what to do."""
    repeatable: bool = False
    """Whether a list goes on where the option is given again; else the later one wins."""
    choice: Choice | None = None
    """The choice that it belongs to."""
    kinds: tuple[str, ...] = ()
    """Kinds of the choice that have it; all of them for the selector."""
    variants: tuple["Option", ...] = ()
    """The option as each of these kinds declares it; `kinds` of each is that kind."""
    available: bool = True
    """Whether the selected kind has it."""

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def flag(self) -> str:
        return option_name(self.name)

    @property
    def selects(self) -> bool:
        """Whether this option is the selector of its choice."""
        return self.choice is not None and self.name == self.choice.selector

    @property
    def help(self) -> str:
        """The docstring below the field."""
        return field_docs(self.owner).get(self.field, "")


@functools.cache
def field_docs(config: type) -> dict[str, str]:
    """Field -> the docstring below it, read from the source of the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(config.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (parsed,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for pair in itertools.pairwise(typing.cast(ast.ClassDef, parsed).body):
            match pair:
                case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                    found[name] = " ".join(text.split())
    return found


def options(config: type, selected: Mapping[str, Any] | None = None) -> list[Option]:
    """List every option of a configuration, in order, sections flattened.

    Args:
        selected: selector -> kind, for choices that are not at their default. Options of the other kinds are listed
            too, as not available; an option of several kinds is listed once, as the selected kind declares it.

    Raises `ValueError` where two sections have an option of the same name: the command line could not tell which.
    """
    found: dict[str, Option] = {}
    for option in _options(config, selected or {}):
        other = found.setdefault(option.name, option)
        if other is not option:
            places = (f"{each.owner.__name__} ({'.'.join(each.path)})" for each in (other, option))
            raise ValueError(f"{option.flag} is an option of both {' and '.join(places)}; rename one of them")
    return list(found.values())


def _options(
    config: type, selected: Mapping[str, Any], path: Place = (), defaults: Any = dataclasses.MISSING
) -> Iterator[Option]:
    """Options of the section `config` at `path`; values of the instance `defaults` replace those of the class."""
    hints, plain = _hints(config), typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        default: Any = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if defaults is not dataclasses.MISSING:
            default = getattr(defaults, field.name)
        here, hint = (*path, key_of(field)), plain[field.name]
        if declared := choice_of(field):
            every = tuple(declared.kinds)
            place, hint = (*here, declared.selector), Literal[every]  # type: ignore[valid-type]
            yield Option(config, field.name, place, hint, default.kind, choice=declared, kinds=every)
            yield from _options_of_kinds(declared, here, default, selected)
        elif is_section(hint):
            yield from _options(hint, selected, here, default)
        else:
            ranges = tuple(ranges_of(hints[field.name]))
            names = ("positional", "placeholder", "needed", "repeatable")
            stated = {name: field.metadata[name] for name in names if name in field.metadata}
            yield Option(config, field.name, here, hint, default, ranges, **stated)


def _options_of_kinds(declared: Choice, path: Place, default: Any, selected: Mapping[str, Any]) -> Iterator[Option]:
    """Options of the selected kind of a choice, then those that only other kinds have."""
    kind = selected.get(declared.selector, default.kind)
    kind = kind if kind in declared.kinds else default.kind  # the type check names a kind that does not exist
    found: dict[Place, list[Option]] = {}  # one a kind; the first is listed
    for name in sorted(declared.kinds, key=lambda name: name != kind):
        defaults = default if name == default.kind else dataclasses.MISSING
        for option in _options(declared.kinds[name], selected, path, defaults):
            found.setdefault(option.path, []).append(dataclasses.replace(option, choice=declared, kinds=(name,)))
    for same in found.values():
        kinds = tuple(sorted((each.kinds[0] for each in same), key=list(declared.kinds).index))
        yield dataclasses.replace(same[0], kinds=kinds, variants=tuple(same), available=kind in kinds)
