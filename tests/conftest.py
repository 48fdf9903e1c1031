"""What every test file shares: one thread a process, a way to call a program, and the programs that are installed."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before torch is imported; processes that tests start inherit it. pytest's workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of gradio's client, with which tests call the page, from a thread of its own.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from helpers.network import no_requests
from hypothesis import settings
from processes import Ended

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

# No deadline: on a shared machine time says nothing. In CI the same examples each time.
settings.register_profile("vqgen", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("vqgen")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # for `benchmarks.campaign`, wherever pytest is called from


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device that a test of arithmetic runs on: the CPU, and CUDA where there is a device."""
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Let this process compute with one thread, whatever the environment says: bytes may be compared then."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda() -> str:
    """CUDA, for a test that compares it with the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def trained_on(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device that programs which ask Accelerate for one get, in a process that may have had another."""
    from accelerate import PartialState

    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", str(device == "cpu"))
    PartialState._reset_state()
    yield device
    PartialState._reset_state()


@pytest.fixture(autouse=True, scope="session")
def refused_requests() -> Iterator[list[str]]:
    """Other machines that anything in this process has asked for, in vain."""
    with no_requests() as asked:
        yield asked


@pytest.fixture(autouse=True)
def no_program_makes_a_request(refused_requests: list[str]) -> Iterator[None]:
    """SECURITY.md promises it of all but those that are asked for one."""
    yield
    asked = refused_requests[:]
    refused_requests.clear()
    assert not asked


@pytest.fixture(autouse=True)
def no_precision_is_left() -> Iterator[None]:
    """Let Accelerate, which keeps one precision per process, forget that of a run in the test."""
    yield
    if loaded := sys.modules.get("accelerate.state"):
        loaded.AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs find an idle machine: they say so in a line where it is busy."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Call a program's `main` with words of the command line (anything with a `str`); an `Ended` comes back."""

    def call(main: Callable[[Sequence[str]], int], *words: Any) -> Ended:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as ending:  # a run that a signal stopped
            code = int(ending.code or 0)
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


@dataclass(frozen=True)
class Program:
    """A console script: its configuration class and the function that runs it."""

    config: type
    run: Callable[[Any], None]


@pytest.fixture(scope="session")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def programs(project: dict[str, Any]) -> dict[str, Program]:
    """Every console script of pyproject.toml by name, each command of one that has several: what its `main` hands to
    `command` or `commands`."""
    found: dict[str, Program] = {}

    def note(program: str, config: type, run: Callable[[Any], None], arguments: Sequence[str] | None = None) -> int:
        found[program] = Program(config, run)
        return 0

    def note_all(program: str, known: dict[str, tuple[type, Any]], arguments: Sequence[str] | None = None) -> int:
        for word, (config, run) in known.items():
            note(f"{program} {word}", config, run)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        for name, target in project["project"]["scripts"].items():
            module, _, function = target.partition(":")
            loaded = importlib.import_module(module)
            several = hasattr(loaded, "commands")
            patch.setattr(loaded, "commands" if several else "command", note_all if several else note)
            getattr(loaded, function)([])
            assert any(f"{key} ".startswith(f"{name} ") for key in found), (
                f"{target} does not call command({name!r}, …)"
            )
    return found
