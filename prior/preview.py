"""A few samples drawn while the prior trains; the product's own sampler stands above this package."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .model import Prior
from .vocabulary import Vocabulary


class _LegalCodes(LogitsProcessor):
    """Leaves only the codes that may stand at the next position."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        first, end = self.vocabulary.allowed(input_ids.shape[1] - 1)
        legal = torch.full_like(scores, -torch.inf)
        legal[:, first:end] = scores[:, first:end]
        return legal


@torch.no_grad()
def preview_codes(prior: Prior, count: int, seed: int) -> Tensor:
    """Codes (count, h, w[, depth]) at temperature 1, the classes in turn; leaves torch's random state as it was."""
    vocabulary, device = prior.vocabulary, next(prior.parameters()).device
    labels = torch.arange(count) % vocabulary.classes if vocabulary.classes else torch.full((count,), -1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = prior.backbone.generate(  # type: ignore[operator]
            vocabulary.class_id(labels)[:, None].to(device),
            attention_mask=torch.ones(count, 1, dtype=torch.long, device=device),
            do_sample=True,
            top_k=0,
            max_new_tokens=vocabulary.length,
            min_new_tokens=vocabulary.length,
            pad_token_id=vocabulary.null,
            logits_processor=LogitsProcessorList([_LegalCodes(vocabulary)]),
        )
    return vocabulary.to_codes(tokens[:, 1:])
