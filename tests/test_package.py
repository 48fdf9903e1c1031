"""The package as a whole: what the wheel holds, which way imports go, what `import vqgen` costs, and every option."""

import ast
import configparser
import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import vqgen
from vqgen.config import options

ROOT = Path(__file__).parents[1]
# Folder -> the package it installs as, in order of layers: a file may import its own layer and those before it.
LAYERS = {
    "vqgen": "vqgen",
    **{name: f"vqgen.{name}" for name in ("tokenizer", "prior", "sampling", "evaluation", "app")},
}
SOURCES = [path for folder in LAYERS for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


# ---- the wheel ----


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree: building in the tree itself would leave and take up old files of `build/`."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns(".*", "build", "dist", "runs", "samples", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=junk)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    assert file.name == f"vqgen-{vqgen.__version__}-py3-none-any.whl"
    models = sum(path.stat().st_size for path in (ROOT / "sampling" / "pretrained").rglob("*"))
    assert file.stat().st_size <= min(models, 80 * 10**6) + 10 * 10**6, "the wheel is larger than the models and 10 MB"
    return zipfile.ZipFile(file)


def test_the_wheel_holds_the_tree_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected: set[str] = set()
    for folder, package in {**LAYERS, "configs": "vqgen.configs"}.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected.add(package.replace(".", "/") + "/" + path.relative_to(ROOT / folder).as_posix())
    information = f"vqgen-{vqgen.__version__}.dist-info/"
    held = {name for name in wheel.namelist() if not name.startswith(information)}
    assert held == expected
    assert {"LICENSE", "tokenizer/data/demo/LICENSE"} <= {
        name.removeprefix(information + "licenses/") for name in wheel.namelist()
    }
    assert wheel.read(information + "top_level.txt").split() == [b"vqgen"]


def test_console_scripts_are_functions_that_exist(wheel: zipfile.ZipFile, project: dict[str, Any]) -> None:
    entries = configparser.ConfigParser(delimiters="=")
    entries.optionxform = str  # type: ignore[assignment,method-assign]
    entries.read_string(wheel.read(f"vqgen-{vqgen.__version__}.dist-info/entry_points.txt").decode())
    scripts = dict(entries["console_scripts"])
    assert scripts == project["project"]["scripts"]
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), target


def test_constraints_pin_every_direct_dependency(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "==" and "+" not in version.version and not pin.url, pin
    wanted = [Requirement(text) for text in project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += [Requirement(text) for text in extra]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": python, "python_full_version": f"{python}.1"}
        exact = [
            (p.name.lower(), next(iter(p.specifier)).version) for p in pins if not p.marker or p.marker.evaluate(here)
        ]
        assert len(dict(exact)) == len(exact), f"two pins of one package for Python {python}"
        for requirement in wanted:
            if requirement.marker is None or requirement.marker.evaluate(here):
                assert requirement.name.lower() in dict(exact), f"{requirement.name} has no pin for Python {python}"
                assert requirement.specifier.contains(dict(exact)[requirement.name.lower()]), requirement


def test_types_are_checked_of_every_package(project: dict[str, Any]) -> None:
    """Each folder that `make types` links is to be listed, as pyright follows no other link."""
    linked = {name for name in project["tool"]["setuptools"]["packages"] if name.count(".") < 2}
    listed = set(project["tool"]["pyright"]["include"]) - {"benchmarks"}
    assert listed == {f"build/types/{name.replace('.', '/')}" for name in linked}


# ---- imports ----


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Every module that a file of `package` imports, by full name, with the number of leading dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from vqgen import prior` and `from vqgen.prior import model` both reach the layer `prior`.
            yield from ((f"{module}.{alias.name}", node.level) for alias in node.names)


def wrong_imports(tree: ast.AST, package: str) -> list[str]:
    """Imports of a later layer, and imports that are neither relative within a folder nor written in full."""
    order, wrong = list(LAYERS), []

    def layer(module: str) -> str:
        first, _, rest = module.partition(".")
        return rest.partition(".")[0] if first == "vqgen" and rest.partition(".")[0] in LAYERS else "vqgen"

    for module, dots in imported(tree, package):
        if order.index(layer(module)) > order.index(layer(package + ".")):
            wrong.append(f"{package} imports {module}")
        elif dots > 1 or module.partition(".")[0] in (*order[1:], "configs"):
            wrong.append(f"{module} is not imported in full")
    return wrong


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The module less its `if TYPE_CHECKING:` blocks."""
    kept = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    return ast.Module(kept, [])


def package_of(path: Path) -> str:
    """The package that a source file is installed in."""
    first, *rest = path.relative_to(ROOT).parent.parts
    return ".".join([LAYERS[first], *rest])


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    tree = tree_of(path)
    # The public names load lazily: they are strings, and imports for type checkers alone.
    lazy = name_of(path) == "vqgen/__init__.py"
    assert wrong_imports(without_type_checking(tree) if lazy else tree, package_of(path)) == []


@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        (
            "vqgen.prior",
            "from vqgen.tokenizer.model import Tokenizer\nfrom .model import Prior\nimport torch",
            0,
        ),
        ("vqgen.prior", "from vqgen.config import command\nfrom vqgen import config\nfrom . import model", 0),
        ("vqgen.prior", "from ..tokenizer.model import Tokenizer", 1),
        ("vqgen.prior", "from vqgen.sampling.decoding.logits import f", 1),
        ("vqgen.prior", "def f():\n    from vqgen.sampling import logits", 1),
        ("vqgen.tokenizer", "from vqgen import prior", 1),
        ("vqgen.tokenizer.data", "from vqgen.prior import model", 1),
        ("vqgen.tokenizer.data", "from ..model import Tokenizer", 1),
        ("vqgen.tokenizer.data", "from .pixels import to_float", 0),
        ("vqgen", "from .tokenizer import model", 1),
        ("vqgen", "from . import errors", 0),
        ("vqgen.training", "from vqgen.errors import UserError", 0),
        ("vqgen.prior", "import vqgen.sampling.decoding.logits", 1),
        ("vqgen.sampling", "from vqgen.evaluation.receipt import flat", 1),
        ("vqgen.evaluation.report", "from vqgen.app import demo", 1),
        ("vqgen.sampling", "from prior.model import Prior", 1),
        ("vqgen.sampling", "from tokenizers import Tokenizer", 0),
    ],
)
def test_the_layering_check_sees_what_it_must(package: str, source: str, wrong: int) -> None:
    assert len(wrong_imports(ast.parse(source), package)) == wrong


def test_import_vqgen_loads_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import vqgen; vqgen.__version__, dir(vqgen)\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names)), len(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, _, count = out.rpartition(" ")
    assert names == "['vqgen']" and int(count) < 20


HEAVY = {"torch", "torchvision", "transformers", "datasets", "accelerate", "torchmetrics", "lpips", "pandas", "scipy"}
HEAVY |= {"pyarrow", "matplotlib"}
START = """
import contextlib, importlib, io, json, sys
module, _, function = sys.argv[1].partition(":")
main = getattr(importlib.import_module(module), function)
ends = []
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ends.append(main(words))
print(json.dumps([ends, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_help_version_and_usage_errors_import_nothing_heavy(
    project: dict[str, Any], programs: dict[str, Any], tmp_path: Path
) -> None:
    """What takes seconds to import is imported when work begins."""
    slow = {}
    for name, target in project["project"]["scripts"].items():
        lines = [["--help"], ["--help-all"], ["--version"], ["--hepl"]]
        for command in (program.split()[1] for program in programs if program.startswith(f"{name} ")):
            lines += [
                [command, "--help"],
                [command, "--help-all"],
                [command, "--hepl"],
                [command, "--config", "no such"],
            ]
        run = [sys.executable, "-c", START, target, json.dumps(lines)]
        done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=True)
        ends, loaded = json.loads(done.stdout)
        assert ends == [0 if line[-1] in ("--help", "--help-all", "--version") else 2 for line in lines], name
        if found := HEAVY & set(loaded):
            slow[name] = sorted(found)
    assert not slow


def test_common_options_exist_and_are_about_ten(programs: dict[str, Any]) -> None:
    for program, found in programs.items():
        names = {option.name for option in options(found.config)}
        common = getattr(found.config, "COMMON", ())
        assert set(common) <= names and len(set(common)) == len(common) <= 12, program
        shown = common or len(names) <= 15
        assert shown, f"{program} has {len(names)} options: COMMON says which --help shows"


def test_public_names_load_on_first_use() -> None:
    for name in vqgen.__all__:
        assert getattr(vqgen, name) is not None
    assert set(vqgen.__all__) == set(dir(vqgen))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vqgen.nothing


# ---- sources ----


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=name_of)
def test_no_file_is_over_350_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


def test_no_folder_has_over_14_source_files() -> None:
    counts = Counter(name_of(path.parent) for path in SOURCES)
    assert not {folder: count for folder, count in counts.items() if count > 14}


def dangers(tree: ast.AST) -> list[str]:
    """Reading that can run code, and weights loaded by name only where they happen to fit."""
    runs_code = ("pickle", "dill", "shelve", "marshal", "joblib", "cloudpickle")
    used = {module for module, _ in imported(tree, "x")} - {"pickle"}
    used |= {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # The error that `torch.load(weights_only=True)` raises for a damaged file is the one harmless name in there.
    found = [
        f"uses {name}" for name in used if name.partition(".")[0] in runs_code and name != "pickle.UnpicklingError"
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if called == "torch.load" and given.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if called not in ("zip", "map") and given.get("strict") is False:
            found.append(f"{called} with strict=False")
        if called in ("eval", "exec") or given.get("allow_pickle") is True or given.get("trust_remote_code") is True:
            found.append(f"{called} runs what it reads")
    return found


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=name_of)
def test_no_source_unpickles_or_loads_loosely(path: Path) -> None:
    assert dangers(tree_of(path)) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("import pickle\npickle.loads(x)", 1),
        ("import pickle\ntry: f()\nexcept pickle.UnpicklingError: pass", 0),
        ("import dill", 1),
        ("from pickle import load", 1),
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("m.load_state_dict(s, strict=False)", 1),
        ("m.load_state_dict(s); zip(a, b, strict=False)", 0),
        ("np.load(p, allow_pickle=True)", 1),
        ("eval(x); model.eval()", 1),
    ],
)
def test_the_check_of_sources_sees_what_it_must(source: str, count: int) -> None:
    assert len(dangers(ast.parse(source))) == count


# ---- options ----


def test_option_names_are_unique_in_a_program(programs: dict[str, Any]) -> None:
    for program, found in programs.items():
        names = Counter(option.name for option in options(found.config))
        assert not {name for name, count in names.items() if count > 1}, program
        assert not {"config", "help", "version", "debug", "h"} & set(names), program
        assert not {f"no_{name}" for name in names} & set(names), program


def test_every_option_has_help_text(programs: dict[str, Any]) -> None:
    for program, found in programs.items():
        assert (found.run.__doc__ or "").strip(), f"{program}: run has no docstring, which is the first line of --help"
        for option in options(found.config):
            assert len(option.help) > 5, f"{program} {option.flag}"


def attributes(tree: ast.AST) -> list[str]:
    return [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]


def reads(trees: list[ast.Module]) -> Counter[str]:
    """How often a name is read as an attribute, less where a class only checks its own fields."""
    count: Counter[str] = Counter()
    for tree in trees:
        count.update(attributes(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                fields = {
                    n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
                }
                for check in node.body:
                    if isinstance(check, ast.FunctionDef) and check.name == "__post_init__":
                        count.subtract(name for name in attributes(check) if name in fields)
    return count


def test_every_option_is_read_somewhere(programs: dict[str, Any]) -> None:
    count = reads([tree_of(path) for path in SOURCES])
    for program, found in programs.items():
        for option in options(found.config):
            assert count[option.name] + count[option.name + "_"] > 0, f"{program} {option.flag} is read nowhere"


def test_the_check_of_reads_sees_an_option_that_is_only_validated() -> None:
    source = "class C:\n    a: int\n    b: int\n    def __post_init__(self):\n        assert self.a\nprint(c.b)"
    assert reads([ast.parse(source)]) == Counter({"a": 0, "b": 1})


def test_programs_start_as_modules(project: dict[str, Any]) -> None:
    """`python -m` is what `accelerate launch -m` needs; a wrong option ends it with 2 and one line."""
    for name, target in project["project"]["scripts"].items():
        run = [sys.executable, "-m", target.partition(":")[0], "--hepl"]
        done = subprocess.run(run, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), name + done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith((f"{name}: unknown option --hepl", f"{name}: unknown command '--hepl'")), done.stderr
