"""Drawing images of a series by their indices: conditions to codes to pixels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vqgen.devices import precision_of
from vqgen.errors import UsageError, UserError
from vqgen.prior.conditioning import Conditions
from vqgen.prior.likelihood import token_nats
from vqgen.prior.model import Prior
from vqgen.tokenizer.codes.degrade import Keep
from vqgen.tokenizer.data.pixels import center_crop, fit, to_uint8
from vqgen.tokenizer.model import Tokenizer

from .decoding.cached_transformer import CachedTransformer
from .decoding.generate import Drawn, generate, image_uniforms
from .decoding.threads import in_parts
from .guidance import Guidance, check_guidance
from .known import Known, Sources
from .oversample import batches, selected_rows, with_candidates
from .settings import SCALES, SamplingSettings, combined

# Convolutions choose their algorithm by the shape of the batch: parts depend on the image size alone.
PART_PIXELS = {"cpu": 2**13, "cuda": 2**18}
PART_IMAGES = {"cpu": 1, "cuda": 4}


@dataclass(frozen=True)
class Samples:
    """Drawn images, row by row, on the CPU."""

    indices: list[int]
    labels: Tensor
    """int64 (B,); -1 = no class."""
    codes: Tensor
    """int64 (B, h, w) or (B, h, w, depth)."""
    nats: Tensor
    """float64 (B,): NLL of the drawn codes under the prior alone, given their conditions and all earlier codes, among
    the allowed ids, in the generator's precision."""
    images: Tensor
    """uint8 (B, C, H, W)."""


@dataclass(frozen=True)
class Recipe:
    """How images of a series are drawn: what decides them besides their indices and given codes, and the batches."""

    conditions: Conditions | None = None
    """Part of the prefix -> values that the series goes through in turn, as {"class": [3, 5]}; -1 for none. By default
    every class."""
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    seed: int = 0
    batch_size: int = 64
    """Images drawn at once."""
    on_token: Callable[[Tensor], object] | None = None
    """Called with the tokens (b,) of each position as they are drawn, e.g. for a progress bar; what it raises ends the
    drawing."""

    def __post_init__(self) -> None:
        if not _is_integer(self.batch_size) or self.batch_size < 1:
            raise UsageError(f"--batch-size: found {self.batch_size!r}, expected an integer of at least 1")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed: found {self.seed!r}, expected an integer from 0 to 2^64-1")


def _is_integer(value: object) -> bool:
    """Whether a number given in Python is an integer, of Python or numpy; tensors are unequal as keys."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class Drawer:
    """A prior and its tokenizer, ready to draw.

    Image i depends on (seed, i, its conditions, settings) alone, on a CPU also at any number of threads. On CUDA that
    holds at a given batch size: another one may round the logits differently in the last bits.
    """

    def __init__(
        self,
        prior: Prior,
        tokenizer: Tokenizer,
        device: torch.device,
        precision: str = "auto",
        recommended: Mapping[str, Any] | None = None,
    ) -> None:
        """Move both models to `device` and cast the prior's weights to `precision` (auto, fp32, bf16, fp16).

        `recommended` are the settings of `settings`, by name, where no others are given.
        """
        self.recommended = dict(recommended or {})
        self.precision = precision_of(precision, device).replace("no", "fp32")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        for parameter in prior.backbone.parameters():
            # Not the buffers: rotary frequencies lose positions in 16 bits.
            parameter.data = parameter.data.to(dtype)
        self.prior, self.tokenizer, self.device = prior.eval().to(device), tokenizer.eval().to(device), device
        self.conditioning, self.vocabulary = prior.conditioning, prior.vocabulary
        self.decoder = CachedTransformer(prior.backbone, self.conditioning.length + self.vocabulary.length - 1)

    def check(self, settings: SamplingSettings, conditions: Conditions | None = None) -> None:
        """Raise `UsageError` for settings that have no effect with this model, or on images of these conditions."""
        check_guidance(self.conditioning, settings, conditions)
        if conditions:
            self.conditioning.check_given(conditions)

    @staticmethod
    def series(n: int | None, given: int) -> range:
        """The images of a series of `n`, by default one for each of `given`. Raises `UsageError`."""
        if n is not None and (not _is_integer(n) or n < 0):
            raise UsageError(f"--n: found {n!r}, expected an integer of at least 0")
        return range(given if n is None else n)

    def settings(self, given: Mapping[str, Any], conditions: Conditions | None = None) -> SamplingSettings:
        """The given settings, by name, and for all others the recommended ones that have an effect on such images."""
        recommended = dict(self.recommended)
        for name in SCALES:
            if recommended.get(name, 1) != 1:
                alone = SamplingSettings(**{name: recommended[name]})
                try:
                    check_guidance(self.conditioning, alone, conditions)
                except UsageError:
                    del recommended[name]
        return combined(given, recommended)

    def check_inpainting(self) -> None:
        """Raise `UsageError` for a prior that fills in nothing."""
        if self.conditioning.masked_source is None:
            text = "the prior was trained without --inpainting, so it sees only what comes before a hole"
            hint = "train one with --inpainting 0.5, take cifar10-restorer, or keep upper rows (--keep-rows, complete)"
            raise UsageError(f"{text}; {hint}")

    def check_translation(self) -> None:
        """Raise `UsageError` for a prior that translates nothing."""
        if self.conditioning.paired_source is None:
            masked = self.conditioning.masked_source is not None
            kind = "to fill in images (--init-image), not on source codes" if masked else "without source codes"
            text = f"the prior was trained {kind}; train one on codes of vqgen-tokenize --source"
            raise UsageError(f"--source-image: {text}")

    @property
    def source_size(self) -> tuple[int, int]:
        """Height and width in pixels of the source images of the prior."""
        source = self.conditioning.paired_source
        rows, columns = source.about.grid if source else self.tokenizer.grid
        return rows * self.tokenizer.factor, columns * self.tokenizer.factor

    def keep(self, degraded_by: Sequence[str] | None = None) -> Keep | None:
        """How drawn images get what their sources show as it was; None where that is nothing, or of another size."""
        source = self.conditioning.paired_source
        equal = self.source_size == tuple(self.tokenizer.config.image_size)
        return source.keep(degraded_by) if source and equal else None

    def sources(self, images: Tensor, paste: bool = True, degraded_by: Sequence[str] | None = None) -> Sources:
        """Encode images uint8 (C, H, W) or (B, C, H, W) to make others from. Raises `UsageError`; see `translate`."""
        self.check_translation()
        codes, keep = self.encode(images, self.source_size), self.keep(degraded_by) if paste else None
        images = self.checked(images)
        return Sources(codes, keep, self.fitted(images).cpu() if keep and len(images) else None)

    @torch.inference_mode()
    def nats(self, codes: Tensor, conditions: Conditions, batch_size: int = 64) -> Tensor:
        """NLL of each code of images (B, h, w[, depth]) given their conditions and all earlier codes, among all ids:
        float64 (B, length) in drawing order, on the CPU. `conditions` has every part, see `Conditioning.conditions`."""
        layout, tokens = self.conditioning.layout(conditions), self.vocabulary.to_tokens(codes)
        sequences = torch.cat([layout.prefixes(conditions, range(len(tokens))), tokens], 1)
        found = [torch.zeros(0, self.vocabulary.length, dtype=torch.float64)]
        for part in sequences.split(batch_size):
            part = part.to(self.device)
            logits = layout.of_codes(self.prior(part[:, :-1]))
            found.append(token_nats(logits, layout.split(part)[1]).double().cpu())
        return torch.cat(found)

    def encode(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """uint8 images of any size (C, H, W) or (B, C, H, W) -> codes int64 (B, h, w[, depth]) on the CPU.

        `size` is the height and width that they are fitted to, by default those of training.
        """
        images = self.checked(images)
        config, size = self.tokenizer.config, size or self.tokenizer.config.image_size
        if not len(images):
            return self.tokenizer.encode(images.new_zeros(0, config.channels, *size)).cpu()

        def encoded(part: Tensor) -> Tensor:
            codes = self.tokenizer.encode(self.fitted(part, size).to(self.device)).cpu()
            self.tokenizer.check_finite()
            return codes

        return torch.cat(self._in_parts(encoded, images, size))

    def checked(self, images: Tensor, least: int = 0) -> Tensor:
        """Images uint8 (C, H, W) or (B, C, H, W), at least so many, as (B, C, H, W). Raises `UserError`."""
        if not isinstance(images, Tensor):
            raise UserError(f"images are of type {type(images).__name__}, expected a tensor; use torch.from_numpy")
        images = images[None] if images.ndim == 3 else images
        channels = self.tokenizer.config.channels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
            found = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"images: found {found}, expected uint8 (B, {channels}, H, W), H and W at least 1")
        if len(images) < least:
            raise UsageError("images: found none; give at least one")
        return images

    def fitted(self, images: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Images uint8 (B, C, H, W) resized and cropped as in training, to another `size` where one is given."""
        config, size = self.tokenizer.config, size or self.tokenizer.config.image_size
        if images.shape[-2:] == torch.Size(size):
            return images
        return torch.stack([center_crop(fit(image, size, config.fit), size) for image in images])

    def draw(
        self,
        indices: Sequence[int],
        conditions: Conditions | None = None,
        settings: SamplingSettings | None = None,
        seed: int = 0,
        batch_size: int = 64,
        on_token: Callable[[Tensor], object] | None = None,
        known: Known | None = None,
    ) -> Samples:
        """Draw images of the endless series of a seed; an image does not depend on which others are drawn.

        Args:
            indices: which images, e.g. range(64).
            conditions: as in `Recipe`, like the other arguments that it has.
            settings: by default temperature 1 and nothing else.
            known: codes that are given, not drawn.
        """
        indices, chosen = list(indices), self.conditioning.conditions(conditions)
        recipe = Recipe(chosen, settings or SamplingSettings(), seed, batch_size, on_token)
        codes, nats = self.draw_codes(indices, recipe, known)
        labels = [chosen["class"][index % len(chosen["class"])] for index in indices]
        return Samples(indices, torch.tensor(labels, dtype=torch.long), codes, nats, self.decode(codes))

    def draw_codes(self, indices: Sequence[int], recipe: Recipe, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """The codes of `draw` (B, h, w[, depth]), and their NLL (B,), both on the CPU."""
        conditions, settings, size = self.conditioning.conditions(recipe.conditions), recipe.settings, recipe.batch_size
        if unfit := [index for index in indices if not _is_integer(index) or not 0 <= index < 2**64]:
            raise UsageError(f"indices: found {unfit[0]!r}, expected integers from 0 to 2^64-1")
        self.check(settings, conditions)
        cycle = lcm(self.conditioning.cycle(conditions), 1 if known is None else len(known))
        length, layout = self.vocabulary.length, self.conditioning.layout(conditions)
        guidance = Guidance.of(layout, settings, conditions)
        drawn: dict[int, tuple[Tensor, Tensor]] = {}
        for batch in batches(list(dict.fromkeys(indices)), cycle, settings.oversample, size):
            candidates, groups = with_candidates(batch, cycle, settings.oversample)
            found = []
            for part in batches(candidates, cycle, 1, size):
                prefix, uniforms = layout.prefixes(conditions, part), image_uniforms(recipe.seed, part, length)
                given = (None, None) if known is None else (known.rows(part), known.span)
                found.append(self.tokens(guidance, prefix, uniforms, recipe, *given))
            tokens = torch.cat([part.tokens for part in found]).cpu()
            nats = torch.cat([part.nats for part in found]).cpu()
            chosen = selected_rows(nats, groups) if groups else {index: row for row, index in enumerate(batch)}
            drawn |= {index: (tokens[chosen[index]], nats[chosen[index]]) for index in batch}
        if not drawn:
            return self.vocabulary.to_codes(torch.empty(0, length, dtype=torch.long)), torch.zeros(0).double()
        codes = self.vocabulary.to_codes(torch.stack([drawn[index][0] for index in indices]))
        return codes, torch.stack([drawn[index][1] for index in indices])

    def tokens(
        self,
        guidance: Guidance,
        prefix: Tensor,
        uniforms: Tensor,
        recipe: Recipe,
        known: Tensor | None,
        span: range | None,
    ) -> Drawn:
        """Draw the codes of a batch after prefixes of the layout of `guidance`; see `generate`."""
        allowed = [self.vocabulary.allowed(position) for position in range(self.vocabulary.length)]
        given = self.decoder, prefix, allowed, uniforms, recipe.settings, guidance.contrasts(prefix), known, span
        # On CUDA the last batch is computed as a full one.
        return generate(*given, rows=recipe.batch_size, on_token=recipe.on_token)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w[, depth]) -> uint8 images (B, C, H, W) on the CPU; an image depends on its own codes alone."""
        size = [side * self.tokenizer.factor for side in codes.shape[1:3]]
        images = [torch.empty(0, self.tokenizer.config.channels, *size, dtype=torch.uint8)]

        def decoded(part: Tensor) -> Tensor:
            images = to_uint8(self.tokenizer.decode(part.to(self.device))).cpu()
            self.tokenizer.check_finite()
            return images

        return torch.cat([*images, *self._in_parts(decoded, codes.cpu(), size)])

    def _in_parts(self, function: Callable[[Tensor], Tensor], given: Tensor, size: Sequence[int]) -> list[Tensor]:
        """Apply `function` to parts of `given`, one row an image of `size`: each part has the same number of rows, and
        on a CPU is computed by one thread, so that an image does not depend on the others."""
        count = max(PART_PIXELS[self.device.type] // (size[0] * size[1]), PART_IMAGES[self.device.type])

        def in_turn(of: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
            return [of(part) for part in parts]

        return in_parts(torch.inference_mode()(function), given, count, None if self.device.type == "cpu" else in_turn)
