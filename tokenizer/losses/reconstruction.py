"""Pixel loss of reconstructions; the adversarial loss is in `adversarial.py`."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def reconstruction_loss(images: Tensor, targets: Tensor, kind: Literal["l2", "l1"]) -> Tensor:
    """Mean squared or absolute difference of images (B, C, H, W) in [-1, 1], in float32."""
    loss = F.mse_loss if kind == "l2" else F.l1_loss
    return loss(images.float(), targets.float())
