"""vqgen-demo: the whole path on the images in the package, from nothing to a grid of new ones."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqgen.config import command, parse
from vqgen.evaluation.report.program import ReportConfig, check_output, write_report
from vqgen.files import read_json
from vqgen.prior.train import PriorTraining
from vqgen.prior.train import train as train_prior
from vqgen.sampling.sample import SampleConfig, sample
from vqgen.tokenizer.codes.writer import tokenize
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.train import TokenizerTraining
from vqgen.tokenizer.train import train as train_tokenizer


@dataclass
class DemoConfig:
    """Where the demo goes, and whether it starts over."""

    output: Path = Path("runs/demo")
    """Folder for tokenizer/, codes/, prior/, samples/ and report.html. A demo that was interrupted goes on from
    there."""
    overwrite: bool = False
    """Remove an earlier demo in --output and start anew."""


def drawn(samples: Path, prior: Path) -> bool:
    """Whether `samples` holds a finished run of this very prior."""
    path = samples / "samples.json"
    return path.is_file() and read_json(path).get("prior_fingerprint") == read_json(prior / "vqgen.json")["fingerprint"]


def demo(config: DemoConfig) -> None:
    """Train a tokenizer and a prior on 9,000 images of clothes that come with the package, then draw new ones."""
    start = time.perf_counter()
    tokenizer, codes, prior, samples = (config.output / n for n in ("tokenizer", "codes", "prior", "samples"))
    anew = ["--overwrite"] if config.overwrite else []
    page = config.output / "report.html"
    check_output(page)  # before minutes are spent

    def stage(number: int, text: str) -> None:
        print(f"\n[{number}/4] {text}", file=sys.stderr, flush=True)

    stage(1, "the tokenizer learns to turn images into 64 codes and back")
    train_tokenizer(parse(TokenizerTraining, ["--config", "demo-tokenizer", "--output", str(tokenizer), *anew]))
    stage(2, "every image becomes its codes")
    tokenize(parse(TokenizeConfig, ["--data", "demo", "--tokenizer", str(tokenizer), "--output", str(codes), *anew]))
    stage(3, "the prior learns which codes follow which")
    train_prior(parse(PriorTraining, ["--config", "demo-prior", "--codes", str(codes), "--output", str(prior), *anew]))
    stage(4, "new images, ten classes in columns")
    if drawn(samples, prior):
        print(f"{samples} holds the samples of this prior already", file=sys.stderr)
    else:
        sample(
            parse(
                SampleConfig,
                ["--config", "demo-samples", "--model", str(prior), "--output", str(samples), "--overwrite"],
            )
        )
    write_report(ReportConfig([config.output], page))
    print(f"\n{time.perf_counter() - start:.0f} s. Look at {samples / 'grid.png'}, and at the whole in {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-demo", DemoConfig, demo, arguments)


if __name__ == "__main__":
    sys.exit(main())
