"""One value of a configuration: what YAML or the command line says -> the type its option declares.

YAML 1.1 reads `no` as false, `1:30` as 90 and `1e-4` as text. Here the option's type decides what a word means.
"""

import functools
import re
import types
import typing
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class YamlLoader(yaml.SafeLoader):
    """YAML where `no` and `1:30` are text and 1e-4 is a number; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


YamlLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0].rpartition(":")[2] in ("null", "merge")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _first, _pattern in (
    ("bool", "tTfF", r"true|True|TRUE|false|False|FALSE"),
    ("int", "-+0123456789", r"[-+]?(0|[1-9][0-9]*)"),
    ("float", "-+.0123456789", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"),
    ("float", "-+.", r"[-+]?\.inf|\.nan"),
):
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


class YamlDumper(yaml.SafeDumper):
    """Quotes whatever either `YamlLoader` or any other reader of YAML would take for something else than text."""


YamlDumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + YamlLoader.yaml_implicit_resolvers.get(first, [])
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *YamlLoader.yaml_implicit_resolvers}
}


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """A type in the words of `--help` and of errors."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(hint))
    members = [kind for kind in kinds(hint) if kind is not type(None)]
    if members != [hint]:
        return " | ".join(type_name(kind) for kind in members)
    if typing.get_origin(hint) is list:
        return "list of " + type_name(typing.get_args(hint)[0])
    name: str = hint.__name__
    return {"Path": "path", "str": "text", "bool": "true or false"}.get(name, name)


def from_words(hint: Any, words: list[str]) -> Any:
    """What was typed for an option of this type, not checked yet; text stays as typed (`no` may be a name).

    A list is several words, or one that is a YAML list or, of numbers and the like, holds commas: a name or a path may
    have some of its own. `none` empties what may be empty.
    """
    members = kinds(hint)
    empty = (["null"],) if list[str] in members else (["null"], ["none"])  # a class may be called none
    if words in empty and type(None) in members:
        return None
    if any(typing.get_origin(kind) is list for kind in members):
        text = list[str] in members or list[Path] in members
        if len(words) == 1 and words[0].startswith("["):
            with suppress(yaml.YAMLError):
                return yaml.load(words[0], yaml.BaseLoader if text else YamlLoader)
        if text:
            return words
        return [_from_word(word) for word in (words[0].split(",") if len(words) == 1 else words)]
    if any(kind in (str, Path) or typing.get_origin(kind) is typing.Literal for kind in members):
        return words[0]
    return _from_word(words[0])


def _from_word(word: str) -> Any:
    with suppress(yaml.YAMLError):
        return yaml.load(word, YamlLoader) if word.strip() else word
    return word  # no YAML: stays text, for the type check to name


def _whole(value: Any) -> Any:
    """1e5, which people write for a number of steps, as an int; 1.5 is no count and stays."""
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if isinstance(value, (str, float)):
        with suppress(ValueError):
            return int(float(value)) if float(value).is_integer() else value
    return value


@functools.cache
def _parser(hint: Any):
    """A jsonargparse parser that checks values of one type; kept, because building one costs milliseconds."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("--value", type=hint)
    return parser


def checked(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, or a `UsageError` that says where it stands, what it is and what belongs there."""
    members = kinds(hint)
    found = value if isinstance(value, str) and value.strip() else repr(value)
    if bool in members and isinstance(value, str):
        value = _SWITCH.get(value.lower(), value)
    kind = next((item for item in members if typing.get_origin(item) is list), None)
    if kind is not None and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        value = [value]  # a list of one, as people write it in YAML
    if kind == list[str] and isinstance(value, list):
        value = [str(item) if type(item) is int else item for item in value]
    if int in members and float not in members:
        value = _whole(value)
    elif list[int] in members and isinstance(value, list):
        value = [_whole(item) for item in value]
    # jsonargparse would take None for any type, True for a literal 1, and the text "null" for None.
    if value is None or isinstance(value, bool):
        if type(value) in members:
            return value
    elif isinstance(value, str) and set(members) <= {str, type(None)}:
        return value
    elif isinstance(value, str) and set(members) <= {Path, type(None)}:
        if value:
            return Path(value)
    else:
        with suppress(Exception), redirect_stderr(StringIO()):
            return _parser(hint).parse_object({"value": value})["value"]
    raise UsageError(f"{where}: found {found}, expected {type_name(hint)}")
