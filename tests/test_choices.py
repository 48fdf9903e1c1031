"""Sections whose options depend on a choice, on the command line, in YAML and in what vqgen writes."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from helpers.errors import refusal

from vqgen.config import as_dict, build, from_dict, options, parse, read_saved, save, values_of
from vqgen.config_layers import MARK
from vqgen.errors import UsageError
from vqgen.help import help_text
from vqgen.options import Count, Options, choice


@dataclass
class Lookup(Options):
    """Nearest code of a table."""

    kind: ClassVar[str] = "lookup"
    size: Count = 8
    """How many codes."""
    decay: float = 0.99
    """Decay of the averages."""


@dataclass
class Rounded(Options):
    """Rounding to levels."""

    kind: ClassVar[str] = "rounded"
    levels: list[int] = field(default_factory=lambda: [8, 5])
    """Levels of each dimension."""
    size: Count = 16
    """How many codes, about."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.levels) < 2:
            raise UsageError(f"--levels: found {self.levels}, expected at least 2")


@dataclass
class Stacked(Lookup):
    """Lookups of what is left."""

    kind: ClassVar[str] = "stacked"
    size: Count = 4
    """How many codes at each depth."""
    depth: Count = 2
    """How many."""


KINDS = {"lookup": Lookup, "rounded": Rounded, "stacked": Stacked}


@dataclass
class Program:
    """A program with a choice."""

    output: str
    """Where to."""
    code: Lookup | Rounded = choice("code_kind", KINDS, default="lookup")
    """Kind of code."""
    seed: int = 0
    """Seed of everything."""


def program(*words: str) -> Program:
    return parse(Program, ["--output", "o", *words])


def file(folder: Path, text: str, name: str = "c.yaml") -> list[str]:
    (folder / name).write_text(text)
    return ["--config", str(folder / name)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", Lookup()),
        ("--code-kind rounded", Rounded()),
        ("--code-kind=rounded --levels 4 4 --size 3", Rounded(levels=[4, 4], size=3)),
        ("--levels 4,4 --code-kind rounded", Rounded(levels=[4, 4])),
        ("--code-kind stacked --decay 0.5 --depth 3", Stacked(decay=0.5, depth=3)),
        ("--size 9", Lookup(size=9)),
    ],
)
def test_the_selector_decides_the_dataclass(words: str, expected: Any) -> None:
    found = program(*words.split()).code
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("--levels 4 4", ("--levels: ", "--code-kind rounded", "found --code-kind lookup")),
        ("--code-kind rounded --decay 0.5", ("--decay: ", "lookup or stacked", "found --code-kind rounded")),
        ("--code-kind round", ("--code-kind: found round, expected lookup | rounded | stacked",)),
        ("--code-kind rounded --level 4", ("unknown option --level", "--levels")),
        ("--code-kind rounded --levels 1", ("--levels: found [1]",)),
        ("--code-kind rounded --levels x", ("--levels: found ['x'], expected list of int",)),
        ("--size 0", ("--size: found 0, expected at least 1",)),
    ],
)
def test_options_of_other_kinds_are_refused(words: str, facts: tuple[str, ...]) -> None:
    message = refusal(program, *words.split())
    assert message.startswith(facts[0]) and all(fact in message for fact in facts)


def test_yaml_selects_in_the_section(tmp_path: Path) -> None:
    assert program(*file(tmp_path, "code: {code_kind: rounded, levels: [4, 3]}")).code == Rounded(levels=[4, 3])
    assert program(*file(tmp_path, "code: {code_kind: rounded, levels: [4]}"), "--size", "2").code.size == 2
    message = refusal(program, *file(tmp_path, "code: {code_kind: rounded, depth: 2}"))
    assert message.startswith(f"{tmp_path / 'c.yaml'}: code.depth: ") and "stacked" in message
    assert "code.depth" in refusal(program, *file(tmp_path, "code: {dept: 2}"))


def test_a_later_file_or_option_changes_the_kind(tmp_path: Path) -> None:
    first = file(tmp_path, "code: {size: 100, decay: 0.5}", "first.yaml")
    second = file(tmp_path, "code: {code_kind: rounded}", "second.yaml")
    assert program(*first, *second).code == Rounded(size=100)
    assert program(*first, "--code-kind", "rounded").code == Rounded(size=100)
    assert program("--code-kind", "stacked", *first).code == Stacked(size=100, decay=0.5)
    assert program(*second, *first, "--code-kind", "lookup").code == Lookup(size=100, decay=0.5)
    # After the kind was changed, the options of the former one are an error again.
    assert "code.decay" in refusal(program, *second, *first)
    assert "--decay" in refusal(program, *first, *second, "--decay", "0.1")
    # What a file says for another kind is checked all the same.
    wrong = file(tmp_path, "code: {decay: fast}", "wrong.yaml")
    assert "code.decay: found fast" in refusal(program, *wrong, *second)


def test_a_file_may_leave_the_selection_to_the_command_line(tmp_path: Path) -> None:
    assert program(*file(tmp_path, "code: {levels: [7]}"), "--code-kind", "rounded").code == Rounded(levels=[7])


@pytest.mark.parametrize("code", [Lookup(size=3), Rounded(levels=[5]), Stacked(depth=4)])
def test_what_is_saved_reads_back_the_same(tmp_path: Path, code: Any) -> None:
    config = Program("o", code, seed=3)
    plain = as_dict(config)
    assert plain["code"].pop("code_kind") == code.kind and plain["code"] == as_dict(code)
    assert values_of(config) == {"output": "o", "code_kind": code.kind, **as_dict(code), "seed": 3}
    path = tmp_path / "config.yaml"
    save(config, path, MARK)
    assert parse(Program, ["--config", str(path)]) == config
    assert read_saved(path, Program) == values_of(config)
    assert build(Program, values_of(config)) == config
    assert from_dict(Program, json.loads(json.dumps(as_dict(config))), "f") == config


EVERYTHING = {"code_kind": "rounded", "levels": [4], "size": 5, "decay": 0.9, "depth": 1}


def test_files_of_0_1_hold_the_options_of_every_kind(tmp_path: Path) -> None:
    assert from_dict(Program, {"output": "o", "code": EVERYTHING}, "vqgen.json").code == Rounded([4], 5)
    assert from_dict(Program, {"output": "o", "code": {"size": 5, "depth": 1}}, "vqgen.json").code == Lookup(5)
    path = tmp_path / "config.yaml"
    path.write_text(MARK + yaml.dump({"output": "o", "code": EVERYTHING}))
    assert read_saved(path, Program) == {"output": "o", "code_kind": "rounded", "levels": [4], "size": 5}
    assert parse(Program, ["--config", str(path)]).code == Rounded([4], 5)
    path.write_text(yaml.dump({"output": "o", "code": EVERYTHING}))
    assert "code.d" in refusal(parse, Program, ["--config", str(path)])


@pytest.mark.parametrize(
    ("tree", "facts"),
    [
        ({"output": "o", "code": {"code_kind": "other"}}, ("vqgen.json: ", "code_kind", "other")),
        ({"output": "o", "code": {"nothing": 1}}, ("vqgen.json: ", "nothing")),
        ({"output": "o", "code": 3}, ("vqgen.json: ", "found 3")),
    ],
)
def test_a_description_that_does_not_fit_names_its_file(tree: Any, facts: tuple[str, ...]) -> None:
    message = refusal(from_dict, Program, tree, "vqgen.json")
    assert message.startswith(facts[0]) and all(fact in message for fact in facts)


def test_options_removed_since_0_1_are_read_at_values_that_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    old = "output: o\ncode: {size: 3}\n"
    path.write_text(f"{MARK}{old}channels_last: true\ngan: {{gan_plateau: 0.01}}\n")
    # A section that is gone as a whole is unknown; its options in a section that stays are not.
    assert "gan" in refusal(read_saved, path, Program)
    path.write_text(f"{MARK}{old}channels_last: true\nkeep_share: null\ngan_start_at: step\n")
    assert read_saved(path, Program) == {"output": "o", "size": 3}
    path.write_text(f"{MARK}{old}gan_start_at: plateau\n")
    assert all(fact in refusal(read_saved, path, Program) for fact in (str(path), "gan_start_at", "plateau"))
    path.write_text(f"{old}channels_last: true\n")
    assert "channels_last" in refusal(parse, Program, ["--config", str(path)])
    assert "removed" in refusal(program, "--channels-last")


def test_options_are_listed_once_with_their_kinds() -> None:
    found = {option.name: option for option in options(Program)}
    assert list(found) == ["output", "code_kind", "size", "decay", "levels", "depth", "seed"]
    assert found["size"].kinds == ("lookup", "rounded", "stacked") and found["size"].default == 8
    assert found["levels"].kinds == ("rounded",) and not found["levels"].available
    assert found["code_kind"].path == ("code", "code_kind") and found["code_kind"].help == "Kind of code."
    stacked = {option.name: option for option in options(Program, {"code_kind": "stacked"})}
    assert stacked["size"].default == 4 and stacked["size"].help == "How many codes at each depth."
    assert [name for name, option in stacked.items() if not option.available] == ["levels"]


def test_help_lists_the_kinds_and_the_options_of_each() -> None:
    text = help_text("vqgen-x", "Do.", Program)
    assert "--code-kind lookup|rounded|stacked  (default lookup)" in text
    assert "rounded  Rounding to levels." in text
    assert "--levels INT ...  (only rounded; default 8 5)" in text
    assert "--decay NUMBER  (only lookup, stacked; default 0.99)" in text


def test_help_shows_an_option_as_each_kind_declares_it() -> None:
    text = " ".join(help_text("vqgen-x", "Do.", Program, everything=True).split())
    assert "--size INT (only lookup; at least 1; default 8) How many codes. --size" in text
    assert "--size INT (only rounded; at least 1; default 16) How many codes, about. --size" in text
    assert "--size INT (only stacked; at least 1; default 4) How many codes at each depth. --decay" in text
    assert text.count("--decay NUMBER") == 1  # two kinds declare it alike


def test_sections_that_share_an_option_name_are_an_error_of_the_program() -> None:
    @dataclass
    class Deep(Options):
        """A section with the name of an option that one kind has."""

        depth: Count = 3
        """Layers."""

    @dataclass
    class Clash(Program):
        """A program with both."""

        network: Deep = field(default_factory=Deep)
        """Network."""

    with pytest.raises(ValueError, match=r"^--depth .*Stacked \(code\.depth\) and Deep \(network\.depth\)"):
        parse(Clash, ["--output", "o"])


def test_a_literal_of_a_description_is_checked() -> None:
    @dataclass
    class Fitted:
        """A description with a literal."""

        fit: Literal["crop", "pad"] = "crop"
        """How images are fitted."""

    assert from_dict(Fitted, {"fit": "pad"}, "vqgen.json").fit == "pad"
    message = refusal(from_dict, Fitted, {"fit": "stretch"}, "vqgen.json")
    assert message.startswith("vqgen.json: fit: found 'stretch', expected crop | pad")


def test_a_default_of_another_kind_than_the_first(tmp_path: Path) -> None:
    @dataclass
    class Inner:
        """A section with a choice."""

        code: Lookup | Rounded = choice("code_kind", KINDS, default="rounded")
        """Kind of code."""

    @dataclass
    class Outer:
        """A configuration with such a section, and defaults of its own."""

        inner: Inner = field(default_factory=lambda: Inner(Stacked(depth=7)))
        mode: Literal["a", "b"] = "a"
        """A mode."""

    assert parse(Outer, []).inner.code == Stacked(depth=7)
    assert parse(Outer, ["--code-kind", "rounded"]).inner.code == Rounded()
    assert parse(Outer, ["--depth", "3"]).inner.code == Stacked(depth=3)
    assert parse(Outer, file(tmp_path, "inner: {code: {code_kind: lookup}}")).inner.code == Lookup()
    path = tmp_path / "saved.yaml"
    save(Outer(), path)
    assert parse(Outer, ["--config", str(path)]) == Outer()
