"""Degradations of images, from which a prior learns to restore them: `downscale:4`, `noise:0.05-0.4`, `grey` ...

Each is one entry in `DEGRADATIONS`. What it does to an image is a function of the image and a seed alone.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.options import Range
from vqgen.seeding import hash64

MOST = 8
"""Degradations in one chain, and chains."""
OR = "or"
"""Stands between chains of which each image gets one."""
Keep = Callable[[Tensor, Tensor], Tensor]
"""Drawn images, and the degraded ones that they were drawn from -> the drawn ones with what these show as it was; all
uint8 (B, C, H, W)."""


@dataclass(frozen=True)
class Degradation:
    """One degradation as given: its name and the range that the strength of each image is drawn from, evenly."""

    name: str
    low: float = 0.0
    high: float = 0.0

    @property
    def random(self) -> bool:
        """Whether it differs by seed."""
        return self.name == "noise" or self.low < self.high

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Degrade one image, uint8 (C, H, W) -> uint8 (C, H, W)."""
        kind, random = DEGRADATIONS[self.name], np.random.default_rng(seed)
        strength = self.low + (self.high - self.low) * random.random()
        if kind.whole:
            strength = int(random.integers(int(self.low), int(self.high) + 1))
        return kind.apply(image, strength, random)


@dataclass(frozen=True)
class Degradations:
    """Chains of degradations, of which each image gets one; without any, images stay as they are."""

    chains: tuple[tuple[Degradation, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.chains)

    @property
    def random(self) -> bool:
        """Whether what an image gets differs by seed."""
        return len(self.chains) > 1 or any(each.random for each in self.each)

    @property
    def each(self) -> list[Degradation]:
        """Those of all chains."""
        return [each for chain in self.chains for each in chain]

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Degrade one image, uint8 (C, H, W) -> uint8 (C, H, W), by one of the chains, each as likely as another."""
        if self.chains:
            for order, degradation in enumerate(self.chains[hash64("chain", seed) % len(self.chains)]):
                image = degradation(image, hash64("degrade", seed, order))
        return image


@dataclass(frozen=True)
class Kind:
    """A kind of degradation: how it is applied, and the strength that it takes."""

    apply: Callable[[Tensor, float, np.random.Generator], Tensor]
    """uint8 (C, H, W), strength, random numbers -> uint8 (C, H, W)."""
    unit: str = ""
    """What the strength is, as help calls it; empty where there is none."""
    strengths: Range | None = None
    whole: bool = False
    """Whether the strength is an integer."""
    keep: Callable[[Tensor, Tensor, float], Tensor] | None = None
    """Gives drawn images what it leaves of an image as it was, as `Keep` by its strength; None where it changes all."""


def _transforms() -> Any:
    """torchvision's functions of images, whose import takes a second, which drawing images does not need."""
    from torchvision.transforms.v2 import functional

    return functional


def _to_uint8(pixels: Tensor) -> Tensor:
    """Round and clamp float pixels in the range of uint8."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _coarse(images: Tensor, factor: float) -> Tensor:
    """Antialiased bicubic down by a factor, at least to one pixel, and bicubic up, as in the super-resolution field;
    float (..., C, H, W)."""
    size = list(images.shape[-2:])
    small = [max(round(side / factor), 1) for side in size]
    pixels = _transforms().resize(images.float(), small, _transforms().InterpolationMode.BICUBIC, antialias=True)
    return _transforms().resize(pixels, size, _transforms().InterpolationMode.BICUBIC, antialias=True)


def _downscale(image: Tensor, factor: float, _: np.random.Generator) -> Tensor:
    """What is left of an image that was made smaller by a factor, in its former size."""
    return _to_uint8(_coarse(image, factor))


def _keep_coarse(drawn: Tensor, small: Tensor, factor: float) -> Tensor:
    """The detail of `drawn`, on the coarse structure of `small`."""
    return _to_uint8(small.float() + drawn - _coarse(drawn, factor))


def _noise(image: Tensor, sigma: float, random: np.random.Generator) -> Tensor:
    """Gaussian noise, independent in each channel; sigma in the range of pixels from 0 to 1."""
    noise = torch.from_numpy(random.standard_normal(tuple(image.shape), dtype=np.float32))
    return _to_uint8(image + 255 * sigma * noise)


def _grey(image: Tensor, _: float, __: np.random.Generator) -> Tensor:
    """Luma (ITU-R BT.601) in all three channels."""
    return _to_uint8(_transforms().rgb_to_grayscale(image.float(), num_output_channels=3))


def _luma(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of images (B, 3, H, W), float (B, 1, H, W) in their range."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    return (images.float() * weights[:, None, None]).sum(1, keepdim=True)


def _keep_luma(drawn: Tensor, grey: Tensor, _: float) -> Tensor:
    """The colour differences of `drawn` to its luma, on the luma of `grey`.

    Where a channel would leave its range all three differences shrink alike: that keeps the luma, and the hue.
    """
    luma, drawn = _luma(grey), drawn.float()
    colour = drawn - _luma(drawn)
    room = torch.where(colour > 0, 255 - luma, luma) / colour.abs().clamp(min=1e-3)
    return _to_uint8(luma + room.amin(1, keepdim=True).clamp(max=1) * colour)


def _blur(image: Tensor, sigma: float, _: np.random.Generator) -> Tensor:
    """Gaussian blur over three sigma each way, or as far as the image can be mirrored; sigma in pixels."""
    sizes = [2 * min(math.ceil(3 * sigma), side - 1) + 1 for side in reversed(image.shape[-2:])]
    return _transforms().gaussian_blur(image, sizes, [sigma, sigma])


def _jpeg(image: Tensor, quality: float, _: np.random.Generator) -> Tensor:
    """Compression by Pillow's JPEG encoder, with its chroma subsampling."""
    file = io.BytesIO()
    _transforms().to_pil_image(image).save(file, "JPEG", quality=int(quality))
    return _transforms().pil_to_tensor(Image.open(file))


def _edges(image: Tensor, _: float, __: np.random.Generator) -> Tensor:
    """Magnitude of the Sobel gradient of the luma, white on black; a step from black to white is white."""
    grey = _transforms().rgb_to_grayscale(image.float()) if len(image) == 3 else image.float()
    padded = torch.nn.functional.pad(grey[None], [1, 1, 1, 1], mode="replicate")
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    gradient = torch.nn.functional.conv2d(padded, torch.stack([across, across.T])[:, None])
    return _to_uint8(gradient.square().sum(1).sqrt()).expand(len(image), -1, -1)


DEGRADATIONS = {
    "downscale": Kind(_downscale, "FACTOR", Range(above=1, most=64), keep=_keep_coarse),
    "noise": Kind(_noise, "SIGMA", Range(above=0, most=1)),
    "grey": Kind(_grey, keep=_keep_luma),
    "blur": Kind(_blur, "SIGMA", Range(above=0, most=20)),
    "jpeg": Kind(_jpeg, "QUALITY", Range(least=1, most=100), whole=True),
    "edges": Kind(_edges),
}
"""Every degradation by the name that it has on the command line."""

_NUMBER = r"\d{1,4}(?:\.\d{0,6})?"
_SPEC = re.compile(rf"([a-z]+)(?::({_NUMBER})(?:-({_NUMBER}))?)?")


def alternatives(specs: Sequence[str]) -> list[list[str]]:
    """Divide what was given at each "or": ["grey", "or", "blur:2", "jpeg:10"] -> [["grey"], ["blur:2", "jpeg:10"]]."""
    chains: list[list[str]] = [[]]
    for spec in specs:
        if spec == OR:
            chains.append([])
        else:
            chains[-1].append(spec)
    return chains


def parse_degradations(specs: Sequence[str]) -> Degradations:
    """Parse chains such as ["downscale:2", "noise:0.05-0.4", "or", "grey"]. Raises `UsageError` naming --source."""
    chains = alternatives(specs)
    for number, chain in enumerate(chains, 1):
        if not 0 < len(chain) <= MOST:
            place = f" in chain {number} of {len(chains)}" if len(chains) > 1 else ""
            raise UsageError(f"--source: found {len(chain)} degradations{place}, expected 1 to {MOST}")
    if len(chains) > MOST:
        raise UsageError(f"--source: found {len(chains)} chains of degradations, expected 1 to {MOST}")
    return Degradations(tuple(tuple(_parse(spec) for spec in chain) for chain in chains))


def _parse(spec: str) -> Degradation:
    match = _SPEC.fullmatch(spec)
    name, first, last = match.groups() if match else (spec.partition(":")[0], None, None)
    kind = DEGRADATIONS.get(name)
    if kind is None:
        known = " ".join(f"{name}:{kind.unit}" if kind.unit else name for name, kind in DEGRADATIONS.items())
        raise UsageError(f"--source: found {spec[:80]!r}, expected degradations among {known}")
    if kind.strengths is None:
        if spec != name:
            raise UsageError(f"--source: found {spec[:80]!r}, expected {name} alone, it has no strength")
        return Degradation(name)
    usual = f"{name}:{kind.unit} with {kind.unit}{', an integer,' if kind.whole else ''} {kind.strengths}"
    expected = f"expected {usual}, or {name}:LEAST-MOST for a random one"
    if not match or first is None:
        raise UsageError(f"--source: found {spec[:80]!r}, {expected}")
    low, high = float(first), float(last or first)
    within = kind.strengths.contains(low) and kind.strengths.contains(high) and low <= high
    if not within or (kind.whole and not (low.is_integer() and high.is_integer())):
        raise UsageError(f"--source: found {spec[:80]!r}, {expected}")
    return Degradation(name, low, high)


def chain_among(given: Sequence[str], chains: Sequence[Sequence[str]]) -> Sequence[str]:
    """The one of `chains` that `given` is in other words, as "blur:2.0" for "blur:2"; empty where it is none of them.

    Raises `UsageError` naming --source for what is no degradation.
    """
    wanted = parse_degradations(given)
    known = (chain for chain in chains if all(spec.partition(":")[0] in DEGRADATIONS for spec in chain))
    return next((chain for chain in known if chain and parse_degradations(chain) == wanted), [])


def keep_of(specs: Sequence[str]) -> Keep | None:
    """How drawn images get what a chain of degradations leaves of an image as it was; None where that is nothing.

    A chain of several leaves nothing: each changes what another may leave. So do a strength that differs by image, and
    chains of which an image gets one.
    """
    if len(specs) != 1 or specs[0].partition(":")[0] not in DEGRADATIONS:
        return None
    found = _parse(specs[0])
    keep = DEGRADATIONS[found.name].keep if found.low == found.high else None
    return keep and (lambda drawn, degraded: keep(drawn, degraded, found.low))


def source_seed(seed: int, image: object, view: int = 0) -> int:
    """The seed of `degrade` for a view of an image by the --seed of any program: of the image with the index `image` of
    a split, or of those that are given, or with a text in a stream."""
    return hash64("source", seed, image, view)


def check_channels(degradations: Degradations, channels: int) -> None:
    """Raise `UsageError` where a degradation means nothing for images of that many channels."""
    if channels != 3 and any(each.name == "grey" for each in degradations.each):
        raise UsageError(f"--source grey: the images have {channels} channel; leave it out, or take colour images")


def degrade(images: Tensor, degradations: Degradations, seeds: Sequence[int]) -> Tensor:
    """Degrade each image by one of the chains, the first degradation first.

    Args:
        images: uint8 (B, C, H, W) of 1 or 3 channels.
        seeds: one for each image; chain, strengths and noise are a function of it alone.

    Returns uint8 (B, C, H, W). Raises `UsageError` for grey on images of 1 channel.
    """
    check_channels(degradations, images.shape[1])
    if len(seeds) != len(images):
        raise ValueError(f"{len(images)} images, {len(seeds)} seeds")
    out = torch.empty_like(images)
    for place, (image, seed) in enumerate(zip(images, seeds)):
        out[place] = degradations(image, seed)
    return out
