"""Values on the command line. The `path` of these mutations is a file of the words, one a line, which they change."""

import os
from collections.abc import Sequence
from pathlib import Path
from random import Random

from ..place import Place
from . import NotApplicable, mutation
from .yaml_ import BOMB

VALUES = [
    "", "0", "-1", "1", "2", "abc", "1e30", "1e3", "1e999", "nan", "inf", "-inf", str(2**31), str(2**63), str(2**64),
    str(2**70), str(-(2**70)), str(10**18), "9" * 5000, "0x10", "1_000", "1.5", "true", "null", "~", "[1, 2]",
    "[" * 1000, "{a: 1}", "*a", "&a [*a]", "!!int abc", "!!python/object/apply:os.system ['touch pwned']", "é" * 200,
    "x" * 300, "x" * 100_000, "../victim.txt", "/dev/zero", "/dev/null", "/", ".", "..", "~nobody/x", "a\tb",
    "\x1b[31m", "\udcff\udcfe", "-", "--", "--help=", "=", "١", "1 2", "'", '"', "%s", "$HOME", "demo", "auto",
    "cuda", "cuda:99", "mps", "meta", "none", "../elsewhere", "victim.txt/x", "images/train", "images", "tokenizer",
    "prior", "codes", BOMB, "http://localhost/x",
]  # fmt: skip
# A large number here is no error: it only takes long.
LONG = {
    "--steps",
    "--n",
    "--num-per-class",
    "--views",
    "--epochs",
    "--pictures",
    "--validation-images",
    "--workers",
    "--at",
}


def read(path: Path) -> list[str]:
    return os.fsdecode(path.read_bytes()).split("\x01")


def write(path: Path, words: Sequence[str]) -> None:
    path.write_bytes(os.fsencode("\x01".join(words)))


def _harmless(option: str, value: str) -> bool:
    """Whether it is a valid request for more work than a campaign has time for."""
    try:
        return option in LONG - {"--workers"} and 100 < float(value) < 1e19
    except ValueError:
        return False


@mutation("words")
@mutation("words")
@mutation("words")
@mutation("words")
def option_value(path: Path, random: Random, place: Place) -> str:
    """An option of the program, given or not, with a hostile value."""
    words, options = read(path), (path.parent / "options.txt").read_text().split()
    option, value = random.choice(options), random.choice(VALUES)
    if _harmless(option, value):
        raise NotApplicable
    if option == "--workers" and value in {str(2**31), str(10**18)} and random.random() < 0.5:
        value = "1e30"
    write(path, [*words, option, value])
    return f"{option} {value[:40]!r}"


@mutation("words")
def given_value(path: Path, random: Random, place: Place) -> str:
    """Another value for an option that the command line has."""
    words = read(path)
    places = [i for i, word in enumerate(words[:-1]) if word.startswith("--") and not words[i + 1].startswith("--")]
    if not places:
        raise NotApplicable
    at, value = random.choice(places), random.choice(VALUES)
    if _harmless(words[at], value):
        raise NotApplicable
    words[at + 1] = value
    write(path, words)
    return f"{words[at]} {value[:40]!r}"


@mutation("words")
def shape_of_the_line(path: Path, random: Random, place: Place) -> str:
    words = read(path)
    what = random.choice(["lose", "repeat", "swap", "unknown", "end", "word", "equals"])
    at = random.randrange(1, len(words))
    if what == "lose":
        del words[at]
    elif what == "repeat":
        words.insert(at, words[at])
    elif what == "swap":
        other = random.randrange(1, len(words))
        words[at], words[other] = words[other], words[at]
    elif what == "equals" and words[at].startswith("--") and at + 1 < len(words):
        words[at : at + 2] = [f"{words[at]}={words[at + 1]}"]
    else:
        words.insert(at, {"unknown": "--unknown-option", "end": "--", "word": "word"}.get(what, "--"))
    write(path, words)
    return f"{what} at word {at}"


@mutation("words")
def config_file(path: Path, random: Random, place: Place) -> str:
    """--config with what is no configuration."""
    value = random.choice(
        [
            "/dev/zero", "/dev/stdin", ".", "nowhere.yaml", "", "images/train", "vqgan", "../victim.txt", "pipe",
            "x" * 300, "a\udcffb", "~", "/proc/self/mem", "/proc/self/environ",
        ]
    )  # fmt: skip
    if value == "pipe":
        os.mkfifo(place.work / "pipe")
    write(path, [*read(path), "--config", value])
    return f"--config {value[:40]!r}"
