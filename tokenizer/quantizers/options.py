"""Options of the quantizers."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from vqgen.errors import UsageError
from vqgen.options import at_least

# Levels of FSQ for about 2^8 ... 2^16 codes (Mentzer et al. 2023, table 1).
FSQ_LEVELS = ([8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5])


LEARNED = ("vq", "residual", "product")
"""Kinds whose codes are looked up, learned from the vectors nearest to them, and revived."""


# Options that only some quantizers have.
_ONLY = {
    "depth": ("residual", "product"),
    "levels": ("fsq",),
    "codebook": LEARNED,
    "codebook_decay": LEARNED,
    "commitment_weight": ("vq", "simvq", "lfq", "residual", "product"),
    "revive_after": LEARNED,
    "shared_codebook": ("residual",),
    "estimator": ("vq", "simvq", "residual", "product"),
    **dict.fromkeys(("entropy_weight", "entropy_diversity"), ("vq", "lfq", "gumbel")),
    "entropy_temperature": ("vq", "lfq"),
    **dict.fromkeys(("gumbel_temperature", "gumbel_temperature_end", "gumbel_anneal", "gumbel_kl_weight"), ("gumbel",)),
}


@dataclass
class QuantizerConfig:
    """The codebook and how it learns."""

    quantizer: Literal["vq", "simvq", "gumbel", "fsq", "lfq", "residual", "product"] = "vq"
    """Kind of quantizer: nearest code of a learned codebook (vq), of a frozen one under a learned linear map (simvq),
    a sample by Gumbel-softmax (gumbel), rounding to --levels (fsq), signs (lfq), vq of what is left, --depth times
    (residual), or --depth codebooks side by side (product)."""
    codebook_size: int = 1024
    """Number of codes K of each codebook; a power of two for lfq; fsq takes the levels nearest to it."""
    code_dim: int = 8
    """Dimension of a code; a linear map leads from the latents to it and back. fsq and lfq have their own."""
    depth: int = 1
    """Codes a position; residual and product only, 2 or more."""
    levels: list[int] = field(default_factory=list)
    """Levels of each dimension (fsq only); empty = those of the paper nearest to --codebook-size."""
    codebook: Literal["ema", "gradient"] = "ema"
    """How codes learn: as moving averages of their vectors, or by the gradient of the codebook loss (vq, residual,
    product)."""
    codebook_decay: float = 0.99
    """Decay of the moving averages (ema only)."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss, which draws the encoder towards its codes."""
    l2_normalize: bool = True
    """Compare directions: latents and codes lie on the unit sphere (Yu et al. 2022, section 3.2); vq and product."""
    kmeans_start: bool = True
    """Start the codebook from k-means over the first batches of latents (vq, residual, product)."""
    revive_after: int = 100
    """A code unused for this many steps is moved to a random latent of the batch; 0 = never (vq, residual, product).
    Each of a step's --accumulate parts counts as one."""
    shared_codebook: bool = False
    """One codebook for all depths (Lee et al. 2022, section 3.1.2); residual only."""
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    """How the gradient passes the codes: copied, or turned and scaled with them (Fifty et al. 2024, section 4)."""
    entropy_weight: float = 0.0
    """Weight of the entropy loss, which wants sure choices and even use (Yu et al. 2023, eq. 5); vq, lfq, gumbel."""
    entropy_temperature: float = 0.01
    """Temperature of the soft choices the entropy is taken over (vq and lfq; gumbel has choices of its own)."""
    entropy_diversity: float = 1.0
    """Weight of even use against sure choices inside the entropy loss."""
    gumbel_temperature: float = 1.0
    """Temperature of the Gumbel-softmax at the start (gumbel only)."""
    gumbel_temperature_end: float = 0.0625
    """Temperature it falls to, on a cosine (gumbel only)."""
    gumbel_anneal: float = 0.5
    """Share of the run after which the temperature has fallen (gumbel only)."""
    gumbel_kl_weight: float = 5e-4
    """Weight of the KL divergence of the choices from the uniform prior (gumbel only)."""

    def __post_init__(self) -> None:
        at_least(self, codebook_size=2, code_dim=1)
        at_least(self, commitment_weight=0, entropy_weight=0, entropy_diversity=0, gumbel_kl_weight=0)
        if self.l2_normalize and self.code_dim < 2 and self.quantizer in ("vq", "product"):
            raise UsageError("--code-dim: 1 with --l2-normalize leaves only two codes; use a larger --code-dim")
        if not 0 < self.codebook_decay < 1:
            raise UsageError(f"--codebook-decay: found {self.codebook_decay}, expected 0 < decay < 1")
        for name in ("entropy_temperature", "gumbel_temperature", "gumbel_temperature_end"):
            if getattr(self, name) <= 0:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected more than 0")
        if not 0 <= self.gumbel_anneal <= 1:
            raise UsageError(f"--gumbel-anneal: found {self.gumbel_anneal}, expected 0 <= share <= 1")
        if self.revive_after < 0:
            raise UsageError(f"--revive-after: found {self.revive_after}, expected 0 or a number of steps")
        for option in fields(self):
            kinds, value = _ONLY.get(option.name), getattr(self, option.name)
            default = [] if option.name == "levels" else option.default
            if kinds and self.quantizer not in kinds and value and value != default:
                raise UsageError(
                    f"--{option.name.replace('_', '-')}: found {value}, which --quantizer {self.quantizer} has no use "
                    f"for (only {', '.join(kinds)}); leave it at {default or 'its default'}"
                )
        if self.depth < 1 or (self.depth < 2 and self.quantizer in _ONLY["depth"]):
            raise UsageError(f"--depth: found {self.depth}, expected at least 2 with --quantizer residual or product")
        if self.levels and not 3 <= min(self.levels) <= max(self.levels) <= 1000:
            raise UsageError(f"--levels: found {self.levels}, expected 3 to 1000 in each dimension")
        if self.codes > 2**24:
            raise UsageError(f"--codebook-size (for fsq: --levels): found {self.codes} codes, expected at most 2^24")
        if self.quantizer == "lfq" and self.codebook_size & (self.codebook_size - 1):
            raise UsageError(f"--codebook-size: found {self.codebook_size}; lfq needs a power of two")

    @property
    def fsq_levels(self) -> list[int]:
        """Levels of FSQ: those asked for, or the paper's nearest to the codebook size."""
        return self.levels or min(FSQ_LEVELS, key=lambda x: abs(math.log(math.prod(x) / self.codebook_size)))

    @property
    def codes(self) -> int:
        """Codes a codebook really has: K, or for fsq the product of its levels."""
        return math.prod(self.fsq_levels) if self.quantizer == "fsq" else self.codebook_size
