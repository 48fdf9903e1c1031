"""vqgen-tokenize: a dataset to code files, sharded over any number of processes, resumable."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.options import Few, Options, Range, Seed, Size, option_name
from vqgen.tokenizer.data.options import ImageConfig


@dataclass
class TokenizeConfig(Options):
    """What is encoded, with what, and where to."""

    COMMON: ClassVar[tuple[str, ...]] = tuple(
        "tokenizer data source source_data text_column output overwrite verify views flip random_crop holdout".split()
    )

    tokenizer: Path | None = field(default=None, metadata={"needed": True})
    """Run or model folder of the tokenizer, or the name of a model in the package."""
    data: str | None = field(default=None, metadata={"needed": True})
    """Images: demo, a folder, parquet files, a save_to_disk folder, or a name that `datasets` knows; or a stream:
    tar or parquet files by pattern or URL, or stream:NAME."""
    text_column: str | None = None
    """Captions that are stored with the codes: a column of text in tables, or in metadata.jsonl or metadata.csv of a
    folder; `txt` takes NAME.txt beside each image of a folder."""
    output: Path = Path("runs/codes")
    """Folder of the code files; a run that was begun there with the same options is resumed."""
    overwrite: bool = False
    """Remove the code files in --output, finished or not, and start anew; leave it out to resume."""
    verify: bool = False
    """Only check the code files in --output: every checksum, every code, every label."""
    batch_size: Size = 64
    """Images encoded at once by each process."""
    views: Few = 1
    """Grids of codes per training image: one of the image as it is, further ones of augmented copies."""
    source: list[str] | None = None
    """Store the codes of each image degraded, too, to learn restoring it: downscale:FACTOR, noise:SIGMA (of the range
    from 0 to 1), grey, blur:SIGMA (pixels), jpeg:QUALITY, edges. Several are applied in order; after "or" begins
    another chain, and each image and view gets one. noise:0.05-0.4 draws the strength for each image and view."""
    source_data: str | None = None
    """Store the codes of each image's partner in this data, too, to learn turning one into the other."""
    pair_by: str = "name"
    """What partners have in common: a column of tables, or for folders `name`, the relative path without its ending."""
    unpaired: Literal["error", "skip"] = "error"
    """Images without a partner end the run with an error, or are left out."""
    shard_size: Annotated[int, Range(least=1, most=2**31)] = 8192
    """Images per file; a killed run loses at most the files it was writing."""
    seed: Seed = 0
    """Seed of the augmented views."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto takes bf16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode; auto takes what Accelerate finds."""
    images: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        various = self._check_source()
        most = (2 * self.images.random_shift + 1) ** 2 * (1 + self.images.flip)
        if self.views > most and not (self.images.random_crop > 0 or various):
            made = f"the image, flips and shifts make {most} as they are given"
            raise UsageError(
                f"--views: found {self.views}, but {made}; give --random-crop 0.1 or a larger --random-shift"
            )
        if self.views == 1 and self.images.augments:
            given = next(name for name in ("flip", "random_crop", "random_shift") if getattr(self.images, name))
            text = "found with --views 1, which is not augmented; use --views 2 or leave it out"
            raise UsageError(f"{option_name(given)}: {text}")

    def _check_source(self) -> bool:
        """Check the options of the source; return whether those of two equal views may differ. Raises `UsageError`."""
        if self.source_data is None:
            for name, default in ("pair_by", "name"), ("unpaired", "error"):
                if (found := getattr(self, name)) != default:
                    raise UsageError(
                        f"{option_name(name)}: found {found} without --source-data; add it, or leave it out"
                    )
        elif self.source is not None:
            raise UsageError("--source: found with --source-data; give one of them, as there is one source an image")
        if self.source is None:
            return self.source_data is not None
        from vqgen.tokenizer.codes.degrade import parse_degradations

        return parse_degradations(self.source).random


def run(config: TokenizeConfig) -> None:
    """Turn a dataset into code files with a trained tokenizer: sharded, resumable, over any number of processes."""
    from accelerate import PartialState

    from vqgen.tokenizer.codes.writer import tokenize, verify

    if config.verify:
        verify(config.output)
    else:
        tokenize(config)
        PartialState().destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-tokenize", TokenizeConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
