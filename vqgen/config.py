"""Configuration: documented dataclasses <-> YAML files <-> command line options.

A program's configuration is a dataclass whose fields are options or sections (dataclasses again). In YAML the
sections nest, keys in snake_case; on the command line every option goes by its own name in kebab-case
(`training.batch_size` is `--batch-size`), which is why a name occurs once in a program. A field `class_` is the
option `--class` and the key `class`. A list with `metadata={"positional": "FILES"}` takes the words that belong to no
option as well. Values of the command line win over `--config FILE` wherever either stands.
`values.py` checks the types.
"""

import dataclasses
import difflib
import functools
import importlib.resources
import os
import re
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from . import __version__
from .errors import UsageError, UserError
from .files import write_text
from .option_types import YamlDumper, YamlLoader, checked, from_words, kinds, type_name

C = TypeVar("C")


@dataclass(frozen=True)
class Option:
    """One leaf of a configuration: where it stands and what it takes."""

    path: tuple[str, ...]
    type: Any
    default: Any
    help: str
    positional: str = ""
    """What the words of the command line that belong to no option are called, where they are this one's."""

    @property
    def name(self) -> str:
        return self.path[-1]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _key(field: dataclasses.Field) -> str:
    return field.name.removesuffix("_")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


@functools.cache
def _texts(config: type) -> dict[str, str]:
    """Field -> the docstring below it, read from the source of the class and its bases."""
    from docstring_parser import parse_from_object

    bases = [base for base in reversed(config.__mro__) if dataclasses.is_dataclass(base)]
    found = [param for base in bases for param in parse_from_object(base).params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in found}


def options(config: type, path: tuple[str, ...] = (), defaults: Any = dataclasses.MISSING) -> Iterator[Option]:
    """Every option of a configuration dataclass, in order, sections flattened.

    `defaults` is an instance whose values stand in for the class's own, as a section's default factory gives one.
    """
    hints, texts = typing.get_type_hints(config), _texts(config)
    for field in dataclasses.fields(config):
        default = _default(field) if defaults is dataclasses.MISSING else getattr(defaults, field.name)
        here = (*path, _key(field))
        if dataclasses.is_dataclass(hints[field.name]):
            yield from options(typing.cast(type, hints[field.name]), here, default)
        else:
            positional = field.metadata.get("positional", "")
            yield Option(here, hints[field.name], default, texts.get(field.name, ""), positional)


def _suggest(name: str, known: Sequence[str]) -> str:
    """The known name, in whatever section, whose last part is most like that of `name`."""
    leaves = {path.rpartition(".")[2]: path for path in known}
    close = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1)
    return f"; did you mean {leaves[close[0]]}?" if close else ""


def find_preset(name: str) -> tuple[str, str]:
    """The name and text of a configuration file: a path, or a preset of `configs/` by name."""
    folder = importlib.resources.files("vqgen.configs")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(f"--config: {path} does not exist") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--config: {path} cannot be read ({error})") from error
    preset = folder / f"{name}.yaml"
    if preset.is_file():
        return f"{name}.yaml", preset.read_text(encoding="utf-8")
    known = sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))
    raise UsageError(f"--config: no file and no preset {name!r}; presets: {', '.join(known)}")


def _read_file(config: type, name: str) -> dict[str, Any]:
    """Option name -> value from a YAML file or preset."""
    file, text = find_preset(name)
    try:
        tree = yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    known = {option.path: option for option in options(config)}
    sections = {path[:n] for path in known for n in range(1, len(path))}
    values: dict[str, Any] = {}

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if path in sections or not path:
            if node is None:
                return
            if not isinstance(node, dict):
                raise UsageError(f"{file}: {'.'.join(path) or 'the file'} is a {type(node).__name__}, expected keys")
            for key, value in node.items():
                walk(value, (*path, str(key)))
        elif path in known:
            option = known[path]
            values[option.name] = checked(option.type, node, f"{file}: {'.'.join(path)}")
        else:
            names = [".".join(p) for p in [*known, *sections]]
            raise UsageError(f"{file}: unknown key {'.'.join(path)}{_suggest('.'.join(path), names)}")

    walk(tree or {}, ())
    return values


def _read_arguments(config: type, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Option name -> value from the command line, and every `--config` in order."""
    known = {option.flag: option for option in options(config)}
    values: dict[str, Any] = {}
    files: list[str] = []
    bare: list[str] = []
    takes_bare = next((option for option in known.values() if option.positional), None)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, has_value, value = word.partition("=")
        flag = flag.replace("_", "-")
        negated = "--" + flag[5:] if flag.startswith("--no-") and flag not in known else None
        if not word.startswith("--"):
            if takes_bare is None or word.startswith("-"):
                raise UsageError(f"unexpected argument {word!r}: options begin with --")
            bare.append(word)  # as it is: a comma in it is no list
            continue
        if flag != "--config" and flag not in known and (negated not in known or known[negated].type is not bool):
            raise UsageError(f"unknown option {flag}{_suggest(flag, [*known, '--config'])}")
        option = known.get(flag) or known.get(negated or "")
        if option and option.type is bool:
            # A switch: `--flip`, `--no-flip`, `--flip=false`.
            chosen = checked(bool, value if has_value else True, flag)
            values[option.name] = chosen != (negated is not None)
            continue
        words = [value] if has_value else []
        many = bool(option) and any(typing.get_origin(kind) is list for kind in kinds(option.type))
        while not has_value and rest and not re.match(r"--[a-zA-Z]", rest[0]) and (many or not words):
            words.append(rest.pop(0))
        if not words:
            raise UsageError(f"{flag} needs a value")
        if option is None:
            files.append(words[0])
        else:
            values[option.name] = checked(option.type, from_words(option.type, words), flag)
    if takes_bare and bare:
        if takes_bare.name in values:
            raise UsageError(f"{takes_bare.flag}: given twice, also as {bare[0]!r}; name all of them in one place")
        values[takes_bare.name] = checked(takes_bare.type, bare, takes_bare.positional)
    return values, files


def build(config: type[C], values: dict[str, Any]) -> C:
    """The dataclass from option name -> value; sections are built inside out and check themselves."""
    known = {option.path: option for option in options(config)}

    def make(cls: type, path: tuple[str, ...]) -> Any:
        hints = typing.get_type_hints(cls)
        given = {}
        for field in dataclasses.fields(cls):
            here = (*path, _key(field))
            if dataclasses.is_dataclass(hints[field.name]):
                given[field.name] = make(typing.cast(type, hints[field.name]), here)
                continue
            given[field.name] = values.get(here[-1], known[here].default)
            if given[field.name] is dataclasses.MISSING:
                names = [name for name in (known[here].positional, known[here].flag) if name]
                raise UsageError(f"{' or '.join(names)} is needed; --help lists all options")
        return cls(**given)

    return make(config, ())


def parse(config: type[C], arguments: Sequence[str]) -> C:
    """Read the command line: defaults, each `--config` in order, then the options given. Raises `UsageError`."""
    given, files = _read_arguments(config, arguments)
    values: dict[str, Any] = {}
    for file in files:
        values |= _read_file(config, file)
    return build(config, values | given)


def as_dict(config: Any) -> Any:
    """A configuration as plain values that YAML and JSON can hold."""
    if dataclasses.is_dataclass(config):
        return {_key(field): as_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
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
    names = {_key(field): field.name for field in dataclasses.fields(typing.cast(Any, config))}
    given = {}
    for key, value in tree.items():
        if key not in names:
            raise UserError(f"{where}: unknown key {key}; {other}")
        hint = hints[names[key]]
        given[names[key]] = (
            from_dict(typing.cast(type, hint), value, where) if dataclasses.is_dataclass(hint) else value
        )
    try:
        return config(**given)
    except TypeError as error:
        raise UserError(f"{where}: {error}; {other}") from error


def values_of(config: Any) -> dict[str, Any]:
    """Option name -> plain value, sections flattened."""
    flat: dict[str, Any] = {}
    for key, value in as_dict(config).items():
        flat.update(values_of(getattr(config, key)) if isinstance(value, dict) else {key: value})
    return flat


def read_saved(path: Path, config: type) -> dict[str, Any]:
    """Option name -> plain value from a saved `config.yaml`."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in _read_file(config, str(path)).items()}


def save(config: Any, path: Path, heading: str = "") -> None:
    """Write the resolved configuration as YAML under a comment line; `--config path` reads it back."""
    write_text(path, heading + yaml.dump(as_dict(config), Dumper=YamlDumper, sort_keys=False))


def help_text(program: str, description: str, config: type) -> str:
    """The text of `--help`: one entry an option, grouped by section, with type and default."""
    bare = "".join(f"{option.positional} ... " for option in options(config) if option.positional)
    usage = f"usage: {program} {bare}[--config FILE] [--option VALUE ...]"
    lines = [usage, "", *textwrap.wrap(description, 100)]
    section: tuple[str, ...] | None = None
    for option in options(config):
        if option.path[:-1] != section:
            section = option.path[:-1]
            lines += ["", f"{'.'.join(section) or 'options'}:"]
        kind = "" if option.type is bool else f" {type_name(option.type)}"
        if option.default is dataclasses.MISSING:
            shown = "needed"
        elif isinstance(option.default, bool):
            shown = f"default on; --no-{option.flag[2:]}" if option.default else "default off"
        else:
            shown = "default none" if option.default is None else f"default {option.default}"
        lines.append(f"  {option.flag}{kind}  ({shown})")
        lines += textwrap.wrap(option.help, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "anywhere:", "  --config FILE or preset name; the later of several wins, options over all"]
    lines += ["  --debug  show the traceback of an error", "  --version", "  --help"]
    return "\n".join(lines)


def command(program: str, config: type[C], run: Callable[[C], None], arguments: Sequence[str] | None = None) -> int:
    """Run a program: parse, run, and turn errors into one line and an exit code.

    Returns 0; 2 for a wrong option or key; 130 when interrupted; 1 for any other error. `--debug` shows tracebacks.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if "--help" in words or "-h" in words:
        try:
            print(help_text(program, (run.__doc__ or "").split("\n\n")[0], config), flush=True)
        except BrokenPipeError:  # `--help | head`; what is left unsaid must not fail at exit either
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    if "--version" in words:
        print(f"vqgen {__version__}")
        return 0
    try:
        run(parse(config, words))
        return 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        if isinstance(error, UserError):
            print(f"{program}: {text}", file=sys.stderr)
            return error.exit_code
        print(f"{program}: {type(error).__name__}: {text} (--debug shows where)", file=sys.stderr)
        return 1


def commands(
    program: str, known: dict[str, tuple[type, Callable[[Any], None]]], arguments: Sequence[str] | None = None
) -> int:
    """A program of several commands, the first word of its line: name -> configuration and what runs it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in known:
        config, run = known[words[0]]
        return command(f"{program} {words[0]}", config, run, words[1:])
    if "--version" in words:
        print(f"vqgen {__version__}")
        return 0
    lines = [f"usage: {program} COMMAND [--option VALUE ...]; {program} COMMAND --help lists its options", ""]
    lines += [f"  {name:<16} {(run.__doc__ or '').splitlines()[0]}" for name, (_, run) in known.items()]
    if "--help" in words or "-h" in words:
        print("\n".join(lines), flush=True)
        return 0
    found = f"unknown command {words[0]!r}" if words else "no command"
    print(f"{program}: {found}; the commands are {', '.join(known)}", file=sys.stderr)
    return 2
