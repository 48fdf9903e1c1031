"""Options of the prior and of its objective."""

from dataclasses import dataclass
from typing import Literal

from vqgen.errors import UsageError
from vqgen.options import at_least

from .orders import ORDERS


@dataclass
class PriorConfig:
    """The transformer."""

    backbone: Literal["llama", "qwen3", "gpt2"] = "llama"
    """Architecture, by its name in transformers."""
    dim: int = 512
    """Width of the residual stream."""
    layers: int = 8
    """Transformer blocks."""
    heads: int = 8
    """Attention heads; must divide --dim."""
    hidden_dim: int | None = None
    """Width of the feed-forward layers; none = 8/3 dim for llama and qwen3, 4 dim for gpt2, rounded up to 64."""
    dropout: float = 0.1
    """Dropout of embeddings, attention output and feed-forward output."""
    order: str = "raster"
    """Order in which the codes of an image are predicted, by its name in prior/orders.py."""

    def __post_init__(self) -> None:
        at_least(self, dim=1, layers=1, heads=1, hidden_dim=1)
        if self.dim % self.heads:
            raise UsageError(f"--heads: {self.heads} does not divide --dim {self.dim}; choose a divisor")
        if self.backbone != "gpt2" and self.dim // self.heads % 2:
            raise UsageError(f"--heads: --dim / --heads is {self.dim // self.heads}, rotary positions need it even")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout: found {self.dropout}, expected 0 <= dropout < 1")
        if self.order not in ORDERS:
            raise UsageError(f"--order: found {self.order}, expected one of {', '.join(ORDERS)}")


@dataclass
class ObjectiveConfig:
    """Regularisation of the prior, all of it in training alone."""

    label_dropout: float = 0.1
    """Share of sequences trained without their class, which guidance needs."""
    token_corruption: float = 0.0
    """Share of the codes fed in that are replaced by random ones, against overfitting; what is to be predicted stays
    (1 - pkeep of Esser et al. 2021)."""
    label_smoothing: float = 0.0
    """Share of the target's probability that is spread over all ids (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's normaliser, which keeps logits small; 1e-4 is usual (Chowdhery et al.
    2022, section 5)."""

    def __post_init__(self) -> None:
        for name in ("label_dropout", "token_corruption", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected 0 to 1")
        if self.label_dropout == 1:
            raise UsageError("--label-dropout: 1 leaves no class to learn; tokenize images without classes for that")
        at_least(self, z_loss=0)
