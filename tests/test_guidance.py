"""Guidance by several conditions: what is computed, and that it equals the formula on full forward passes."""

import math

import pytest
import torch
from helpers.models import small_prior
from torch import Tensor

from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.sampling.decoding.generate import Contrast, generate, image_uniforms
from vqgen.sampling.decoding.logits import choose, guide
from vqgen.sampling.settings import SamplingSettings


def test_three_rows_are_the_equation():
    """none + s_1 (source - none) + s_0 (all - source), eq. 3 of Brooks et al. 2023."""
    both, source, none = torch.randn(3, 2, 5).unbind()
    found = guide([both, source, none], [3.0, 1.5])
    torch.testing.assert_close(found, none + 1.5 * (source - none) + 3.0 * (both - source))
    torch.testing.assert_close(guide([both, source, none], [1.0, 1.0]), both)
    torch.testing.assert_close(guide([both, source, none], [1.0, 0.0]), both - source + none)
    torch.testing.assert_close(guide([both, source, none], [0.0, 1.0]), source)


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
@pytest.mark.parametrize("schedule", ["constant", "power-cosine"])
def test_drawing_with_three_rows_equals_full_forward_passes(backbone, schedule):
    """Against a loop that keeps no cache, applies the equation itself, and draws each row alone."""
    prior = small_prior(backbone, classes=4).eval()
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(15)
    vocabulary, count = prior.vocabulary, 20
    ids = range(vocabulary.size, prior.conditioning.size)
    prefixes = [torch.tensor([[ids[(row + shift) % 5]] for row in range(count)]) for shift in (0, 1, 3)]
    uniforms = image_uniforms(2, range(count), vocabulary.length)
    settings = SamplingSettings(guidance_scale=6.0, source_guidance_scale=0.5, guidance_schedule=schedule, top_k=5)
    contrasts = [Contrast(prefixes[1], 6.0), Contrast(prefixes[2], 0.5)]
    allowed = [vocabulary.allowed(position) for position in range(vocabulary.length)]
    decoder = CachedTransformer(prior.backbone, vocabulary.length)
    drawn = generate(decoder, prefixes[0], allowed, uniforms, settings, contrasts)

    def logits(prefix: Tensor, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return prior(torch.cat([prefix, tokens], 1))[:, -1, : vocabulary.size]

    tokens, nats = torch.empty(count, 0, dtype=torch.long), torch.zeros(count)
    for position in range(vocabulary.length):
        share = position / (vocabulary.length - 1)
        growth = 1.0 if schedule == "constant" else (1 - math.cos(math.pi * share**2.75)) / 2
        both, source, none = (logits(prefix, tokens) for prefix in prefixes)
        of_class, of_source = 1 + 5 * growth, 1 - 0.5 * growth
        guided = none + of_source * (source - none) + of_class * (both - source)
        chosen = choose(guided, uniforms[:, position], settings)
        nats += -both.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    assert torch.equal(drawn.tokens, tokens) and drawn.tokens.unique().numel() > 3
    torch.testing.assert_close(drawn.nats, nats.double(), rtol=1e-4, atol=1e-4)
    plain = generate(decoder, prefixes[0], allowed, uniforms, SamplingSettings(top_k=5)).tokens
    assert not torch.equal(plain, tokens), "it changes something"
