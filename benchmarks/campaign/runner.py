"""Programs run by zygotes, several at a time, each with limits of time and memory."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

from .zygote import ROOT

LIMIT = 30.0
"""Seconds after which a program hangs."""
MEMORY = 6 << 30
"""Bytes of data that a program may allocate; two thirds of these are left after its imports."""
# One file may not fill the disk of the machine that runs this; no valid output of the campaign comes near it.
FILE_SIZE = 1 << 30


@dataclass(frozen=True)
class Ended:
    """What a program ended with."""

    code: int
    """Exit code; minus the signal that ended it."""
    out: str
    err: str
    hang: bool
    seconds: float
    operations: tuple[str, ...] = ()
    """Changes of files, each with the path, where they were counted."""

    @property
    def lines(self) -> list[str]:
        """Lines of the errors without progress bars, each as it is seen at last."""
        seen = [line.rpartition("\r")[2] for line in self.err.replace("\r\n", "\n").split("\n")]
        return [line for line in seen if line.strip() and not re.search(r"\d+%\||\d+it \[|\[\d\d:\d\d<", line)]

    def expect(self, words: Sequence[str], code: int = 0) -> None:
        """Raise `RuntimeError` where a program has ended otherwise on valid inputs."""
        if self.code != code:
            how = f"hang, {self.seconds:.0f} s" if self.hang else f"exit code {self.code}"
            raise RuntimeError(f"{' '.join(words)} on valid inputs: {how}\n{self.err[-3000:]}")


@dataclass(frozen=True)
class Kill:
    """When a program is killed: before its k-th file operation whose path matches, or after some seconds."""

    before: int = 0
    pattern: str = ""
    after: float = 0.0


class Zygote:
    """A process that forks programs, one at a time."""

    def __init__(self) -> None:
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, "-m", "benchmarks.campaign.zygote"]
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def ready(self) -> None:
        assert self.process.stdout
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("a zygote did not start; its errors are above")

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class Runner:
    """Runs programs on as many zygotes as there are workers; threads may share it."""

    def __init__(self, zygotes: Sequence[Zygote]) -> None:
        self.free: Queue[Zygote] = Queue()
        for zygote in zygotes:
            self.free.put(zygote)

    def run(
        self, words: Sequence[str], folder: Path, home: Path, kill: Kill | None = None, count: bool = False, **more: Any
    ) -> Ended:
        """Run a command line in `folder`; `home` is for caches. Arguments `more`: limits as `RLIMIT_…`."""
        for name in ("", "tmp"):
            (home / name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="vqgen-campaign-") as log:
            files = {name: str(Path(log) / name) for name in ("out", "err", "operations")}
            kill = kill or Kill()
            request = {
                "program": words[0],
                "words": list(words[1:]),
                "folder": str(folder),
                "environ": {
                    "HOME": str(home),
                    "TMPDIR": str(home / "tmp"),
                    "XDG_CACHE_HOME": str(home / "cache"),
                    "HF_HOME": str(home / "cache"),
                    "HF_DATASETS_CACHE": str(home / "cache" / "datasets"),
                },
                "limits": {"RLIMIT_DATA": MEMORY, "RLIMIT_FSIZE": FILE_SIZE, **more},
                "limit": LIMIT,
                "kill_after": kill.after,
                "kill_before": kill.before,
                "pattern": kill.pattern,
                **files,
            }
            if not (count or kill.before):
                request["operations"] = ""
            zygote = self.free.get()
            try:
                answer = zygote.ask(request)
            finally:
                self.free.put(zygote)
            texts = {}
            for name, path in files.items():
                there = os.path.exists(path)
                texts[name] = Path(path).read_text(encoding="utf-8", errors="replace") if there else ""
        operations = tuple(texts["operations"].splitlines())
        return Ended(answer["code"], texts["out"], texts["err"], answer["hang"], answer["seconds"], operations)


@contextmanager
def runner(workers: int) -> Iterator[Runner]:
    """Start the zygotes, and end them at last."""
    zygotes = [Zygote() for _ in range(workers)]
    try:
        for zygote in zygotes:
            zygote.ready()
        yield Runner(zygotes)
    finally:
        for zygote in zygotes:
            zygote.end()
