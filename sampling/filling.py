"""Filling in: images of which a part is drawn anew, given the rest.

A mask of pixels becomes a mask of codes: a code is drawn where it has a pixel in the mask, and so are its neighbours,
as the encoder has seen into the hole. What is drawn is decoded with the kept codes, and the known pixels are pasted
back over a soft edge.
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

from .known import Known


def fitted_masks(masks: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Masks bool (B, H, W) resized and cropped as images are in training: (B, height, width), True where any was."""
    if masks.shape[-2:] == torch.Size(size):
        return masks
    found = [center_crop(fit(255 * mask[None].to(torch.uint8), size, mode), size)[0] > 0 for mask in masks]  # type: ignore[arg-type]
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


def paste(drawn: Tensor, originals: Tensor, masks: Tensor, feather: int) -> Tensor:
    """Put the known pixels of `originals` into `drawn`, both uint8 (B, C, H, W), outside of masks, bool (B, H, W).

    The two blend within `feather` pixels outside of the mask; inside all is drawn.
    """
    hole, radius = masks[:, None].float(), 2 * (feather // 2)
    height, width = masks.shape[1:]
    # The blur reflects at the borders, for which a side of one code is too short.
    down, across = (radius if side <= radius else 0 for side in (height, width))
    padded = F.pad(hole, (across, across, down, down), mode="replicate")
    from torchvision.transforms.v2.functional import gaussian_blur  # slow to import

    blurred = gaussian_blur(padded, [2 * radius + 1] * 2, [max(feather, 1) / 4] * 2)
    soft = (2 * blurred[..., down : down + height, across : across + width]).clamp(0, 1)
    share = torch.maximum(hole, soft)
    return (share * drawn + (1 - share) * originals).round().to(torch.uint8)


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
        return Known(self.codes, ~self.cells, self.vocabulary)

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
    def kept(self) -> Tensor:
        """The codes that are kept of all rows, one after another; on the prior's grid as tokens, in drawing order. Of
        `given` images all codes, as any may be kept."""
        if self.given is not None:
            return self.codes[: self.given].flatten()
        if self.grid == self.vocabulary.grid:
            return self.known.tokens[self.known.tokens >= 0]
        return self.codes[~self.cells].flatten()

    @property
    def conditions(self) -> dict[str, list[Tensor]]:
        """The source of every image, where the prior takes one."""
        return {"source": list(masked(self.codes, self.cells))} if self.sourced else {}

    def finished(self, indices: Sequence[int], images: Tensor) -> Tensor:
        """Decoded images uint8 (B, C, H, W) of a series, with their known pixels where these are pasted back."""
        if self.originals is None or self.pixels is None:
            return images
        rows = [index % len(self) for index in indices]
        feather = images.shape[-1] // self.codes.shape[2]
        return paste(images, self.originals[rows], self.pixels[rows], feather)
