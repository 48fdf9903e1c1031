"""Negative log-likelihood (NLL) of codes under a prior."""

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
    """NLL of each target: logits (B, T, V), targets (B, T) -> nats, float32 (B, T)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


@dataclass(frozen=True)
class Likelihood:
    """Mean NLL of code tokens, also as a rate.

    `bits_per_dimension` is the rate of the codes: the NLL of an image's codes in bits over C*H*W. It is not a
    likelihood of pixels, since the decoder does not restore them exactly.
    """

    nats_per_token: float
    bits_per_dimension: float


def rated(nats_per_token: float, prior: Prior) -> Likelihood:
    """Add the rate of the codes to a mean NLL."""
    bits = nats_per_token * prior.vocabulary.length / math.log(2)
    return Likelihood(nats_per_token, bits / math.prod(prior.image_shape))


@torch.no_grad()
def tabulate(prior: Prior, batches: Iterable[Tensor], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Sum the nats of the codes of sequences, given their prefixes, over all processes: float64 on the CPU.

    Returns the sums by group of `Conditioning.group_names` and code position, (groups, length), and the number of
    sequences of each group, (groups,).
    """
    conditioning, device, length = prior.conditioning, accelerator.device, prior.vocabulary.length
    dtype = torch.float64 if device.type != "mps" else torch.float32
    table = torch.zeros(len(conditioning.group_names), 1 + length, dtype=dtype, device=device)
    further = 0
    if is_sharded(accelerator):  # all processes take part in every forward pass, with or without a batch left
        batches = list(batches)
        most = accelerator.gather(torch.tensor([len(batches)], device=device)).max()  # type: ignore[union-attr]
        further = int(most) - len(batches)
    for tokens in batches:
        tokens = tokens.to(device)
        with accelerator.autocast():
            logits = prior(tokens[:, :-1])
        nats = token_nats(conditioning.of_codes(logits), conditioning.split(tokens)[1]).to(dtype)
        table.index_add_(0, conditioning.groups(tokens), torch.cat([torch.ones_like(nats[:, :1]), nats], 1))
    for _ in range(further):
        prior(torch.zeros(1, conditioning.length + length - 1, dtype=torch.long, device=device))
    total: Tensor = accelerator.reduce(table, "sum").double().cpu()  # type: ignore[union-attr]
    return total[:, 1:], total[:, 0]


def likelihood(prior: Prior, batches: Iterable[Tensor], accelerator: Accelerator) -> Likelihood:
    """Likelihood of the codes of sequences given their prefixes, over all processes."""
    sums, counts = tabulate(prior, batches, accelerator)
    return rated((sums.sum() / (counts.sum() * prior.vocabulary.length)).item(), prior)
