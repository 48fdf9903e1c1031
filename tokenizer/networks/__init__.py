"""Networks of the tokenizer: encoder and decoder by kind, and the discriminator."""

import importlib
from typing import TYPE_CHECKING

from .options import NETWORKS, NetworkConfig

if TYPE_CHECKING:
    from torch import nn

    from .base import ImageDecoder

__all__ = ["NETWORKS", "decoder_for", "encoder_for"]


def encoder_for(channels: int, config: NetworkConfig) -> "nn.Module":
    """Build the encoder that `config` describes, for images of `channels`."""
    return importlib.import_module(config.module).Encoder(channels, config)


def decoder_for(channels: int, config: NetworkConfig) -> "ImageDecoder":
    """Build the decoder that `config` describes, for images of `channels`."""
    return importlib.import_module(config.module).Decoder(channels, config)
