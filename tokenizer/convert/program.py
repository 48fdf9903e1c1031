"""vqgen-convert: tokenizers of other projects to a model folder, and a model folder to a diffusers VQModel."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from vqgen.config import command
from vqgen.errors import UsageError
from vqgen.files.output_folder import new_folder
from vqgen.options import Options


@dataclass
class ConvertConfig(Options):
    """Input and output of a conversion."""

    COMMON: ClassVar[tuple[str, ...]] = ("input", "output", "to", "size", "taming_config", "codebook_l2_norm")

    input: Path | None = None
    """A .ckpt of taming-transformers, a .pt of LlamaGen, either as .safetensors, a folder of a diffusers VQModel, or a
    run or model folder of vqgen. Required."""
    from_: Literal["auto", "taming", "llamagen", "diffusers", "vqgen"] = "auto"
    """Project of --input; auto recognises its files and the names of its tensors."""
    to: Literal["vqgen", "diffusers"] = "vqgen"
    """A model folder of vqgen, or a folder that diffusers' VQModel.from_pretrained loads."""
    output: Path = Path("runs/converted")
    """Folder to write; must be new or empty."""
    size: list[int] = field(default_factory=list)
    """Height and width of the training images in pixels (one number: square); empty = as the files say, which
    those of LlamaGen and a .ckpt without --taming-config do not."""
    taming_config: Path | None = None
    """YAML file of a .ckpt, for the image size; it must match the weights."""
    codebook_l2_norm: bool | None = None
    """Whether a model of LlamaGen was trained with codebook_l2_norm, as those of its authors were; required, since its
    files do not say, unless all codes have length 1 and it makes no difference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) == 1:
            self.size = [self.size[0]] * 2
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(f"--size: found {self.size}, expected height and width of at least 1")


def run(config: ConvertConfig) -> None:
    """Convert a tokenizer of taming-transformers, LlamaGen or diffusers to a model folder, or the other way."""
    from .read import load
    from .write import save

    output = config.output
    with new_folder(output):
        tokenizer, kind, left_out = load(config)
        save(tokenizer, config.to, output, str(config.input))
    if left_out:
        groups = sorted({name.partition(".")[0] + "." if name.startswith("loss.") else name for name in left_out})
        plural = "s" * (len(left_out) > 1)
        print(f"left out {len(left_out)} tensor{plural} used only in training: {', '.join(groups)}")
    (height, width), (rows, columns) = tokenizer.config.image_size, tokenizer.grid
    weights = sum(tensor.numel() for tensor in tokenizer.inference_state().values())
    print(
        f"{output}: from {kind} to {config.to}, {weights / 1e6:.1f} million weights, "
        f"images of {height}x{width} as {rows}x{columns} codes of {tokenizer.codebook_size}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-convert", ConvertConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
