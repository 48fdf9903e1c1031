"""A prior's model folder as one object that draws images: conditions to codes to pixels."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen.devices import find_device
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION
from vqgen.prior.model import Prior
from vqgen.tokenizer.shipped import DEFAULT, SHIPPED, find_model

from .drawing import Recipe, Samples
from .filling import Filling
from .inpainter import Inpainter
from .known import Known
from .settings import read_recommended

__all__ = ["DEFAULT", "SHIPPED", "Generator", "find_model"]

Classes = Sequence[str | int] | str | int | None
"""Classes by name or index, given to the images in turn."""


class Generator(Inpainter):
    """A prior and its tokenizer as one object that draws, completes, fills in and translates images."""

    @classmethod
    def load(
        cls, model: str | Path | None = None, device: str | torch.device = "auto", precision: str = "auto"
    ) -> "Generator":
        """Read a prior's folder with its tokenizer, by default that of `find_model`. Raises `UserError`."""
        folder, place = find_model(None if model is None else Path(model)), find_device(device)
        prior = Prior.load(folder, stored=True)
        tokenizer = prior.load_tokenizer(folder / "tokenizer")
        stated, own = ((m.codebook_size, m.depth, m.grid) for m in (prior.vocabulary, tokenizer))
        if own != stated:
            text = f"says codebook size, depth and grid {stated}, its tokenizer has {own}; restore the file"
            raise UserError(f"{folder / DESCRIPTION} {text}")
        return cls(prior, tokenizer, place, precision, read_recommended(folder))

    def sample(
        self,
        n: int,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        size: Sequence[int] | None = None,
        prompts: Sequence[str] | str | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw images 0..n-1 of the endless series of this seed. Raises `UsageError` for what does not fit.

        Args:
            classes: names or indices, given to the images in turn; by default every class, or none where anything
                else is given.
            conditions: values by name of the part, given to the images in turn, as {"class": "cat"}.
            size: height and width in pixels; larger than in training they are drawn in windows.
            prompts: texts, given to the images in turn: {"text": prompts} in `conditions`.
            settings: those of `SamplingSettings`, as `temperature=0.9, top_k=100`; others are as the prior recommends
                (`recommended`, from generation_config.json in its folder), or plain.
        """
        if prompts is not None:
            if conditions and conditions.get("text") is not None:
                raise UsageError("prompts: conditions has 'text', too; give one of them")
            conditions = {**(conditions or {}), "text": prompts}
        if size is not None:
            return self._filled(self.canvas(size), n, classes, seed, batch_size, conditions, settings, absent=False)
        chosen = self._conditions(classes, conditions)
        return self.draw(self.series(n, n), chosen, self.settings(settings, chosen), seed, batch_size)

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
        codes, (rows, columns) = self.encode(self.checked(images, 1)), self.tokenizer.grid
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
        indices = self.series(n, len(codes))
        return self.draw(indices, chosen, self.settings(settings, chosen), seed, batch_size, known=known)

    def inpaint(
        self,
        images: Tensor,
        mask: Tensor,
        n: int | None = None,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        paste: bool = True,
        **settings: Any,
    ) -> Samples:
        """Draw the pixels of a mask anew, given all that surrounds it. Raises `UsageError` for what does not fit.

        Args:
            images: uint8 (C, H, W) or (B, C, H, W), of any size: they are fitted as in training.
            mask: bool (H, W) or (B, H, W), True where pixels are drawn.
            n: how many fillings, the images in turn; by default one each.
            classes: as in `sample`, but by default none.
            conditions: as in `sample`, but by default none.
            paste: put the known pixels back; else all pixels are decoded from codes.
        """
        return self._filled(self.filling(images, mask, paste), n, classes, seed, batch_size, conditions, settings)

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

    def extend(
        self,
        images: Tensor,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        n: int | None = None,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        paste: bool = True,
        **settings: Any,
    ) -> Samples:
        """Draw pixels around images, this many on each side; otherwise as `inpaint`."""
        filling = self.extension(images, (left, top, right, bottom), paste)
        return self._filled(filling, n, classes, seed, batch_size, conditions, settings)

    def translate(
        self,
        images: Tensor,
        n: int | None = None,
        classes: Classes = None,
        seed: int = 0,
        batch_size: int = 64,
        conditions: Mapping[str, Any] | None = None,
        paste: bool = True,
        degraded_by: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw images of which `images` are the sources: restored, or in the other style, as the prior has learned.

        Raises `UsageError` for what does not fit, and for a prior that was not trained on source codes.

        Args:
            images: uint8 (C, H, W) or (B, C, H, W), of any size: they are fitted as in training.
            n: how many translations, the images in turn; by default one each.
            classes: as in `sample`, but by default none.
            conditions: as in `sample`, but by default none.
            paste: keep what sources show as it was, the luma of grey ones and the coarse structure of smaller ones,
                where the prior was trained on such; else all of an image is decoded from codes.
            degraded_by: how the sources were degraded, as ["grey"], which says what to keep where the prior was
                trained on several degradations.
            settings: those of `SamplingSettings`, as `source_guidance_scale=1.5`.
        """
        named = [degraded_by] if isinstance(degraded_by, str) else degraded_by
        sources = self.sources(images, paste, named)
        chosen = self._conditions(classes, {**(conditions or {}), "source": sources.codes}, absent=True)
        indices = self.series(n, len(sources))
        drawn = self.draw(indices, chosen, self.settings(settings, chosen), seed, batch_size)
        return replace(drawn, images=sources.finished(indices, drawn.images))

    def _filled(
        self,
        filling: Filling,
        n: int | None,
        classes: Classes,
        seed: int,
        batch_size: int,
        conditions: Mapping[str, Any] | None,
        settings: Mapping[str, Any],
        absent: bool = True,
    ) -> Samples:
        """Draw the missing parts of a series of images."""
        chosen = self._conditions(classes, conditions, absent)
        indices = list(self.series(n, len(filling)))
        applied = self.settings(settings, chosen, filling)
        codes, nats = self.draw_filling(filling, indices, Recipe(chosen, applied, seed, batch_size))
        labels = torch.tensor([chosen["class"][i % len(chosen["class"])] for i in indices], dtype=torch.long)
        return Samples(indices, labels, codes, nats, filling.finished(indices, self.decode(codes)))

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
        codes = self.encode(images)
        chosen = self._conditions(classes, conditions, absent=True)
        for name, values in chosen.items():
            if len(values) not in (1, len(codes)):
                raise UsageError(f"{name}: found {len(values)} values for {len(codes)} images; give one an image")
        self.conditioning.check_given(chosen)
        return -self.nats(codes, chosen).sum(1)
