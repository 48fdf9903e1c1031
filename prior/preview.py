"""Samples drawn while a prior trains, with the `generate` of transformers: vqgen's own sampler is a later layer."""

import torch
from torch import Tensor

from .model import Prior


@torch.no_grad()
def preview_codes(prior: Prior, count: int, seed: int) -> Tensor:
    """Draw codes (count, h, w[, depth]) at temperature 1, every class in turn; torch's random state is restored."""
    conditioning, vocabulary, device = prior.conditioning, prior.vocabulary, next(prior.parameters()).device
    prefixes = conditioning.prefixes(conditioning.conditions(), range(count)).to(device)

    def allowed(_row: int, ids: Tensor) -> Tensor:
        return torch.arange(*vocabulary.allowed(len(ids) - conditioning.length))

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
            prefix_allowed_tokens_fn=allowed,
        )
    return vocabulary.to_codes(conditioning.split(tokens)[1])
