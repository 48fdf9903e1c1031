"""Sampling of a token from logits: guidance, temperature, top-k, top-p and min-p, as pure functions.

Logits are float32 (B, V), one row an image; a filtered-out token has logit -inf. Rows are independent: the token of a
row depends on its own logits and uniform number alone.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vqgen.sampling.settings import SamplingSettings


def guide(rows: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """Classifier-free guidance on logits (B, V) -> (B, V).

    `rows` are the logits with all conditions, then with fewer and fewer of them; `scales[i]` multiplies what `rows[i]`
    has over `rows[i + 1]`. With two rows it is eq. 6 of Ho & Salimans 2022 (scale = 1 + w), with three eq. 3 of Brooks
    et al. 2023: none + s_1 (source - none) + s_0 (all - source). Scale 1 everywhere gives `rows[0]`.
    """
    guided = rows[-1]
    for (richer, poorer), scale in zip(reversed(list(pairwise(rows))), reversed(scales), strict=True):
        guided = guided + scale * (richer - poorer)
    return guided


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature > 0, shifted so that the largest is 0: no temperature, however low, overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row, and all that equal the k-th; k = 0 or k >= V keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens of each row whose probabilities reach p, at least one; of equals the lower id first."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1, dtype=torch.float64)
    before = probabilities.cumsum(-1) - probabilities
    # `before` is 0 for the most likely token, so it stays however small p is.
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the most likely one of their row; 0 keeps all."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token a row by inverse transform sampling: ids int64 (B,), each of positive probability.

    Each row of logits (B, V) has a finite one; uniforms are float64 (B,) in [0, 1). Of a row with NaN it is some id.
    """
    # Summed in float64: in float32 the target can round up to the total and pass every token.
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    first_above = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return first_above.clamp(max=logits.shape[-1] - 1)  # nothing is above NaN


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """Choose one token a row, int64 (B,), of logits (B, V) after guidance by all filters and uniforms (B,)."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    if settings.temperature != 1:
        logits = apply_temperature(logits, settings.temperature)
    logits = keep_top_p(keep_top_k(logits, settings.top_k), settings.top_p)
    return draw(keep_min_p(logits, settings.min_p), uniforms)
