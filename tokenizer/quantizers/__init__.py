"""Every kind of quantizer by the name it has in a configuration."""

from collections.abc import Callable

from .base import Quantizer
from .fsq import FSQ
from .gumbel import GumbelQuantizer
from .lfq import LFQ
from .options import QuantizerConfig
from .product import ProductQuantizer
from .residual import ResidualQuantizer
from .simvq import SimVQ
from .vq import VectorQuantizer

QUANTIZERS: dict[str, Callable[[int, QuantizerConfig], Quantizer]] = {
    "vq": VectorQuantizer,
    "simvq": SimVQ,
    "gumbel": GumbelQuantizer,
    "fsq": FSQ,
    "lfq": LFQ,
    "residual": ResidualQuantizer,
    "product": ProductQuantizer,
}


def quantizer_for(dim: int, config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config` names, for latents of `dim` channels."""
    return QUANTIZERS[config.quantizer](dim, config)
