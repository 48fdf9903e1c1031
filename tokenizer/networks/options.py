"""Options of the networks: each kind of encoder and decoder by name, and the discriminator's size check."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from vqgen.errors import UsageError
from vqgen.options import Few, Fraction, Options, Size


@dataclass
class NetworkConfig(Options, ABC):
    """Options that every kind of network has. Add a kind with `register`."""

    kind: ClassVar[str]
    module: ClassVar[str]
    training_only: ClassVar[frozenset[str]] = frozenset()
    """Names of a class's own options that only training reads, so that images have the same codes with any value."""

    latent_dim: Size = 128
    """Channels between the encoder and the quantizer."""

    @property
    @abstractmethod
    def factor(self) -> int:
        """Downsampling factor: pixels a side of one code."""

    @property
    def factor_options(self) -> str:
        """The options that determine `factor`, for errors."""
        return f"--network {self.kind}"


NETWORKS: dict[str, type[NetworkConfig]] = {}
"""Kind of network -> its options."""

N = TypeVar("N", bound=type[NetworkConfig])


def register(kind: str, module: str) -> Callable[[N], N]:
    """Class decorator: register options under the name of their kind.

    `module` has the classes `Encoder` and `Decoder`, built with (channels, config); it is imported for that.
    """

    def add(options: N) -> N:
        options.kind, options.module = kind, module
        NETWORKS[kind] = options
        return options

    return add


@register("vqgan", "vqgen.tokenizer.networks.autoencoder")
@dataclass
class VQGANConfig(NetworkConfig):
    """The convolutional network of VQGAN (Esser et al. 2021)."""

    training_only: ClassVar[frozenset[str]] = frozenset({"dropout"})

    width: Size = 64
    """Channels of the finest level; level i has width x multipliers[i]."""
    multipliers: list[Few] = field(default_factory=lambda: [1, 2, 4])
    """Channel multiplier of each level; each level after the first halves height and width."""
    patch: Few = 1
    """Pixels a side folded into channels before the first convolution and unfolded after the last: 2 or 4 saves the
    costly work at full resolution."""
    blocks: Few = 2
    """Residual blocks a level in the encoder; the decoder has one more a level."""
    attention: bool = True
    """Self-attention at the lowest resolution, between the encoder's last two blocks and the decoder's first two."""
    attention_levels: list[int] = field(default_factory=list)
    """Further levels (0 is the finest) with self-attention after each block."""
    groups: Size = 32
    """Groups of the group norm; must divide the channels of every level."""
    dropout: Fraction = 0.0
    """Dropout inside the residual blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.multipliers) <= 16:
            raise UsageError(f"--multipliers: found {len(self.multipliers) or 'none'}, expected one a level, 1 to 16")
        if any(not 0 <= level < len(self.multipliers) for level in self.attention_levels):
            raise UsageError(
                f"--attention-levels: found {self.attention_levels}, expected numbers from 0 to "
                f"{len(self.multipliers) - 1}, one less than there are --multipliers"
            )
        for channels in self.channels:
            if channels % self.groups:
                raise UsageError(
                    f"--groups: {self.groups} does not divide {channels} channels "
                    f"(--width {self.width} x --multipliers {self.multipliers}); choose a common divisor"
                )

    @property
    def channels(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.width * m for m in self.multipliers]

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def factor_options(self) -> str:
        return f"--multipliers {' '.join(map(str, self.multipliers))} and --patch {self.patch}"


def check_discriminator(layers: int, size: Sequence[int]) -> None:
    """Raise `UsageError` where images of `size` are too small for a discriminator of so many strided layers."""
    # Each strided layer halves the side, two more 4x4 convolutions take one pixel each.
    if min(size) // 2**layers < 3:
        raise UsageError(
            f"--gan-layers: {layers} strided layers are too many for {size[0]}x{size[1]} pixels; use fewer"
        )
