"""vqgen-train-prior: options and entry point; `trainer.py` does the work: build -> Run.fit -> step / validate."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from vqgen.config import command
from vqgen.options import CountOrZero, Options, Range
from vqgen.training.options import OptimizerConfig, RunConfig

from .options import ObjectiveConfig, PriorConfig


@dataclass
class PriorTraining(Options):
    """Codes, output, model, objective and optimization of a prior run."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "codes", "output", "overwrite", "dim", "layers", "dropout", "steps", "minutes", "batch_size", "lr", "patience",
    )  # fmt: skip

    codes: Path
    """Folder of code files, as vqgen-tokenize writes it."""
    output: Path = Path("runs/prior")
    """Run folder; finished, it is the prior's model folder, with the tokenizer inside."""
    init: Path | None = None
    """Prior whose weights the run starts from, of the same architecture and sizes, on codes of the same tokenizer. What
    it was not trained for, e.g. other classes or --inpainting, starts new."""
    overwrite: bool = False
    """Remove an earlier run in --output and start anew; after an interruption leave it out, or that is removed too."""
    patience: CountOrZero = 5
    """Stop after this many validations without a better held-out loss; 0 = train to the last step. The best weights
    are saved either way."""
    validation_images: CountOrZero = 2000
    """Held-out images that each validation measures, the same ones from all over the set; 0 = all."""
    preview_images: Annotated[int, Range(least=0, most=10_000)] = 40
    """Images drawn at each validation and written under images/; 0 = none."""
    gradient_checkpointing: bool = False
    """Compute each layer's forward pass again in the backward pass: less memory, a third more time."""
    model: PriorConfig = field(default_factory=PriorConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


def train(config: PriorTraining) -> None:
    """Train an autoregressive prior on code files, and measure it on held-out codes."""
    from vqgen.devices import locked_by_main, processes
    from vqgen.tokenizer.codes.format import CodeFiles
    from vqgen.training.budget import settled

    from .trainer import build

    processes()
    with locked_by_main(config.output):
        built = build(settled(config, build, lambda: len(CodeFiles(config.codes, "train"))))
        if built:
            run, trainer = built
            run.fit(trainer)
            of = ", those of plain and filled images in the shares of training" if config.objective.inpainting else ""
            run.say(f"prior: {config.output} (held-out {trainer.extra['best']:.4f} nats per token{of})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-train-prior", PriorTraining, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
