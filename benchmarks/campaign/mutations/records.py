"""JSON and JSON lines: values of wrong types, extreme numbers, paths, nesting, and text that is no text."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ..place import Place
from . import NotApplicable, mutation

DEEP = 20_000
"""Levels of nesting."""


def hostile_values(place: Place) -> list[Any]:
    """Values for any key."""
    numbers = [0, -1, 1, 2, 7, 2**31, 2**63, 2**70, -(2**70), 10**12, 10**18, 0.5, -0.0, 1e308, math.nan, math.inf]
    texts = ["", "x", "\0", "a\nb", "\ud800", "1", "nan", "x" * 10_000, "é" * 300, "\x1b[31m", "NaN", "true"]
    paths = [
        "../victim.txt",
        "../../victim.txt",
        str(place.victims[0]),
        "/etc/passwd",
        "/dev/zero",
        ".",
        "..",
        "a/../b",
    ]
    return [
        *numbers,
        *texts,
        *paths,
        None,
        True,
        False,
        [],
        {},
        [None],
        [[]],
        [1, 2, 3],
        ["../victim.txt"],
        {"a": 1},
        [0] * 1000,
        [{}],
        {"": ""},
        [1e308, -1e308],
        ["a", 1],
    ]


def leaves(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places of all values, those that hold others included; of long lists the first few."""
    if here:
        yield here
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*here, key))


def parent(tree: Any, where: tuple[Any, ...]) -> Any:
    for key in where[:-1]:
        tree = tree[key]
    return tree


def changed(tree: Any, random: Random, place: Place) -> str:
    """Change one value or key of a tree in place, and say which."""
    places = list(leaves(tree))
    if not places:
        raise NotApplicable
    where = random.choice(places)
    holder, key, name = parent(tree, where), where[-1], ".".join(map(str, where))
    what = random.choice(["value"] * 8 + ["delete", "rename", "add", "repeat", "text", "digit"])
    if what == "delete":
        del holder[key]
        return f"{name} removed"
    if what == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
        return f"{name} renamed"
    if what == "add" and isinstance(holder, dict):
        holder[random.choice(["unknown", "former", "n", "steps", "__class__", ""])] = random.choice(
            hostile_values(place)
        )
        return f"a key added beside {name}"
    if what == "repeat" and isinstance(holder[key], list) and holder[key]:
        holder[key] = holder[key] * random.choice([2, 1000])
        return f"{name} repeated"
    if what == "text":
        holder[key] = json.dumps(holder[key])
        return f"{name} as text"
    if what == "digit" and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = holder[key] + random.choice([1, -1, 1000, 0.5])
        return f"{name} is {holder[key]}"
    holder[key] = random.choice(hostile_values(place))
    return f"{name} is {repr(holder[key])[:60]}"


def dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree), encoding="utf-8", errors="surrogatepass")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise NotApplicable from error


@mutation("json")
@mutation("json")
@mutation("json")
@mutation("json")
def value(path: Path, random: Random, place: Place) -> str:
    tree = _read(path)
    text = changed(tree, random, place)
    dump(path, tree)
    return text


@mutation("json")
def root(path: Path, random: Random, place: Place) -> str:
    found = random.choice(hostile_values(place))
    dump(path, found)
    return f"the whole file is {repr(found)[:60]}"


@mutation("json")
def samples_list(path: Path, random: Random, place: Place) -> str:
    """Lists of what may be removed and how much there is: the records of samples and pictures."""
    tree = _read(path)
    if not path.name.startswith(("samples", "metrics")) or not isinstance(tree, dict):
        raise NotApplicable
    victims = ["../victim.txt", "../../victim.txt", str(place.victims[0]), "thesis.txt", "../elsewhere/00000.png", ".."]
    key = random.choice(["former", "former", "n", "images", "files", "class_names", "layout", "labels"])
    tree[key] = {
        "former": [random.choice(victims)],
        "n": random.choice([10**12, 10**18, -1, 2.5, "8", 2**70]),
        "images": [{"file": random.choice(victims), "label": 0, "class": None}],
        "files": [random.choice(victims)],
        "class_names": ["../../elsewhere", "/"],
        "layout": random.choice(["folders", "labels", "x", 3]),
        "labels": random.choice([[], [10**9], [-5], ["a"], [2**70], [1.5]]),
    }[key]
    dump(path, tree)
    return f"{key} is {tree[key]!r}"


@mutation("json", "yaml")
def nested(path: Path, random: Random, place: Place) -> str:
    opening, closing = random.choice([("[", "]"), ('{"a":', "}")])
    inside = "1" if opening != "[" else ""
    path.write_text(opening * DEEP + inside + closing * DEEP * random.choice([0, 1]))
    return f"{DEEP} levels of {opening}"


@mutation("json")
def nested_value(path: Path, random: Random, place: Place) -> str:
    text = path.read_text(errors="replace")
    if not text.startswith("{"):
        raise NotApplicable
    path.write_text('{"deep": ' + "[" * DEEP + "]" * DEEP + "," + text[1:])
    return f"a value of {DEEP} levels"


@mutation("json")
def duplicate_keys(path: Path, random: Random, place: Place) -> str:
    tree, text = _read(path), path.read_text()
    if not isinstance(tree, dict) or not tree:
        raise NotApplicable
    key = random.choice(sorted(tree))
    extra = f"{json.dumps(key)}: {json.dumps(random.choice(hostile_values(place)))}"
    path.write_text(f"{text.rstrip()[:-1]}, {extra}}}", errors="surrogatepass")
    return f"{key} twice"


@mutation("json", "yaml", "jsonl")
def no_text(path: Path, random: Random, place: Place) -> str:
    data = path.read_bytes()
    cut = random.randrange(len(data) + 1)
    what = random.choice([b"\xff\xfe", b"\0", b"\xc3(", b"\xed\xa0\x80", b"\x1b[2J", b"\xe2\x80\xa8"])
    path.write_bytes(data[:cut] + what + data[cut:])
    return f"{what!r} at byte {cut}"


@mutation("json", "jsonl")
def endless_number(path: Path, random: Random, place: Place) -> str:
    """An integer of more digits than Python converts, and a fraction beyond float64."""
    tree: Any = _read(path) if path.suffix == ".json" else {"step": 1}
    keys = sorted(tree) if isinstance(tree, dict) else []
    if not keys:
        raise NotApplicable
    number = random.choice(["9" * 5000, "1e9999", "-1e9999", "1" + "0" * 400, "9" * 5000 + ".0"])
    key = random.choice(keys)
    tree[key] = "HERE"
    path.write_text(json.dumps(tree).replace('"HERE"', number) + "\n")
    return f"{key} is a number of {len(number)} characters"


@mutation("jsonl")
@mutation("jsonl")
def line(path: Path, random: Random, place: Place) -> str:
    lines = path.read_text(errors="replace").splitlines()
    if not lines:
        raise NotApplicable
    number = random.randrange(len(lines))
    what = random.choice(["value", "value", "other", "cut", "twice", "blank", "remove"])
    if what == "value":
        row = json.loads(lines[number])
        text = changed(row, random, place)
        lines[number] = json.dumps(row)
    elif what == "other":
        lines[number] = text = random.choice(
            ["3", "null", "[1]", '"a"', "NaN", "{}", "[" * DEEP, "{", '{"step": null}']
        )
    elif what == "cut":
        lines[number], text = lines[number][: len(lines[number]) // 2], "cut"
    elif what == "twice":
        lines.insert(number, lines[number])
        text = "twice"
    elif what == "blank":
        lines[number] = text = ""
    else:
        del lines[number]
        text = "removed"
    path.write_text("\n".join(lines) + random.choice(["\n", ""]), errors="surrogatepass")
    return f"line {number + 1}: {text[:60]}"


@mutation("jsonl")
def endless_line(path: Path, random: Random, place: Place) -> str:
    with path.open("a") as file:
        file.write('{"step": "' + "x" * random.choice([100_000, 30_000_000]) + '"}')
    return "a very long line appended"
