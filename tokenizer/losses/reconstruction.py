"""Distance between images and their reconstructions; `adversarial.py` has the other half of the loss."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.options import at_least


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


def reconstruction_loss(images: Tensor, targets: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Mean square or absolute difference of (B, C, H, W) in [-1, 1], in float32."""
    loss = F.mse_loss if kind == "l2" else F.l1_loss
    return loss(images.float(), targets.float())
