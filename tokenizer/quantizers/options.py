"""Options of the quantizers, one dataclass for each kind."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, TypeVar

from vqgen.errors import UsageError
from vqgen.options import CountOrZero, NotNegative, Options, Positive, Range, Share, Size

# Levels of FSQ for about 2^8 ... 2^16 codes (Mentzer et al. 2023, table 1).
FSQ_LEVELS = ([8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5])

Estimator = Literal["straight-through", "rotation"]


@dataclass
class QuantizerConfig(Options):
    """Options that every kind of quantizer has. Add a kind with `register`."""

    kind: ClassVar[str]
    builder: ClassVar[str]
    fixed_codes: ClassVar[bool] = False
    """Whether codes exist without data, so that no codebook can be too large for the images."""
    codes_option: ClassVar[str] = "--codebook-size"
    """The option that determines `codes`, for errors."""
    training_only: ClassVar[frozenset[str]] = frozenset()
    """Names of a class's own options that only training reads, so that images have the same codes with any value."""

    codebook_size: Annotated[int, Range(least=2)] = 1024
    """Number of codes K of each codebook; a power of two for lfq; fsq takes the levels nearest to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes > 2**24:
            raise UsageError(f"{self.codes_option}: found {self.codes} codes, expected at most 2^24")

    @property
    def codes(self) -> int:
        """Number of codes of each codebook."""
        return self.codebook_size

    @property
    def unread(self) -> frozenset[str]:
        """Names of options that have no effect beside the others."""
        return frozenset()

    @property
    def settling_steps(self) -> int:
        """Steps after which a collapse of the codebook no longer heals by itself."""
        return 0

    def collapse_remedy(self) -> str:
        """Return what helps against a collapse of the codebook and is not done yet."""
        return f"use a smaller {self.codes_option}"


QUANTIZERS: dict[str, type[QuantizerConfig]] = {}
"""Kind of quantizer -> its options."""

Q = TypeVar("Q", bound=type[QuantizerConfig])


def register(kind: str, builder: str) -> Callable[[Q], Q]:
    """Class decorator: register options under the name of their kind.

    `builder` is the "module:class" of the `Quantizer`, imported when a model is built; it takes (dim, config).
    """

    def add(options: Q) -> Q:
        options.kind, options.builder = kind, builder
        QUANTIZERS[kind] = options
        return options

    return add


# ---- options that several kinds share ----


@dataclass
class CodeDim:
    """Dimension of the codes."""

    code_dim: Size = 8
    """Dimension of a code; a linear map leads from the latents to it and back."""


@dataclass
class Commitment:
    """The commitment loss."""

    training_only: ClassVar[frozenset[str]] = frozenset({"commitment_weight"})

    commitment_weight: NotNegative = 0.25
    """Weight of the commitment loss, which pulls the encoder's outputs towards their codes."""


@dataclass
class GradientEstimator:
    """The gradient of the codes."""

    training_only: ClassVar[frozenset[str]] = frozenset({"estimator"})

    estimator: Estimator = "straight-through"
    """Gradient through the quantization: copied, or rotated and scaled (Fifty et al. 2024, section 4)."""


@dataclass
class Entropy:
    """The entropy loss (Yu et al. 2023, eq. 5)."""

    training_only: ClassVar[frozenset[str]] = frozenset({"entropy_weight", "entropy_diversity"})

    entropy_weight: NotNegative = 0.0
    """Weight of the entropy loss, which favours confident choices and even use of the codes."""
    entropy_diversity: NotNegative = 1.0
    """Weight of even use relative to confident choices in the entropy loss."""


@dataclass
class SoftEntropy(Entropy):
    """The entropy loss of soft choices between codes."""

    training_only: ClassVar[frozenset[str]] = frozenset({"entropy_temperature"})

    entropy_temperature: Positive = 0.01
    """Temperature of the softmax over codes whose entropy is taken."""


@dataclass
class CodebookConfig(GradientEstimator, Commitment, CodeDim, QuantizerConfig):
    """Options of kinds with codes learned from the vectors nearest to them."""

    training_only: ClassVar[frozenset[str]] = frozenset({"codebook", "codebook_decay", "kmeans_start", "revive_after"})

    codebook: Literal["ema", "gradient"] = "ema"
    """How codes learn: as moving averages of their vectors, or by the gradient of the codebook loss."""
    codebook_decay: Annotated[float, Range(above=0, below=1)] = 0.99
    """Decay of the moving averages (ema only)."""
    kmeans_start: bool = True
    """Initialize the codebook by k-means over the first batches of latents."""
    revive_after: CountOrZero = 100
    """Move a code that was unused for this many steps to a random latent of the batch; 0 = never. Each of a step's
    --accumulate parts counts as one."""

    @property
    def settling_steps(self) -> int:
        return 2 * self.revive_after

    def missing_remedies(self) -> dict[str, bool]:
        """Options that prevent a collapse -> whether they are not set yet."""
        return {
            "--codebook ema": self.codebook != "ema",
            "--code-dim 8": self.code_dim > 16,
            "--kmeans-start": not self.kmeans_start,
            "--revive-after 100": not self.revive_after,
        }

    def collapse_remedy(self) -> str:
        missing = [option for option, wanted in self.missing_remedies().items() if wanted]
        smaller = f"a smaller {self.codes_option}"
        return (
            f"use {' '.join(missing)}, or {smaller}"
            if missing
            else f"use {smaller} or a larger --batch-size, or lower --lr"
        )


@dataclass
class DirectionCodebookConfig(CodebookConfig):
    """Options of kinds whose codebooks can compare directions."""

    l2_normalize: bool = True
    """Compare directions: latents and codes lie on the unit sphere (Yu et al. 2022, section 3.2)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l2_normalize and self.code_dim < 2:
            raise UsageError("--code-dim: found 1, of which --l2-normalize leaves two codes; expected at least 2")

    def missing_remedies(self) -> dict[str, bool]:
        return {"--l2-normalize": not self.l2_normalize, **super().missing_remedies()}


# ---- the kinds ----


@register("vq", "vqgen.tokenizer.quantizers.vq:VectorQuantizer")
@dataclass
class VQConfig(SoftEntropy, DirectionCodebookConfig):
    """Nearest code of a learned codebook (van den Oord et al. 2017)."""


@register("simvq", "vqgen.tokenizer.quantizers.simvq:SimVQ")
@dataclass
class SimVQConfig(GradientEstimator, Commitment, CodeDim, QuantizerConfig):
    """Nearest code of a frozen codebook under a learned linear map (Zhu et al. 2024)."""


@register("gumbel", "vqgen.tokenizer.quantizers.gumbel:GumbelQuantizer")
@dataclass
class GumbelConfig(Entropy, CodeDim, QuantizerConfig):
    """A sample by Gumbel-softmax (Jang et al. 2017)."""

    training_only: ClassVar[frozenset[str]] = frozenset(
        {"gumbel_temperature", "gumbel_temperature_end", "gumbel_anneal", "gumbel_kl_weight"}
    )

    gumbel_temperature: Positive = 1.0
    """Temperature of the Gumbel-softmax at the start."""
    gumbel_temperature_end: Positive = 0.0625
    """Temperature it falls to, on a cosine."""
    gumbel_anneal: Share = 0.5
    """Share of the run over which the temperature falls."""
    gumbel_kl_weight: NotNegative = 5e-4
    """Weight of the KL divergence of the choices from the uniform prior."""
    entropy_weight: NotNegative = 0.005
    """Weight of the entropy loss; without it few codes are in use at the end."""
    entropy_diversity: NotNegative = 2.0
    """Weight of even use relative to confident choices in the entropy loss."""

    def collapse_remedy(self) -> str:
        weight = f"--entropy-weight (it is {self.entropy_weight:g})"
        return f"raise {weight} or --gumbel-kl-weight, or {super().collapse_remedy()}"


@register("fsq", "vqgen.tokenizer.quantizers.fsq:FSQ")
@dataclass
class FSQConfig(QuantizerConfig):
    """Rounding to a grid of levels (Mentzer et al. 2023)."""

    fixed_codes: ClassVar[bool] = True
    codes_option: ClassVar[str] = "--levels"

    levels: list[Annotated[int, Range(least=3, most=1000)]] = field(default_factory=list)
    """Levels of each dimension; empty = those of the paper nearest to --codebook-size."""

    @property
    def fsq_levels(self) -> list[int]:
        """Levels asked for, or the paper's nearest to the codebook size."""
        return self.levels or min(FSQ_LEVELS, key=lambda x: abs(math.log(math.prod(x) / self.codebook_size)))

    @property
    def codes(self) -> int:
        return math.prod(self.fsq_levels)

    @property
    def unread(self) -> frozenset[str]:
        return frozenset({"codebook_size"}) if self.levels else frozenset()

    def collapse_remedy(self) -> str:
        return "use smaller --levels"


@register("lfq", "vqgen.tokenizer.quantizers.lfq:LFQ")
@dataclass
class LFQConfig(SoftEntropy, Commitment, QuantizerConfig):
    """Signs of log2(K) dimensions (Yu et al. 2023)."""

    fixed_codes: ClassVar[bool] = True

    entropy_weight: NotNegative = 0.02
    """Weight of the entropy loss; without it few codes are in use."""
    entropy_temperature: Positive = 0.3
    """Temperature of the softmax over codes whose entropy is taken."""
    commitment_weight: NotNegative = 0.05
    """Weight of the commitment loss, which pulls the encoder's outputs towards their codes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook_size & (self.codebook_size - 1):
            raise UsageError(f"--codebook-size: found {self.codebook_size}; lfq needs a power of two")

    def collapse_remedy(self) -> str:
        return f"raise --entropy-weight (it is {self.entropy_weight:g}), or {super().collapse_remedy()}"


@register("residual", "vqgen.tokenizer.quantizers.residual:ResidualQuantizer")
@dataclass
class ResidualConfig(CodebookConfig):
    """Vector quantization of what remains, --depth times (Lee et al. 2022)."""

    depth: Annotated[int, Range(least=2, most=256)] = 2
    """Codes a position."""
    shared_codebook: bool = False
    """One codebook for all depths (Lee et al. 2022, section 3.1.2)."""


@register("product", "vqgen.tokenizer.quantizers.product:ProductQuantizer")
@dataclass
class ProductConfig(DirectionCodebookConfig):
    """Vector quantization of --depth parts of the vector (Jegou et al. 2011)."""

    depth: Annotated[int, Range(least=2, most=256)] = 2
    """Codes a position."""
