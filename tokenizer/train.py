"""vqgen-train-tokenizer: options and entry point; the training itself is in `trainer.py`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.options import CountOrZero, Options, Range, choice
from vqgen.tokenizer.data.options import ImageConfig, is_stream
from vqgen.tokenizer.losses.options import GanConfig, LossConfig, check_size
from vqgen.tokenizer.networks.options import NETWORKS, NetworkConfig, check_discriminator
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import QUANTIZERS, QuantizerConfig
from vqgen.training.options import OptimizerConfig, RunConfig


@dataclass
class TokenizerTraining(Options):
    """The configuration of a tokenizer run."""

    COMMON: ClassVar[tuple[str, ...]] = (
        "data",
        "output",
        "size",
        "channels",
        "quantizer",
        "codebook_size",
        "perceptual_weight",
        "perceptual_weights",
        "gan_weight",
        "steps",
        "minutes",
        "batch_size",
    )

    data: str
    """Images: demo, a folder, parquet files, a save_to_disk folder, or a name that `datasets` knows; or a stream:
    tar or parquet files by pattern or URL, or stream:NAME."""
    output: Path = Path("runs/tokenizer")
    """Run folder, which becomes the tokenizer's model folder."""
    init: Path | None = None
    """Tokenizer whose weights the run starts from; its encoder and decoder must have the same sizes. Its quantizer is
    kept where it has the same sizes, and else starts new."""
    decoder_only: bool = False
    """Keep encoder and quantizer of --init as they are, and train its decoder alone: options by which a quantizer
    learns have no effect. Images keep their codes, so a prior of them can draw with the new decoder: vqgen-export
    --tokenizer."""
    overwrite: bool = False
    """Remove an earlier run in --output and start again. To resume an interrupted run, leave it out."""
    validation_images: CountOrZero = 1000
    """Held-out images that each validation measures, the same ones each time; 0 = all."""
    shuffle_buffer: Annotated[int, Range(least=1, most=2**20)] = 2048
    """Images of a stream that are in memory and shuffled among each other, in each process; twice as many are read."""
    images: ImageConfig = field(default_factory=ImageConfig)
    model: NetworkConfig = choice("network", NETWORKS, default="vqgan")
    """Kind of encoder and decoder."""
    quantizer: QuantizerConfig = choice("quantizer", QUANTIZERS, default="vq")
    """Kind of quantizer."""
    loss: LossConfig = field(default_factory=LossConfig)
    gan: GanConfig = field(default_factory=GanConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_stream(self.data):
            if self.run.epochs is not None:
                raise UsageError("--epochs: a stream has no known number of images; give --steps or --minutes")
            if not self.validation_images:
                raise UsageError("--validation-images: found 0, but a stream has no known number of them; give one")
        self.architecture()  # checks that the sizes fit together
        if self.decoder_only and self.init is None:
            raise UsageError("--decoder-only: the codes stay those of a tokenizer, but --init names none; add it")
        height, width = self.images.size
        if self.loss.perceptual_weights:
            check_size(self.loss.perceptual_net, height, width)
        if min(height, width) < 8:
            raise UsageError(f"--size: found {height}x{width}, expected at least 8 pixels a side (SSIM needs them)")
        if self.gan.gan_weight:
            check_discriminator(self.gan.gan_layers, self.images.size)

    @property
    def unread(self) -> frozenset[str]:
        """Names of options that have no effect beside the others."""
        return self.quantizer.unread

    def architecture(self) -> TokenizerConfig:
        """Return the part that is stored in the model folder."""
        return TokenizerConfig(self.images.size, self.images.channels, self.model, self.quantizer, self.images.fit)


def train(config: TokenizerTraining) -> None:
    """Train a tokenizer (VQ-VAE or VQGAN) on images and validate it on held-out ones."""
    from vqgen.devices import locked_by_main, processes
    from vqgen.tokenizer.data.sources import open_source
    from vqgen.training.budget import settled

    from .trainer import build

    processes()
    with locked_by_main(config.output):
        built = build(settled(config, build, lambda: len(open_source(config.data, "train", config.images.holdout))))
        if built:
            run, trainer = built
            run.fit(trainer)
            broken = trainer.train_images.broken.count + trainer.heldout_images.broken.count
            run.say(f"tokenizer: {config.output}" + (f" ({broken} broken images skipped)" if broken else ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-train-tokenizer", TokenizerTraining, train, arguments)


if __name__ == "__main__":
    sys.exit(main())
