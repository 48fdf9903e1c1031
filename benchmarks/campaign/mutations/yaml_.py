"""YAML: aliases, tags, and values as in JSON."""

from pathlib import Path
from random import Random

import yaml

from ..place import Place
from . import NotApplicable, mutation
from .records import changed, dump

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
"""Nine levels of nine aliases each: 387 million values."""
TAGGED = [
    "!!int abc", "!!float x", "!!bool 3", "!!timestamp 99", "!!binary '****'", "!!null x", "!!set [a]",
    "!!omap {a: 1}", "!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system",
    "!!python/tuple [1]", "!unknown x", "&a [*a]", "&a {a: *a}", "*nowhere", "{<<: 3}", "? [a, b]\n: 1", "2024-13-45",
    "2024-01-01", "0o17", "1:2:3", "~", "0x1F", "1_000", ".inf", ".nan", "1e3", "'a\\0b'", '"\\0"', '"\\ud800"',
    "|\n  text", "[", "{", "'", "- a\nb", "%YAML 9.9", "999999999999999999999999999999", "-1", "1e400", "yes", "=",
    "<<", "[[[[[[[[[1]]]]]]]]]",
]  # fmt: skip


@mutation("yaml")
def alias_bomb(path: Path, random: Random, place: Place) -> str:
    text = path.read_text(errors="replace")
    where = random.choice(["alone", "before", "value"])
    if where == "value":
        line = next((each for each in text.splitlines() if each.partition(": ")[2]), "a: 1")
        text = text.replace(line, f"{line.partition(': ')[0]}: *i", 1)
    path.write_text(BOMB if where == "alone" else BOMB + text)
    return f"an alias bomb ({where})"


@mutation("yaml")
def merge_bomb(path: Path, random: Random, place: Place) -> str:
    lines = ["a0: &a0 {k0: 1}"] + [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 1}}" for n in range(1, 30)]
    path.write_text("\n".join(lines) + "\n")
    return "a bomb of merge keys"


@mutation("yaml")
@mutation("yaml")
def tagged(path: Path, random: Random, place: Place) -> str:
    """One value replaced by YAML that is hard to read."""
    lines = path.read_text(errors="replace").splitlines()
    rows = [number for number, each in enumerate(lines) if each.partition(": ")[2]]
    if not rows:
        raise NotApplicable
    number, found = random.choice(rows), random.choice(TAGGED)
    lines[number] = f"{lines[number].partition(': ')[0]}: {found}"
    path.write_text("\n".join(lines) + "\n")
    return f"line {number + 1} is {lines[number]!r}"


@mutation("yaml")
@mutation("yaml")
@mutation("yaml")
def value(path: Path, random: Random, place: Place) -> str:
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise NotApplicable from error
    text = changed(tree, random, place)
    dump(path, tree)  # JSON is YAML, but for numbers such as NaN, which are text then
    return text


@mutation("yaml")
def root(path: Path, random: Random, place: Place) -> str:
    found = random.choice(
        [*TAGGED, "3", "[1, 2]", "null", "", "---\na: 1\n---\nb: 2", "\t", "a: b: c", "{1: 2}", "? {}\n: 1"]
    )
    path.write_text(found)
    return f"the whole file is {found!r}"


@mutation("yaml")
def repeated_key(path: Path, random: Random, place: Place) -> str:
    lines = path.read_text(errors="replace").splitlines()
    path.write_text("\n".join([*lines, *lines]) + "\n")
    return "every key twice"


@mutation("yaml")
def long(path: Path, random: Random, place: Place) -> str:
    with path.open("a") as file:
        file.write(
            random.choice(
                ["\n# " + "x" * 20_000_000, "\nunknown: " + "[" + "1, " * 300_000 + "1]", "\n" + "k" * 100_000 + ": 1"]
            )
        )
    return "very long"
