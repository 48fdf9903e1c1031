"""Options of vqgen-convert; needs no torch. The program is `prior/convert/program.py`: it converts priors, too."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from vqgen.errors import UsageError
from vqgen.options import Options


@dataclass
class ConvertConfig(Options):
    """Input and output of a conversion."""

    COMMON: ClassVar[tuple[str, ...]] = ("input", "output", "to", "size", "taming_config", "codebook_l2_norm")

    input: Path | None = field(default=None, metadata={"needed": True})
    """A .ckpt of taming-transformers (a tokenizer, or a class-conditional or unconditional prior with its tokenizer), a
    .pt of LlamaGen's tokenizer, either as .safetensors, a folder of a diffusers VQModel, or a run or model folder of
    vqgen."""
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
    """YAML file of a .ckpt, which must match the weights: the image size of a tokenizer, and what a prior's .ckpt does
    not say (heads, classes); required for priors."""
    codebook_l2_norm: bool | None = None
    """Whether a model of LlamaGen was trained with codebook_l2_norm, as those of its authors were; required, since its
    files do not say, unless all codes have length 1 and it makes no difference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) == 1:
            self.size = [self.size[0]] * 2
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(f"--size: found {self.size}, expected height and width of at least 1")
