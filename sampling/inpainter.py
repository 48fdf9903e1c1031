"""A drawer that fills in: what is kept of given images, and how the rest is drawn on grids of any size."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.prior.conditioning import Conditions
from vqgen.prior.parts.part import is_absent

from .drawing import Drawer, Recipe
from .filling import Filling, cells_of, fitted_masks, random_cells
from .settings import SamplingSettings
from .windows import Painter


class Inpainter(Drawer):
    """A prior and its tokenizer, ready to draw parts of images; `Generator` says what they are for."""

    def canvas(self, size: Sequence[int]) -> Filling:
        """An empty image of `size`, height and width in pixels."""
        grid = self._grid(size, "--size")
        cells = torch.ones(1, *grid, dtype=torch.bool)
        shape = (1, *grid, *self.vocabulary.shape[2:])
        return Filling(torch.zeros(shape, dtype=torch.long), cells, self.vocabulary, False)

    def _grid(self, size: Sequence[int], option: str) -> tuple[int, int]:
        """The grid of codes of images of a size in pixels. Raises `UsageError`."""
        factor, (least_h, least_w) = self.tokenizer.factor, self.tokenizer.config.image_size
        if len(size) != 2 or size[0] < least_h or size[1] < least_w or size[0] % factor or size[1] % factor:
            wanted = f"a height and width of at least {least_h} and {least_w}, multiples of {factor}"
            raise UsageError(f"{option}: found {' '.join(map(str, size))}, expected {wanted}")
        self._check_area(size[0], size[1], option)
        return size[0] // factor, size[1] // factor

    @staticmethod
    def _check_area(height: int, width: int, option: str) -> None:
        """Raise `UsageError` for images of more pixels than are read from a file."""
        if (most := Image.MAX_IMAGE_PIXELS) is not None and height * width > most:
            text = f"images of {width}x{height} pixels, of which at most {most} are read from a file"
            raise UsageError(f"{option}: found {text}; make them smaller")

    def extension(self, images: Tensor, margins: Sequence[int], paste: bool = True) -> Filling:
        """Images with margins that are drawn, see `Generator.extend`: left, top, right and bottom."""
        self.check_inpainting()
        factor, fitted = self.tokenizer.factor, self.fitted(self.checked(images, 1)).cpu()
        if len(margins) != 4 or min(margins) < 0 or any(margin % factor for margin in margins) or not any(margins):
            found = " ".join(map(str, margins))
            raise UsageError(f"--extend: found {found}, expected LEFT TOP RIGHT BOTTOM, multiples of {factor} pixels")
        left, top, right, bottom = margins
        height, width = fitted.shape[2:]
        self._check_area(top + height + bottom, left + width + right, "--extend")
        originals = F.pad(fitted, (left, right, top, bottom))
        pixels = torch.ones(len(fitted), *originals.shape[2:], dtype=torch.bool)
        pixels[:, top : top + height, left : left + width] = False
        cells = cells_of(pixels, factor)
        codes = torch.zeros(*cells.shape, *self.vocabulary.shape[2:], dtype=torch.long)
        inside = slice(top // factor, (top + height) // factor), slice(left // factor, (left + width) // factor)
        codes[:, inside[0], inside[1]] = self.encode(fitted)
        return Filling(codes, cells, self.vocabulary, True, originals if paste else None, pixels)

    def filling(
        self, images: Tensor, mask: Tensor, paste: bool = True, names: tuple[str, str] | None = None
    ) -> Filling:
        """Images and the parts of them that are drawn, see `Generator.inpaint`; `names` are those of mask and image in
        errors."""
        self.check_inpainting()
        images, size = self.checked(images, 1), self.tokenizer.config.image_size
        codes = self.encode(images)
        if mask.dtype != torch.bool or mask.shape not in (images.shape[2:], (len(images), *images.shape[2:])):
            wanted = f"bool {tuple(images.shape[2:])}, or one for each of {len(images)} images"
            raise UsageError(f"mask: found {mask.dtype} {tuple(mask.shape)}, expected {wanted}")
        if not mask.flatten(-2).any(-1).all():
            raise UsageError("mask: no pixel of an image is to be drawn; mark some of them True")
        pixels = fitted_masks(mask.cpu().expand(len(images), *images.shape[2:]), size, self.tokenizer.config.fit)
        if not pixels.flatten(1).any(1).all():
            (marked, image), (height, width) = names or ("mask: one", "its image"), images.shape[2:]
            fit = f"cropped and scaled from {width}x{height} to {size[1]}x{size[0]} pixels"
            raise UsageError(f"{marked} is not in what is left of {image}, {fit}; mark a part nearer to the centre")
        cells = cells_of(pixels, self.tokenizer.factor)
        originals = self.fitted(images).cpu() if paste else None
        return Filling(codes, cells, self.vocabulary, True, originals, pixels)

    def variation(self, images: Tensor, share: float, n: int | None, seed: int) -> Filling:
        """Images and the random share of their codes that is drawn anew, another for each of `n` results."""
        self.check_inpainting()
        if not 0 < share <= 1:
            raise UsageError(f"vary: found {share}, expected a share above 0, at most 1")
        codes = self.encode(self.checked(images, 1))
        indices = range(max(len(codes), n or 0))
        rows, cells = codes[[i % len(codes) for i in indices]], random_cells(indices, self.tokenizer.grid, share, seed)
        return Filling(rows, cells, self.vocabulary, True, given=len(codes))

    def settings(
        self, given: Mapping[str, Any], conditions: Conditions | None = None, filling: Filling | None = None
    ) -> SamplingSettings:
        """As `Drawer.settings`; a recommended `oversample` has no effect where `check_filling` refuses it."""
        if filling is None:
            return super().settings(given, conditions)
        one_by_one = {} if self._has_groups(filling) else {"oversample": 1.0}
        return super().settings({**one_by_one, **given}, self.seen(self.conditioning.conditions(conditions), filling))

    def _has_groups(self, filling: Filling) -> bool:
        """Whether several images of a series differ in nothing but their randomness."""
        return filling.given is None and filling.grid == self.vocabulary.grid

    def check_filling(self, filling: Filling, settings: SamplingSettings, conditions: Conditions) -> Conditions:
        """What `seen` returns. Raises `UsageError` for settings and conditions that do not fit what is filled in, see
        also `check`."""
        if settings.oversample != 1 and not self._has_groups(filling):
            text = "but images in windows, and variations, are drawn without further candidates; leave it out"
            raise UsageError(f"--oversample: found {settings.oversample:g}, {text}")
        if not all(map(is_absent, conditions.get("source", ()))):
            if filling.sourced:
                text = "the parts of images that are kept take its place; leave it out, or the mask"
                raise UsageError(f"--source-image: {text}")
            if filling.grid != self.vocabulary.grid:
                raise UsageError("--size: a source image tells one window alone; images in windows take none")
        elif (source := self.conditioning.paired_source) and source.required:
            option, way = (
                ("--size", "draw larger images") if filling.cells.all() else ("--init-image", "complete images")
            )
            trained = f"the prior was trained with {source.undropped}, always with a source image"
            raise UsageError(f"{option}: {trained}, and cannot {way}; use --source-image, or another prior")
        seen = self.seen(conditions, filling)
        self.check(settings, seen)
        return seen

    def draw_filling(self, filling: Filling, indices: Sequence[int], recipe: Recipe) -> tuple[Tensor, Tensor]:
        """The codes of images of which a part is drawn, and the NLL of that part, both on the CPU."""
        conditions = self.conditioning.conditions(recipe.conditions)
        seen = self.check_filling(filling, recipe.settings, conditions)
        if filling.grid == self.vocabulary.grid:
            return self.draw_codes(indices, replace(recipe, conditions=seen), filling.known)
        return Painter(self, filling).draw(indices, recipe)

    def seen(self, conditions: Conditions, filling: Filling) -> Conditions:
        """The conditions of a series with the source that filling in adds; of larger grids only that there is one."""
        if filling.grid == self.vocabulary.grid:
            return self.conditioning.conditions(conditions).having(filling.conditions)
        return {**conditions, "source": list(filling.codes)} if self.conditioning.masked_source else conditions

    def tokens_of(self, filling: Filling) -> int:
        """Codes that are drawn or fed one by one for each image of a filling."""
        if filling.grid == self.vocabulary.grid:
            return len(filling.known.span)
        return Painter(self, filling).tokens
