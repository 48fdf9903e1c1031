"""vqgen-demo: the whole path on the images in the package, from training a tokenizer to a grid of new images."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqgen.config import command
from vqgen.files import locked
from vqgen.options import Options

WORDS = {
    "tokenizer": ["--config", "demo-tokenizer"],
    "codes": ["--data", "demo"],
    "prior": ["--config", "demo-prior"],
    "samples": ["--config", "demo-samples"],
}
"""The plan of the demo: what each stage is called with."""


@dataclass
class DemoConfig(Options):
    """Options of vqgen-demo."""

    output: Path = Path("runs/demo")
    """Folder for tokenizer/, codes/, prior/, samples/ and report.html. An interrupted demo is continued."""
    overwrite: bool = False
    """Remove an earlier demo in --output and start anew."""


def demo(config: DemoConfig) -> None:
    """Train a tokenizer and a prior on 9,000 images of clothes that come with the package, then draw new ones."""
    from vqgen.evaluation.report.program import check_output

    from .stages import STAGES, check_folders, folders, outdated, write_page

    with locked(config.output):
        began = time.perf_counter()
        check_output(config.output / "report.html")  # before minutes of training
        check_folders(config.output)
        for number, name in enumerate(WORDS, 1):
            samples, prior = config.output / "samples", config.output / "prior"
            overwrite = config.overwrite or (name == "samples" and outdated(samples, prior))
            words = [*WORDS[name], *folders(config.output, name, overwrite)]
            STAGES[name](words, f"{number}/{len(WORDS)}")
        page = write_page(config.output)
    grid = config.output / "samples" / "grid.png"
    print(f"\n{time.perf_counter() - began:.0f} s. Look at {grid}, and at all of it in {page}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-demo", DemoConfig, demo, arguments)


if __name__ == "__main__":
    sys.exit(main())
