"""Negative log-likelihood (NLL) of codes under a prior."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from .dataset import Examples
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
def tabulate(prior: Prior, batches: Iterable[Examples], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Sum the nats of the wanted codes of sequences, given their prefixes, over all processes: float64 on the CPU.

    Returns the sums and the numbers of wanted codes by group of `Conditioning.group_names` and code position, both
    (groups, length).
    """
    from vqgen.training.fsdp import is_sharded  # half a second that drawing images does not need

    conditioning, device, length = prior.conditioning, accelerator.device, prior.vocabulary.length
    dtype = torch.float64 if device.type != "mps" else torch.float32
    table = torch.zeros(len(conditioning.group_names), 2 * length, dtype=dtype, device=device)
    further = 0
    if is_sharded(accelerator):  # all processes take part in every forward pass, with or without a batch left
        batches = list(batches)
        most = accelerator.gather(torch.tensor([len(batches)], device=device)).max()  # type: ignore[union-attr]
        further = int(most) - len(batches)
    for batch in batches:
        tokens, layout = batch.tokens.to(device), batch.layout
        with accelerator.autocast():
            logits = prior(tokens[:, :-1])
        nats = token_nats(layout.of_codes(logits), layout.split(tokens)[1]).to(dtype)
        wanted = torch.ones_like(nats) if batch.wanted is None else batch.wanted.to(device, dtype)
        table.index_add_(0, layout.groups(tokens), torch.cat([nats * wanted, wanted], 1))
    for _ in range(further):
        prior(torch.zeros(1, conditioning.length + length - 1, dtype=torch.long, device=device))
    total: Tensor = accelerator.reduce(table, "sum").double().cpu()  # type: ignore[union-attr]
    return total[:, :length], total[:, length:]


def likelihood(prior: Prior, batches: Iterable[Examples], accelerator: Accelerator) -> Likelihood:
    """Likelihood of the wanted codes of sequences given their prefixes, over all processes."""
    sums, counts = tabulate(prior, batches, accelerator)
    return rated((sums.sum() / counts.sum()).item(), prior)
