"""vqgen/config.py: dataclasses <-> YAML <-> command line, and what it says when something does not fit."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from helpers.errors import refusal
from hypothesis import given
from hypothesis import strategies as st

from vqgen.config import as_dict, build, command, from_dict, one_line, options, parse, read_saved, save, values_of
from vqgen.errors import UsageError, UserError
from vqgen.help import help_text
from vqgen.options import Count, Options, Range, Share
from vqgen.tokenizer.train import TokenizerTraining

ROOT = Path(__file__).parents[1]


@dataclass
class Inner:
    """A section."""

    steps: int = 10
    """How many steps."""
    lr: float = 1e-3
    """Learning rate."""
    size: list[int] = field(default_factory=lambda: [32, 32])
    """Height and width."""
    rates: list[float] = field(default_factory=list)
    """Some rates."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--steps: found {self.steps}, expected at least 1")


@dataclass
class Example:
    """A program's configuration."""

    output: Path
    """Where it
    goes."""
    name: str = "plain"
    """A name."""
    title: str | None = None
    """A title, if any."""
    model: Path | None = None
    """A folder, if any."""
    limit: int | None = None
    """A limit, if any."""
    flip: bool = False
    """Mirror."""
    ema: bool = True
    """Average."""
    precision: Literal["no", "bf16", "auto"] = "auto"
    """Precision."""
    channels: Literal[1, 3] = 3
    """Channels."""
    class_: list[str] | None = field(default=None, metadata={"repeatable": True})
    """Classes."""
    files: list[Path] = field(default_factory=list)
    """Files."""
    scale: float | Literal["auto"] = "auto"
    """A scale."""
    inner: Inner = field(default_factory=lambda: Inner(steps=20))


def example(*words: str) -> Example:
    return parse(Example, ["--output", "o", *words])


def in_file(tmp_path: Path, text: str, *words: str) -> Example:
    (tmp_path / "c.yaml").write_text(text)
    return parse(Example, ["--config", str(tmp_path / "c.yaml"), "--output", "o", *words])


def test_defaults_sections_and_option_names() -> None:
    config = example()
    assert config == Example(output=Path("o"))
    assert config.inner.steps == 20  # the section's default factory, not its class, has the last word
    found = {option.flag: option for option in options(Example)}
    assert list(found)[-4:] == ["--steps", "--lr", "--size", "--rates"]
    assert found["--steps"].path == ("inner", "steps") and found["--steps"].default == 20
    assert found["--output"].help == "Where it goes."
    assert found["--class"].path == ("class",)


def test_a_list_that_is_given_in_several_places_is_one(tmp_path: Path) -> None:
    assert example("--class", "cat", "dog", "--scale", "1", "--class=bird").class_ == ["cat", "dog", "bird"]
    assert in_file(tmp_path, "class: [horse]", "--class", "cat", "--class", "dog").class_ == ["cat", "dog"]
    assert example("--rates", "1", "--rates", "2", "3").inner.rates == [2.0, 3.0], "it is not repeatable"
    assert example("--limit", "1", "--limit", "2").limit == 2


def test_defaults_are_not_shared_between_configurations() -> None:
    first = example()
    first.inner.size.append(3)
    assert example().inner.size == [32, 32]


def test_help_texts_of_a_base_class_are_found() -> None:
    @dataclass
    class Child(Inner):
        """Derived."""

        extra: int = 1
        """One more."""

    texts = {option.name: option.help for option in options(Child)}
    assert texts["steps"] == "How many steps." and texts["extra"] == "One more."


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--steps 7", "inner.steps", 7),
        ("--steps=7", "inner.steps", 7),
        ("--steps 1e3", "inner.steps", 1000),
        ("--steps 2.0", "inner.steps", 2),
        ("--limit -1", "limit", -1),
        ("--limit=none", "limit", None),
        ("--limit null", "limit", None),
        ("--lr 1e-4", "inner.lr", 1e-4),
        ("--lr -3", "inner.lr", -3.0),
        ("--size 28 30", "inner.size", [28, 30]),
        ("--size 28,30", "inner.size", [28, 30]),
        ("--size=28,30", "inner.size", [28, 30]),
        ("--size [28,30]", "inner.size", [28, 30]),
        ("--size 1e3 2", "inner.size", [1000, 2]),
        ("--rates 1 1e-4", "inner.rates", [1.0, 1e-4]),
        ("--rates []", "inner.rates", []),
        ("--class 3", "class_", ["3"]),
        ("--class no 3 null", "class_", ["no", "3", "null"]),
        ("--class 'coats, grey' '[03]' '#1'", "class_", ["coats, grey", "[03]", "#1"]),
        ("--class '[no, 03]'", "class_", ["no", "03"]),
        ("--class dress,coat", "class_", ["dress,coat"]),  # for the program that knows the names
        ("--files 'a, b.png' '# 3'", "files", [Path("a, b.png"), Path("# 3")]),
        ("--class 'ankle boot' t-shirt/top", "class_", ["ankle boot", "t-shirt/top"]),
        ("--class null", "class_", None),
        ("--class none", "class_", ["none"]),
        ("--name no", "name", "no"),
        ("--name 1e3", "name", "1e3"),
        ("--name null", "name", "null"),
        ("--name ''", "name", ""),
        ("--name 'a: b # c'", "name", "a: b # c"),
        ("--name=--odd", "name", "--odd"),
        ("--title none", "title", None),
        ("--model x/y", "model", Path("x/y")),
        ("--model=~/x", "model", Path.home() / "x"),
        ("--model=./~/x", "model", Path("~/x")),
        ("--files ~/x ~", "files", [Path.home() / "x", Path("~")]),
        ("--precision no", "precision", "no"),
        ("--channels 1", "channels", 1),
        ("--scale 2", "scale", 2.0),
        ("--scale auto", "scale", "auto"),
        ("--flip", "flip", True),
        ("--no-flip", "flip", False),
        ("--flip=false", "flip", False),
        ("--flip=no", "flip", False),
        ("--flip --no-flip", "flip", False),
        ("--no-ema", "ema", False),
        ("--steps 7 --steps 8", "inner.steps", 8),
    ],
)
def test_the_command_line_reads(words: str, path: str, value: Any) -> None:
    found: Any = example(*shlex.split(words))
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@dataclass
class Bare:
    """A configuration with words that belong to no option."""

    files: list[str] = field(metadata={"positional": "FILES"})
    """Some files."""
    flip: bool = False
    """Mirror."""
    steps: int = 1
    """How many steps."""
    size: list[int] = field(default_factory=list)
    """Height and width."""


@pytest.mark.parametrize(
    ("words", "files", "rest"),
    [
        ("a.png", ["a.png"], (False, 1, [])),
        ("'a, b.png'", ["a, b.png"], (False, 1, [])),
        ("[a].png", ["[a].png"], (False, 1, [])),
        ("a b/c '[d]' 'e, f' g=h null", ["a", "b/c", "[d]", "e, f", "g=h", "null"], (False, 1, [])),
        ("a.png --steps 3 b.png --flip c.png", ["a.png", "b.png", "c.png"], (True, 3, [])),
        ("--steps=3 __a.png --size=4,5 _", ["__a.png", "_"], (False, 3, [4, 5])),
        ("a.png --size 4 5", ["a.png"], (False, 1, [4, 5])),
        ("--files a.png b.png --flip", ["a.png", "b.png"], (True, 1, [])),
    ],
)
def test_bare_words_go_to_the_option_that_takes_them(words: str, files: list[str], rest: tuple[Any, ...]) -> None:
    found = parse(Bare, shlex.split(words))
    assert found.files == files and (found.flip, found.steps, found.size) == rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "FILES or --files is needed; --help lists all options"),
        ("a.png --files b.png", "--files: given twice, also as 'a.png'; name all of them in one place"),
        ("a.png -n 3", "unexpected argument '-n': options begin with --"),
        ("a.png --flop", "unknown option --flop; did you mean --flip?"),
        ("--size 4 a.png", "--size: found [4, 'a.png'], expected list of int"),
    ],
)
def test_bare_words_that_do_not_fit(words: str, message: str) -> None:
    assert refusal(parse, Bare, shlex.split(words)) == message


def test_help_shows_where_bare_words_go() -> None:
    lines = help_text("vqgen-x", "Does a thing.", Bare).splitlines()
    assert lines[0] == "usage: vqgen-x FILES ... [--config FILE] [--option VALUE ...]"
    assert "  --files NAME ...  (needed)" in lines
    assert help_text("x", "y", Example).startswith("usage: x [--config FILE]")


def test_bare_words_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("files: [a, b]")
    assert parse(Bare, ["--config", str(tmp_path / "c.yaml")]).files == ["a", "b"]
    assert parse(Bare, ["c", "--config", str(tmp_path / "c.yaml")]).files == ["c"]


def test_underscores_are_read_as_hyphens() -> None:
    @dataclass
    class Two:
        top_k: int = 1

    assert parse(Two, ["--top_k", "5"]).top_k == parse(Two, ["--top-k=5"]).top_k == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 1.5", "--steps: found 1.5, expected int"),
        ("--steps yes", "--steps: found yes, expected int"),
        ("--steps true", "--steps: found True, expected int"),
        ("--steps null", "--steps: found None, expected int"),
        ("--steps ''", "--steps: found '', expected int"),
        ("--steps '['", "--steps: found [, expected int"),
        ("--steps '{a: 1}'", "--steps: found {'a': 1}, expected int"),
        ("--steps inf", "--steps: found inf, expected int"),
        ("--limit 1.5", "--limit: found 1.5, expected int"),
        ("--lr fast", "--lr: found fast, expected float"),
        ("--lr true", "--lr: found True, expected float"),
        ("--size 28 x", "--size: found [28, 'x'], expected list of int"),
        ("--size 28.5", "--size: found [28.5], expected list of int"),
        ("--size '[28, 30'", "--size: found ['[28', 30], expected list of int"),
        ("--precision fp8", "--precision: found fp8, expected no | bf16 | auto"),
        ("--channels 2", "--channels: found 2, expected 1 | 3"),
        ("--scale big", "--scale: found big, expected float | auto"),
        ("--flip=maybe", "--flip: found maybe, expected true or false"),
        ("--flip false", "unexpected argument 'false': options begin with --"),
        ("--model=", "--model: found '', expected path"),
        ("--steps", "--steps needs a value"),
        ("--steps --flip", "--steps needs a value"),
        ("--config", "--config needs a value"),
        ("extra", "unexpected argument 'extra': options begin with --"),
        ("-n 3", "unexpected argument '-n': options begin with --"),
        ("--stepz 3", "unknown option --stepz; did you mean --steps?"),
        ("--ste 3", "unknown option --ste; did you mean --steps?"),
        ("--hepl", "unknown option --hepl; did you mean --help?"),
        ("--no-steps", "unknown option --no-steps; did you mean --steps?"),
        ("--zzzzzzz 1", "unknown option --zzzzzzz"),
        ("--epochs 1", "unknown option --epochs"),  # the hyphens alone make it no --steps
        ("--steps 0", "--steps: found 0, expected at least 1"),
    ],
)
def test_the_command_line_refuses(words: str, message: str) -> None:
    assert refusal(example, *shlex.split(words)) == message


def test_a_needed_option_is_named() -> None:
    assert refusal(parse, Example, []) == "--output is needed; --help lists all options"


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("inner: {steps: 1e3}", "inner.steps", 1000),
        ("inner: {steps: 010}", "inner.steps", 10),
        ("inner: {lr: 1e-4}", "inner.lr", 1e-4),
        ("inner: {lr: 5}", "inner.lr", 5.0),
        ("inner: {lr: .inf}", "inner.lr", float("inf")),
        ("inner: {size: [1e2, 3]}", "inner.size", [100, 3]),
        ("inner:", "inner.steps", 20),
        ("# only a comment", "name", "plain"),
        ("precision: no", "precision", "no"),
        ("class: [no, on, 'null', a b]", "class_", ["no", "on", "null", "a b"]),
        ("class: null", "class_", None),
        ("class: shoe", "class_", ["shoe"]),
        ("class: [0, 2]", "class_", ["0", "2"]),
        ("inner: {size: 32}", "inner.size", [32]),
        ("files: a b.png", "files", [Path("a b.png")]),
        ("name: 1:30", "name", "1:30"),
        ("name: 2020-01-01", "name", "2020-01-01"),
        ("name: off", "name", "off"),
        ("title: 'null'", "title", "null"),
        ("title: ~", "title", None),
        ("model: 'null'", "model", Path("null")),
        ("model: ~/x y", "model", Path.home() / "x y"),
        ("flip: yes", "flip", True),
        ("flip: True", "flip", True),
        ("ema: off", "ema", False),
        ("channels: 1", "channels", 1),
    ],
)
def test_yaml_reads(tmp_path: Path, text: str, path: str, value: Any) -> None:
    found: Any = in_file(tmp_path, text)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {step: 3}", "unknown key inner.step; did you mean inner.steps?"),
        ("steps: 3", "unknown key steps; did you mean inner.steps?"),
        ("inner: {lr: 1, nam: 1}", "unknown key inner.nam; did you mean name?"),
        ("class_: [a]", "unknown key class_; did you mean class?"),
        ("zzzzz: 1", "unknown key zzzzz"),
        *((text, "the file is empty; restore it, or leave --config out") for text in ("", " \n")),
        ("inner: {steps: 1.5}", "inner.steps: found 1.5, expected int"),
        ("inner: {steps: true}", "inner.steps: found True, expected int"),
        ("inner: {steps: }", "inner.steps: found None, expected int"),
        ("inner: {lr: [1]}", "inner.lr: found [1], expected float"),
        ("inner: {size: x}", "inner.size: found x, expected list of int"),
        ("inner: {size: [32, true]}", "inner.size: found [32, True], expected list of int"),
        ("inner: 3", "inner is a int, expected keys"),
        ("[1, 2]", "the file is a list, expected keys"),
        ("name: 3", "name: found 3, expected text"),
        ("name: true", "name: found True, expected text"),
        ("class: [1.5]", "class: found [1.5], expected list of text"),
        ("class: true", "class: found True, expected list of text"),
        ("channels: true", "channels: found True, expected 1 | 3"),
        ("precision: null", "precision: found None, expected no | bf16 | auto"),
        ("flip: 1", "flip: found 1, expected true or false"),
    ],
)
def test_yaml_refuses(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(in_file, tmp_path, text) == f"{tmp_path / 'c.yaml'}: {message}"


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\tx: 1", "name: a\nname: b"])
def test_broken_yaml_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    message = refusal(in_file, tmp_path, text)
    assert message.startswith(f"{tmp_path / 'c.yaml'} is not valid YAML: ") and "line" in message


def test_the_line_wins_over_the_file_wherever_either_stands(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: file\nflip: true\nclass: [a]\ninner: {steps: 5, lr: 0.5}\n")
    for words in (
        ["--config", str(file), "--output", "o", "--steps", "9", "--no-flip", "--class", "b"],
        ["--output", "o", "--steps", "9", "--no-flip", "--class", "b", f"--config={file}"],
        ["--steps", "9", "--no-flip", "--class", "b", "--config", str(file), "--output", "o"],
    ):
        config = parse(Example, words)
        assert (config.inner.steps, config.flip, config.class_) == (9, False, ["b"])
        assert (config.name, config.inner.lr) == ("file", 0.5)


def test_the_later_of_several_files_wins_and_the_line_over_all(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("inner: {steps: 5}\nclass: [a]\n")
    (tmp_path / "two.yaml").write_text("inner: {steps: 6}\n")
    files = [f"--config={tmp_path / name}" for name in ("one.yaml", "two.yaml")]
    both = example(*files)
    assert (both.inner.steps, both.class_) == (6, ["a"])
    assert example(*reversed(files)).inner.steps == 5
    assert example(files[0], "--steps", "7", files[1]).inner.steps == 7


def test_an_option_on_the_line_that_equals_the_default_still_wins(tmp_path: Path) -> None:
    assert in_file(tmp_path, "name: file", "--name", "plain").name == "plain"


@pytest.mark.parametrize("name", ["lfq", "gumbel"])
def test_quantizers_that_need_an_entropy_loss_have_it_by_default(name: str) -> None:
    """As in their presets, without which most of their codes fall out of use."""
    given = ["--data", "demo", "--codebook-size", "1024"]
    preset = parse(TokenizerTraining, [*given, "--config", f"quantizer-{name}"]).quantizer
    plain = parse(TokenizerTraining, [*given, "--quantizer", name]).quantizer
    for option in ("entropy_weight", "entropy_diversity", "entropy_temperature", "commitment_weight"):
        assert getattr(plain, option, None) == getattr(preset, option, None), option


def test_presets_are_found_by_name_and_files_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presets = sorted(file.stem for file in ROOT.joinpath("configs").glob("*.yaml"))
    message = refusal(example, "--config", presets[-1] + "x")
    assert message.startswith(f"--config: no file and no preset '{presets[-1]}x'; closest presets: {presets[-1]}, ")
    assert message.endswith(f"(of {len(presets)} in configs/)") and len(message) < 200
    assert refusal(example, "--config", "none.yaml") == "--config: none.yaml does not exist"
    assert refusal(example, "--config", "vqgan.yaml").endswith("does not exist; the preset is called vqgan")
    (tmp_path / "folder.yaml").mkdir()
    assert refusal(example, "--config", str(tmp_path / "folder.yaml")).startswith(f"--config: {tmp_path}")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(example, "--config", str(tmp_path / "bytes.yaml"))
    (tmp_path / "plain").write_text("name: by path")
    monkeypatch.chdir(tmp_path)
    assert example("--config", "plain").name == "by path"


@pytest.mark.parametrize("preset", sorted(p.stem for p in ROOT.joinpath("configs").glob("*.yaml")))
def test_each_preset_opens_with_the_command_that_runs_it(preset: str, programs: dict[str, Any]) -> None:
    lines = (ROOT / "configs" / f"{preset}.yaml").read_text(encoding="utf-8").splitlines()
    text = ""
    for line in lines:
        assert line.startswith("#"), f"{preset}.yaml does not open with the command that runs it"
        text += line.lstrip("# ").rstrip("\\ ") + " "
        if not line.endswith("\\"):
            break
    name, *words = shlex.split(text)
    assert preset in [words[index + 1] for index, word in enumerate(words) if word == "--config"]
    parse(programs[name].config, words)


texts = st.text(st.characters(exclude_categories=("Cs", "Cc"), include_characters="\t\n\x85"), max_size=12)
counts = st.integers(-(10**20), 10**20)
floats = st.floats(allow_nan=False)
examples = st.builds(
    Example,
    output=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).map(Path),
    name=texts,
    title=st.none() | texts,
    model=st.none() | st.sampled_from(["a/b", "null", "1", "no", "~", "with space", "…"]).map(Path),
    limit=st.none() | counts,
    flip=st.booleans(),
    ema=st.booleans(),
    precision=st.sampled_from(["no", "bf16", "auto"]),
    channels=st.sampled_from([1, 3]),
    class_=st.none() | st.lists(texts, max_size=3),
    scale=st.just("auto") | floats,
    inner=st.builds(Inner, st.integers(1, 10**12), floats, st.lists(counts, max_size=3), st.lists(floats, max_size=3)),
)


@given(config=examples)
def test_what_is_saved_reads_back_the_same(config: Example, tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    save(config, file)
    assert parse(Example, ["--config", str(file)]) == config
    assert read_saved(file, Example) == values_of(config)
    assert from_dict(Inner, json.loads(json.dumps(as_dict(config.inner))), "file") == config.inner


@given(config=examples)
def test_what_is_typed_reads_back_the_same(config: Example) -> None:
    def word(value: Any) -> str:
        plain = yaml.safe_dump(value, default_flow_style=True, width=10**9)
        return value if isinstance(value, str) else plain.removesuffix("\n").removesuffix("\n...")

    config = replace(config, title="text" if config.title in ("none", "null") else config.title)
    config = replace(config, model=None if config.model == Path("null") else config.model)
    words = [f"--{name.replace('_', '-')}={word(value)}" for name, value in values_of(config).items()]
    assert parse(Example, words) == config


def test_as_dict_is_plain_and_from_dict_its_inverse() -> None:
    tree = as_dict(example("--class", "a", "--model", "m"))
    assert tree["class"] == ["a"] and tree["model"] == "m" and tree["inner"]["steps"] == 20 and "class_" not in tree
    json.dumps(tree)
    assert from_dict(Inner, {"steps": 3}, "f") == Inner(steps=3)
    assert build(Inner, {"lr": 2.0}) == Inner(lr=2.0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"inner": {"stepz": 1}}, "vqgen.json: unknown key stepz; it was written by another version of vqgen"),
        ({"inner": 3, "output": "o"}, "vqgen.json: found 3 where the keys of Inner belong"),
        ([1], "vqgen.json: found [1] where the keys of Example belong"),
        ({"name": "x"}, "vqgen.json: "),
    ],
)
def test_a_description_that_does_not_fit_names_its_file(tree: Any, message: str) -> None:
    assert refusal(from_dict, Example, tree, "vqgen.json").startswith(message)


def program(action: Callable[[Example], None]) -> Callable[[list[str]], int]:
    def run(config: Example) -> None:
        """Does a thing.

        Not for the help."""
        action(config)

    return lambda words: command("vqgen-x", Example, run, words)


def nothing(config: Example) -> None:
    pass


def failing(error: BaseException) -> Callable[[Example], None]:
    def action(config: Example) -> None:
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "words", "code", "err"),
    [
        (nothing, ["--output", "o"], 0, ""),
        (nothing, [], 2, "vqgen-x: --output is needed; --help lists all options\n"),
        (nothing, ["--outptu", "o"], 2, "vqgen-x: unknown option --outptu; did you mean --output?\n"),
        (failing(UserError("a: b\n  c")), ["--output", "o"], 1, "vqgen-x: a: b c\n"),
        (failing(UsageError("--a: b")), ["--output", "o"], 2, "vqgen-x: --a: b\n"),
        (failing(KeyboardInterrupt()), ["--output", "o"], 130, "vqgen-x: interrupted\n"),
    ],
)
def test_exit_codes_and_one_line_errors(
    cli: Callable[..., Any], action: Callable[[Example], None], words: list[str], code: int, err: str
) -> None:
    result = cli(program(action), *words)
    assert (result.code, result.out) == (code, "")
    assert result.err == err


@pytest.mark.parametrize("error", [OSError(28, "No space"), ValueError("two\nlines"), BrokenPipeError("a worker's")])
def test_an_error_that_is_not_the_users_prints_its_traceback(cli: Callable[..., Any], error: Exception) -> None:
    result = cli(program(failing(error)), "--output", "o")
    assert (result.code, result.out) == (1, "")
    assert "Traceback" in result.err and "test_config.py" in result.err
    assert result.err.splitlines()[-1].startswith("vqgen-x: ")


ONE, SEVERAL = "command('vqgen-x', t.Example, run)", "commands('vqgen-x', {'do': (t.Example, run)})"


@pytest.mark.parametrize(
    ("call", "words", "code"),
    [
        *((ONE, *given) for given in (("--help", 0), ("--output o", 1), ("--output o --no-ema", 0))),
        *((SEVERAL, *given) for given in (("--help", 0), ("--version", 0), ("do --help", 0), ("do --output o", 1))),
    ],
)
def test_a_reader_that_stops_reading_is_no_error(call: str, words: str, code: int) -> None:
    """As after `| head`: nothing is printed about it, not even at exit. Short output fails in the last flush."""
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import test_config as t\n"
        "from vqgen.config import command, commands\n"
        "def run(config): 'Prints.'; print('x\\n' * (100_000 if config.ema else 10))\n"
        f"sys.exit({call})"
    )
    run = [sys.executable, "-c", script, str(Path(__file__).parent), *words.split()]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (code, "")


def test_help_and_version(cli: Callable[..., Any]) -> None:
    result = cli(program(failing(AssertionError())), "--help")
    assert result.code == 0 and result.err == ""
    for option in options(Example):
        assert f"  {option.flag}" in result.out and option.help in result.out
    assert "Does a thing." in result.out and "Not for the help" not in result.out
    for entry in ("--output PATH  (needed)", "--steps INT  (default 20)", "--no-ema", "--limit INT  (default none)"):
        assert entry in result.out
    for entry in ("--size INT ...  (default 32 32)", "--class NAME ...", "--scale NUMBER|auto", "--channels 1|3"):
        assert entry in result.out
    assert "\ninner:\n" in help_text("x", "y", Example)
    version = cli(program(nothing), "--version")
    assert version.code == 0 and version.out.startswith("vqgen ")


@dataclass
class Sized(Options):
    """A configuration with more options than most people need."""

    COMMON: ClassVar[tuple[str, ...]] = ("sizes", "steps")
    name: str = "x"
    """A name."""
    steps: Count = 10
    """How many steps."""
    sizes: list[Annotated[int, Range(least=2, most=9)]] = field(default_factory=lambda: [3, 4])
    """Sizes of things."""
    share: Share | None = None
    """A share."""


def test_help_shows_common_options_first_and_ranges(cli: Callable[..., Any]) -> None:
    def run(config: Sized) -> None:
        """Do it."""

    def main(words: list[str]) -> int:
        return command("vqgen-x", Sized, run, words)

    short, long = cli(main, "--help").out, cli(main, "--help-all").out
    assert short.index("--sizes INT ...  (at least 2 and at most 9; default 3 4)") < short.index("--steps INT")
    assert "--name" not in short and "--help-all shows 2 more options" in short
    assert [line.split()[0] for line in long.splitlines() if line.startswith("  --")][:4] == [
        "--sizes", "--steps", "--name", "--share",
    ]  # fmt: skip


def test_help_reads_what_fields_say_of_themselves() -> None:
    @dataclass
    class Told(Options):
        """Options that say more than their types."""

        source: str | None = field(default=None, metadata={"needed": True})
        """Needed unless another option says what to do."""
        words: list[str] = field(default_factory=list, metadata={"placeholder": "NAME=VALUE"})
        """Pairs."""
        text: str = ""
        """A text."""

    lines = help_text("vqgen-x", "Do it\n    in two lines.", Told).splitlines()
    wanted = ("Do it in two lines.", "  --source TEXT  (needed)", "  --text TEXT  (default none)")
    assert set(wanted) <= set(lines) and "  --words NAME=VALUE ...  (default none)" in lines


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ("--steps 0", ("--steps", "0", "at least 1")),
        ("--sizes 3 10", ("--sizes", "10", "at least 2 and at most 9")),
        ("--share 1.5", ("--share", "1.5", "at least 0 and at most 1")),
        ("--share nan", ("--share", "nan")),
        ("--share -0.1", ("--share", "-0.1")),
    ],
)
def test_a_number_out_of_range_is_refused_with_what_was_found(words: str, facts: tuple[str, ...]) -> None:
    message = refusal(parse, Sized, words.split())
    assert message.startswith(facts[0]) and all(fact in message for fact in facts)


def test_a_quantizer_preset_goes_on_top_of_any_other() -> None:
    presets = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
    kinds = [name for name in presets if name.startswith("quantizer-")]
    bases = [[name] for name in ("demo-tokenizer", "vqvae", "vqgan-cifar10", "vqgan", "cifar10-512")]
    bases += [["cifar10-512", name] for name in ("cifar10-512-even", "cifar10-512-lpips", "cifar10-8192")]
    assert len(kinds) == 10
    for base in bases:
        for kind in kinds:
            words = [word for name in [*base, kind] for word in ("--config", name)]
            asked = parse(TokenizerTraining, [*words, "--data", "x", "--output", "y", "--perceptual-weights", "z"])
            assert asked.quantizer.codes >= 32, (base, kind)


def test_an_interrupt_that_an_import_swallows_is_still_one(capsys):
    """numpy, for one, ends in a RecursionError when it is interrupted in the middle of its import."""

    def run(_config: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise RecursionError("of a half imported module")

    @dataclass
    class Nothing(Options):
        """Nothing."""

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    try:
        assert command("vqgen-test", Nothing, run, []) == 130
        assert capsys.readouterr().err == "vqgen-test: interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_message_is_no_longer_than_a_screen():
    found = one_line("a" * 5000 + "the end")
    assert len(found) < 1000 and found.startswith("aaa") and found.endswith("the end") and "…" in found


@pytest.mark.parametrize("program", ["vqgen.sampling.sample", "vqgen.evaluation.program"])
def test_output_that_nobody_can_write_is_one_line(program: str):
    for redirect in (">/dev/full", ">&-"):
        line = f"{sys.executable} -m {program} --help-all {redirect}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr and "defect" not in done.stderr, done.stderr
        assert done.returncode == (1 if "full" in redirect else 0)
    line = f"{sys.executable} -m {program} --unknown 2>/dev/full"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 2
