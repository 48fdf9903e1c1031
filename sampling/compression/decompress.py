"""vqgen-decompress: options and entry point."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.options import Options


@dataclass
class DecompressConfig(Options):
    """Archive, model and output of vqgen-decompress."""

    archive: list[Path] = field(metadata={"positional": "ARCHIVE"})
    """The folder that vqgen-compress wrote, or its images.vqc."""
    model: Path | None = None
    """Run or model folder of the prior that compressed it; by default that of vqgen-sample."""
    output: Path = Path("restored")
    """Folder for the images, as PNG under their names; it must be new or empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.archive) != 1:
            names = " and ".join(map(str, self.archive[:2])) or "none"
            raise UsageError(f"ARCHIVE: found {names}, expected one folder or file")


def decompress(config: DecompressConfig) -> None:
    """Restore the images of an archive of vqgen-compress."""
    from .work import restore_images

    restore_images(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-decompress", DecompressConfig, decompress, arguments)


if __name__ == "__main__":
    sys.exit(main())
