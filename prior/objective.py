"""What a prior is trained to do: predict codes, with what makes that harder or steadier."""

import torch
from torch import Tensor

from .likelihood import token_nats
from .options import ObjectiveConfig
from .vocabulary import Vocabulary


def without_labels(tokens: Tensor, share: float, vocabulary: Vocabulary) -> Tensor:
    """Sequences (B, 1 + length) with the null id for a random share of their conditions."""
    dropped = torch.rand(len(tokens), device=tokens.device) < share
    tokens = tokens.clone()
    tokens[:, 0] = torch.where(dropped, vocabulary.null, tokens[:, 0])
    return tokens


def corrupted(tokens: Tensor, share: float, vocabulary: Vocabulary) -> Tensor:
    """Sequences (B, T), condition first, with a random share of their codes replaced by codes of the same depth."""
    if not share:
        return tokens
    codes = tokens[:, 1:]
    depths = torch.arange(codes.shape[1], device=tokens.device) % vocabulary.depth
    random = torch.randint_like(codes, vocabulary.codebook_size) + depths * vocabulary.codebook_size
    chosen = torch.rand(codes.shape, device=tokens.device) < share
    return torch.cat([tokens[:, :1], torch.where(chosen, random, codes)], 1)


def objective(logits: Tensor, targets: Tensor, config: ObjectiveConfig) -> tuple[dict[str, Tensor], Tensor]:
    """Logits (B, T, V), targets (B, T) -> the terms, all of them logged, and their sum, which is trained on.

    `cross-entropy` is always that of the targets themselves, so that runs compare whatever their smoothing.
    """
    nats = token_nats(logits, targets)
    terms = {"cross-entropy": nats.mean()}
    total = terms["cross-entropy"]
    if config.label_smoothing or config.z_loss:
        # float32, as the cross-entropy is.
        normaliser = logits.float().logsumexp(-1)
        if config.label_smoothing:
            spread = (normaliser - logits.float().mean(-1)).mean()
            terms["smoothing"] = config.label_smoothing * (spread - total)
        if config.z_loss:
            terms["z-loss"] = config.z_loss * normaliser.square().mean()
        total = torch.stack(list(terms.values())).sum()
    return terms, total
