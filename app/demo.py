"""vqgen-demo: the whole path on the images in the package, from training a tokenizer to a grid of new images."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqgen.config import command, parse
from vqgen.files import is_file, locked, read_json
from vqgen.options import Options


@dataclass
class DemoConfig(Options):
    """Options of vqgen-demo."""

    output: Path = Path("runs/demo")
    """Folder for tokenizer/, codes/, prior/, samples/ and report.html. An interrupted demo is continued."""
    overwrite: bool = False
    """Remove an earlier demo in --output and start anew."""


def samples_are_drawn(samples: Path, prior: Path) -> bool:
    """Return whether `samples` holds a finished run of vqgen-sample with the weights in `prior`."""
    path, fingerprint = samples / "samples.json", read_json(prior / "vqgen.json").get("fingerprint")
    return is_file(path) and fingerprint is not None and read_json(path).get("prior_fingerprint") == fingerprint


def demo(config: DemoConfig) -> None:
    """Train a tokenizer and a prior on 9,000 images of clothes that come with the package, then draw new ones."""
    with locked(config.output):
        _demo(config)


def _demo(config: DemoConfig) -> None:
    from vqgen.evaluation.report.program import ReportConfig, check_output, write_report
    from vqgen.prior.train import PriorTraining
    from vqgen.prior.train import train as train_prior
    from vqgen.sampling.sample import SampleConfig
    from vqgen.sampling.write_samples import write_samples
    from vqgen.tokenizer.codes.writer import tokenize
    from vqgen.tokenizer.encode import TokenizeConfig
    from vqgen.tokenizer.train import TokenizerTraining
    from vqgen.tokenizer.train import train as train_tokenizer

    start = time.perf_counter()
    tokenizer, codes, prior, samples = (config.output / n for n in ("tokenizer", "codes", "prior", "samples"))
    overwrite = ["--overwrite"] if config.overwrite else []
    page = config.output / "report.html"
    check_output(page)  # before minutes of training

    def announce(number: int, text: str) -> None:
        print(f"\n[{number}/4] {text}", file=sys.stderr, flush=True)

    announce(1, "train the tokenizer, which turns an image into 64 codes and back")
    words = ["--config", "demo-tokenizer", "--output", str(tokenizer), *overwrite]
    train_tokenizer(parse(TokenizerTraining, words))
    announce(2, "encode every image")
    words = ["--data", "demo", "--tokenizer", str(tokenizer), "--output", str(codes), *overwrite]
    tokenize(parse(TokenizeConfig, words))
    announce(3, "train the prior, which predicts each code from those before it")
    words = ["--config", "demo-prior", "--codes", str(codes), "--output", str(prior), *overwrite]
    train_prior(parse(PriorTraining, words))
    announce(4, "draw new images of ten classes")
    if samples_are_drawn(samples, prior):
        print(f"{samples} holds the samples of this prior already", file=sys.stderr)
    else:
        words = ["--config", "demo-samples", "--model", str(prior), "--output", str(samples), "--overwrite"]
        write_samples(parse(SampleConfig, words))
    write_report(ReportConfig([config.output], page))
    print(f"\n{time.perf_counter() - start:.0f} s. Look at {samples / 'grid.png'}, and at all of it in {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-demo", DemoConfig, demo, arguments)


if __name__ == "__main__":
    sys.exit(main())
