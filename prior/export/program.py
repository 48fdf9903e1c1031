"""vqgen-export: write a prior, its tokenizer and a model card to a folder.

`--to transformers` writes what `AutoModelForCausalLM` and serving engines read: weights under the names of the model
folder, a generation_config.json of the right length, and a README.md that explains the token ids. `--to vqgen` writes a
model folder like that of a run, in 16 bits with `--dtype`; both models get new fingerprints.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqgen.config import command
from vqgen.options import Options


@dataclass
class ExportConfig(Options):
    """Model, format and output of vqgen-export."""

    model: Path
    """Run or model folder of the prior."""
    to: Literal["transformers", "vqgen"] = "transformers"
    """Layout of the folder: what transformers loads, or a model folder of vqgen (which transformers loads, too)."""
    output: Path = Path("export")
    """Folder to write; one that exists is refused."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the prior's weights; with --to vqgen of the tokenizer's, too."""


def export(config: ExportConfig) -> None:
    """Write a prior as a folder that transformers loads, with a card, and its image tokenizer beside it."""
    from .folder import export_prior

    export_prior(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-export", ExportConfig, export, arguments)


if __name__ == "__main__":
    sys.exit(main())
