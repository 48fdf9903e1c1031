"""Configuration: documented dataclasses <-> YAML files <-> command line options.

YAML sections nest, with keys in snake_case; on the command line every option goes by its own name in kebab-case
(`training.batch_size` is `--batch-size`), unique in a program, and wins over `--config FILE` wherever either stands.
A list with `metadata={"positional": "FILES"}` also takes the words that belong to no option, one with
`{"repeatable": True}` goes on where it is given again. `options.py` has the declarations, `config_layers.py` reads the
sources.
"""

import dataclasses
import re
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from . import __version__
from .config_layers import merged, read_arguments, read_file, was_removed
from .errors import UsageError, UserError, lacks_memory
from .files import write_text
from .files.yaml_text import dump_yaml
from .option_types import type_name
from .options import choice_of, is_section, key_of, option_name, options
from .terminal import close_stdout, noted_interrupts, prepared_streams, stdout_has_no_reader
from .threads import limit_threads, without_threads

C = TypeVar("C")
_HELP = {"--help", "-h", "--help-all"}


def build(config: type[C], values: Mapping[str, Any]) -> C:
    """The dataclass from option name -> value; options of kinds not selected are ignored. Raises `UsageError`."""
    known = {option.path: option for option in options(config, values)}

    def make(cls: type, path: tuple[str, ...]) -> Any:
        hints, given = typing.get_type_hints(cls), {}
        for field in dataclasses.fields(cls):
            here, section = (*path, key_of(field)), hints[field.name]
            if choice := choice_of(field):
                selector = known[(*here, choice.selector)]
                section = choice.kinds[values.get(selector.name, selector.default)]
            value = make(section, here) if is_section(section) else values.get(here[-1], known[here].default)
            if value is dataclasses.MISSING:
                names = filter(None, (known[here].positional, known[here].flag))
                raise UsageError(f"{' or '.join(names)} is needed; --help lists all options")
            given[field.name] = value
        return cls(**given)

    return make(config, ())


def parse(config: type[C], arguments: Sequence[str]) -> C:
    """Read the command line: defaults, each `--config` in order, then the options given. Raises `UsageError`.

    The result has the names of the options that the command line gave as `given`, with those of files as `stated`, and
    with those of the user's own files as `chosen`.
    `--threads` is no option of a configuration: `command` sees to it.
    """
    given, files = read_arguments(config, without_threads(arguments)[0])
    layers = [*(read_file(config, file) for file in files), given]
    values = merged(config, layers)
    found, chosen = build(config, values), frozenset[str]().union(*(layer.values for layer in layers if layer.chosen))
    vars(found).update(given=frozenset(given.values), stated=frozenset(values), chosen=chosen)
    return found


def as_dict(config: Any) -> Any:
    """A configuration as plain values that YAML and JSON can hold; a choice is a mapping with the selector first."""
    if dataclasses.is_dataclass(config):
        found = {}
        for field in dataclasses.fields(config):
            value, choice = getattr(config, field.name), choice_of(field)
            found[key_of(field)] = {choice.selector: value.kind, **as_dict(value)} if choice else as_dict(value)
        return found
    if isinstance(config, dict):
        return {key: as_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [as_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def from_dict(config: type[C], tree: Any, where: str) -> C:
    """The dataclass from nested plain values, e.g. an architecture in `vqgen.json`; errors name `where`, the file."""
    other = "it was written by another version of vqgen"
    if not isinstance(tree, dict):
        raise UserError(f"{where}: found {tree!r} where the keys of {config.__name__} belong; {other}")
    hints = typing.get_type_hints(config)
    fields = {key_of(field): field for field in dataclasses.fields(typing.cast(Any, config))}
    given: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            if was_removed(key, value, where):
                continue
            raise UserError(f"{where}: unknown key {key}; {other}")
        section = hints[fields[key].name]
        if choice := choice_of(fields[key]):
            if not isinstance(value, dict):
                raise UserError(f"{where}: found {value!r} where the keys of {key} belong; {other}")
            kind = value.get(choice.selector, choice.default)
            if not isinstance(kind, str) or kind not in choice.kinds:
                raise UserError(f"{where}: unknown {choice.selector} {kind}; {other}")
            section = choice.kinds[kind]
            keys = {name: set(map(key_of, dataclasses.fields(cls))) for name, cls in choice.kinds.items()}
            unused = {choice.selector}.union(*keys.values()) - keys[kind]  # version 0.1 wrote options of every kind
            value = {k: v for k, v in value.items() if k not in unused}
        if is_section(section):
            value = from_dict(section, value, where)
        elif not _is(section, value):
            raise UserError(f"{where}: {key}: found {value!r:.200}, expected {type_name(section)}; {other}")
        given[fields[key].name] = value
    try:
        return config(**given)
    except (TypeError, UsageError) as error:  # a field that is missing, or a value out of range
        raise UserError(f"{where}: {error}; {other}") from error


def check_types(config: type, values: Mapping[str, Any]) -> None:
    """Raise `UsageError` where values, by name, are of other types than a dataclass's fields: for Python, where no
    command line was parsed. Other names are for the dataclass to refuse."""
    hints = typing.get_type_hints(config)
    for name, value in values.items():
        if name in hints and not _is(hints[name], value):
            raise UsageError(f"{option_name(name)}: found {value!r:.200}, expected {type_name(hints[name])}")


def _is(hint: Any, value: Any) -> bool:
    """Whether a value has exactly this type, an int that of float too."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # not needed by --help

    try:
        TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(value)
    except ValidationError:
        return False
    return True


def values_of(config: Any) -> dict[str, Any]:
    """Option name -> plain value, sections flattened; of a choice the selector and the options of its kind."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if choice := choice_of(field):
            flat[choice.selector] = value.kind
        flat |= values_of(value) if dataclasses.is_dataclass(value) else {key_of(field): as_dict(value)}
    return flat


def read_saved(path: Path, config: type) -> dict[str, Any]:
    """Option name -> plain value from a saved `config.yaml`. Raises `UserError`."""
    return {name: as_dict(value) for name, value in merged(config, [read_file(config, str(path))]).items()}


def save(config: Any, path: Path, heading: str = "") -> None:
    """Write the resolved configuration as YAML under a comment line; `--config path` reads it back."""
    write_text(path, heading + dump_yaml(as_dict(config)))


def command(program: str, config: type[C], run: Callable[[C], None], arguments: Sequence[str] | None = None) -> int:
    """Run a program on its command line and return the exit code.

    0; 2 for a wrong option or key, 1 for any other `UserError`, a file that may not be accessed, or too little memory,
    each with one line; 130 when interrupted. Any other exception is a defect of vqgen: its traceback is printed and 1
    returned.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)

    def act() -> None:
        if "--version" in words:
            print(f"vqgen {__version__}")
        elif _HELP & set(words):
            from .help import help_text

            description = (run.__doc__ or "").split("\n\n")[0]
            print(help_text(program, description, config, everything="--help-all" in words))
        else:
            limit_threads(without_threads(words)[1])
            run(parse(config, words))

    with prepared_streams(), noted_interrupts() as interrupts:
        return _ended(program, act, "--version" in words or bool(_HELP & set(words)), interrupts)


def _ended(program: str, act: Callable[[], None], finished: bool, interrupts: Sequence[int]) -> int:
    """Call `act` and return the exit code, see `command`; with `finished` its text need not be read to the end."""
    try:
        act()
        finished = True
        print(end="", flush=True)
        return 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"{program}: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if interrupts:  # raised within an import, which went on without what it was importing
            print(f"{program}: interrupted", file=sys.stderr)
            return 130
        if isinstance(error, BrokenPipeError) and stdout_has_no_reader():
            close_stdout()
            return 0 if finished else 1
        if isinstance(error, PermissionError) and error.filename is not None:  # also by Path.is_file and its like
            denied = one_line(f"{error.filename}: {error.strerror}")
            print(f"{program}: {denied}; change its permissions or name another place", file=sys.stderr)
            return 1
        if lacks_memory(error):
            print(f"{program}: not enough memory ({one_line(str(error))[:300]}); ask for less", file=sys.stderr)
            return 1
        traceback.print_exc()
        print(f"{program}: this is a defect of vqgen; please report it with the lines above", file=sys.stderr)
        return 1


def shown(url: str) -> str:
    """A URL as messages show it: without query and password, which may be secrets. Paths are returned as they are."""
    return re.sub("://[^/@]*@", "://", url.split("?")[0]) if "://" in url else url


def one_line(text: str) -> str:
    """A message as one line of printable characters: names in it may hold escape sequences of a terminal.

    The middle of a longer one than a screen shows is left out.
    """
    joined = " ".join(text.split())
    if len(joined) > 1000:
        joined = f"{joined[:700]} … {joined[-250:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def commands(
    program: str, known: Mapping[str, tuple[type, Callable[[Any], None]]], arguments: Sequence[str] | None = None
) -> int:
    """Run a program of several commands, the first word of its line: name -> configuration and function to run."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in known:
        config, run = known[words[0]]
        return command(f"{program} {words[0]}", config, run, words[1:])
    with prepared_streams(), noted_interrupts() as interrupts:
        return _ended(program, lambda: _show_commands(program, known, words), True, interrupts)


def _show_commands(program: str, known: Mapping[str, tuple[type, Callable[[Any], None]]], words: Sequence[str]) -> None:
    """Print version or commands. Raises `UsageError` where `words` ask for neither: they name no command."""
    if "--version" in words:
        print(f"vqgen {__version__}")
    elif _HELP & set(words):
        lines = [f"usage: {program} COMMAND [--option VALUE ...]; {program} COMMAND --help lists its options", ""]
        lines += [f"  {name:<16} {(run.__doc__ or '').splitlines()[0]}" for name, (_, run) in known.items()]
        print("\n".join(lines))
    else:
        found = f"unknown command {words[0]!r}" if words else "no command"
        raise UsageError(f"{found}; the commands are {', '.join(known)}")
