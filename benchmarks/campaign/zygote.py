"""A process that has imported everything once and forks programs from then on: seconds less a run.

It reads one JSON request a line and answers with one JSON line. The forked program gets a session, files for its
output, limits of memory and time and, if asked for, dies before its k-th file operation.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_SCRIPT = re.compile(r'^(vqgen-[a-z-]+) = "([\w.]+):main"$', re.MULTILINE)
MODULES = dict(_SCRIPT.findall((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
"""Program -> the module of its `main`."""
_LIBRARIES = (
    "accelerate datasets lpips pyarrow.parquet pydantic safetensors.torch torch torchvision transformers.models.llama"
).split()
_FOLDERS = ("vqgen", "tokenizer", "prior", "sampling", "evaluation")
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def _own_modules() -> list[str]:
    """Every module of the project but those of the page, which programs would import late."""
    found = []
    for folder in _FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(".".join(parts if folder == "vqgen" else ("vqgen", *parts)))
    return found


def _drop_override() -> None:
    """Make permission bits count for root as well: give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) == 0:
        for word in (0, 1):  # effective, permitted
            data[word] &= ~0b110
        libc.capset(header, data)


def _count_operations(kill_before: int, pattern: str, log: str) -> None:
    """Log every change of files of this process, and die before the `kill_before`-th whose path matches `pattern`."""
    matches, own = re.compile(pattern).search, os.getpid()
    record = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & _WRITING:
                return
        elif event not in _CHANGES:
            return
        path = str(args[0])
        if os.getpid() != own or path.startswith(("/dev/", "/proc/")) or not matches(path):
            return
        done += 1
        os.write(record, f"{event} {path}\n".encode("utf-8", "replace"))
        if done == kill_before:
            os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)


def _run(request: dict[str, Any]) -> int:
    """In the forked process: the program's `main`, as if called from a shell."""
    os.setsid()
    for path, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (request["out"], 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (request["err"], 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o600), descriptor)
    os.environ.update(request["environ"])
    os.chdir(request["folder"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    program = importlib.import_module(MODULES[request["program"]])
    _drop_override()
    if request["operations"]:
        _count_operations(request["kill_before"], request["pattern"], request["operations"])
    try:
        code = program.main([os.fsencode(word).decode("utf-8", "surrogateescape") for word in request["words"]])
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


def _activity(session: int) -> tuple[float, float, bool]:
    """Processor time of all processes of a session and of the busiest one, in seconds; whether any wants to go on."""
    ticks, wanting = [0], False
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) == session:
            ticks.append(int(fields[11]) + int(fields[12]))
            wanting = wanting or fields[0] in (b"R", b"D")
    second = os.sysconf("SC_CLK_TCK")
    return sum(ticks) / second, max(ticks) / second, wanting


def _wait(pid: int, request: dict[str, Any]) -> tuple[int, bool, float]:
    """Exit code (minus the signal that ended it), whether it hung, seconds.

    More than `limit` seconds is a hang; on a busy machine, where a process has computed for less than that and still
    does, up to three times as many.
    """
    start, looked, used, idle = time.monotonic(), 0.0, -1.0, 0
    limit, hang = request["limit"], False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        passed = time.monotonic() - start
        if ended:
            break
        if request["kill_after"] and passed > request["kill_after"]:
            os.kill(pid, signal.SIGKILL)
        elif passed > limit and passed - looked > 1:
            now, most, wanting = _activity(pid)
            idle = idle + 1 if now - used < 0.02 and not wanting else 0
            used, looked = now, passed
            if idle > 2 or most > limit or passed > 3 * limit:
                hang = True
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002 if passed < 0.2 or request["kill_after"] else 0.02)
    with suppress(OSError):
        os.killpg(pid, signal.SIGKILL)  # what it started and left
    return os.waitstatus_to_exitcode(status), hang, passed


def serve() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in (*_LIBRARIES, *_own_modules()):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                answers.close()
                code = _run(request)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code, hang, seconds = _wait(pid, request)
        print(json.dumps({"code": code, "hang": hang, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
