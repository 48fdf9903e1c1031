"""Guidance of a series of images: which of their conditions are amplified, and the prefixes that do without these."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vqgen.prior.conditioning import Conditioning, Conditions
from vqgen.prior.parts.part import Part, is_absent

from .decoding.generate import Contrast
from .settings import SamplingSettings


def scales_of(settings: SamplingSettings) -> dict[str, float]:
    """Option -> guidance scale, in the order in which conditions are taken away: the source last."""
    return {
        "--guidance-scale": settings.guidance_scale,
        "--source-guidance-scale": settings.source_guidance_scale,
    }


def check_guidance(conditioning: Conditioning, settings: SamplingSettings, conditions: Conditions | None) -> None:
    """Raise `UsageError` for guidance that changes nothing with this prior, or on images of these conditions."""
    for option, scale in scales_of(settings).items():
        if scale != 1:
            conditioning.check_absence(f"{option}: found {scale:g}, but", conditions, option)


@dataclass(frozen=True)
class Guidance:
    """How the images of a series with the same kinds of conditions are guided."""

    layout: Conditioning
    levels: Sequence[tuple[Sequence[Part], float]]
    """Parts that are taken away, and the scale of what is left by the level before: each level takes away more."""

    @classmethod
    def of(cls, layout: Conditioning, settings: SamplingSettings, conditions: Conditions) -> "Guidance":
        """The levels that the scales need: none at 1, one where there is one kind of condition or the scales are equal,
        else two. They depend on all conditions of the series, not on those of a batch."""
        levels: list[tuple[list[Part], float]] = []
        for option, scale in scales_of(settings).items():
            parts = [part for part in layout.parts if part.guidance == option and part.guidable]
            if any(not is_absent(value) for part in parts for value in conditions[part.name]):
                levels.append(([*(levels[-1][0] if levels else []), *parts], scale))
        following = [*(scale for _, scale in levels[1:]), 1.0]
        # A level's logits have the factor `scale after it - its own scale`.
        return cls(layout, [level for level, after in zip(levels, following) if level[1] != after])

    def contrasts(self, prefix: Tensor) -> list[Contrast]:
        """The contrasts of prefixes (B, P)."""
        return [Contrast(self.layout.without(prefix, parts), scale) for parts, scale in self.levels]
