"""vqgen-compress: options and entry point; `archive.py` has the format of what it writes.

An image becomes the codes of its tokenizer, so that what is restored is its reconstruction. The codes are stored
without loss, in as many bits as they have under the prior (NLL).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.options import Options


@dataclass
class CompressConfig(Options):
    """Images, model and output of vqgen-compress."""

    COMMON: ClassVar[tuple[str, ...]] = ("images", "model", "output", "probabilities")

    images: list[Path] = field(metadata={"positional": "IMAGES"})
    """Image files of any sizes, or folders, with all images below them."""
    model: Path | None = None
    """Run or model folder of the prior; by default that of vqgen-sample."""
    output: Path = Path("compressed")
    """Folder for images.vqc and summary.json; it must be new or empty."""
    probabilities: Literal["exact", "rounded", "histogram"] = "exact"
    """exact: those of the prior, which must round alike where the images are restored (the same kind of processor and
    torch). rounded: to 12 bits, on which other machines mostly agree; with 4,096 codes and more it takes several
    percent more bits. histogram: counts of the codes so far, without the prior: the same everywhere, and larger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.images:
            raise UsageError("IMAGES: found none; name image files or a folder of images")


def compress(config: CompressConfig) -> None:
    """Store images as codes, with the prior's probabilities by a range coder."""
    from .work import compress_images

    compress_images(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-compress", CompressConfig, compress, arguments)


if __name__ == "__main__":
    sys.exit(main())
