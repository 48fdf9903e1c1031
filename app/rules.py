"""The rules by which vqgen-train chooses sizes: functions of the images, the codes and the time. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIZES = (32, 64, 128, 256)
"""Sides of the square images, in pixels, that there is a network for."""
FEW, MANY = 64, 256
"""Most codes of an image: 8x8 or 16x16."""
FEW_IMAGES = 2000
"""Below so many training images a longer sequence has too few examples: images of 64 pixels get `FEW` codes."""
TOKENIZERS = {32: "vqgan-cifar10", 64: "vqgan-64", 128: "vqgan-128", 256: "vqgan"}
"""Side of the images -> the preset that the tokenizer starts from."""
LEAST_STEPS = 600
"""Steps of a tokenizer below which smaller images are chosen."""
DRAWING = (15.0, 60.0)
"""Least and most seconds for drawing and the report."""
MOST_EPOCHS = 100
"""Passes over the images after which a prior no longer gained: 950 photographs in 8 views levelled off after 110."""


@dataclass(frozen=True)
class Prior:
    """Sizes of a transformer, and how it is optimized at these sizes."""

    dim: int
    layers: int
    heads: int
    optimizer: str
    lr: float

    @property
    def weights(self) -> int:
        """Weights of its blocks: four attention matrices and three of the feed-forward layers, 8/3 dim wide."""
        return 12 * self.dim**2 * self.layers

    def values(self) -> dict[str, Any]:
        """The sections of a configuration of vqgen-train-prior."""
        model = {"dim": self.dim, "layers": self.layers, "heads": self.heads}
        return {"model": model, "optimizer": {"optimizer": self.optimizer, "lr": self.lr}}


PRIORS = (
    Prior(128, 4, 4, "muon", 2e-3),
    Prior(192, 4, 6, "muon", 2e-3),
    Prior(256, 4, 4, "muon", 2e-3),
    Prior(384, 6, 6, "muon", 2e-3),
    Prior(512, 8, 8, "adamw", 1e-3),
    Prior(768, 12, 12, "adamw", 3e-4),
    Prior(1024, 24, 16, "adamw", 1e-4),
)
"""From 0.8 to 302 million parameters; the last four are the presets prior-tiny, -small, -base and -large."""


def image_side(median: int) -> int:
    """The largest side that enlarges no more than half of the images, whose median shorter side is `median` pixels."""
    return max((size for size in SIZES if size <= median), default=SIZES[0])


def grids(size: Sequence[int] | None, side: int, images: int) -> list[tuple[list[int], int]]:
    """Sizes of images with the most codes of each, from the best to the cheapest.

    Args:
        size: height and width where they are given.
        side: median of the shorter sides of the images; none is made larger.
        images: for training.
    """
    sizes = [list(size)] if size else [[s, s] for s in SIZES[::-1] if s <= image_side(side)]
    found: list[tuple[list[int], int]] = []
    for each in sizes:
        small, few = min(each) <= 32, min(each) <= 64 and images < FEW_IMAGES
        found += [(each, most) for most in (MANY, FEW) if most == FEW or not (small or few)]
    # 64 codes of 128 pixels and more would be a blur: then smaller images are better.
    return [(each, most) for each, most in found if size or most == MANY or min(each) <= 64]


def factor(size: Sequence[int], most: int) -> int:
    """The least downsampling by 4 to 32 that leaves at most so many codes of an image of this height and width."""
    return next((f for f in (4, 8, 16) if size[0] * size[1] <= most * f * f), 32)


def network(factor: int, side: int, cuda: bool) -> dict[str, Any]:
    """Options of the network for this downsampling. A patch of 2 or 4 pixels makes it fast enough for a CPU."""
    if cuda and side == 256 and factor == 16:
        return {}  # as in the preset
    patch, multipliers = {4: (2, [1, 2]), 8: (4, [1, 2]), 16: (4, [1, 2, 2]), 32: (4, [1, 2, 2, 4])}[factor]
    return {"width": 64, "patch": patch, "multipliers": multipliers, "blocks": 1, "latent_dim": 64, "groups": 16}


def codebook_size(tokens: int) -> int:
    """A power of two from 256 to 16,384, such that each code stands for about 1,000 of the training tokens.

    The demo and ImageNet have these sizes: 512 codes for 0.5 million tokens, 16,384 for 300 million (LlamaGen).
    """
    return 2 ** min(14, max(8, round(math.log2(max(tokens, 1) / 1000))))


def prior_weights(tokens: int) -> float:
    """Weights of a prior for so many different training tokens: 11 million for 3.2 million tokens, to the power 0.7.

    A line through priors that worked: a former demo (3.5 million, 0.54 million tokens), CIFAR-10 (11, 3.2) and
    LlamaGen-B to -L on ImageNet (111 to 343, 328; Sun et al. 2024, table 1).
    """
    return 11e6 * (tokens / 3.2e6) ** 0.7


def prior_for(tokens: int) -> int:
    """Index in `PRIORS` of the one whose weights are nearest to `prior_weights`, as a ratio."""
    wanted = prior_weights(tokens)
    return min(range(len(PRIORS)), key=lambda i: abs(math.log(PRIORS[i].weights / wanted)))


def affordable(index: int, tokens: float) -> bool:
    """Whether a prior sees at least half as many tokens as it has weights, as the demo's does; counted with repeats."""
    return index == 0 or tokens >= PRIORS[index].weights / 2


def smaller(index: int, tokens: float) -> int:
    """The next prior to try after one that sees so many tokens, which are too few: the largest that could see enough.

    The steps of a smaller one are faster as its weights are fewer, and twice as fast at most.
    """
    weights = PRIORS[index].weights
    return next((i for i in range(index - 1, 0, -1) if affordable(i, 2 * tokens * weights / PRIORS[i].weights)), 0)


def least_prior_steps(length: int) -> int:
    """Steps of a prior over so many codes below which fewer codes are chosen: 600 for 64, where the demo has 1,100.

    With 200 steps on 256 codes of 1,000 photographs, samples were patches of one colour.
    """
    return max(600, 300 * length // FEW)


def prior_batch(length: int, cuda: bool) -> int:
    """Sequences of a step. More steps are worth more than larger ones: at equal time the demo gained 0.03 nats by 32
    in place of 64."""
    return 64 if cuda else max(8, min(32, 8192 // length))


ENCODING = 0.1
"""Share of the time above which fewer views are encoded."""


def views(images: int) -> int:
    """Most augmented views of each image that are encoded: 8 of a thousand, one of a million."""
    return next(count for count, most in ((8, 5_000), (4, 20_000), (2, 200_000), (1, math.inf)) if images < most)


MOST_DROPOUT = 0.3


def dropout(passes: float) -> float:
    """Dropout of a prior that passes over the images so often.

    In four passes over the demo's images 0.1 costs 0.04 nats per token, in eight over CIFAR-10 one with 0.1 overfits,
    in 64 over 3,239 photographs in 8 views one with 0.3 does not.
    """
    return next(share for share, most in ((0.0, 6), (0.1, 12), (0.2, 40), (MOST_DROPOUT, math.inf)) if passes < most)


@dataclass(frozen=True)
class Time:
    """How the time of a run is shared, in seconds."""

    tokenizer: float
    encoding: float
    prior: float
    settings: float
    drawing: float


def share_time(total: float, encoding: float, most: float, settings: float = 0.0) -> Time | None:
    """Divide `total` seconds; None where encoding, `settings` and drawing leave less than half of them.

    Drawing and the report get a twentieth within `DRAWING`. Of the rest the prior gets half, but no more than `most`
    seconds, and the tokenizer what is left.
    """
    drawing = min(max(DRAWING[0], total / 20), DRAWING[1])
    rest = total - encoding - settings - drawing
    if rest < total / 2:
        return None
    prior = min(rest / 2, most)
    return Time(rest - prior, encoding, prior, settings, drawing)


def least_time(encoding: float) -> float:
    """Seconds, in whole minutes, that `share_time` can divide with so much encoding, also with the longest search."""
    total = 60.0
    while share_time(total, encoding, math.inf, min(total / 20, SEARCH)) is None:
        total += 60
    return total


@dataclass(frozen=True)
class Search:
    """A search of sampling settings, see `vqgen-eval settings`."""

    seconds: float
    images: int
    """Drawn with each candidate."""
    steps: int
    """Of the classifier that judges them."""


SEARCH = 300.0
"""Most seconds of a search, which gets a twentieth of the time: a quarter for the classifier, half for drawing."""
LEAST_HELDOUT = 5
"""Held-out images of a class below which samples of it are not compared with them well."""


def candidates(guided: bool) -> dict[str, list[float]]:
    """Values of the settings that are tried, all combined."""
    if guided:
        return {"guidance_scale": [1.0, 1.5, 2.5], "min_p": [0.02, 0.1]}
    return {"temperature": [0.9, 1.0], "guidance_scale": [1.0], "min_p": [0.0, 0.05, 0.1]}


def search(total: float, step: float, drawn: float, guided: bool, classes: int, decoding: float = 0.0) -> Search | None:
    """A search in a twentieth of `total` seconds; None where it would be too short to tell candidates apart.

    Args:
        step: seconds of a step of the classifier.
        drawn: images a second.
        decoding: seconds in which the images are decoded that are looked at, besides.
    """
    seconds, count = min(total / 20, SEARCH) - decoding, math.prod(map(len, candidates(guided).values()))
    steps, images = min(600, int(seconds / 4 / step)), min(500, int(seconds / 2 * drawn / count))
    return Search(seconds + decoding, images, steps) if steps >= 100 and images >= max(60, 6 * classes) else None
