"""Samples drawn while a prior trains, with the `generate` of transformers: vqgen's own sampler is a later layer."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .conditioning import Conditioning
from .model import Prior


class _LegalCodes(LogitsProcessor):
    """Mask all ids but those of the codes at the next position."""

    def __init__(self, conditioning: Conditioning) -> None:
        self.conditioning = conditioning

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        position = input_ids.shape[1] - self.conditioning.length
        first, end = self.conditioning.vocabulary.allowed(position)
        legal = torch.full_like(scores, -torch.inf)
        legal[:, first:end] = scores[:, first:end]
        return legal


@torch.no_grad()
def preview_codes(prior: Prior, count: int, seed: int) -> Tensor:
    """Draw codes (count, h, w[, depth]) at temperature 1, every class in turn; torch's random state is restored."""
    conditioning, vocabulary, device = prior.conditioning, prior.vocabulary, next(prior.parameters()).device
    prefixes = conditioning.prefixes(conditioning.conditions(), range(count)).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = prior.backbone.generate(  # type: ignore[operator]
            prefixes,
            attention_mask=torch.ones_like(prefixes),
            do_sample=True,
            top_k=0,
            max_new_tokens=vocabulary.length,
            min_new_tokens=vocabulary.length,
            pad_token_id=conditioning.null,
            logits_processor=LogitsProcessorList([_LegalCodes(conditioning)]),
        )
    return vocabulary.to_codes(conditioning.split(tokens)[1])
