"""Quantizers by kind."""

import pkgutil
from typing import TYPE_CHECKING

from .options import QUANTIZERS, QuantizerConfig

if TYPE_CHECKING:
    from .base import Quantizer

__all__ = ["QUANTIZERS", "quantizer_for"]


def quantizer_for(dim: int, config: QuantizerConfig) -> "Quantizer":
    """Build the quantizer that `config` describes, for latents of `dim` channels."""
    return pkgutil.resolve_name(config.builder)(dim, config)
