"""Options of the losses."""

import math
from dataclasses import dataclass, field
from typing import Literal

from vqgen.errors import UsageError
from vqgen.options import at_least

Augmentation = Literal["color", "translation", "cutout"]


@dataclass
class LossConfig:
    """Distance between images and their reconstructions."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Distance of pixels: mean square (l2) or mean absolute (l1) difference in [-1, 1]."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS (Zhang et al. 2018); 0 = off."""
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    """Backbone of LPIPS, in the loss and in the held-out figure."""
    perceptual_weights: str | None = None
    """Convolutions of that backbone: a safetensors file with torchvision's names, or "torchvision" to let torchvision
    fetch them once. With 0 --perceptual-weight they serve the held-out LPIPS figure alone."""

    def __post_init__(self) -> None:
        at_least(self, perceptual_weight=0)
        if self.perceptual_weight and self.perceptual_weights is None:
            raise UsageError(
                f"--perceptual-weights is needed with --perceptual-weight {self.perceptual_weight}: a safetensors "
                f"file with the {self.perceptual_net} convolutions, or torchvision to let torchvision fetch them"
            )


GanLoss = Literal["hinge", "vanilla", "non-saturating"]


@dataclass
class GanConfig:
    """The adversarial loss: its kind, when it starts, how it grows, and the discriminator."""

    gan_weight: float = 0.0
    """Weight of the adversarial loss; 0 = no discriminator."""
    gan_loss: GanLoss = "hinge"
    """hinge; vanilla: cross-entropy for the discriminator, its mean logit for the decoder (so in VQGAN's code);
    non-saturating: cross-entropy for both."""
    gan_start_at: Literal["step", "share", "plateau"] = "step"
    """What --gan-start is: a step; a share of --steps; or plateau: the discriminator begins once the reconstruction
    loss has levelled off, at step --gan-start at the latest."""
    gan_start: int | float = 5000
    """When the discriminator begins to train, see --gan-start-at."""
    gan_plateau: float = 0.02
    """With --gan-start-at plateau: the loss has levelled off where its mean over --gan-plateau-steps is not lower than
    the best such mean before by at least this share."""
    gan_plateau_steps: int = 500
    """Steps of each of those means."""
    gan_warmup: int = 500
    """Steps for which the discriminator trains alone, before the decoder feels it."""
    gan_ramp: int = 1000
    """Steps over which the weight then rises from 0 to --gan-weight."""
    gan_adaptive: bool = True
    """Scale the weight by the ratio of gradients at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    gan_adaptive_max: float = 100.0
    """Largest such ratio. Where the discriminator is fooled its gradient is small and the ratio large: a bound near the
    usual ratio (see adaptive_ratio in metrics.jsonl) keeps the decoder from being driven hardest just then."""
    gan_lecam: float = 0.0
    """Weight of LeCam regularisation of the discriminator (Tseng et al. 2021); 0 = off."""
    gan_augment: list[Augmentation] = field(default_factory=list)
    """DiffAugment (Zhao et al. 2020) of what the discriminator sees; [] = off."""
    gan_spectral_norm: bool = False
    """Spectral norm of the discriminator's convolutions (Miyato et al. 2018)."""
    gan_width: int = 64
    """Channels of the discriminator's first layer."""
    gan_layers: int = 3
    """Strided layers of the discriminator; each doubles the patch it judges."""
    gan_lr: float = 1e-4
    """Learning rate of the discriminator while --lr is at its peak; the two rise and fall together."""

    def __post_init__(self) -> None:
        names = ("gan_weight", "gan_start", "gan_warmup", "gan_ramp", "gan_adaptive_max", "gan_lecam", "gan_lr")
        for name in names:
            # A number that is not finite fails the comparison, or the one below.
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected at least 0")
        at_least(self, gan_width=1, gan_layers=1, gan_plateau_steps=1)
        if not 0 <= self.gan_plateau < 1:
            raise UsageError(f"--gan-plateau: found {self.gan_plateau}, expected a share, 0 <= value < 1")
        if self.gan_start_at == "share":
            if not self.gan_start < 1:
                raise UsageError(
                    f"--gan-start: found {self.gan_start}, expected 0 <= value < 1 with --gan-start-at share"
                )
        elif self.gan_start != int(self.gan_start):
            raise UsageError(
                f"--gan-start: found {self.gan_start}, expected a whole step with --gan-start-at {self.gan_start_at}"
            )

    def start(self, steps: int) -> int:
        """The discriminator's first step (0 is that of the run) in a run of `steps`; with a plateau, the latest."""
        return int(self.gan_start * steps if self.gan_start_at == "share" else self.gan_start)

    def weight(self, since: int) -> float:
        """Weight of the adversarial loss `since` steps after the discriminator's first, before the adaptive ratio."""
        felt = since - self.gan_warmup
        return self.gan_weight * min(1.0, (felt + 1) / max(1, self.gan_ramp)) if felt >= 0 else 0.0
