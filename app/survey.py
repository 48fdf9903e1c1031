"""What a data set is, as far as a plan depends on it: numbers of images, their sizes, colours, classes and captions."""

import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np
import torch

from vqgen.errors import UserError
from vqgen.tokenizer.data.decoding import BrokenImage, decode, read_size
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import fit
from vqgen.tokenizer.data.sources import Source, open_source

from .rules import LEAST_HELDOUT

HEADERS, PIXELS, TIMED = 400, 100, 12
"""Training images, spread evenly, whose sizes are read, that are looked at for colour, and that are timed."""
PROMPTS, PROMPT_BYTES = 64, 2**15
"""Most captions that samples are drawn of, and most bytes of them together, as they are listed in a YAML file."""


@dataclass(frozen=True)
class Survey:
    """A data set in numbers."""

    train: int
    """Images to train on."""
    heldout: int
    judged: int
    """Classes with at least `rules.LEAST_HELDOUT` held-out images."""
    test: int
    classes: int
    captions: int
    """Training images with a caption."""
    height: int
    """Median over the images that were looked at, in pixels; so is `width`."""
    width: int
    side: int
    """Median of the shorter sides."""
    channels: int
    """1 where every image that was looked at is grey."""
    unreadable: float
    """Share of the images that were looked at that are none."""
    decoding: float = 0.0
    """Seconds in which one image is read, decoded and resized."""
    prompts: tuple[str, ...] = ()
    """The first captions of held-out images, as samples are drawn of them."""
    unlabelled: bool = False
    """Whether some training images have no class, where others have one."""
    class_names: tuple[str, ...] = ()
    """Names of the `classes`."""


def look(data: str, text_column: str | None, holdout: float = ImageConfig.holdout) -> Survey:
    """Survey a source; the share `holdout` is held out where it has no validation split.

    Raises `UserError` where it has no images that can be read.
    """
    train = open_source(data, "train", holdout, text_column)
    heldout = open_source(data, "heldout", holdout, text_column)
    sizes, looked_at = _sizes(train), len(_spread(train, HEADERS))
    if not sizes:
        raise UserError(f"--data: none of the images of {data} can be read; look at {train.item_name(0)}")
    return Survey(
        train=len(train),
        heldout=len(heldout),
        judged=sum(
            int((heldout.labels == label).sum()) >= LEAST_HELDOUT for label in range(len(train.class_names or []))
        ),
        test=train.test_images,
        classes=len(train.class_names or []),
        captions=sum(map(bool, train.captions or [])),
        height=round(statistics.median(height for height, _ in sizes)),
        width=round(statistics.median(width for _, width in sizes)),
        side=round(statistics.median(min(size) for size in sizes)),
        channels=1 if _all_grey(train) else 3,
        unreadable=(looked_at - len(sizes)) / looked_at,
        decoding=_decoding(train),
        prompts=_prompts(heldout),
        unlabelled=bool(train.class_names) and bool((train.labels < 0).any()),
        class_names=tuple(train.class_names or []),
    )


def _prompts(source: Source) -> tuple[str, ...]:
    """The first captions in order, each once, as many as fit."""
    found = list(islice(dict.fromkeys(filter(None, source.captions or [])), PROMPTS))
    lengths = accumulate(len(text.encode()) for text in found)
    return tuple(text for text, length in zip(found, lengths) if length <= PROMPT_BYTES)


def _spread(source: Source, count: int) -> list[int]:
    """Indices of at most `count` images, spread evenly."""
    return np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()


def _sizes(source: Source) -> list[tuple[int, int]]:
    """Height and width of the images that can be read among those looked at."""
    found = []
    for index in _spread(source, HEADERS):
        try:
            height, width, _ = read_size(source.read(index))
        except (BrokenImage, OSError):
            continue
        found.append((height, width))
    return found


def _decoding(source: Source) -> float:
    """Mean seconds of reading an image at a common size, over those that can be read among `TIMED` but the slowest."""
    taken = []
    fit(torch.zeros(3, 8, 8, dtype=torch.uint8), [8, 8], "crop")  # imports, which take longer
    for index in _spread(source, TIMED):
        began = time.perf_counter()
        with suppress(BrokenImage, OSError):
            fit(decode(source.read(index), 3), [128, 128], "crop")
            taken.append(time.perf_counter() - began)
    return statistics.fmean(sorted(taken)[: max(1, len(taken) - 1)]) if taken else 0.0


def _all_grey(source: Source) -> bool:
    """Whether the images that are looked at have no colour, however they are stored."""
    for index in _spread(source, PIXELS):
        try:
            red, green, blue = decode(source.read(index), 3)
        except (BrokenImage, OSError):
            continue
        if not (red.equal(green) and green.equal(blue)):
            return False
    return True
