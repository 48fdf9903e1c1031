"""From logits to a token: guidance, temperature, top-k, top-p, min-p and the draw, as pure functions.

Logits are float32 (B, V), one row an image; a filtered-out token has logit -inf. No function looks across rows, so
what is drawn for a row depends on that row's logits and uniform number alone.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vqgen.errors import UsageError


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. Applied in this order: guidance, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """Divides the logits: below 1 safer, above 1 more varied, 0 = always the most likely code."""
    top_k: int = 0
    """Draw from the k most likely codes only (those tied with the last of them stay too); 0 = from all."""
    top_p: float = 1.0
    """Draw from the fewest codes that hold this share of the probability (Holtzman et al. 2020); 1 = from all."""
    min_p: float = 0.0
    """Drop codes less likely than this share of the likeliest one (Nguyen et al. 2024); 0 = none."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 = none, more = closer to the class and less varied, 0 = class ignored."""
    guidance_schedule: Literal["constant", "linear", "cosine", "interval"] = "constant"
    """How guidance grows from 1 at the first code to --guidance-scale at the last; interval = whole within
    --guidance-interval and none outside (Kynkaanniemi et al. 2024)."""
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """First and last share of an image's codes that --guidance-schedule interval guides."""
    oversample: float = 1.0
    """Images drawn for each one kept: of each 16 of a class, which is the fewest that are drawn, the most likely ones
    by the prior's own likelihood; 1.25 rejects the least likely fifth (after Razavi et al. 2019, section 3.3)."""

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, expected: str) -> None:
            if not fine:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected {expected}")

        check("temperature", 0 <= self.temperature < math.inf, "a number of at least 0")
        check("top_k", self.top_k >= 0, "a count of codes, or 0 for all")
        check("top_p", 0 < self.top_p <= 1, "0 < top-p <= 1")
        check("min_p", 0 <= self.min_p <= 1, "0 <= min-p <= 1")
        check("guidance_scale", 0 <= self.guidance_scale < math.inf, "a number of at least 0")
        kinds, between = ("constant", "linear", "cosine", "interval"), self.guidance_interval
        check("guidance_schedule", self.guidance_schedule in kinds, ", ".join(kinds))
        two = isinstance(between, (list, tuple)) and len(between) == 2
        check("guidance_interval", two and 0 <= between[0] < between[1] <= 1, "two shares, as 0.2 0.8")
        if list(between) != [0.0, 1.0]:
            check("guidance_interval", self.guidance_schedule == "interval", "--guidance-schedule interval with it")
        if self.guidance_schedule != "constant":
            check("guidance_schedule", self.guided, "a --guidance-scale other than 1 with it")
        check("oversample", 1 <= self.oversample <= 100, "1 to 100 images drawn for each one kept")

    @property
    def guided(self) -> bool:
        """Whether the logits without the condition are needed at all."""
        return self.guidance_scale != 1

    def guidance_at(self, position: int, length: int) -> float:
        """The guidance scale for code `position` of an image's `length`."""
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        if self.guidance_schedule == "interval":
            first, last = self.guidance_interval
            return self.guidance_scale if first <= (position + 0.5) / length <= last else 1.0
        share = position / max(length - 1, 1)
        if self.guidance_schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return 1 + (self.guidance_scale - 1) * share


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = 1 + w), on logits (B, V) -> (B, V).

    Scale 1 gives `conditional`, 0 gives `unconditional`, more than 1 moves past the conditional.
    """
    return unconditional + scale * (conditional - unconditional)


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
    # `before` is 0 for the likeliest token, so it stays however small p is.
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the likeliest one of their row; 0 keeps all."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V); at least one finite a row.
        uniforms: float64 (B,) in [0, 1), one a row.

    Returns:
        Token ids int64 (B,), each of positive probability.
    """
    # Summed in float64: in float32 the target can round up to the total and pass every token.
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = uniforms.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)  # the first above the target


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One token a row under `settings`, but for their guidance.

    Args:
        logits: (B, V) float32, guided already.
        uniforms: float64 (B,) in [0, 1).

    Returns:
        Token ids int64 (B,).
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    if settings.temperature != 1:
        logits = apply_temperature(logits, settings.temperature)
    logits = keep_top_k(logits, settings.top_k)
    logits = keep_top_p(logits, settings.top_p)
    return draw(keep_min_p(logits, settings.min_p), uniforms)
