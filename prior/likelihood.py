"""How well a prior predicts held-out codes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .model import Prior


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target: logits (B, T, V), targets (B, T) -> float32 (B, T) nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@dataclass(frozen=True)
class Likelihood:
    """Mean over tokens of held-out images, and the same as a rate.

    `bits_per_dimension` is the rate of the codes: bits the prior needs for an image's codes over C*H*W. It is no
    likelihood of pixels, since the decoder does not restore them exactly.
    """

    nats_per_token: float
    bits_per_dimension: float


@torch.no_grad()
def likelihood(prior: Prior, batches: Iterable[Tensor], accelerator: Accelerator) -> Likelihood:
    """Nats per token over sequences (B, 1 + length), given their conditions; summed over all processes."""
    total = torch.zeros(2, device=accelerator.device, dtype=torch.float64 if accelerator.device.type != "mps" else None)
    for tokens in batches:
        tokens = tokens.to(accelerator.device)
        with accelerator.autocast():
            logits = prior(tokens[:, :-1])
        nats = token_nats(logits, tokens[:, 1:])
        total += torch.stack([nats.sum(), torch.tensor(nats.numel(), device=nats.device)]).to(total.dtype)
    summed, count = accelerator.reduce(total, "sum").tolist()  # type: ignore[union-attr]
    per_token = summed / count
    return Likelihood(per_token, per_token * prior.vocabulary.length / math.log(2) / math.prod(prior.image_shape))
