"""Text, YAML and numbers that a user or a file hands in, however large, deep or odd: one line, exit code 2, at once."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from vqgen.config import command, parse
from vqgen.errors import UsageError, UserError
from vqgen.evaluation.options import ClassifierTraining, SamplesConfig
from vqgen.files.yaml_text import MAX_YAML, dump_yaml, parse_yaml, read_yaml
from vqgen.options import Options
from vqgen.prior.train import PriorTraining
from vqgen.sampling.sample import SampleConfig
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.train import TokenizerTraining

BOMB = "a0: &a0 [x, x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 64))
MERGED = "a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40))


@dataclass
class Small(Options):
    """A program's configuration."""

    steps: int = 1
    """Steps."""
    rate: float = 1.0
    """Rate."""
    name: str = ""
    """Name."""
    names: list[str] = field(default_factory=list)
    """Names."""
    file: Path = Path("x")
    """File."""


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BOMB, id="alias bomb"),
        pytest.param(MERGED, id="merge bomb"),
        pytest.param("steps: &a [*a]", id="cycle"),
        pytest.param("steps: &a {b: *a}", id="cycle of keys"),
        pytest.param("steps: " + "[" * 20_000, id="deep"),
        pytest.param("steps: " + "{a: " * 20_000, id="deep keys"),
        pytest.param("\n".join(" " * n + "a:" for n in range(700)), id="deep blocks"),
        pytest.param("name: " + "x" * MAX_YAML, id="large"),
        pytest.param("\n".join(f"k{n}: 1" for n in range(20_001)), id="many"),
        pytest.param("steps: !!int abc", id="int"),
        pytest.param("steps: !!int 1:30", id="sexagesimal"),
        pytest.param("rate: !!float x", id="float"),
        pytest.param("name: !!bool maybe", id="bool"),
        pytest.param("name: !!binary '=='", id="binary"),
        pytest.param("name: !!timestamp 2020-99-99", id="timestamp"),
        pytest.param("name: !!python/object/apply:os.getcwd []", id="python"),
        pytest.param("name: !!set {a}", id="set"),
        pytest.param("name: !own x", id="own tag"),
        pytest.param("name: *a", id="no anchor"),
        pytest.param("? [a]\n: 1", id="list as a key"),
        pytest.param("? {a: 1}\n: 1", id="map as a key"),
        pytest.param("name: a\nname: b", id="twice"),
        pytest.param("steps: " + "9" * 10_000, id="digits"),
        pytest.param("name: a\0b", id="NUL"),
        pytest.param("a: 1\n---\nb: 1", id="two documents"),
    ],
)
def test_yaml_that_is_no_plain_small_value(tmp_path: Path, text: str) -> None:
    path, start = tmp_path / "c.yaml", time.process_time()
    path.write_text(text)
    with pytest.raises(UsageError, match=r"c\.yaml") as refused:
        parse(Small, ["--config", str(path)])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000
    with pytest.raises(UserError, match=r"c\.yaml"):
        read_yaml(path)
    assert time.process_time() - start < 10


def test_aliases_and_merge_keys_of_people_are_read() -> None:
    found = parse_yaml("a: &a {x: 1, y: !!float 2}\nb: {<<: *a, x: !!str 3}\nc: [*a, *a]")
    assert found["b"] == {"x": "3", "y": 2.0} and found["c"] == [{"x": 1, "y": 2.0}] * 2
    assert parse_yaml(dump_yaml(found)) == found


def test_many_keys_take_linear_time() -> None:
    text = "\n".join(f"k{n}: 1" for n in range(9000))
    start = time.process_time()
    assert len(parse_yaml(text)) == 9000
    assert time.process_time() - start < 10


@pytest.mark.parametrize("word", [BOMB, "[" * 20_000, "&a [*a]", "!!int abc", "9" * 10_000, "!!python/name:os.system"])
def test_values_on_the_command_line_are_yaml_too(word: str) -> None:
    for option in ("--steps", "--rate"):
        with pytest.raises(UsageError, match=option) as refused:
            parse(Small, [f"{option}={word}"])
        assert len(str(refused.value)) < 1000
    parse(Small, [f"--names={word}"])  # text, as typed


@pytest.mark.parametrize("text", ["a\0b", "a\x1b[31m", "caf\udce9"])
def test_text_that_no_file_can_hold_is_refused(tmp_path: Path, text: str) -> None:
    for option in ("--name", "--names", "--file", "--config"):
        with pytest.raises(UsageError, match=option):
            parse(Small, [f"{option}={text}"])
    if text.isascii():
        (tmp_path / "c.yaml").write_text(f"name: {yaml.safe_dump(text)}")
        with pytest.raises(UsageError, match="name"):
            parse(Small, ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize("text", ["a\0b", "a\x1b[31m", "a\x7f"])
def test_a_prompt_of_a_file_is_checked_as_one_of_the_command_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--prompt: "):
        parse(SampleConfig, [f"--prompt={text}"])
    path = tmp_path / "prompts.txt"
    path.write_text(f"a shoe\n\n{text}\na bag\n")
    config = parse(SampleConfig, ["--prompt-file", str(path)])
    with pytest.raises(UserError, match=r"--prompt-file: .*prompts\.txt line 3"):
        _ = config.prompts
    path.write_text("a\tshoe\n\x0ca bag\n")
    assert parse(SampleConfig, ["--prompt-file", str(path)]).prompts == ["a\tshoe", "a bag"]


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "d/" + "x" * 256 + "/y", "d/" * 2100])
def test_names_of_files_are_bounded(name: str) -> None:
    for option in ("--file", "--config"):
        with pytest.raises(UsageError, match=option):
            parse(Small, [f"{option}={name}"])
    assert parse(Small, ["--file", "x" * 255]).file == Path("x" * 255)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "no UTF-8"])
def test_a_configuration_is_a_regular_text_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "c.yaml"
    {
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "no UTF-8": lambda: path.write_bytes(b"name: \xff"),
    }[kind]()
    with pytest.raises(UsageError, match=r"c\.yaml"):
        parse(Small, ["--config", str(path)])


HUGE = str(2**70), "1e30", "-" + "9" * 30, str(2**64), "9" * 309, "-" + "9" * 4300


@pytest.mark.parametrize(
    ("config", "option", "values"),
    [
        (Small, "--steps", HUGE),
        (Small, "--rate", ("inf", "nan", "1e308", "-1e39", ".inf")),
        (TokenizerTraining, "--seed", (*HUGE, "-1")),
        (TokenizerTraining, "--steps", HUGE),
        (TokenizerTraining, "--workers", ("1e30", "1e4", "-2")),
        (TokenizerTraining, "--size", ("1e18", "0", "-1", "100000")),
        (TokenizerTraining, "--width", ("1e18", "0")),
        (TokenizerTraining, "--blocks", ("1e18",)),
        (TokenizerTraining, "--patch", ("1e18",)),
        (TokenizerTraining, "--latent-dim", ("1e18",)),
        (TokenizerTraining, "--multipliers", ("1e18", " ".join("1" * 17))),
        (TokenizerTraining, "--code-dim", ("1e18",)),
        (TokenizerTraining, "--codebook-size", ("1e18",)),
        (TokenizerTraining, "--gan-layers", ("1e18",)),
        (TokenizerTraining, "--batch-size", ("1e18",)),
        (TokenizerTraining, "--lr", ("inf", "nan", "1e308")),
        (TokenizerTraining, "--gan-weight", ("inf",)),
        (PriorTraining, "--layers", ("1e18",)),
        (PriorTraining, "--dim", ("1e18",)),
        (PriorTraining, "--heads", ("1e18",)),
        (PriorTraining, "--hidden-dim", ("1e18",)),
        (PriorTraining, "--seed", (*HUGE, "-1")),
        (PriorTraining, "--weight-decay", ("1e300",)),
        (TokenizeConfig, "--seed", (*HUGE, "-1")),
        (TokenizeConfig, "--views", ("1e18",)),
        (SampleConfig, "--seed", (*HUGE, "-1")),
        (SampleConfig, "--n", (*HUGE, "1e8")),
        (SampleConfig, "--num-per-class", (*HUGE, "1e8")),
        (PriorTraining, "--preview-images", ("1e18",)),
        (SamplesConfig, "--n", ("1e18",)),
        (SampleConfig, "--columns", ("1e18",)),
        (SampleConfig, "--temperature", ("inf", "1e308", "-1")),
        (SampleConfig, "--guidance-scale", ("inf", "1e308")),
        (SamplesConfig, "--seed", HUGE),
        (ClassifierTraining, "--width", ("1e18",)),
    ],
)
def test_numbers_are_bounded_before_any_work(config: type, option: str, values: tuple[str, ...]) -> None:
    for value in values:
        with pytest.raises(UsageError, match=rf"^{option}: found") as refused:
            parse(config, [option, *value.split(), *_needed(config)])
        assert refused.value.exit_code == 2 and len(str(refused.value)) < 1000


def test_an_integer_that_no_float_holds_is_shown_by_its_first_digits() -> None:
    for value, shown in ((12 * 10**399, "12"), (-(10**5000), "-10")):
        with pytest.raises(UsageError, match=rf"^--steps: found {shown}0+e\+[0-9]+, expected") as refused:
            Small(steps=value)
        digits, exponent = str(refused.value).split()[2].rstrip(",").split("e+")
        assert int(digits) * 10 ** int(exponent) == value and len(digits) < 20


def _needed(config: type) -> list[str]:
    return {
        TokenizerTraining: ["--data", "x", "--output", "y"],
        PriorTraining: ["--codes", "x", "--output", "y"],
        TokenizeConfig: ["--data", "x", "--output", "y", "--tokenizer", "t"],
        ClassifierTraining: ["--data", "x", "--output", "y", "--size", "32"],
    }.get(config, [])


def run(error: BaseException | None = None, text: str = "") -> Callable[..., int]:
    def work(config: Small) -> None:
        print(text)
        if error:
            raise error

    return lambda words: command("vqgen-x", Small, work, words)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a\x1b[31m\udce9.png is odd"), 1),
        (MemoryError(), 1),
        (PermissionError(errno.EACCES, "Permission denied", Path("a\x1b[31m/b")), 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1),
    ],
)
def test_an_error_is_one_printable_line(cli: Callable[..., Any], error: Exception, code: int) -> None:
    result = cli(run(error))
    assert result.code == code and len(result.err.splitlines()) == 1 and result.err.rstrip("\n").isprintable()


def test_names_that_are_not_utf_8_are_printed() -> None:
    script = "import test_hostile_options as t; raise SystemExit(t.run(None, 'caf\\udce9')([]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\udce9\n", "")


def test_images_of_all_classes_together_are_bounded() -> None:
    config = parse(SampleConfig, ["--num-per-class", "1e6", "--class", "a"])
    assert config.count(10) == 10**7
    with pytest.raises(UsageError, match="--num-per-class"):
        config.count(11)
