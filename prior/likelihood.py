"""How well a prior predicts codes."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from vqgen.training.fsdp import is_sharded

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


def rated(nats_per_token: float, prior: Prior) -> Likelihood:
    """The likelihood of so many nats a token."""
    bits = nats_per_token * prior.vocabulary.length / math.log(2)
    return Likelihood(nats_per_token, bits / math.prod(prior.image_shape))


@torch.no_grad()
def tabulate(prior: Prior, batches: Iterable[Tensor], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Nats of sequences (B, 1 + length) given their conditions, summed over all processes.

    Returns:
        Their sums by condition and position, (classes + 1, length), and how many sequences each condition has,
        (classes + 1,), float64 on the CPU; the last condition is the null id, no class.
    """
    vocabulary, device = prior.vocabulary, accelerator.device
    kind = torch.float64 if device.type != "mps" else torch.float32
    table = torch.zeros(vocabulary.classes + 1, 1 + vocabulary.length, dtype=kind, device=device)
    further = 0
    if is_sharded(accelerator):  # a process with fewer batches still has to bring its share of the weights to all
        batches = list(batches)
        most = accelerator.gather(torch.tensor([len(batches)], device=device)).max()  # type: ignore[union-attr]
        further = int(most) - len(batches)
    for tokens in batches:
        tokens = tokens.to(device)
        with accelerator.autocast():
            logits = prior(tokens[:, :-1])
        nats = token_nats(logits, tokens[:, 1:]).to(kind)
        condition = tokens[:, 0] - vocabulary.codebook_size * vocabulary.depth
        table.index_add_(0, condition, torch.cat([torch.ones_like(nats[:, :1]), nats], 1))
    for _ in range(further):
        prior(torch.zeros(1, vocabulary.length, dtype=torch.long, device=device))
    total: Tensor = accelerator.reduce(table, "sum")  # type: ignore[assignment]
    total = total.double().cpu()
    return total[:, 1:], total[:, 0]


def likelihood(prior: Prior, batches: Iterable[Tensor], accelerator: Accelerator) -> Likelihood:
    """Likelihood of sequences (B, 1 + length), given their conditions; over all processes."""
    sums, counts = tabulate(prior, batches, accelerator)
    return rated((sums.sum() / (counts.sum() * prior.vocabulary.length)).item(), prior)
