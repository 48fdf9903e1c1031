"""The loss terms of stage one as pure functions, and the schedule of the adversarial one."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.errors import UsageError


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
        if self.perceptual_weight < 0:
            raise UsageError(f"--perceptual-weight: found {self.perceptual_weight}, expected at least 0")
        if self.perceptual_weight and self.perceptual_weights is None:
            raise UsageError(
                f"--perceptual-weights is needed with --perceptual-weight {self.perceptual_weight}: a safetensors "
                f"file with the {self.perceptual_net} convolutions, or torchvision to let torchvision fetch them"
            )


@dataclass
class GanConfig:
    """The adversarial loss: when it starts, how it grows, and the discriminator."""

    gan_weight: float = 0.0
    """Weight of the adversarial loss; 0 = no discriminator."""
    gan_start: int = 5000
    """Step at which the discriminator begins to train."""
    gan_warmup: int = 500
    """Steps for which the discriminator trains alone, before the decoder feels it."""
    gan_ramp: int = 1000
    """Steps over which the weight then rises from 0 to --gan-weight."""
    gan_adaptive: bool = True
    """Scale the weight by the ratio of gradients at the decoder's last layer (Esser et al. 2021, eq. 7)."""
    gan_adaptive_max: float = 100.0
    """Largest such ratio."""
    gan_width: int = 64
    """Channels of the discriminator's first layer."""
    gan_layers: int = 3
    """Strided layers of the discriminator; each doubles the patch it judges."""
    gan_lr: float = 1e-4
    """Peak learning rate of the discriminator."""

    def __post_init__(self) -> None:
        for name in ("gan_weight", "gan_start", "gan_warmup", "gan_ramp", "gan_adaptive_max", "gan_lr"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected at least 0")
        for name in ("gan_width", "gan_layers"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected at least 1")

    def trains(self, step: int) -> bool:
        """Whether the discriminator learns at this step (0 is the first)."""
        return self.gan_weight > 0 and step >= self.gan_start

    def weight(self, step: int) -> float:
        """Weight of the adversarial loss at this step, before the adaptive ratio."""
        since = step - self.gan_start - self.gan_warmup
        if self.gan_weight == 0 or since < 0:
            return 0.0
        return self.gan_weight * min(1.0, (since + 1) / max(1, self.gan_ramp))


def reconstruction_loss(images: Tensor, targets: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Mean square or absolute difference of (B, C, H, W) in [-1, 1], in float32."""
    loss = F.mse_loss if kind == "l2" else F.l1_loss
    return loss(images.float(), targets.float())


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim and Ye 2017): 0 when it always wins, 1 when its logits are all 0."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """Adversarial loss of the decoder under the hinge loss."""
    return -fake.float().mean()


def adaptive_ratio(reconstruction: Tensor, adversarial: Tensor, last: nn.Parameter, largest: float) -> Tensor:
    """|grad of the reconstruction loss| / |grad of the adversarial loss| at the decoder's last weights, detached.

    Esser et al. 2021, eq. 7. Norms are taken in float32: under bf16 or fp16 their squares would overflow or vanish.
    `last` must belong to the module itself, not to a wrapper around it.
    """
    with torch.autocast(reconstruction.device.type, enabled=False):
        grads = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
        norms = [grad.detach().float().norm() for grad in grads]
        return (norms[0] / (norms[1] + 1e-4)).clamp(0, largest)
