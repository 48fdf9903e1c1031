"""A prior's model folder as one object that draws images: conditions to codes to pixels."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen.devices import find_device
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION
from vqgen.prior.model import Prior

from .drawing import Drawer, Samples
from .filling import Filling, cells_of, fitted_masks, random_cells
from .known import Known
from .settings import SamplingSettings

DEFAULT_MODEL = Path("runs/demo/prior")
SHIPPED = Path(__file__).parent / "pretrained" / "cifar10"
"""A class-conditional model of CIFAR-10 that comes with the package; its README.md says how it was made."""
Classes = Sequence[str | int] | str | int | None
"""Classes by name or index, given to the images in turn."""


def find_model(model: Path | None) -> Path:
    """The given folder, else $VQGEN_MODEL, else the demo's prior, else the model in the package."""
    if model is not None:
        return model
    if os.environ.get("VQGEN_MODEL"):
        return Path(os.environ["VQGEN_MODEL"])
    return DEFAULT_MODEL if (DEFAULT_MODEL / DESCRIPTION).is_file() else SHIPPED


class Generator(Drawer):
    """A prior and its tokenizer as one object that draws, completes and fills in images."""

    @classmethod
    def load(
        cls, model: str | Path | None = None, device: str | torch.device = "auto", precision: str = "auto"
    ) -> "Generator":
        """Read a prior's folder with its tokenizer, by default that of `find_model`. Raises `UserError`."""
        folder, place = find_model(None if model is None else Path(model)), find_device(device)
        prior = Prior.load(folder)
        tokenizer = prior.load_tokenizer(folder / "tokenizer")
        stated, own = ((m.codebook_size, m.depth, m.grid) for m in (prior.vocabulary, tokenizer))
        if own != stated:
            text = f"says codebook size, depth and grid {stated}, its tokenizer has {own}; restore the file"
            raise UserError(f"{folder / DESCRIPTION} {text}")
        return cls(prior, tokenizer, place, precision)

    def sample(
        self,
        n: int,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw images 0..n-1 of the endless series of this seed. Raises `UsageError` for what does not fit.

        Args:
            classes: names or indices, given to the images in turn; by default every class.
            conditions: values by name of the part, given to the images in turn, as {"class": "cat"}.
            settings: those of `SamplingSettings`, as `temperature=0.9, top_k=100`.
        """
        if n < 0:
            raise UsageError(f"--n: found {n}, expected at least 0")
        chosen = self._conditions(classes, conditions)
        return self.draw(range(n), chosen, SamplingSettings(**settings), seed, batch_size)

    def complete(
        self,
        images: Tensor,
        mask_rows: int | None = None,
        n: int | None = None,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        mask: Tensor | None = None,
        conditions: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw a part of images anew, given the codes of the rest that come before it in drawing order.

        Raises `UsageError` for a class, a mask or a setting that does not fit.

        Args:
            images: uint8 (C, H, W) or (B, C, H, W), of any size: they are fitted as in training.
            mask_rows: rows of codes, from the bottom, that are drawn.
            n: how many completions, the images in turn; by default one each.
            classes: as in `sample`, but by default none.
            mask: in place of `mask_rows`, bool (h, w) or (B, h, w) on the grid of codes, True where they are drawn.
            conditions: as in `sample`, but by default none.
        """
        codes, (rows, columns) = self.encode(images), self.tokenizer.grid
        if (mask_rows is None) == (mask is None):
            raise UsageError("mask_rows: give it or mask, one of them")
        if mask is None:
            assert mask_rows is not None
            if not 1 <= mask_rows <= rows:
                raise UsageError(f"mask_rows: found {mask_rows}, expected 1 to {rows}, the rows of codes")
            mask = (torch.arange(rows) >= rows - mask_rows)[:, None].expand(rows, columns)
        if mask.dtype != torch.bool or mask.shape not in ((rows, columns), (len(codes), rows, columns)):
            wanted = f"bool {(rows, columns)}, or one for each of {len(codes)} images"
            raise UsageError(f"mask: found {mask.dtype} {tuple(mask.shape)}, expected {wanted}")
        known = Known(codes, ~mask.cpu().expand(len(codes), rows, columns), self.vocabulary)
        chosen = self._conditions(classes, conditions, absent=True)
        indices = range(len(codes) if n is None else n)
        return self.draw(indices, chosen, SamplingSettings(**settings), seed, batch_size, known=known)

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        n: int | None = None,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        pasted: bool = True,
        **settings: Any,
    ) -> Samples:
        """Draw the pixels of a mask anew, given all that surrounds it. Raises `UsageError` for what does not fit.

        Args:
            images: uint8 (C, H, W) or (B, C, H, W), of any size: they are fitted as in training.
            mask: bool (H, W) or (B, H, W), True where pixels are drawn.
            n: how many fillings, the images in turn; by default one each.
            classes: as in `sample`, but by default none.
            conditions: as in `sample`, but by default none.
            pasted: put the known pixels back; else all pixels are decoded from codes.
        """
        return self._filled(self.filling(images, mask, pasted), n, classes, seed, batch_size, conditions, settings)

    def vary(
        self,
        images: Tensor,
        share: float,
        n: int | None = None,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw a random share of the codes of each image anew; otherwise as `inpaint`, with nothing pasted back."""
        filling = self.variation(images, share, n, seed)
        return self._filled(filling, n, classes, seed, batch_size, conditions, settings)

    def filling(self, images: Tensor, mask: Tensor, pasted: bool = True) -> Filling:
        """Images and the parts of them that are drawn, see `inpaint`."""
        self._check_inpainting()
        codes, size = self.encode(images), self.tokenizer.config.image_size
        images = images[None] if images.ndim == 3 else images
        if mask.dtype != torch.bool or mask.shape not in (images.shape[2:], (len(images), *images.shape[2:])):
            wanted = f"bool {tuple(images.shape[2:])}, or one for each of {len(images)} images"
            raise UsageError(f"mask: found {mask.dtype} {tuple(mask.shape)}, expected {wanted}")
        if not mask.any():
            raise UsageError("mask: no pixel is to be drawn; mark some of them True")
        pixels = fitted_masks(mask.cpu().expand(len(images), *images.shape[2:]), size, self.tokenizer.config.fit)
        cells = cells_of(pixels, self.tokenizer.factor)
        originals = self.fitted(images) if pasted else None
        return Filling(codes, cells, self.vocabulary, True, originals, pixels)

    def variation(self, images: Tensor, share: float, n: int | None, seed: int) -> Filling:
        """Images and the random share of their codes that is drawn anew, one for each of `n` results."""
        self._check_inpainting()
        if not 0 < share <= 1:
            raise UsageError(f"vary: found {share}, expected a share above 0, at most 1")
        codes = self.encode(images)
        indices = range(len(codes) if n is None else n)
        rows = codes[[index % len(codes) for index in indices]]
        return Filling(rows, random_cells(indices, self.tokenizer.grid, share, seed), self.vocabulary, True)

    def _check_inpainting(self) -> None:
        if self.conditioning.source is None:
            text = "the prior was trained without --inpainting, so it sees only what comes before a hole"
            raise UsageError(f"{text}; train one with --inpainting 0.5, or keep upper rows (--keep-rows, complete)")

    def _filled(
        self,
        filling: Filling,
        n: int | None,
        classes: Classes,
        seed: int,
        batch_size: int,
        conditions: Mapping[str, Any] | None,
        settings: Mapping[str, Any],
    ) -> Samples:
        """Draw the missing parts of a series of images."""
        chosen = self._conditions(classes, {**(conditions or {}), **filling.conditions}, absent=True)
        indices = range(len(filling) if n is None else n)
        drawn = self.draw(indices, chosen, SamplingSettings(**settings), seed, batch_size, known=filling.known)
        return dataclasses.replace(drawn, images=filling.finished(drawn.indices, drawn.images))

    def _conditions(
        self, classes: Classes, conditions: Mapping[str, Any] | None, absent: bool = False
    ) -> dict[str, list[Any]]:
        """`Conditioning.conditions` with the classes as an argument of their own."""
        given = dict(conditions or {})
        if classes is not None and given.get("class") is not None:
            raise UsageError("classes: conditions has 'class', too; give one of them")
        return self.conditioning.conditions(given if classes is None else {**given, "class": classes}, absent)

    def log_likelihood(
        self, images: Tensor, classes: Classes = None, conditions: Mapping[str, Any] | None = None
    ) -> Tensor:
        """log p of the codes of images (B, C, H, W) or (C, H, W), in nats, float64 (B,), among all ids and in the
        generator's precision: load it with fp32 for exact values.

        Args:
            images: uint8, of any size: they are fitted as in training.
            classes: names or indices, one an image or one for all; by default no class.
            conditions: values by name of the part, one an image or one for all; by default none.
        """
        tokens = self.vocabulary.to_tokens(self.encode(images))
        chosen = self._conditions(classes, conditions, absent=True)
        for name, values in chosen.items():
            if len(values) not in (1, len(tokens)):
                raise UsageError(f"{name}: found {len(values)} values for {len(tokens)} images; give one an image")
        prefixes = self.conditioning.plain.prefixes(chosen, range(len(tokens)))
        return -self.nats(torch.cat([prefixes, tokens], 1))
