"""Options of the losses."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from vqgen.errors import UsageError
from vqgen.options import CountOrZero, NotNegative, Options, Range, Size

Augmentation = Literal["color", "translation", "cutout"]
PerceptualNet = Literal["vgg", "alex"]
GanLoss = Literal["hinge", "vanilla", "non-saturating"]

# Smallest side in pixels that is not empty after the backbone's last pooling.
_SMALLEST_SIDE = {"vgg": 16, "alex": 31}


def check_size(net: str, height: int, width: int) -> None:
    """Raise `UsageError` for images that are too small for the pooling layers of LPIPS's backbone."""
    if min(height, width) < _SMALLEST_SIDE[net]:
        raise UsageError(
            f"--perceptual-net: {net} needs at least {_SMALLEST_SIDE[net]} pixels a side, found {height}x{width}; "
            f"use {'vgg' if net == 'alex' else 'larger images, or no perceptual loss'}"
        )


@dataclass(kw_only=True)
class PerceptualOptions(Options):
    """LPIPS as a metric."""

    perceptual_net: PerceptualNet = "vgg"
    """Backbone of LPIPS."""
    perceptual_weights: str | None = None
    """Convolutions of the LPIPS backbone: a safetensors file with torchvision's names, or torchvision to download them;
    none = no LPIPS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual_net != "vgg" and not self.perceptual_weights:
            raise UsageError(f"--perceptual-net: found {self.perceptual_net} and no --perceptual-weights; name them")


@dataclass
class LossConfig(Options):
    """Reconstruction and perceptual loss."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Pixel loss: mean squared (l2) or mean absolute (l1) difference of values in [-1, 1]."""
    perceptual_weight: NotNegative = 0.0
    """Weight of LPIPS (Zhang et al. 2018) in the loss; 0 = off."""
    perceptual_net: PerceptualNet = "vgg"
    """Backbone of LPIPS, in the loss and in the validation metric."""
    perceptual_weights: str | None = None
    """Convolutions of that backbone: a safetensors file with torchvision's names, or "torchvision" to download them
    once. With --perceptual-weight 0 they serve the validation metric alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perceptual_weight and self.perceptual_weights is None:
            raise UsageError(
                f"--perceptual-weights is needed with --perceptual-weight {self.perceptual_weight}: a safetensors "
                f"file with the {self.perceptual_net} convolutions, or torchvision to download them"
            )


@dataclass
class GanConfig(Options):
    """Adversarial loss: kind, start, warm-up, and the discriminator."""

    gan_weight: NotNegative = 0.0
    """Weight of the adversarial loss; 0 = no discriminator."""
    gan_loss: GanLoss = "hinge"
    """hinge; vanilla: cross-entropy for the discriminator, its mean logit for the decoder (as in VQGAN's code);
    non-saturating: cross-entropy for both."""
    gan_start: Annotated[int | float, Range(least=0)] = 5000
    """When the discriminator begins to train: a step, or below 1 a share of --steps."""
    gan_warmup: CountOrZero = 500
    """Steps that the discriminator trains alone before the adversarial loss reaches the decoder."""
    gan_ramp: CountOrZero = 1000
    """Steps over which the weight then rises from 0 to --gan-weight."""
    gan_adaptive: bool = True
    """Scale the weight by the ratio of gradient norms at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    gan_adaptive_max: NotNegative = 100.0
    """Largest such ratio. A discriminator that is fooled has a small gradient, so the ratio is largest when the loss is
    least useful; a bound near the usual ratio (adaptive_ratio in metrics.jsonl) prevents that."""
    gan_lecam: NotNegative = 0.0
    """Weight of LeCam regularisation of the discriminator (Tseng et al. 2021); 0 = off."""
    gan_augment: list[Augmentation] = field(default_factory=list)
    """DiffAugment (Zhao et al. 2020) of the discriminator's inputs; [] = off."""
    gan_spectral_norm: bool = False
    """Spectral norm of the discriminator's convolutions (Miyato et al. 2018)."""
    gan_width: Size = 64
    """Channels of the discriminator's first layer."""
    gan_layers: Annotated[int, Range(least=1, most=16)] = 3
    """Strided layers of the discriminator; each doubles the patch size."""
    gan_lr: NotNegative = 1e-4
    """Peak learning rate of the discriminator; it follows the schedule of --lr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_start >= 1 and self.gan_start % 1:
            raise UsageError(f"--gan-start: found {self.gan_start}, expected a whole step or a share below 1")

    def start(self, steps: int) -> int:
        """Return the discriminator's first step, counted from 0, in a run of `steps`."""
        return int(self.gan_start * steps if self.gan_start < 1 else self.gan_start)

    def weight(self, since: int) -> float:
        """Return the weight `since` steps after the discriminator's first step, without the adaptive ratio."""
        ramped = since - self.gan_warmup
        return self.gan_weight * min(1.0, (ramped + 1) / max(1, self.gan_ramp)) if ramped >= 0 else 0.0
