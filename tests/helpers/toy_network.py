"""A second network: one strided convolution down, one up."""

from dataclasses import dataclass

from torch import Tensor, nn

from vqgen.options import Count
from vqgen.tokenizer.networks.base import ImageDecoder
from vqgen.tokenizer.networks.options import NetworkConfig


@dataclass
class StridedConfig(NetworkConfig):
    """Strided convolutions."""

    stride: Count = 4
    """Downsampling factor."""

    @property
    def factor(self) -> int:
        return self.stride


class Encoder(nn.Module):
    def __init__(self, channels: int, config: StridedConfig) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, config.latent_dim, config.stride, config.stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x)


class Decoder(ImageDecoder):
    def __init__(self, channels: int, config: StridedConfig) -> None:
        super().__init__()
        self.convolution = nn.ConvTranspose2d(config.latent_dim, channels, config.stride, config.stride)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.convolution.weight

    def forward(self, z: Tensor) -> Tensor:
        return self.convolution(z)
