"""Time and memory of a stage before it is trained: some of its steps, in a process of their own.

`tried` starts that process, which is `python -m vqgen.app.trial FILE`; its peak memory is that of the stage alone.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vqgen.config import command, parse
from vqgen.files import read_record, write_json
from vqgen.options import Options

STEPS, SECONDS = 12, 8.0
"""A trial takes so many steps at most, and ends after so many seconds if it has taken four."""
OUT_OF_MEMORY = 77
"""Exit code of a trial that needed more memory than there is."""
MOST_IMAGES = 4096
"""Most images of made-up codes that a prior is tried on."""


@dataclass(frozen=True)
class Stage:
    """What is tried, as words of the command lines of its programs: the prior where there are words for it."""

    tokenizer: list[str]
    prior: list[str]
    images: list[int]
    """Numbers of training and held-out images, for the prior."""
    classes: int
    text_column: str | None


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
    encoded: float
    """Images that the tokenizer encodes in a second; 0 for a prior."""

    def steps(self, seconds: float) -> int:
        """Steps that fit into the time, less the validations of a run of that length."""
        from vqgen.training.budget import Trial

        return Trial(self.start, self.step, self.validation).steps(seconds, self.validations)[0]


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

    words = [sys.executable, "-m", "vqgen.app.trial", "--folder"]
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
    from vqgen.devices import peak_memory, processes
    from vqgen.training.budget import measured

    processes()
    stage = read_record(config.folder / "stage.json", Stage)
    if stage.prior:
        from vqgen.prior.train import PriorTraining
        from vqgen.prior.trainer import build as build_prior

        _write_codes(stage, config.folder / "codes")
        settings = parse(PriorTraining, [*stage.prior, "--codes", str(config.folder / "codes")])
        found, encoded = measured(settings, build_prior, STEPS, SECONDS), 0.0
    else:
        from vqgen.tokenizer.train import TokenizerTraining
        from vqgen.tokenizer.trainer import build as build_tokenizer

        settings = parse(TokenizerTraining, stage.tokenizer)
        found, encoded = measured(settings, build_tokenizer, STEPS, SECONDS), _encoding_rate(settings)
    memory, run = peak_memory(_device()), settings.run
    record = Measured(
        found.start, found.step, found.validation, run.batch_size, max(1, round(run.steps / run.validate_every)),
        float(memory), encoded,
    )  # fmt: skip
    write_json(config.folder / "measured.json", asdict(record))


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


def _write_codes(stage: Stage, folder: Path) -> None:
    """Write code files of random codes, as those of this tokenizer on these images would be, and the tokenizer."""
    import numpy as np

    from vqgen.tokenizer.codes.format import Manifest, ShardEntry, SplitEntry, checksum, code_shape, write_shard
    from vqgen.tokenizer.data.sources import open_source
    from vqgen.tokenizer.model import Tokenizer
    from vqgen.tokenizer.train import TokenizerTraining

    config = parse(TokenizerTraining, stage.tokenizer)
    model, random = Tokenizer(config.architecture()), np.random.default_rng(0)
    mark, shape = model.save(folder / "tokenizer"), code_shape(model.grid, model.depth)
    splits = {}
    for split, images in zip(("train", "heldout"), stage.images):
        count, path = min(images, MOST_IMAGES), folder / f"{split}.safetensors"
        codes = random.integers(model.codebook_size, size=(count, 1, *shape))
        labels = random.integers(stage.classes, size=count) if stage.classes else np.full(count, -1)
        captions = None
        if stage.text_column:
            captions = (open_source(config.data, split, config.images.holdout, stage.text_column).captions or [])[
                :count
            ]
        write_shard(path, codes, labels, model.codebook_size, captions=captions)
        splits[split] = SplitEntry(1, count, [ShardEntry(path.name, count, checksum(path))])
    names = [str(index) for index in range(stage.classes)] or None
    Manifest(
        model.codebook_size, list(model.grid), model.depth, config.images.size, config.images.channels, names, mark,
        "0" * 64, "fp32", "", splits, captions=stage.text_column is not None,
    ).write(folder)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    return command("vqgen-train", TrialConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
