"""Options of the encoder and the decoder."""

from dataclasses import dataclass, field

from vqgen.errors import UsageError
from vqgen.options import at_least


@dataclass
class ModelConfig:
    """Sizes of the encoder and the decoder."""

    width: int = 64
    """Channels of the finest level; level i has width x multipliers[i]."""
    multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Channel multiplier of each level; each level after the first halves height and width."""
    patch: int = 1
    """Pixels a side folded into channels before the first convolution and unfolded after the last: 2 or 4 saves the
    costly work at full resolution."""
    blocks: int = 2
    """Residual blocks a level in the encoder; the decoder has one more a level."""
    attention: bool = True
    """Self-attention at the lowest resolution, between the encoder's last two blocks and the decoder's first two."""
    attention_levels: list[int] = field(default_factory=list)
    """Levels (0 is the finest) with self-attention after each of their blocks besides."""
    latent_dim: int = 128
    """Channels between the encoder and the quantizer."""
    groups: int = 32
    """Groups of the group norm; must divide the channels of every level."""
    dropout: float = 0.0
    """Dropout inside the residual blocks."""

    def __post_init__(self) -> None:
        at_least(self, width=1, patch=1, blocks=1, latent_dim=1, groups=1)
        if not self.multipliers or min(self.multipliers) < 1:
            raise UsageError(f"--multipliers: found {self.multipliers}, expected positive integers, one a level")
        if any(not 0 <= level < len(self.multipliers) for level in self.attention_levels):
            raise UsageError(
                f"--attention-levels: found {self.attention_levels}, expected numbers from 0 to "
                f"{len(self.multipliers) - 1}, one less than there are --multipliers"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout: found {self.dropout}, expected 0 <= dropout < 1")
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
        """How many pixels a side one code stands for."""
        return self.patch * 2 ** (len(self.multipliers) - 1)
