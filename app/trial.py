"""Time and memory of a stage before it is trained: some of its steps, in a process of their own.

`tried` starts that process; its peak memory is that of the stage alone.
"""

import math
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from vqgen.config import command, parse
from vqgen.errors import UsageError
from vqgen.evaluation.options import SMALLEST
from vqgen.files import read_record, write_json
from vqgen.options import Options
from vqgen.sampling.sample import SampleConfig

from .given import explained
from .made_up import conditions_of, write_codes

if TYPE_CHECKING:
    from vqgen.prior.train import PriorTraining
    from vqgen.tokenizer.train import TokenizerTraining
    from vqgen.training.budget import Trial

# Not -m, which would take modules from the current folder, whatever files are in it.
_PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from vqgen.app.trial import main; sys.exit(main())"
STEPS, SECONDS = 12, 8.0
"""A trial takes so many steps at most, and ends after so many seconds if it has taken four."""
OUT_OF_MEMORY = 77
"""Exit code of a trial that needed more memory than there is."""


@dataclass(frozen=True)
class Stage:
    """What is tried, as words of the command lines of its programs: the prior, with a batch of samples, where there are
    words for it."""

    tokenizer: list[str]
    prior: list[str]
    samples: list[str]
    images: list[int]
    """Numbers of training and held-out images, for the prior."""
    classes: list[str]
    """Names of the classes."""
    text_column: str | None
    codes: list[str] = field(default_factory=list)
    """Of the encoding, which may give the prior a source."""
    unlabelled: bool = False
    """Whether some training images have no class, where others have one."""


@dataclass(frozen=True)
class Measured:
    """What a stage took in its trial."""

    start: float
    """Seconds until the first step."""
    step: float
    """Seconds."""
    validation: float
    """Seconds."""
    batch: int
    """Examples of a step."""
    validations: int
    """Of the configured run."""
    memory: float
    """Peak, in bytes: of the process on a CPU, of tensors on CUDA."""
    kept: float
    """Bytes that its process keeps when the training has ended, for libraries and their compiled kernels; 0 on CUDA."""
    encoded: float = 0.0
    """Images that the tokenizer encodes in a second; 0 for a prior."""
    judged: float = 0.0
    """Seconds of a step of the classifier that judges samples; 0 for a prior, and for images too small for it."""
    drawn: float = 0.0
    """Images that are drawn in a second; 0 for a tokenizer, and where samples were refused."""
    drawing_memory: float = 0.0
    """Peak after drawing, in bytes; 0 for a tokenizer."""
    every: int | None = None
    """Steps between validations, where the user has fixed them."""
    reading: float = 0.0
    """Seconds of an image that is kept, when a step first needs it."""
    cached: int = 0
    """Training images that are kept."""
    refused: str = ""
    """Why samples of a prior cannot be drawn as asked; empty where they were."""

    def check_drawn(self) -> None:
        """Raise `UsageError` where samples could not be drawn."""
        if self.refused:
            raise UsageError(self.refused)

    def after(self, kept: float) -> "Measured":
        """The same in a process in which a stage before it has kept so many bytes."""
        return replace(self, memory=self.memory + kept, drawing_memory=self.drawing_memory + kept)

    def steps(self, seconds: float) -> int:
        """Steps that fit into the time, less the validations of a run of that length."""
        return self._trial().steps(seconds, self.validations, self.every)[0]

    def read_in(self, steps: int) -> float:
        """Seconds of so many steps in which images are read that are then kept."""
        return self._trial().read_in(steps)

    def _trial(self) -> "Trial":
        from vqgen.training.budget import Trial

        return Trial(self.start, self.step, self.validation, self.reading, self.cached, self.batch)

    def seconds(self, steps: int) -> float:
        """Time that holds so many steps and their validations: a fifth of it, or one of them, where `every` is free."""
        from vqgen.training.budget import VALIDATION

        trained, validated = steps * self.step, math.ceil(steps / (self.every or steps)) * self.validation
        most = trained / (1 - VALIDATION) if self.every is None else 0.0
        return self.start + max(most, trained + validated) + self.read_in(steps) + self.step


@dataclass
class TrialConfig(Options):
    """Options of a trial."""

    folder: Path
    """Folder with stage.json, which gets measured.json."""


def tried(stage: Stage) -> Measured | None:
    """Try a stage in a process of its own; None where it took more memory than there is.

    Raises `SystemExit` where it fails otherwise, which has said why, and on SIGTERM.
    """

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    words = [sys.executable, "-c", _PROGRAM, "--folder"]
    before = signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="vqgen-plan-") as folder:
            write_json(Path(folder) / "stage.json", asdict(stage))
            # In a session of its own: an interrupt at the terminal is this process's, which ends the other.
            child = subprocess.Popen([*words, folder], stdin=subprocess.DEVNULL, start_new_session=True)
            try:
                code = child.wait()
            finally:
                child.kill()
                child.wait()
            if code in (-signal.SIGKILL, OUT_OF_MEMORY):
                return None
            if code:
                raise SystemExit(code if code > 0 else 128 - code)
            return read_record(Path(folder) / "measured.json", Measured)
    finally:
        signal.signal(signal.SIGTERM, before)


def run(config: TrialConfig) -> None:
    """Time some steps of a stage of vqgen-train."""
    try:
        _run(config)
    except (MemoryError, RuntimeError) as error:  # torch's error of CUDA memory is a RuntimeError, too
        if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", str(error)):
            raise SystemExit(OUT_OF_MEMORY) from error
        raise


def _run(config: TrialConfig) -> None:
    from vqgen.devices import processes

    processes()
    stage = read_record(config.folder / "stage.json", Stage)
    found = _prior(stage, config.folder / "codes") if stage.prior else _tokenizer(stage)
    write_json(config.folder / "measured.json", asdict(found))


def _tokenizer(stage: Stage) -> Measured:
    """Try the tokenizer, and how fast it encodes."""
    from vqgen.tokenizer.train import TokenizerTraining
    from vqgen.tokenizer.trainer import build

    config = parse(TokenizerTraining, stage.tokenizer)
    with explained("tokenizer"):
        found = _training(config, build)
    judged = _judging_step(config, len(stage.classes) or 4) if min(config.images.size) >= SMALLEST else 0.0
    return replace(found, encoded=_encoding_rate(config), judged=judged)


def _prior(stage: Stage, codes: Path) -> Measured:
    """Try the prior on made-up codes, and how fast it draws."""
    from vqgen.devices import peak_memory
    from vqgen.prior.train import PriorTraining
    from vqgen.prior.trainer import build

    write_codes(stage, codes)
    config = parse(PriorTraining, [*stage.prior, "--codes", str(codes)])
    with explained("prior"):
        found = _training(config, build)
    try:
        found = replace(found, drawn=_drawing_rate(config, parse(SampleConfig, stage.samples)))
    except UsageError as error:  # another size of the images may allow it
        found = replace(found, refused=str(error))
    return replace(found, drawing_memory=float(peak_memory(_device())))


def _training(config: Any, build: Any) -> Measured:
    """Try some steps of a training."""
    from vqgen.devices import peak_memory, release_memory
    from vqgen.training.budget import measured

    process, run = psutil.Process(), config.run
    before = process.memory_info().rss
    found = measured(config, build, STEPS, SECONDS)
    memory = peak_memory(_device())
    release_memory()
    kept = 0 if _device().type == "cuda" else max(0, process.memory_info().rss - before)
    validations = max(1, round(run.steps / run.validate_every))
    times = found.start, found.step, found.validation
    every = run.validate_every if "validate_every" in config.given else None
    held = {"reading": found.reading, "cached": found.cached}
    return Measured(*times, run.batch_size, validations, float(memory), float(kept), every=every, **held)


def _device():
    from vqgen.devices import find_device

    return find_device("auto")


def _encoding_rate(config) -> float:
    """Images a second that a tokenizer of this architecture encodes."""
    import torch

    from vqgen.tokenizer.model import Tokenizer

    model = Tokenizer(config.architecture()).to(_device()).eval()
    images = torch.zeros(config.run.batch_size, config.images.channels, *config.images.size, device=_device())
    rates = []
    for _ in range(3):
        began = time.perf_counter()
        model.encode(images).cpu()  # waits for the device
        rates.append(len(images) / (time.perf_counter() - began))
    return max(rates)


def _judging_step(config: "TokenizerTraining", classes: int) -> float:
    """Seconds of a step of a classifier of images of this size, as `vqgen-eval settings` trains one."""
    import torch
    import torch.nn.functional as F

    from vqgen.evaluation.classifier import Classifier, ClassifierConfig
    from vqgen.evaluation.tasks.options import SettingsConfig

    images = torch.zeros(SettingsConfig.batch_size, config.images.channels, *config.images.size, device=_device())
    names = [str(index) for index in range(classes)]
    model = Classifier(ClassifierConfig(config.images.size, config.images.channels, names)).to(_device())
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long, device=_device()))
        loss.backward()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - began)
    return max(taken[1:])


def _drawing_rate(config: "PriorTraining", samples: SampleConfig) -> float:
    """Images a second that a prior of this architecture draws, in one batch with the settings of `samples`."""
    from vqgen.prior.conditioning import Conditioning
    from vqgen.prior.model import Prior
    from vqgen.sampling.generator import Generator
    from vqgen.tokenizer.codes.format import CodeFiles
    from vqgen.tokenizer.model import Tokenizer

    files = CodeFiles(config.codes, "train")
    conditioning = Conditioning.for_files(files, config.objective, config.model.order)
    prior = Prior(config.model, conditioning, (files.channels, *files.image_size), files.tokenizer_fingerprint)
    generator = Generator(prior, Tokenizer.load(config.codes / "tokenizer"), _device(), samples.precision)
    count = min(samples.count(1), samples.batch_size)
    with explained("samples"):
        conditions, settings = conditions_of(generator, samples, config.codes / "given.png")
    began = time.perf_counter()
    generator.draw(range(count), conditions, settings, samples.seed, samples.batch_size)
    return count / (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    return command("vqgen-train", TrialConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
