"""vqgen-export: write a prior, its tokenizer and a model card to a folder.

Both layouts are model folders of vqgen that `AutoModelForCausalLM` loads, too. `--to transformers` adds a
generation_config.json of the right length for `generate` and serving engines, and keeps the tokenizer as it is;
`--to vqgen` writes both models in `--dtype`. Weights in 16 bits have other fingerprints.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.options import Options


@dataclass
class ExportConfig(Options):
    """Model, format and output of vqgen-export."""

    model: Path
    """Run or model folder of the prior, or the name of a model in the package."""
    tokenizer: Path | None = None
    """Tokenizer that takes the place of the prior's, with the same codes and another decoder, of vqgen-train-tokenizer
    --decoder-only; by default the prior's own."""
    to: Literal["transformers", "vqgen"] = "transformers"
    """Layout of the folder: what transformers and serving engines draw from, or a model folder of vqgen (which
    transformers loads, too)."""
    output: Path = Path("export")
    """Folder to write; must be new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the prior's weights; with --to vqgen of the tokenizer's, too."""
    license: str | None = None
    """License of the weights, by the hub's identifier, as mit or cc-by-4.0; the model card states it."""
    dataset: list[str] = field(default_factory=list)
    """Data that both models were trained on, by their names on the hub, as uoft-cs/cifar10; the model card states
    them."""
    samples: Path | None = None
    """Folder of vqgen-sample, drawn from --model, or with --tokenizer from an earlier export with both in float32: its
    grid.png is copied into the folder and shown in the model card."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, values in (("--license", [self.license]), ("--dataset", self.dataset)):
            for value in values:
                if value is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value, re.ASCII):
                    raise UsageError(f"{option}: found {value!r}, expected a name as the hub has it")


def export(config: ExportConfig) -> None:
    """Write a prior as a folder that transformers loads, with a card, and its image tokenizer beside it."""
    from .folder import export_prior

    export_prior(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-export", ExportConfig, export, arguments)


if __name__ == "__main__":
    sys.exit(main())
