"""The text of `--help` and `--help-all`."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .option_types import is_switch, kinds
from .options import Option, options

WIDTH = 100
_PLACEHOLDERS: dict[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH", bool: "true|false"}


def help_text(program: str, description: str, config: type, everything: bool = False) -> str:
    """The options in `config.COMMON` with syntax, default and help text, or every option by section, in
    each the common ones first.

    A configuration without `COMMON: ClassVar[tuple[str, ...]]` shows every option.
    """
    known = list(options(config))
    common = () if everything else getattr(config, "COMMON", ())
    bare = "".join(f"{option.positional} ... " for option in known if option.positional)
    usage = f"usage: {program} {bare}[--config FILE] [--option VALUE ...]"
    lines = [usage, "", *textwrap.wrap(" ".join(description.split()), WIDTH)]
    if common:
        lines += ["", "options:"]
        of_name = {option.name: option for option in known}
        for name in common:
            lines += _entries(of_name[name])
        hidden = len(known) - len(common)
        lines += ["", f"--help-all shows {hidden} more options." if hidden else ""]
    section: tuple[str, ...] | None = None
    sections = list(dict.fromkeys(option.path[:-1] for option in known))
    rank: dict[str, int] = {name: index for index, name in enumerate(getattr(config, "COMMON", ()))}
    known.sort(key=lambda option: (sections.index(option.path[:-1]), rank.get(option.name, len(rank))))
    for option in () if common else known:
        if option.path[:-1] != section:
            section = option.path[:-1]
            lines += ["", f"{'.'.join(section) or 'options'}:"]
        lines += _entries(option)
    lines += ["", "anywhere:", "  --config FILE or preset name; the later of several wins, options over all"]
    lines += ["  --threads INT  CPU threads of each process; by default those that it may use, or $OMP_NUM_THREADS"]
    lines += ["  --help, --help-all", "  --version"]
    return "\n".join(lines)


def _entries(option: Option) -> Iterator[str]:
    """The lines of an option, once for each of the ways in which kinds of a choice declare it."""
    alike: dict[tuple[str, ...], list[Option]] = {}
    for each in option.variants or (option,):
        alike.setdefault((_syntax(each), str(each.ranges), _default(each), each.help), []).append(each)
    for same in alike.values():
        kinds = {kind for each in same for kind in each.kinds}
        yield from _entry(dataclasses.replace(same[0], kinds=tuple(kind for kind in option.kinds if kind in kinds)))


def _entry(option: Option) -> Iterator[str]:
    """The lines of one option."""
    syntax = _syntax(option)
    of_kinds = option.choice and not option.selects and len(option.kinds) < len(option.choice.kinds)
    notes = [f"only {', '.join(option.kinds)}"] if of_kinds else []
    notes += [" or ".join(map(str, option.ranges))] if option.ranges else []
    notes.append(_default(option))
    yield f"  {option.flag}{' ' if syntax else ''}{syntax}  ({'; '.join(notes)})"
    yield from textwrap.wrap(option.help, WIDTH - 4, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if option.choice and option.selects:
        width = max(map(len, option.kinds)) + 2
        for kind in option.kinds:
            text = " ".join((option.choice.kinds[kind].__doc__ or "").split("\n\n")[0].split())
            yield from textwrap.wrap(f"{' ' * 6}{kind:<{width}}{text}", WIDTH - 4, subsequent_indent=" " * (6 + width))


def _syntax(option: Option) -> str:
    """What follows the name: `INT ...`, `vq|fsq`; nothing for a switch."""
    if is_switch(option.type):
        return ""
    if option.placeholder:
        return f"{option.placeholder} ..."
    return "|".join(_placeholder(kind) for kind in kinds(option.type) if kind is not type(None))


def _placeholder(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return ("NAME" if item is str else _placeholder(item)) + " ..."
    return _PLACEHOLDERS.get(hint) or hint.__name__


def _default(option: Option) -> str:
    if option.default is dataclasses.MISSING or option.needed:
        return "needed"
    if isinstance(option.default, bool):
        return f"default on; --no-{option.flag[2:]}" if option.default else "default off"
    if is_switch(option.type):
        return f"default as below; --no-{option.flag[2:]}"
    if isinstance(option.default, list):
        return "default " + (" ".join(map(str, option.default)) or "none")
    return "default none" if option.default in (None, "") else f"default {option.default}"
