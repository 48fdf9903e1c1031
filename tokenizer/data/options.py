"""Options of how images are read."""

from dataclasses import dataclass, field
from typing import Literal

from vqgen.errors import UsageError


@dataclass
class ImageConfig:
    """How images are read; checked when built (`UsageError`)."""

    size: list[int] = field(default_factory=lambda: [32, 32])
    """Height and width in pixels; one number means a square."""
    channels: int = 3
    """3 for colour, 1 for grey. Transparent pixels show white."""
    fit: Literal["crop", "pad"] = "crop"
    """How another aspect ratio fits: crop what is over, or pad with black what is missing."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    random_crop: float = 0.0
    """Enlarge training images by this share and crop at random; 0 crops the centre."""
    holdout: float = 0.05
    """Share of the images held out where the source has no held-out split of its own; always the same images."""
    broken: Literal["skip", "error"] = "skip"
    """What a broken image does: it is named and skipped, or it ends the run."""
    max_broken: float = 0.01
    """Largest share of broken images that is skipped; more end the run."""
    workers: int = 0
    """Processes that decode images; 0 decodes in the training process, -1 takes one per free core."""
    cache_mb: int = 512
    """Keep the decoded images in memory when all of them fit into this many megabytes."""

    def __post_init__(self) -> None:
        if len(self.size) == 1:
            self.size = [self.size[0]] * 2
        checks = {
            "size": (len(self.size) == 2 and min(self.size) >= 1, "height and width of at least 1"),
            "channels": (self.channels in (1, 3), "1 or 3"),
            "fit": (self.fit in ("crop", "pad"), "crop or pad"),
            "random_crop": (0 <= self.random_crop <= 4, "a share from 0 to 4"),
            "holdout": (0 < self.holdout < 1, "a share between 0 and 1"),
            "broken": (self.broken in ("skip", "error"), "skip or error"),
            "max_broken": (0 <= self.max_broken <= 1, "a share from 0 to 1"),
            "workers": (self.workers >= -1, "-1 or more"),
            "cache_mb": (self.cache_mb >= 0, "0 or more"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected {expected}")
