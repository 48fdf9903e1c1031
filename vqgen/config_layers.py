"""The options that configuration files and the command line give, and how several sources are merged."""

import difflib
import importlib.resources
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError, UserError
from .files import read_text
from .files.yaml_text import MAX_YAML, parse_yaml
from .option_types import checked, from_words, is_switch, kinds
from .options import Choice, Option, option_name, options

# First line of the config.yaml of a run.
MARK = "# Written by vqgen: the resolved configuration of the run in this folder.\n"
# How the files begin that programs of ours write for others to read: runs, and vqgen-train for its stages.
WRITTEN = (MARK, "# Planned by vqgen-train")
# Options of version 0.1 that are gone -> the values under which its files are still read; None = any.
REMOVED: dict[str, tuple[Any, ...] | None] = {
    "channels_last": (True, False),  # changes the speed alone
    "gan_start_at": ("step", "share"),
    "gan_plateau": None,  # used with `gan_start_at: plateau` alone, as is the next
    "gan_plateau_steps": None,
    "keep_share": (None,),
}
# Options that stand for each other: one that a later layer gives takes the place of the other.
INSTEAD = {"minutes": "epochs", "epochs": "minutes"}


def _suggest(name: str, known: Sequence[str]) -> str:
    """The known name, in whatever section, whose last part is most like that of `name`."""
    leaf = name.rpartition(".")[2].removeprefix("--")
    if leaf.replace("-", "_") in REMOVED:
        return ": it was removed after version 0.1"
    leaves = {path.rpartition(".")[2].removeprefix("--"): path for path in known}
    close = difflib.get_close_matches(leaf, leaves, n=1)
    return f"; did you mean {leaves[close[0]]}?" if close else ""


def _presets() -> dict[str, Any]:
    """The files of `configs/` by name."""
    return {item.name: item for item in importlib.resources.files("vqgen.configs").iterdir()}


def find_preset(name: str) -> tuple[str, str]:
    """The name and text of a configuration file: a path, or a preset of `configs/` by name."""
    path = checked(Path, name, "--config")
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return str(path), read_text(path, MAX_YAML)
        except UserError as error:
            preset = f"; the preset is called {path.stem}" * (path.name in _presets())
            raise UsageError(f"--config: {error}{preset}") from error
    presets = _presets()
    if preset := presets.get(f"{name}.yaml"):
        return preset.name, preset.read_text(encoding="utf-8")
    known = sorted(file[:-5] for file in presets if file.endswith(".yaml"))
    closest = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0))
    among = f"closest presets: {closest} (of {len(known)} in configs/)"
    raise UsageError(f"--config: no file and no preset {name!r}; {among}")


@dataclass(frozen=True)
class Layer:
    """The options that one file or the command line gives: name -> (value, what errors call it), types unchecked.

    The words of the command line after an option are a tuple, which no YAML value is.
    """

    values: dict[str, tuple[Any, str]]
    written_by_us: bool = False
    """Version 0.1 wrote the options of every kind of a choice: those of kinds not selected are ignored."""
    chosen: bool = True
    """Whether the user wrote it: it is neither a preset nor a file of a program of ours."""


def read_file(config: type, name: str) -> Layer:
    """Options of a YAML file or preset."""
    file, text = find_preset(name)
    if not text.strip():  # a file of comments alone may be meant, an emptied one is not
        raise UsageError(f"{file}: the file is empty; restore it, or leave --config out")
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    known = {option.path: option for option in options(config)}
    sections = {path[:n] for path in known for n in range(1, len(path))}
    layer = Layer({}, text.startswith(MARK), file != f"{name}.yaml" and not text.startswith(WRITTEN))

    def walk(node: Any, path: tuple[str, ...]) -> None:
        if path in sections or not path:
            if node is None:
                return
            if not isinstance(node, dict):
                raise UsageError(f"{file}: {'.'.join(path) or 'the file'} is a {type(node).__name__}, expected keys")
            for key, value in node.items():
                walk(value, (*path, str(key)))
        elif path in known:
            layer.values[known[path].name] = (node, f"{file}: {'.'.join(path)}")
        elif not (layer.written_by_us and was_removed(path[-1], node, file)):
            names = [".".join(p) for p in [*known, *sections]]
            raise UsageError(f"{file}: unknown key {'.'.join(path)}{_suggest('.'.join(path), names)}")

    walk(tree or {}, ())
    if layer.written_by_us:  # of versions before 0.2, whose runs would be removed by their own configuration
        layer.values.pop("overwrite", None)
    return layer


def was_removed(name: str, value: Any, file: str) -> bool:
    """Whether `name` is an option of version 0.1 that is gone. Raises `UserError` where it had a value that matters."""
    if name not in REMOVED:
        return False
    if (allowed := REMOVED[name]) is not None and value not in allowed:
        raise UserError(f"{file}: {name} {value} was removed after version 0.1; use version 0.1, or start anew")
    return True


def read_arguments(config: type, arguments: Sequence[str]) -> tuple[Layer, list[str]]:
    """Options of the command line, and every `--config` in order."""
    known = {option.flag: option for option in options(config)}
    takes_bare = next((option for option in known.values() if option.positional), None)
    layer, files, bare, rest = Layer({}), list[str](), list[str](), list(arguments)
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
        if flag != "--config" and flag not in known and (negated not in known or not is_switch(known[negated].type)):
            every = [*known, "--config", "--threads", "--help", "--help-all", "--version"]
            raise UsageError(f"unknown option {flag}{_suggest(flag, every)}")
        option = known.get(flag) or known.get(negated or "")
        if option and is_switch(option.type):  # `--flip`, `--no-flip`, `--flip=false`
            if option.type is not bool and not has_value and rest[:1] in (["true"], ["false"]):
                has_value, value = True, rest.pop(0)  # one without a default always took a value
            chosen = checked(bool, value if has_value else True, flag)
            layer.values[option.name] = (chosen != (negated is not None), flag)
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
            former = layer.values[option.name][0] if option.repeatable and option.name in layer.values else ()
            layer.values[option.name] = ((*former, *words), flag)
    if takes_bare and bare:
        if takes_bare.name in layer.values:
            raise UsageError(f"{takes_bare.flag}: given twice, also as {bare[0]!r}; name all of them in one place")
        layer.values[takes_bare.name] = (bare, takes_bare.positional)
    return layer, files


def _typed(option: Option, value: Any, where: str) -> Any:
    """A value of a layer as its option's type. Raises `UsageError`."""
    return checked(option.type, from_words(option.type, list(value)) if isinstance(value, tuple) else value, where)


def merged(config: type, layers: Sequence[Layer]) -> dict[str, Any]:
    """Option name -> value; the later of several layers wins.

    An option of a kind that is not selected in the end is dropped where it fitted the kind selected up to its layer:
    a later one changed the kind. Else it raises `UsageError`.
    """
    selected: dict[str, Any] = {}
    known: list[dict[str, Option]] = []
    for layer in layers:
        for option in options(config):
            if option.selects and option.name in layer.values:
                selected[option.name] = _typed(option, *layer.values[option.name])
        known.append({option.name: option for option in options(config, selected)})
    values: dict[str, Any] = {}
    for layer, then in zip(layers, known):
        for name, (value, where) in layer.values.items():
            option = known[-1][name]
            if option.available:
                values[name] = _typed(option, value, where)
                if (
                    (other := INSTEAD.get(name))
                    and values[name] is not None
                    and layer.values.get(other, (None,))[0] is None
                ):
                    values.pop(other, None)
            elif then[name].available:
                _typed(then[name], value, where)
            elif not layer.written_by_us:
                choice = typing.cast(Choice, option.choice)
                flag, found = option_name(choice.selector), selected.get(choice.selector, choice.default)
                *first, last = option.kinds
                only = f"only {flag} {', '.join(first)}{' or ' if first else ''}{last} has this option"
                raise UsageError(f"{where}: {only}, found {flag} {found}; leave it out")
    return values
