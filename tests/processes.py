"""Programs as real processes, to be killed, signalled and run side by side.

Importing torch takes seconds a process. All but the few that must show `python -m` itself are therefore forked from a
server that has imported everything once and computed nothing; for signals, files and exit codes they are the same.
"""

import atexit
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

TOKENIZER = "vqgen.tokenizer.train"
TOKENIZE = "vqgen.tokenizer.encode"
PRIOR = "vqgen.prior.train"
SAMPLE = "vqgen.sampling.sample"

_FORKS = multiprocessing.get_context("forkserver")
# The modules that do the work, too: programs import them late.
_WORK = ["vqgen.prior.trainer", "vqgen.sampling.write_samples", "transformers.models.llama"]
_FORKS.set_forkserver_preload(["pytest", "processes", TOKENIZER, TOKENIZE, PRIOR, SAMPLE, *_WORK])
_LIMIT = 900.0  # seconds; whatever takes longer hangs


@dataclass(frozen=True)
class Ended:
    """What a program ended with: its exit code (minus the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of the errors."""
        return (self.err.strip().splitlines() or [""])[-1]

    def ok(self) -> "Ended":
        """Itself, where the program ended well."""
        assert self.code == 0, self.err
        return self

    def refused(self, code: int, *parts: str) -> str:
        """The one line it ended with: exit `code`, no traceback, every one of `parts` in it."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err, self.err
        assert self.last.startswith("vqgen-"), self.err
        for part in parts:
            assert part in self.last, self.err
        return self.last


class Started:
    """A running program; what it prints goes to two files in `log`, a folder of its own."""

    def __init__(self, process: Any, log: Path) -> None:
        self.process, self.log = process, log
        atexit.register(self._end)  # where the tests are interrupted

    def _end(self) -> None:
        if self.running():
            self.process.kill()
        shutil.rmtree(self.log, ignore_errors=True)

    def running(self) -> bool:
        return (self.process.poll() is None) if isinstance(self.process, subprocess.Popen) else self.process.is_alive()

    def wait(self) -> Ended:
        """Wait for the end; one that hangs is killed."""
        end = time.monotonic() + _LIMIT
        while self.running():
            if time.monotonic() > end:
                self.process.kill()
            time.sleep(0.005)
        code = self.process.returncode if isinstance(self.process, subprocess.Popen) else self.process.exitcode
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in _streams(self.log))
        atexit.unregister(self._end)
        self._end()
        return Ended(int(code), out, err)

    def signal(self, number: int, folder: Path, step: int, group: bool = False) -> Ended:
        """Send a signal as soon as `folder/metrics.jsonl` shows `step`, and wait for the end.

        With `group` what a `launch` has started gets it, too, as from a keyboard.
        """
        end = time.monotonic() + _LIMIT
        while not any(row["step"] >= step for row in rows(folder)):
            assert self.running() and time.monotonic() < end, self.wait().err
            time.sleep(0.005)
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self.wait()


def _streams(log: Path) -> tuple[Path, Path]:
    return log / "out", log / "err"


def _new_log() -> Path:
    log = Path(tempfile.mkdtemp(prefix="vqgen-log-"))
    for path in _streams(log):
        path.touch()
    return log


def _main(module: str, words: list[str], environ: Mapping[str, str], log: Path, hook: Callable[[], Any] | None) -> None:
    os.environ.update(environ)
    for path, descriptor in zip(_streams(log), (1, 2)):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    program = importlib.import_module(module)
    if hook:
        hook()
    sys.exit(program.main(words))


def start(
    module: str, *words: Any, environ: Mapping[str, str] | None = None, hook: Callable[[], Any] | None = None
) -> Started:
    """Fork a program; `hook` runs in the new process before its `main` (a function of a module, for pickling)."""
    log = _new_log()
    process = _FORKS.Process(target=_main, args=(module, [str(w) for w in words], dict(environ or {}), log, hook))
    process.start()
    return Started(process, log)


def launch(command: Sequence[str], *words: Any) -> Started:
    """A command in a process and a session of its own, nothing shared."""
    log = _new_log()
    out, err = _streams(log)
    with open(out, "w") as stdout, open(err, "w") as stderr:
        texts = [*command, *(str(word) for word in words)]
        process = subprocess.Popen(texts, stdout=stdout, stderr=stderr, start_new_session=True)
    return Started(process, log)


def kill_rank(started: Started, rank: int, folder: Path, after: int) -> None:
    """SIGKILL one process that torchrun has started, once the run in `folder` has logged step `after`."""
    end = time.monotonic() + _LIMIT
    while not any(row["step"] >= after for row in rows(folder)):
        assert started.running() and time.monotonic() < end, started.wait().err
        time.sleep(0.005)
    workers = psutil.Process(started.process.pid).children(recursive=True)
    next(each for each in workers if each.environ().get("RANK") == str(rank)).kill()


def start_module(module: str, *words: Any) -> Started:
    """`python -m module`."""
    return launch([sys.executable, "-m", module], *words)


_KILLED = """
import runpy, sys
folder, row, module = sys.argv[1:4]
sys.path.insert(0, folder)
from processes import at_row
at_row(int(row))()
sys.argv[1:4] = []
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def killed_module(module: str, row: int, *words: Any) -> Ended:
    """A module run as `python -m` runs it (by runpy, after a hook), killed right after it has logged a step."""
    return launch([sys.executable, "-c", _KILLED, str(Path(__file__).parent), str(row), module], *words).wait()


def free_port() -> int:
    """A free port below those that sockets get which ask for none, so that nobody is given it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def run(module: str, *words: Any, hook: Callable[[], Any] | None = None) -> Ended:
    """Fork a program and wait for its end."""
    return start(module, *words, hook=hook).wait()


def ranks(world: int) -> list[dict[str, str]]:
    """The environment that torchrun and `accelerate launch` give to each of so many processes that are to meet."""
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if torch.cuda.device_count() < world:  # NCCL refuses several processes on a device
        shared["ACCELERATE_USE_CPU"] = "1"
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_together(
    module: str,
    *words: Any,
    hooks: Sequence[Callable[[], Any] | None] = (None, None),
    environ: Mapping[str, str] | None = None,
) -> list[Ended]:
    """Processes of one distributed run, as many as there are `hooks`; `environ` comes on top for all."""
    each = [{**rank, **(environ or {})} for rank in ranks(len(hooks))]
    started = [start(module, *words, environ=own, hook=hook) for own, hook in zip(each, hooks)]
    return [process.wait() for process in started]


# Hooks: what happens inside a process at an exact place.


def _at_row(at: int, number: int) -> None:
    from vqgen.training.trackers import JsonlTracker

    write = JsonlTracker.log

    def log(self: Any, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        write(self, values, step=step, **kwargs)
        if step == at:
            os.kill(os.getpid(), number)

    JsonlTracker.log = log  # type: ignore[method-assign]


def at_row(step: int, number: int = signal.SIGKILL) -> Callable[[], None]:
    """The process sends itself a signal right after the row of this step."""
    return partial(_at_row, step, number)


def _in_step(at: int, number: int) -> None:
    import vqgen.training.run

    seed_of = vqgen.training.run.step_seed

    def step_seed(seed: int, done: int, *where: int) -> int:
        if done + 1 == at:
            os.kill(os.getpid(), number)
        return seed_of(seed, done, *where)

    vqgen.training.run.step_seed = step_seed


def in_step(step: int, number: int) -> Callable[[], None]:
    """The process sends itself a signal at the beginning of this step; 1 is the first."""
    return partial(_in_step, step, number)


def _in_update(at: int, act: Callable[[], None]) -> None:
    from vqgen.training.run import Run

    os.setpgrp()
    update = Run.update

    def late(self: Run, *args: Any) -> Any:
        if self.done + 1 == at:
            act()
        return update(self, *args)

    Run.update = late  # type: ignore[method-assign]


def _signal_group() -> None:
    # From outside the group: workers obey their parent.
    code = f"import os, signal; os.killpg({os.getpgrp()}, signal.SIGTERM)"
    subprocess.run([sys.executable, "-c", code], start_new_session=True, check=True)
    time.sleep(1)  # for torch to see which workers have died


def signal_group(step: int) -> Callable[[], None]:
    """SIGTERM to the process and its workers in the middle of this step: backward is done, the update is not."""
    return partial(_in_update, step, _signal_group)


def _fail() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise RuntimeError("a fault in the middle of a step")


def fail_after_signal(step: int) -> Callable[[], None]:
    """SIGTERM to the process and then an error in the middle of this step."""
    return partial(_in_update, step, _fail)


def _in_checkpoint(step: int) -> None:
    import torch

    save = torch.save

    def die(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, file, *args, **kwargs)
        if f"step-{step:08d}" in str(file.name):
            file.flush()
            os.truncate(file.name, os.path.getsize(file.name) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = die


def in_checkpoint(step: int) -> Callable[[], None]:
    """SIGKILL when half of the optimizers' file of this checkpoint is on disk."""
    return partial(_in_checkpoint, step)


# What a run left behind.


TIMING = ("per_second", "mfu", "/seconds", "peak_memory_gb")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl but for the timing; a last line that is being written is left out."""
    path = folder / "metrics.jsonl"
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []:
        if line.endswith("\n"):
            found.append({k: v for k, v in json.loads(line).items() if not k.endswith(TIMING)})
    return found


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def weights(folder: Path) -> bytes:
    """The bytes of the model."""
    return (folder / "model.safetensors").read_bytes()


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, hidden ones too: time of change and bytes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def write_images(folder: Path, count: int) -> None:
    """The first of the demo's images as PNG, one sub-folder a class."""
    from torchvision.io import write_png

    from vqgen.tokenizer.data.dataset import open_images
    from vqgen.tokenizer.data.options import ImageConfig

    images = open_images("demo", "train", ImageConfig(size=[28, 28], channels=1))
    for index in range(count):
        sample = images[index]
        place = folder / f"class{sample.label}"
        place.mkdir(parents=True, exist_ok=True)
        write_png(sample.image, str(place / f"{index}.png"))
