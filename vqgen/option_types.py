"""Conversion of a value from YAML or the command line to the type that its option declares."""

import operator
import os
import re
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError
from .files.yaml_text import parse_yaml

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def kinds(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def is_switch(hint: Any) -> bool:
    """Whether an option of this type is on by its name alone: a bool, or None where the program decides."""
    return bool in kinds(hint) and set(kinds(hint)) <= {bool, type(None)}


def type_name(hint: Any) -> str:
    """A type as errors name it."""
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
    """Parse words of the command line for an option of this type; the result is not checked yet.

    Text is kept as typed. A list is several words, one word that is a YAML list, or, except for text and paths, one
    word with commas. `none` is None where the option may be None.
    """
    members = kinds(hint)
    empty = (["null"],) if list[str] in members else (["null"], ["none"])  # a class may be called none
    if words in empty and type(None) in members:
        return None
    if any(typing.get_origin(kind) is list for kind in members):
        text = list[str] in members or list[Path] in members
        if len(words) == 1 and words[0].startswith("["):
            with suppress(yaml.YAMLError):
                return parse_yaml(words[0], as_text=text)
        if text:
            return words
        return [_from_word(word) for word in (words[0].split(",") if len(words) == 1 else words)]
    if any(kind in (str, Path) or typing.get_origin(kind) is typing.Literal for kind in members):
        return words[0]
    return _from_word(words[0])


def _from_word(word: str) -> Any:
    with suppress(yaml.YAMLError):
        return parse_yaml(word) if word.strip() else word
    return word  # not YAML: kept as text for the message of the type check


def _as_int(value: Any) -> int:
    """1e5, as people write a number of steps, is an int; 1.5 is none. Raises `ValueError` or `TypeError`."""
    with suppress(ValueError, TypeError):
        return int(value) if isinstance(value, str) else operator.index(value)
    number = float(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _converted(hint: Any, value: Any) -> Any:
    """`value` as `hint`. Raises `ValueError`, `TypeError` or `OverflowError` where it is of another type."""
    members = kinds(hint)
    if len(members) > 1:
        exact = next((kind for kind in members if type(value) is kind), None)
        if exact:
            return value
        for kind in members:
            with suppress(ValueError, TypeError, OverflowError):
                return _converted(kind, value)
    elif hint is type(None) and value is None:
        return None
    elif typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            value = [value]  # a list of one, as people write it in YAML
        if isinstance(value, (list, tuple)):
            return [_converted(item, str(each) if item is str and type(each) is int else each) for each in value]
    elif typing.get_origin(hint) is typing.Literal:
        for allowed in typing.get_args(hint):
            if not isinstance(value, bool) and str(value) == str(allowed):
                return allowed
    elif hint is bool and str(value).lower() in _SWITCH:
        return _SWITCH[str(value).lower()]
    elif hint is Path and value and isinstance(value, (str, Path)):
        # A shell leaves ~/ in --output=~/runs, and nobody reads a configuration before us.
        return Path(os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value)
    elif hint is str and isinstance(value, str):
        return value
    elif hint in (int, float):
        number = _from_word(value) if isinstance(value, str) else value
        if not isinstance(number, bool):
            return _as_int(number) if hint is int else float(number)
    raise ValueError


def problem_of(value: Any) -> str:
    """Why a text cannot be used anywhere, or a path not be a file's; empty where it can."""
    text = str(value)
    if re.search(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        return "which has a control character"
    if re.search(r"[\ud800-\udfff]", text):
        return "which is not UTF-8; rename it"
    longest = max((len(part.encode()) for part in value.parts), default=0) if isinstance(value, Path) else 0
    if longest > 255 or (isinstance(value, Path) and len(text.encode()) > 4095):
        return "which is longer than the name of a file can be"
    return ""


def checked(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`, or a `UsageError` that says where it stands, what it is and what belongs there."""
    try:
        found = _converted(hint, value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        shown = value if isinstance(value, str) and value.strip() else repr(value)
        raise UsageError(f"{where}: found {shown[:200]}, expected {type_name(hint)}") from None
    for each in found if isinstance(found, list) else [found]:
        if isinstance(each, (str, Path)) and (problem := problem_of(each)):
            raise UsageError(f"{where}: found {str(each)[:200]!r}, {problem}")
    return found
