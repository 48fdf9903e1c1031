"""Options of the prior and of its training objective; needs no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from vqgen.errors import UsageError
from vqgen.options import Few, Fraction, NotNegative, Options, Range, Share, Size

from .orders import ORDERS

PART_CLASSES = (
    "vqgen.prior.parts.scan:Scan",
    "vqgen.prior.parts.text:Text",
    "vqgen.prior.parts.source:MaskedSource",
    "vqgen.prior.parts.source:PairedSource",
    "vqgen.prior.parts.part:Classes",
)
"""Every kind of conditioning as "module:class", in the order of the sequence; `Classes` is the last."""
GENERATION, RECOMMENDED = "generation_config.json", "vqgen"
"""File of transformers in a prior's folder, and the key by which its settings are those that the prior recommends."""
SHARED = ("temperature", "top_k", "top_p", "min_p")
"""Recommended settings that transformers knows, under the same names; all others stand below `RECOMMENDED`."""
MAX_TEXT_IDS = 4096
"""Most ids of the tokens of text."""
MAX_TEXT_LENGTH = 1024


@dataclass
class PriorConfig(Options):
    """The transformer."""

    backbone: Literal["llama", "qwen3", "gpt2", "mingpt"] = "llama"
    """Architecture, by its name in transformers; mingpt = gpt2 with the exact GELU, whose output layer predicts codes
    alone, as the transformer of taming-transformers."""
    dim: Size = 512
    """Width of the residual stream."""
    layers: Few = 8
    """Transformer blocks."""
    heads: Size = 8
    """Attention heads; must divide --dim."""
    hidden_dim: Size | None = None
    """Width of the feed-forward layers; none = 8/3 dim for llama and qwen3, 4 dim for gpt2 and mingpt, rounded up
    to 64."""
    dropout: Fraction = 0.1
    """Dropout of embeddings, attention output and feed-forward output."""
    order: str = "raster"
    """Order in which the codes of an image are predicted, by its name in prior/orders.py."""

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return "gpt2" if self.backbone == "mingpt" else self.backbone

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layers, also where --hidden-dim is not given."""
        return self.hidden_dim or -(-int(self.dim * (4 if self.model_type == "gpt2" else 8 / 3)) // 64) * 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads:
            raise UsageError(f"--heads: {self.heads} does not divide --dim {self.dim}; choose a divisor")
        if self.model_type != "gpt2" and self.dim // self.heads % 2:
            raise UsageError(f"--heads: --dim / --heads is {self.dim // self.heads}, rotary positions need it even")
        if self.order not in ORDERS:
            raise UsageError(f"--order: found {self.order}, expected one of {', '.join(ORDERS)}")


@dataclass
class ObjectiveConfig(Options):
    """Regularisation of the prior, in training alone."""

    label_dropout: Fraction = 0.1
    """Share of sequences trained without their class, which guidance needs."""
    source_dropout: Fraction = 0.1
    """Share of sequences trained without the source codes that the code files have, which guidance by the source and
    drawing without one need."""
    inpainting: Fraction = 0.0
    """Share of the steps that learn to fill in images: the sequence begins with the image's own codes, some of them
    unknown, and these are predicted. The other steps are plain."""
    text_length: Annotated[int, Range(least=0, most=MAX_TEXT_LENGTH)] | None = None
    """Tokens of a caption that the prior reads, where the codes have captions; longer ones are cut. By default the
    fewest that hold 99 % of the training captions, at most 64; 0 = train without text."""
    text_vocabulary: Annotated[int, Range(least=256, most=MAX_TEXT_IDS)] = MAX_TEXT_IDS
    """Most ids of the byte-level BPE that is trained on the captions."""
    text_dropout: Fraction = 0.15
    """Share of sequences trained without their caption, which guidance needs."""
    scan_orders: bool = False
    """Train on flips and transpositions of the grids of codes, too, named by a token of the prefix: against
    overfitting. Their share falls from 7 in 8 (3 in 4 where a grid is not square) to none between half and three
    quarters of the run; images are drawn in raster order."""
    token_corruption: Share = 0.0
    """Share of the input codes that are replaced by random ones, against overfitting; the targets stay (1 - pkeep of
    Esser et al. 2021)."""
    label_smoothing: Share = 0.0
    """Share of the target's probability that is spread over all codes of its depth (Szegedy et al. 2016)."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log of the softmax's normaliser, which keeps logits small; 1e-4 is usual (Chowdhery et al.
    2022, section 5)."""
