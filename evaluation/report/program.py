"""vqgen-report: runs as one HTML page: curves, images, codebook, receipts, configuration and machine.

The page makes no request and runs no script. The same folders give the same bytes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.files import open_regular, write_text
from vqgen.options import Options

GENERATOR = '<meta name="generator" content="vqgen-report'
"""Text by which an earlier report is recognised, which may be replaced."""


@dataclass
class ReportConfig(Options):
    """Options of vqgen-report."""

    runs: list[Path] = field(metadata={"positional": "RUN"})
    """Run folders of tokenizers or priors, finished or not, or folders that hold tokenizer/, codes/, prior/ and
    samples/ as the demo's does. Several runs of one kind are shown side by side."""
    output: Path = Path("report.html")
    """Page to write; an earlier report is replaced, no other file is."""
    codes: list[Path] = field(default_factory=list)
    """Folders of code files, for the codebook of the tokenizers that made them; those in a demo's folder are found."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UsageError("RUN: found nothing; name a run folder")


def check_output(output: Path) -> None:
    """Raise `UsageError` if `output` is anything but a new file or an earlier report."""
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder; name a file, e.g. {output / 'report.html'}")
    try:
        with open_regular(output) as file:
            earlier = GENERATOR.encode() in file.read(1000)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UsageError(f"--output: {output} cannot be read ({error.strerror}); name another file") from error
    if not earlier:
        raise UsageError(f"--output: {output} is no report of vqgen; move it, or give another --output")


def write_report(config: ReportConfig) -> None:
    """Read the runs and write the page. Raises `UserError`."""
    from .page import render_folders

    check_output(config.output)
    write_text(config.output, render_folders(config.runs, config.codes))


def report(config: ReportConfig) -> None:
    """Show runs on one HTML page: curves, images over time, codebook, receipts, configuration and duration."""
    write_report(config)
    print(f"look at {config.output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-report", ReportConfig, report, arguments)


if __name__ == "__main__":
    sys.exit(main())
