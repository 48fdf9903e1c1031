"""Programs that are killed, started twice or out of disk space: the same command again must end as if undisturbed."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import stock
from .cases import Campaign
from .oracles import Results, digests
from .place import Place, lay_out, outside, plant, snapshot
from .runner import Ended, Kill

ATTEMPTS = 2
"""Calls of the same command after the last kill until it must have ended."""
_HISTORY = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """A command that writes the folder or file `out`."""

    name: str
    words: Sequence[str]
    inputs: tuple[str, ...]
    results: tuple[str, ...]
    begun: str = ""
    """Folder of the stock that is `out` to begin with: a run to continue or to replace."""

    @property
    def program(self) -> str:
        return self.words[0]


UNCOVERED = {
    "vqgen-train": "plans by the time that this machine takes; its stages are programs of their own",
    "vqgen-demo": "trains for minutes; its stages are programs of their own",
    "vqgen-app": "writes no output",
}
"""Programs without a job, and why."""


def jobs() -> list[Job]:
    """Every program but `UNCOVERED`, anew, continuing and replacing another run."""
    found = []
    run = ("model.safetensors", "vqgen.json", _HISTORY, "checkpoints/step-00000006/*.safetensors")
    for words, name, other in ((stock.TOKENIZER_RUN, "tokenizer", "images"), (stock.PRIOR_RUN, "prior", "codes")):
        train = f"train {name}"
        found += [
            Job(f"{train}, new", words, (other,), run),
            Job(f"{train}, resumed", words, (other,), run, f"{name}-stopped"),
            Job(f"{train}, --overwrite", [*words, "--seed", "7", "--overwrite"], (other,), run, name),
            Job(
                f"{train}, --overwrite of a stopped run",
                [*words, "--seed", "7", "--overwrite"],
                (other,),
                run,
                f"{name}-stopped",
            ),
        ]
    codes, images = ("codes-*.safetensors", "manifest.json", "tokenizer/*"), ("*.png", "samples.json", "metrics.json")
    other_codes = [word if word != "8" else "5" for word in stock.CODES_RUN]
    other_samples = [word if word != "3" else "9" for word in stock.SAMPLES_RUN]
    sources, model, taming = ("images", "tokenizer"), ("model.safetensors", "*.json"), "foreign/taming.safetensors"
    fewer = [*stock.RECONSTRUCT_RUN, "--n", "4", "--overwrite"]
    codebook = "vqgen-eval codebook --tokenizer tokenizer --codes codes"
    return [
        *found,
        Job("tokenize, new", stock.CODES_RUN, sources, codes),
        Job("tokenize, resumed", stock.CODES_RUN, sources, codes, "codes-stopped"),
        Job("tokenize, --overwrite", [*other_codes, "--overwrite"], sources, codes, "codes"),
        Job("sample, new", stock.SAMPLES_RUN, ("prior",), images),
        Job("sample, folders", [*stock.SAMPLES_RUN, "--layout", "folders"], ("prior",), ("images/*/*.png", *images)),
        Job("sample, resumed", stock.SAMPLES_RUN, ("prior",), images, "samples-stopped"),
        Job("sample, --overwrite", [*other_samples, "--overwrite"], ("prior",), images, "samples"),
        Job("reconstruct, new", stock.RECONSTRUCT_RUN, sources, images),
        Job("reconstruct, --overwrite", fewer, sources, images, "pictures"),
        Job("convert", f"vqgen-convert --input {taming} --size 32 32".split(), (taming,), model),
        Job("convert to diffusers", "vqgen-convert --input tokenizer --to diffusers".split(), ("tokenizer",), ("*",)),
        Job("export", "vqgen-export --model prior".split(), ("prior",), ("*", "tokenizer/*")),
        Job("compress", stock.COMPRESS_RUN, ("images", "prior"), ("*",)),
        Job("decompress", "vqgen-decompress archive --model prior".split(), ("archive", "prior"), ("*.png",)),
        Job("codebook", codebook.split(), ("tokenizer", "codes"), ("*",)),
        Job("classifier", stock.CLASSIFIER, ("images",), ("*",)),
        Job("report", "vqgen-report tokenizer".split(), ("tokenizer",), (".",)),
    ]


@dataclass(frozen=True)
class Tried:
    """What became of a job that was disturbed."""

    case: str
    job: str
    mode: str
    identical: bool
    detail: str

    @property
    def failed(self) -> bool:
        return not self.identical

    @property
    def line(self) -> str:
        state = "identical" if self.identical else "DIFFERENT"
        return f"case {self.case} | {state} | {self.job} | {self.mode} | {self.detail[:300]}"


@dataclass(frozen=True)
class Reference:
    """A job that nothing disturbed."""

    results: Results
    names: set[str]
    """All files in the output."""
    operations: int
    seconds: float
    bytes: int


class Kills:
    """Disturbs jobs, each in a way that its number decides."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self.jobs = campaign, jobs()
        self.references: dict[str, Reference] = {}

    def _lay_out(self, job: Job, name: str, disk: str = "") -> tuple[Place, Path]:
        place = lay_out(self.campaign.scratch / name, self.campaign.stock, job.inputs)
        output = place.work / disk / "out"
        return place, output

    def _begin(self, job: Job, output: Path) -> set[str]:
        """Put what the job continues in its place, with files of the user; return the names that are not the user's."""
        if not job.begun:
            return set()
        shutil.copytree(self.campaign.stock / job.begun, output)
        own = {path.relative_to(output).as_posix() for path in output.rglob("*")}
        plant(output, ("thesis.txt", ".thesis.part", ".notes.old.txt", "checkpoints/step-00000002.bak"))
        return own

    def _call(
        self, job: Job, place: Place, output: Path, kill: Kill | None = None, count: bool = False, **limits: Any
    ) -> Ended:
        words = [*job.words, "--output", str(output.relative_to(place.work))]
        return self.campaign.run.run(words, place.work, place.home, kill, count, **limits)

    def prepare(self) -> list[Tried]:
        """Run every job undisturbed; what fails or changes files of the user even then."""
        failed = []
        with ThreadPoolExecutor(2) as pool:
            for job, (reference, problem) in zip(self.jobs, pool.map(self._reference, self.jobs)):
                if problem:
                    failed.append(Tried("control", job.name, "undisturbed", False, problem))
                self.references[job.name] = reference
        return failed

    def _reference(self, job: Job) -> tuple[Reference, str]:
        place, output = self._lay_out(job, f"undisturbed-{self.jobs.index(job)}")
        own = self._begin(job, output)
        before = snapshot(place)
        ended = self._call(job, place, output, count=True)
        moved = self._moved(place, output, own, before)
        names = {path.relative_to(output).as_posix() for path in output.rglob("*")}
        size = sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file())
        found = Reference(digests(output, job.results), names, len(ended.operations), ended.seconds, size)
        shutil.rmtree(place.root)
        problem = "" if ended.code == 0 else f"exit code {ended.code}: {(ended.lines or [''])[-1]}"
        return found, problem or "; ".join(moved)

    def _moved(self, place: Place, output: Path, own: set[str], before: dict) -> list[str]:
        top = output.relative_to(place.root)
        mine = {f"{top}/{name}" for name in own} | {str(top)}
        found = outside(place, str(output.relative_to(place.work)), before, mine, snapshot(place))
        # Folders are written beside their place and renamed; what a kill leaves of that is hidden and named after it.
        ours = re.compile(rf"created {re.escape(str(top.parent))}/\.{re.escape(output.name)}\.[^/]*(part|old)")
        return [text for text in found if not ours.match(text)]

    def _judge(self, job: Job, place: Place, output: Path, own: set[str], before: dict, case: str, mode: str) -> Tried:
        """Call the command again until it ends, and compare."""
        reference, ended = self.references[job.name], self._call(job, place, output)
        for _ in range(ATTEMPTS - 1):
            if ended.code and not ended.hang:
                ended = self._call(job, place, output)
        now = digests(output, job.results)
        different = sorted(n for n in {*now, *reference.results} if now.get(n) != reference.results.get(n))
        last = (ended.lines or [""])[-1]
        if moved := self._moved(place, output, own, before):
            problem = "; ".join(moved)
        elif ended.code and different:
            problem = f"does not end any more: exit code {ended.code}: {last}"
        elif ended.code and not (ended.code == 2 and "--output" in last):  # programs that refuse what is there already
            problem = f"exit code {ended.code}: {last}"
        else:
            names = {path.relative_to(output).as_posix() for path in output.rglob("*")}
            left = sorted(names - reference.names)
            problem = f"differs: {', '.join(different)}" if different else f"left: {', '.join(left)}" if left else ""
        tried = Tried(case, job.name, mode, not problem, problem)
        if not self.campaign.keep:
            shutil.rmtree(place.root, ignore_errors=True)
        return tried

    def kill(self, number: int) -> Tried:
        """Kill a job once or twice, before a file operation or at a random moment."""
        random, case = self.campaign.random(f"kill {number}"), f"kill-{number}"
        job = self.jobs[number % len(self.jobs)]
        reference = self.references[job.name]
        place, output = self._lay_out(job, case)
        own, modes, codes = self._begin(job, output), [], []
        before = snapshot(place)
        for _ in range(random.choice([1, 1, 2, 3])):
            if random.random() < 0.65:
                kill = Kill(before=random.randint(1, max(reference.operations, 1)))
                modes.append(f"before operation {kill.before}")
            else:
                kill = Kill(after=random.uniform(0.02, 1) * reference.seconds)
                modes.append(f"after {kill.after:.2f} s")
            codes.append(self._call(job, place, output, kill).code)
            if codes[-1] == 0:
                modes[-1] += " (it had ended)"
        how = "killed" if any(codes) else "not killed"
        return self._judge(job, place, output, own, before, case, f"{how} {', '.join(modes)}")

    def pair(self, number: int) -> Tried:
        """Start a job twice at the same time."""
        random, case = self.campaign.random(f"pair {number}"), f"pair-{number}"
        job = random.choice([job for job in self.jobs if job.words[0] != "vqgen-eval"])
        place, output = self._lay_out(job, case)
        own = self._begin(job, output)
        before = snapshot(place)
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda _: self._call(job, place, output), range(2)))
        codes = sorted(ended.code for ended in both)
        texts = "; ".join((ended.lines or [""])[-1] for ended in both if ended.code)
        found = self._judge(job, place, output, own, before, case, f"two at once, exit codes {codes}")
        bad = any("Traceback" in ended.err or ended.code not in (0, 1, 2) for ended in both)
        if bad or codes[0] != 0:
            return Tried(case, job.name, found.mode, False, f"{found.detail} {texts}".strip())
        return found

    def disk(self, number: int) -> Tried:
        """Let the disk be full at a random place: a line, nothing lost, and the rest when there is room."""
        random, case = self.campaign.random(f"disk {number}"), f"disk-{number}"
        job = self.jobs[number % len(self.jobs)]
        reference = self.references[job.name]
        place, output = self._lay_out(job, case, "disk")
        output.parent.mkdir()
        begun = _size(self.campaign.stock / job.begun) if job.begun else 0
        room = int(
            random.uniform(0.02, 1.0) * max(reference.bytes - (0 if "--overwrite" in job.words else begun), 20_000)
        )
        with full_disk(output.parent, begun + 8192 + room) as grow:
            own = self._begin(job, output)
            before = snapshot(place)
            limits: dict[str, Any] = {} if grow else {"RLIMIT_FSIZE": random.randint(1, max(reference.bytes // 2, 2))}
            ended = self._call(job, place, output, **limits)
            how = f"a disk with {room} bytes of room" if grow else f"files of at most {limits['RLIMIT_FSIZE']} bytes"
            if grow:
                grow()
            found = self._judge(job, place, output, own, before, case, f"{how}, exit code {ended.code}")
        if ended.code not in (0, 1) or ended.hang or "Traceback" in ended.err:
            said = "a traceback" if "Traceback" in ended.err else f"exit code {ended.code}"
            return Tried(
                case, job.name, found.mode, False, f"{said}: {(ended.lines or [''])[-1]} {found.detail}".strip()
            )
        return found


def _size(folder: Path) -> int:
    """Bytes that a tmpfs needs for a folder: whole pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()) + 65536


@contextmanager
def full_disk(folder: Path, size: int) -> Iterator[Callable[[], None] | None]:
    """Mount a tmpfs of `size` bytes on `folder`, if this process may; yield a function that makes room, or None."""
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(words, capture_output=True).returncode == 0

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True, capture_output=True)

    try:
        yield grow if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
