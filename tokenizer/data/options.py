"""Options of how images are read."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from vqgen.errors import UsageError
from vqgen.options import Options, Range, Share

Split = Literal["train", "heldout", "test"]
"""train is learned from, heldout validates and selects models, test is only evaluated on."""

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
"""Endings of image files, in lower case."""

BESIDE = "txt"
"""The --text-column that means text files beside the images of a folder."""
MAX_CAPTION = 10_000
"""Longest caption, in bytes of UTF-8."""

Workers = Annotated[int, Range(least=-1, most=256)]
"""A number of processes; each has Python and torch in memory."""


STREAM = "stream:"
"""What a --data begins with that is read as a stream, and does not show it."""


COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""Endings of tar files that are not read."""


def is_stream(data: str) -> bool:
    """Whether --data names shards that are read one after another: URLs, tar files, parquet by a pattern, `stream:`.

    Compressed tar files are among them, though they are refused there.
    """
    pattern = data.lower().endswith(".parquet") and bool(re.search(r"[*?\[{]", data)) and not os.path.exists(data)
    return data.startswith(STREAM) or "://" in data or data.lower().endswith((".tar", *COMPRESSED)) or pattern


def check_outside(output: Path, images: Path | None) -> None:
    """Raise `UsageError` where an output folder is inside of a folder of images: its previews would be data."""
    if images is None or not os.path.isdir(images):
        return
    place, data = (Path(os.path.realpath(path)) for path in (output, images))  # `resolve` fails for a link to itself
    if not place.is_relative_to(data):
        return
    if not any(part.startswith(".") for part in place.relative_to(data).parts):  # is not read
        raise UsageError(f"--output: {output} is inside of --data, whose images it would join; choose another")


@dataclass
class ImageConfig(Options):
    """How images are read."""

    size: list[Annotated[int, Range(least=1, most=2**14)]] = field(default_factory=lambda: [32, 32])
    """Height and width in pixels; one number means a square."""
    channels: int = 3
    """3 for colour, 1 for grey. Transparent pixels become white."""
    fit: Literal["crop", "pad"] = "crop"
    """How images of another aspect ratio are fitted: crop the excess, or pad with black."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    random_crop: Annotated[float, Range(least=0, most=4)] = 0.0
    """Enlarge training images by this share and crop at random; 0 crops the centre."""
    random_shift: Annotated[int, Range(least=0, most=2**14)] = 0
    """Shift training images by up to this many pixels, down or up and to a side; the edge that this uncovers mirrors
    what is next to it."""
    holdout: Annotated[float, Range(above=0, below=1)] = 0.05
    """Share of the training images held out for validation where the source has no validation split; always the same
    images. A test split is never used for validation."""
    broken: Literal["skip", "error"] = "skip"
    """A broken image is named and skipped, or ends the run with an error."""
    max_broken: Share = 0.01
    """Largest share of broken images that is skipped, of all images of the source; more in one split end the run."""
    workers: Workers = 0
    """Processes that decode images; 0 decodes in the training process, -1 takes one per free core."""
    cache_mb: Annotated[int, Range(least=0, most=2**24)] = 512
    """Keep the decoded images in memory when all of them fit into this many megabytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.size) == 1:
            self.size = [self.size[0]] * 2
        checks = {
            "size": (len(self.size) == 2 and min(self.size) >= 1, "height and width of at least 1"),
            "channels": (self.channels in (1, 3), "1 or 3"),
            "fit": (self.fit in ("crop", "pad"), "crop or pad"),
            "broken": (self.broken in ("skip", "error"), "skip or error"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise UsageError(f"--{name}: found {getattr(self, name)}, expected {expected}")

    def enlarged(self) -> list[int]:
        """Height and width of the image that a random crop is taken from."""
        return [round(side * (1 + self.random_crop)) for side in self.size]

    def check_augmentation(self) -> None:
        """Raise `UsageError` for a shift by as much as the image, or a crop of nothing less than the image: its final
        size is known only where it is read."""
        if self.random_shift >= min(self.size):
            most = f"at most {min(self.size) - 1} for images of {self.size[0]}x{self.size[1]} pixels"
            raise UsageError(f"--random-shift: found {self.random_shift}, expected {most}")
        if self.random_crop > 0 and self.enlarged() == self.size:
            pixels, least = "x".join(map(str, self.size)), 1 / max(self.size)
            found = f"found {self.random_crop:g}, which adds no pixel to {pixels}"
            raise UsageError(f"--random-crop: {found}; expected 0 or at least {least:.2g}")

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return self.flip or self.random_crop > 0 or self.random_shift > 0
