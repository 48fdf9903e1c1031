"""vqgen-eval: figures of reconstructions, priors and samples, each with a receipt by which it can be measured again."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqgen.config import build, commands, options, values_of
from vqgen.devices import processes
from vqgen.errors import UsageError, UserError
from vqgen.files import check_writable
from vqgen.option_types import checked
from vqgen.options import at_least

from .classifier import ClassifierTraining, train_classifier
from .likelihood import PredictionConfig, measure_prediction
from .measurement import Measured, rank_and_world
from .receipt import differences, flat, read_receipt, without_classifier, write_receipt
from .reconstruction import ReconstructionConfig, measure_reconstruction
from .samples import SamplesConfig, measure_samples

PROGRAMS: dict[str, tuple[type, Callable[[Any], Measured]]] = {
    "reconstruction": (ReconstructionConfig, measure_reconstruction),
    "likelihood": (PredictionConfig, measure_prediction),
    "samples": (SamplesConfig, measure_samples),
}


def _measure(program: str, config: Any) -> None:
    """Measure, and have the main process print the figures and write the receipt."""
    path: Path = config.output
    check_writable(path)  # before hours of measuring
    if path.exists():
        read_receipt(path)  # anything else is not replaced
    found = PROGRAMS[program][1](config)
    if rank_and_world()[0] == 0:
        for name, value in flat(found.figures):
            print(f"{name:<28} {value:.5g}")
        shown = ", ".join(f"{count} {what}" for what, count in found.counts.items())
        asked = values_of(config)
        write_receipt(path, program, asked, found.fingerprints, found.counts, found.figures, found.environment)
        print(f"of {shown}; receipt: {path}")
    processes().destroy_process_group()


def reconstruction(config: ReconstructionConfig) -> None:
    """Measure a tokenizer's reconstructions: PSNR, SSIM, LPIPS, rFID, usage and perplexity of the codebook."""
    _measure("reconstruction", config)


def likelihood(config: PredictionConfig) -> None:
    """Measure a prior on code files: nats a token, perplexity, bits a dimension, nats by class."""
    _measure("likelihood", config)


def samples(config: SamplesConfig) -> None:
    """Measure samples against real images: FID, KID, Inception Score, precision, recall, density, coverage and more."""
    _measure("samples", config)


@dataclass
class ReplayConfig:
    """Receipts, and where this machine has what they were made from."""

    receipts: list[Path] = field(metadata={"positional": "RECEIPT"})
    """The receipts to measure again."""
    tolerance: float = 1e-3
    """Largest relative difference of a figure that counts as none."""
    data: str | None = None
    """In place of the receipts' --data; likewise the others."""
    tokenizer: Path | None = None
    """Run or model folder of the tokenizer."""
    samples: Path | None = None
    """Folder of samples."""
    model: Path | None = None
    """Run or model folder of the prior."""
    codes: Path | None = None
    """Folder of code files."""
    classifier: Path | None = None
    """Folder of the classifier."""
    weights: str | None = None
    """Weights of the extractor."""
    perceptual_weights: str | None = None
    """Backbone of LPIPS."""
    cache: Path | None = None
    """Folder of the features of real images; that of the receipt is never used, it was another machine's."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    without_classifier: bool = False
    """Leave out what a classifier said, where it is not at hand."""

    def __post_init__(self) -> None:
        at_least(self, tolerance=0)


def replay(config: ReplayConfig) -> None:
    """Measure again what receipts say, and say whether it comes out the same, or what differs."""
    different = [text for path in config.receipts if (text := _replay(path, config))]
    processes().destroy_process_group()
    if different:
        raise UserError(" | ".join(different))


def _replay(path: Path, config: ReplayConfig) -> str:
    """What does not come out the same; where all does, the main process says so."""
    former = read_receipt(path)
    program = former["program"]
    if program not in PROGRAMS:
        raise UserError(f"{path} is of {program!r}, which this version does not know")
    asked, measure = PROGRAMS[program]
    own = ("receipts", "tolerance", "without_classifier")
    moved = {k: v for k, v in values_of(config).items() if v is not None and k not in own}
    known = {option.name: option for option in options(asked)}
    unknown = next((name for name in former["options"] if name not in known), None)
    if unknown:
        raise UserError(f"{path}: unknown option {unknown}; another version of vqgen wrote it")
    foreign = next((name for name in moved if name not in known), None)
    if foreign:
        raise UsageError(f"--{foreign.replace('_', '-')}: a receipt of {program} has no such option; leave it out")
    left = {"cache", "classifier"} if config.without_classifier else {"cache"}
    options_then = {name: value for name, value in former["options"].items() if name not in left}
    values = {k: checked(known[k].type, v, f"{path}: {k}") for k, v in {**options_then, **moved}.items()}
    found = measure(build(asked, values))
    now: Mapping[str, Any] = {"fingerprints": found.fingerprints, "counts": found.counts, "figures": found.figures}
    if config.without_classifier:
        former = {part: without_classifier(former[part]) for part in (*now, "environment")}
        now = {part: without_classifier(value) for part, value in now.items()}
    changed = [f"{k} {v}, now {found.environment.get(k)}" for k, v in former["environment"].items()
               if found.environment.get(k) != v]  # fmt: skip
    there = f" (with {'; '.join(changed)})" if changed else ""
    differs = differences(former, now, config.tolerance)
    if differs:
        return f"{path} does not come out the same: {'; '.join(differs)}{there}"
    if rank_and_world()[0] == 0:
        count = len(dict(flat(now["figures"])))
        print(f"same: {count} figures within {config.tolerance:g} of {path}{there}", flush=True)
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return commands(
        "vqgen-eval",
        {
            "reconstruction": (ReconstructionConfig, reconstruction),
            "likelihood": (PredictionConfig, likelihood),
            "samples": (SamplesConfig, samples),
            "classifier": (ClassifierTraining, train_classifier),
            "replay": (ReplayConfig, replay),
        },
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
