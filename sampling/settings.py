"""How codes are drawn."""

import math
from dataclasses import dataclass, field
from typing import Literal

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
