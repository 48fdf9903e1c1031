"""The training objective of a prior: cross-entropy of codes, with optional regularisation."""

import torch
from torch import Tensor

from .conditioning import Conditioning
from .likelihood import token_nats
from .options import ObjectiveConfig
from .vocabulary import Vocabulary


def corrupted(sequences: Tensor, share: float, conditioning: Conditioning) -> Tensor:
    """Replace a random share of the codes in sequences (B, T) by random codes of the same depth; prefixes stay."""
    if not share:
        return sequences
    prefix, codes = conditioning.split(sequences)
    vocabulary = conditioning.vocabulary
    depths = torch.arange(codes.shape[1], device=codes.device) % vocabulary.depth
    random = torch.randint_like(codes, vocabulary.codebook_size) + depths * vocabulary.codebook_size
    chosen = torch.rand(codes.shape, device=codes.device) < share
    return torch.cat([prefix, torch.where(chosen, random, codes)], 1)


@torch.no_grad()
def accuracy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Share of the targets (B, T) that are the most likely of all ids by logits (B, T, V), and among the five of these.

    `weights` as in `objective`.
    """
    above = (logits > logits.gather(-1, targets[..., None])).sum(-1)
    weights = torch.ones_like(above, dtype=torch.float32) if weights is None else weights
    return {f"top{k}_accuracy": ((above < k) * weights).mean() for k in (1, 5)}


def objective(
    logits: Tensor, targets: Tensor, config: ObjectiveConfig, vocabulary: Vocabulary, weights: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (B, T, V), targets (B, T) of all codes -> the terms, all of them logged, and their minimised sum.

    `cross-entropy` is that of the targets themselves, so that runs are comparable whatever their smoothing. `weights`
    (B, T) multiply the terms of each target; their mean is 1 over the whole batch.
    """

    def mean(values: Tensor) -> Tensor:
        return values.mean() if weights is None else (values * weights).mean()

    terms = {"cross-entropy": mean(token_nats(logits, targets))}
    total = terms["cross-entropy"]
    if config.label_smoothing or config.z_loss:
        # float32, as the cross-entropy is.
        normaliser = logits.float().logsumexp(-1)
        if config.label_smoothing:
            ids = logits[..., : vocabulary.size].float()
            by_depth = ids.unflatten(-1, (vocabulary.depth, -1)).mean(-1).unflatten(1, (-1, vocabulary.depth))
            possible = by_depth.diagonal(dim1=2, dim2=3).flatten(1)  # (B, T): each over the codes of its own depth
            uniform = mean(normaliser - possible)
            terms["smoothing"] = config.label_smoothing * (uniform - total)
        if config.z_loss:
            terms["z-loss"] = config.z_loss * mean(normaliser.square())
        total = torch.stack(list(terms.values())).sum()
    return terms, total
