"""README.md and docs/: links, headings, files, command lines, options and names of Python that they use exist."""

import ast
import builtins
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vqgen.config import parse
from vqgen.config_layers import find_preset
from vqgen.errors import UsageError
from vqgen.options import options
from vqgen.tokenizer.shipped import SHIPPED

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS += sorted(ROOT.glob("sampling/pretrained/*/README.md"))
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
# Options of other programs that the documents name, and what the examples of docs/extending.md add.
FOREIGN = {"--check", "--metric"}
EXAMPLES = re.compile("strided|binary|brightness|columns")
FRAGMENTS = {"extending.md", "CONTRIBUTING.md"}
"""Pages whose Python is pieces of source files."""


def split_fences(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text without its fenced code blocks, and the blocks as (language, content)."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return fence.sub("", text), [(match[2], textwrap.dedent(match[3])) for match in fence.finditer(text)]


def command_lines(text: str) -> list[str]:
    """The lines of code blocks that call a program of vqgen, continued lines joined."""
    blocks = [content for language, content in split_fences(text)[1] if language != "python"]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("vqgen-")]


def spans(text: str) -> list[str]:
    """The inline code of a document, line breaks within as spaces."""
    found = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", split_fences(text)[0])]
    return [span for span in found if not EXAMPLES.search(span)]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", split_fences(path.read_text(encoding="utf-8"))[0], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> Iterator[str]:
    """The relative links and images of a document that lead nowhere."""
    prose = split_fences(text)[0]
    for target in re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        inside = file.exists() and file.resolve().is_relative_to(ROOT)
        if not inside or (anchor and anchor not in anchors(file)):
            yield target


def program_of(words: list[str], programs: dict[str, Any]) -> tuple[str, list[str]]:
    """The program that a command line calls, with its command if it has several, and the other words."""
    known = next((key for key in (" ".join(words[:2]), words[0]) if key in programs), None)
    assert known, f"{words[0]} {words[1:2]}: no such program or command"
    return known, words[len(known.split()) :]


def unknown_options(words: list[str], programs: dict[str, Any], program: str) -> list[str]:
    """The options among `words` that `program` does not have."""
    known = {option.flag for option in options(programs[program].config)}
    known |= {"--no-" + flag[2:] for flag in known} | {"--config", "--threads", "--help", "--help-all", "--version"}
    return [word for word in words if re.match(r"--[a-z]", word) and word.partition("=")[0] not in known]


@every_document
def test_receipts_of_one_code_block_have_names_of_their_own(path: Path) -> None:
    """Without --output `vqgen-eval samples` and `accuracy` write one file, and refuse to replace each other's."""
    for _, content in split_fences(path.read_text(encoding="utf-8"))[1]:
        lines = command_lines(f"```\n{content}```")
        unnamed = [
            line for line in lines if re.match("vqgen-eval (samples|accuracy) ", line) and "--output" not in line
        ]
        assert len(unnamed) < 2, unnamed


def test_the_readme_is_short_and_says_how_to_start() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for line in ("make demo", "make test", "vqgen-sample --n 64 --temperature 0.9"):
        assert line in text


@every_document
def test_links_and_images_exist(path: Path) -> None:
    assert list(broken_links(path, path.read_text(encoding="utf-8"))) == []


def test_every_document_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in DOCUMENTS[1:]:
        assert f"]({path.relative_to(ROOT).as_posix()}" in text, path


@every_document
def test_command_lines_of_code_blocks_parse(path: Path, programs: dict[str, Any]) -> None:
    for line in command_lines(path.read_text(encoding="utf-8")):
        program, words = program_of(shlex.split(line, comments=True), programs)
        if not {"--help", "--help-all", "--version"} & set(words):
            parse(programs[program].config, words)


@every_document
def test_programs_options_and_presets_in_prose_exist(path: Path, programs: dict[str, Any]) -> None:
    every = {option.flag for found in programs.values() for option in options(found.config)}
    every |= (
        {"--no-" + flag[2:] for flag in every}
        | {"--config", "--threads", "--help", "--help-all", "--version"}
        | FOREIGN
    )
    changed = path.name == "CHANGELOG.md"  # names what is gone
    for span in spans(path.read_text(encoding="utf-8")):
        words = span.split()
        if span.startswith("vqgen-") and "…" not in words[0] and not changed:
            groups = {key.split()[0] for key in programs if " " in key}
            if span not in groups:
                program, rest = program_of(words, programs)
                assert unknown_options(rest, programs, program) == [], span
        elif span.startswith("--") and not changed:
            found = [w.partition("=")[0] for w in words if re.match(r"--[a-z]", w) and not w.endswith("…")]
            assert set(found) <= every, span
        for preset in re.findall(r"--config ([a-z][\w-]*\w)", span):
            if not preset.endswith("NAME"):
                find_preset(preset)


@every_document
def test_files_and_modules_in_prose_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for span in spans(text):
        file = re.fullmatch(r"(?:python )?([\w.-]+(?:/[\w.-]+)+\.(?:py|md|yaml|toml|txt))(?: .*)?", span)
        if file:
            assert (ROOT / file[1]).is_file(), span
    for module in re.findall(r"-m (vqgen(?:\.\w+)+)", text):
        folder, _, rest = module.removeprefix("vqgen.").partition(".")
        place = ROOT / folder / (rest.replace(".", "/") + ".py")
        assert place.is_file(), module


def python_blocks(path: Path) -> list[str]:
    """The Python examples of a document."""
    return [content for language, content in split_fences(path.read_text(encoding="utf-8"))[1] if language == "python"]


def undefined_names(blocks: list[str]) -> list[str]:
    """Names that Python examples of a page use and that neither these nor earlier ones define. Raises `SyntaxError`."""
    known, found = set(dir(builtins)), []
    for block in blocks:
        nodes = list(ast.walk(ast.parse(block)))
        known |= {(n.asname or n.name).partition(".")[0] for n in nodes if isinstance(n, ast.alias)}
        known |= {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        known |= {n.arg for n in nodes if isinstance(n, ast.arg)}
        known |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        found += [n.id for n in nodes if isinstance(n, ast.Name) and n.id not in known]
    return found


@every_document
def test_python_of_code_blocks_parses_and_defines_its_names(path: Path) -> None:
    found = undefined_names(python_blocks(path))
    assert path.name in FRAGMENTS or found == []


def test_the_recipe_for_the_weights_of_vgg16_makes_a_file_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.models
    from torch import nn
    from torchvision.models.vgg import cfgs, make_layers

    from vqgen.tokenizer.losses.lpips import convolutions

    class Vgg16(nn.Module):
        """torchvision's convolutions, without a download, and one layer for all those behind them."""

        def __init__(self, weights: str) -> None:
            super().__init__()
            self.features, self.classifier = make_layers(cfgs["D"]), nn.Linear(1, 1)

    (recipe,) = python_blocks(ROOT / "docs/tokenizers.md")
    monkeypatch.setattr(torchvision.models, "vgg16", Vgg16)
    monkeypatch.chdir(tmp_path)
    exec(recipe, {})
    found, _ = convolutions("vgg", "vgg16_features.safetensors")
    assert len(found) == 26


@every_document
def test_no_command_line_writes_a_receipt_into_the_package(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    evaluations = [line for line in [*command_lines(text), *spans(text)] if line.startswith("vqgen-eval ")]
    names = "|".join(map(re.escape, SHIPPED))
    package = re.compile(rf"--(model|tokenizer) (sampling/pretrained|({names})(?![\w-]))")
    into = [line for line in evaluations if package.search(line)]
    assert [line for line in into if "--output" not in line] == []


def test_every_logged_metric_is_documented() -> None:
    from vqgen.evaluation.report.series import LOGGED
    from vqgen.tokenizer.metrics import RECONSTRUCTION

    further = "nats_per_token bits_per_dimension inpainting_nats_per_token health"
    names = {*RECONSTRUCTION, *(name for group in LOGGED.values() for name in group), *further.split()}
    table = (ROOT / "docs/training.md").read_text(encoding="utf-8").partition("## metrics.jsonl")[2]
    assert [name for name in sorted(names) if f"`{name}`" not in table] == []


def test_tests_that_the_guide_to_extending_names_exist() -> None:
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    named = re.findall(r"^\|.*\| `(test_\w+)` \|$", text, re.MULTILINE)
    source = (ROOT / "tests/test_extending.py").read_text(encoding="utf-8")
    assert len(named) == 5
    assert [name for name in named if f"\ndef {name}(" not in source] == []


def test_every_program_and_preset_is_documented(project: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in project["project"]["scripts"] if f"| `{name}` |" not in readme] == []
    training = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    for preset in (ROOT / "configs").glob("[!q]*.yaml"):
        assert f"`{preset.stem}`" in training, preset


def test_the_checks_see_what_they_must(tmp_path: Path, programs: dict[str, Any]) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, `two`\n```\n# three\n[f](g.md)\n```\n", encoding="utf-8")
    assert anchors(page) == {"one-two"} and list(broken_links(page, page.read_text(encoding="utf-8"))) == []
    links = '[a](nothing.md) [b](README.md#nothing) [c](README.md#layout) [d](http://e.f) [g](../x) <img src="h.png">'
    assert list(broken_links(ROOT / "README.md", links)) == ["nothing.md", "README.md#nothing", "../x", "h.png"]
    block = "```\nvqgen-sample --n 4 \\\n  --seed 1\n```\nvqgen-other\n"
    assert [line.split() for line in command_lines(block)] == [["vqgen-sample", "--n", "4", "--seed", "1"]]
    with pytest.raises(AssertionError):
        program_of(["vqgen-nothing"], programs)
    assert unknown_options(["--n", "3", "--m"], programs, "vqgen-sample") == ["--m"]
    with pytest.raises(UsageError):
        parse(programs["vqgen-sample"].config, ["--m"])
    assert undefined_names(["import a.b as c\nc(d)", "for e in [c]:\n    print(e, a)"]) == ["d", "a"]
