"""The architecture of a tokenizer."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from vqgen.config import values_of
from vqgen.errors import UsageError
from vqgen.options import Few, Options, Range, choice
from vqgen.tokenizer.networks.options import NETWORKS, NetworkConfig
from vqgen.tokenizer.quantizers.options import QUANTIZERS, QuantizerConfig


@dataclass
class TokenizerConfig(Options):
    """The architecture, as stored in `vqgen.json`."""

    image_size: list[Annotated[int, Range(least=1, most=2**16)]]
    """Height and width of the training images, in pixels."""
    channels: Few
    """1 for grey, 3 for RGB."""
    model: NetworkConfig = choice("network", NETWORKS, default="vqgan")
    quantizer: QuantizerConfig = choice("quantizer", QUANTIZERS, default="vq")
    fit: Literal["crop", "pad"] = "crop"
    """How training images of another aspect ratio were fitted; tokenizing does the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_size) != 2:
            raise UsageError(f"--size: found {self.image_size}, expected height and width")
        factor = self.model.factor
        if any(side < factor or side % factor for side in self.image_size):
            height, width = self.image_size
            raise UsageError(
                f"--size: {height}x{width} is not divisible by the downsampling factor {factor} "
                f"of {self.model.factor_options}; change one of them"
            )

    def codes_options(self) -> dict[str, Any]:
        """Name -> value of the options that decide which codes an image has: not those of training alone, or unread."""
        bases = (*type(self.model).__mro__, *type(self.quantizer).__mro__)
        left_out = self.quantizer.unread.union(*(vars(base).get("training_only", ()) for base in bases))
        values = {"size" if name == "image_size" else name: value for name, value in values_of(self).items()}
        return {name: value for name, value in values.items() if name not in left_out}
