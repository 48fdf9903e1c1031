"""Filling in: images of which a part is drawn anew, given the rest.

A mask of pixels becomes a mask of codes: a code is drawn where it has a pixel in the mask, and so are its neighbours,
as the encoder has seen into the hole. What is drawn is decoded with the kept codes and pasted into the known pixels,
without a seam.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.prior.parts.source import masked
from vqgen.prior.vocabulary import Vocabulary
from vqgen.seeding import step_seed
from vqgen.tokenizer.data.pixels import center_crop, fit

from .decoding.threads import in_parts
from .known import Known

REACH = 4
"""Codes over which what is drawn takes on the colours of the known pixels around it."""
PASTED_PIXELS = 2**15
"""Pixels of the images into which one thread pastes at once."""
SWEEPS, RELAXATION = 32, 1.9
"""Iterations of `continued` at each scale, and the factor by which their steps are longer."""


def fitted_masks(masks: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Masks bool (B, H, W) resized and cropped as images are in training: (B, height, width), True where any was."""
    if masks.shape[-2:] == torch.Size(size):
        return masks
    # As floats: a pixel of a large mask is less than half of 1 of 255 in a small one.
    found = [center_crop(fit(mask[None].float(), size, mode), size)[0] > 0 for mask in masks]  # type: ignore[arg-type]
    return torch.stack(found)


def box_mask(box: Sequence[int], height: int, width: int, image: str) -> Tensor:
    """The pixels of rectangles, X Y WIDTH HEIGHT each, bool (height, width). Raises `UsageError`, which names `image`
    where one ends outside of it."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for left, top, across, down in (box[first : first + 4] for first in range(0, len(box), 4)):
        if left + across > width or top + down > height:
            found = f"{left} {top} {across} {down} ends outside of {image}, which is {width}x{height} pixels"
            raise UsageError(f"--box: {found}")
        mask[top : top + down, left : left + across] = True
    return mask


def cells_of(masks: Tensor, factor: int, grow: int = 1) -> Tensor:
    """Masks of pixels, bool (B, H, W) -> of codes (B, H/f, W/f): those with a pixel in the mask, grown by `grow`."""
    cells = F.max_pool2d(masks.float()[:, None], factor)
    for _ in range(grow):
        cells = F.max_pool2d(cells, 3, stride=1, padding=1)
    return cells[:, 0] > 0


def random_cells(indices: Sequence[int], grid: Sequence[int], share: float, seed: int) -> Tensor:
    """Masks of codes, bool (B, h, w), with this share of the cells, at least one; those of image i by (seed, i)."""
    count = max(1, round(share * grid[0] * grid[1]))
    masks = torch.zeros(len(indices), grid[0] * grid[1], dtype=torch.bool)
    for mask, index in zip(masks, indices, strict=True):
        chosen = torch.randperm(len(mask), generator=torch.Generator().manual_seed(step_seed(seed, index, 2)))[:count]
        mask[chosen] = True
    return masks.view(len(indices), *grid)


def _around(values: Tensor) -> Tensor:
    """The sum of the four neighbours of each pixel; beyond the borders they are 0."""
    padded = F.pad(values, (1, 1, 1, 1))
    beside = padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    return beside + padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1]


def continued(values: Tensor, known: Tensor, reach: float) -> Tensor:
    """Continue values (B, C, H, W) from where `known` (B, 1, H, W) is 1, which stay, smoothly to where it is 0.

    There they solve the screened Poisson equation u = reach^2 laplace(u), with no flux across the image's borders: far
    from what is known they fade to 0, over `reach` pixels by a factor of e. The solution is approximate, of smooth
    differences to about 2 %: over-relaxation of the pixels of a chequerboard in turns (Young 1954), coarse to fine.
    """
    height, width = values.shape[-2:]
    found = torch.zeros_like(values)
    if max(height, width) > 1:
        share = F.avg_pool2d(known, 2, ceil_mode=True)
        coarse = F.avg_pool2d(values * known, 2, ceil_mode=True) / share.clamp(min=0.25)
        coarse = continued(coarse, (share > 0).float(), reach / 2)
        found = F.interpolate(coarse, size=(height, width), mode="bilinear")
    found, unknown = torch.where(known > 0, values, found), known == 0
    white = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
    own = _around(torch.ones(height, width)) + 1 / reach**2
    for here in [unknown & white, unknown & ~white] * SWEEPS:
        found = torch.where(here, found + RELAXATION * (_around(found) / own - found), found)
    return found


def paste(drawn: Tensor, originals: Tensor, masks: Tensor, reach: float) -> Tensor:
    """Put what was drawn inside of masks, bool (B, H, W), into `originals`; both uint8 (B, C, H, W).

    All other pixels stay as they are. What they differ by from `drawn` at the border of the mask is continued into it,
    over about `reach` pixels, and added: so there is no seam (seamless cloning, Perez et al. 2003, eq. 5).
    """
    known, hole = (~masks)[:, None].float(), masks[:, None]
    filled = drawn + continued(originals.float() - drawn, known, reach)
    return torch.where(hole, filled.round().clamp(0, 255).to(torch.uint8), originals)


@dataclass(frozen=True)
class Filling:
    """Images of which some codes are drawn anew; image i of a series goes by row i % m."""

    codes: Tensor
    """int64 (m, h, w[, depth])."""
    cells: Tensor
    """bool (m, h, w), True where codes are drawn."""
    vocabulary: Vocabulary
    sourced: bool
    """Whether the prior is given all kept codes, not only those before the one it predicts; larger grids than its own
    are drawn in windows, which decide by themselves."""
    originals: Tensor | None = None
    """uint8 (m, C, H, W), where known pixels are pasted back."""
    pixels: Tensor | None = None
    """bool (m, H, W), True where pixels are drawn."""
    given: int | None = None
    """Number of given images, where each image of a series has a mask of its own; the given ones come first."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.cells.shape[1], self.cells.shape[2]

    def __len__(self) -> int:
        """Number of rows m."""
        return len(self.codes)

    @cached_property
    def known(self) -> Known:
        """The codes that are kept."""
        return Known(self.codes, ~self.cells, self.vocabulary, own=self.given is not None)

    @classmethod
    def joined(cls, parts: Sequence["Filling"]) -> "Filling":
        """Several fillings of the same kind as one."""
        first = parts[0]

        def all_of(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        return dataclasses.replace(first, **{name: all_of(name) for name in ("codes", "cells", "originals", "pixels")})

    @property
    def fingerprint(self) -> str:
        """sha256 of what is drawn; of `given` images of the series where it goes on with other masks."""
        cells = self.cells[: self.given]
        masks = [cells] if self.pixels is None else [cells, self.pixels]
        return hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks)).hexdigest()

    @property
    def pasted_fingerprint(self) -> str | None:
        """sha256 of the known pixels that are pasted back; codes do not tell them."""
        if self.originals is None or self.pixels is None:
            return None
        known = self.originals.masked_fill(self.pixels[:, None], 0)
        return hashlib.sha256(known.numpy().tobytes()).hexdigest()

    @property
    def kept(self) -> Tensor:
        """The codes that are kept of all rows, one after another; on the prior's grid as tokens, in drawing order. Of
        `given` images all codes, as any may be kept."""
        if self.given is not None:
            return self.codes[: self.given].flatten()
        if self.grid == self.vocabulary.grid:
            return self.known.tokens[self.known.tokens >= 0]
        return self.codes[~self.cells].flatten()

    @cached_property
    def conditions(self) -> dict[str, list[Tensor]]:
        """The source of every image, where the prior takes one."""
        return {"source": list(masked(self.codes, self.cells))} if self.sourced else {}

    def finished(self, indices: Sequence[int], images: Tensor) -> Tensor:
        """Decoded images uint8 (B, C, H, W) of a series, with their known pixels where these are pasted back."""
        originals, pixels = self.originals, self.pixels
        if originals is None or pixels is None or not len(images):
            return images
        reach = REACH * (images.shape[-1] // self.codes.shape[2])

        rows = torch.tensor([index % len(self) for index in indices])

        def pasted(places: Tensor) -> Tensor:
            return paste(images[places], originals[rows[places]], pixels[rows[places]], reach)

        # One thread a part: torch divides the interpolation of large images, and rounds differently where it does.
        count = max(PASTED_PIXELS // (images.shape[-2] * images.shape[-1]), 1)
        return torch.cat(in_parts(pasted, torch.arange(len(images)), count))
