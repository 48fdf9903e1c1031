"""A prior's model folder as one object that draws images: labels to codes to pixels."""

import math
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqgen.devices import find_device, precision_of
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION
from vqgen.prior.likelihood import token_nats
from vqgen.prior.model import Prior
from vqgen.tokenizer.data.pixels import centre, fit, to_uint8
from vqgen.tokenizer.model import Tokenizer

from .cached_transformer import CachedTransformer
from .generate import Drawn, generate, image_uniforms
from .names import find_classes
from .oversample import batches, places, selected
from .settings import SamplingSettings

DEFAULT_MODEL = Path("runs/demo/prior")
SHIPPED = Path(__file__).parent / "pretrained" / "cifar10"
"""A class-conditional model of CIFAR-10 that comes with the package; its README.md says how it was made."""
# In float32 on a CPU the last bits of a row depend on how many rows there are: matrix products of 1 to 3 (with two
# threads 7) rows take another path, and the end of an array that does not fill a vector is rounded differently from
# the rest. At multiples of 16 all agree, with one thread and with two, as measured with MKL; in bf16 `Linear` sees to
# it.
CPU_ROWS = 16
# Images are decoded in chunks that depend on their size alone, in float32, because convolutions choose their algorithm
# by the shape of the batch. At least 4, so that two or four threads share the images and not the sums.
DECODE_PIXELS = {"cpu": 2**14, "cuda": 2**18}
DECODE_IMAGES = 4


def find_model(model: Path | None) -> Path:
    """The folder that was named, else $VQGEN_MODEL, else the demo's, else the model in the package."""
    if model is not None:
        return model
    if os.environ.get("VQGEN_MODEL"):
        return Path(os.environ["VQGEN_MODEL"])
    return DEFAULT_MODEL if (DEFAULT_MODEL / DESCRIPTION).is_file() else SHIPPED


@dataclass(frozen=True)
class Samples:
    """Images as drawn, row by row, on the CPU."""

    indices: list[int]
    labels: Tensor
    """int64 (B,); -1 = no class."""
    codes: Tensor
    """int64 (B, h, w) or (B, h, w, depth)."""
    nats: Tensor
    """float64 (B,): -log p of the codes that were drawn, by the prior alone, given their class and what came before,
    among the ids that may stand there, in the generator's precision."""
    images: Tensor
    """uint8 (B, C, H, W)."""


class Generator:
    """A prior and its tokenizer, ready to draw.

    Image i depends on (seed, i, its label, settings) alone. On CUDA that holds at a given batch size: another one may
    round the logits differently in the last bits.
    """

    def __init__(self, prior: Prior, tokenizer: Tokenizer, device: torch.device, precision: str = "auto") -> None:
        """Takes the models over: moves both and casts the prior's weights to `precision` (auto, fp32, bf16, fp16)."""
        self.precision = precision_of(precision, device).replace("no", "fp32")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        for parameter in prior.backbone.parameters():
            # Not the buffers: rotary frequencies lose positions in 16 bits.
            parameter.data = parameter.data.to(dtype)
        self.prior, self.tokenizer, self.device = prior.eval().to(device), tokenizer.eval().to(device), device
        self._decoder = CachedTransformer(prior.backbone, prior.vocabulary.length)

    @classmethod
    def load(
        cls, model: str | Path | None = None, device: str | torch.device = "auto", precision: str = "auto"
    ) -> "Generator":
        """Read a prior's folder and the tokenizer inside it; by default those that `find_model` finds.

        Raises `UserError` where they do not belong together.
        """
        folder, place = find_model(None if model is None else Path(model)), find_device(device)
        prior = Prior.load(folder)
        tokenizer = prior.load_tokenizer(folder / "tokenizer")
        own, vocabulary = (tokenizer.codebook_size, tokenizer.depth, tokenizer.grid), prior.vocabulary
        stated = (vocabulary.codebook_size, vocabulary.depth, vocabulary.grid)
        if own != stated:
            raise UserError(
                f"{folder / DESCRIPTION} says codebook size, depth and grid {stated}, its tokenizer has {own}; "
                "restore the file"
            )
        return cls(prior, tokenizer, place, precision)

    @property
    def classes(self) -> int:
        """Number of classes; 0 where the prior is unconditional."""
        return self.prior.vocabulary.classes

    def check(self, settings: SamplingSettings, labels: Sequence[int] | None = None) -> None:
        """Raise `UsageError` for settings that this model, or a series of these labels, has no use for."""
        if not settings.guided:
            return
        found = f"--guidance-scale: found {settings.guidance_scale:g}, but"
        if not self.classes:
            raise UsageError(f"{found} the model is unconditional; leave it at 1")
        if labels is not None and all(label < 0 for label in labels):
            raise UsageError(f"{found} these images have no class to be guided to; name some with --class")
        if not self.prior.label_dropout:
            raise UsageError(
                f"{found} the prior was trained with --label-dropout 0 and never saw an image without its class; "
                "leave it at 1"
            )

    def sample(
        self,
        n: int,
        classes: Sequence[str | int] | str | int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> Samples:
        """Draw images 0..n-1 of the endless series of this seed.

        Args:
            classes: names or indices, given to the images in turn; by default every class.
            settings: those of `SamplingSettings`, as `temperature=0.9, top_k=100`.

        Raises `UsageError` for a class or a setting that does not fit.
        """
        if n < 0:
            raise UsageError(f"--n: found {n}, expected at least 0")
        return self.draw(range(n), self._labels(classes), SamplingSettings(**settings), seed, batch_size)

    def complete(
        self,
        images: Tensor,
        mask_rows: int,
        n: int | None = None,
        classes: Sequence[str | int] | str | int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        **settings: Any,
    ) -> Samples:
        """Draw the lower part of images anew, given the upper.

        Args:
            images: uint8 (C, H, W) or (B, C, H, W), of any size: they are fitted as in training.
            mask_rows: rows of codes, from the bottom, that are drawn.
            n: how many completions, the images in turn; by default one each.
            classes: as in `sample`, but by default none.

        Raises `UsageError` for a class or a setting that does not fit.
        """
        given = self.encode(images)
        if not 1 <= mask_rows <= self.tokenizer.grid[0]:
            raise UsageError(f"mask_rows: found {mask_rows}, expected 1 to {self.tokenizer.grid[0]}, the rows of codes")
        kept = self.prior.vocabulary.to_tokens(given)
        kept = kept[:, : len(kept[0]) // self.tokenizer.grid[0] * (self.tokenizer.grid[0] - mask_rows)]
        labels = [-1] if classes is None else self._labels(classes)
        return self.draw(
            range(len(given) if n is None else n), labels, SamplingSettings(**settings), seed, batch_size, kept=kept
        )

    def log_likelihood(self, images: Tensor, classes: Sequence[str | int] | str | int | None = None) -> Tensor:
        """log p of the codes of images (B, C, H, W) or (C, H, W), in nats, float64 (B,), among all ids and in the
        generator's precision: load it with fp32 for what vqgen-likelihood gives.

        Args:
            images: uint8, of any size: they are fitted as in training.
            classes: names or indices, one an image or one for all; by default no class.
        """
        tokens = self.prior.vocabulary.to_tokens(self.encode(images))
        labels = torch.tensor([-1] if classes is None else self._cycle(self._labels(classes)))
        if len(labels) not in (1, len(tokens)):
            raise ValueError(f"{len(labels)} classes for {len(tokens)} images")
        condition = self.prior.vocabulary.class_id(labels.expand(len(tokens)))[:, None]
        return -self.nats(torch.cat([condition, tokens], 1))

    @torch.inference_mode()
    def nats(self, sequences: Tensor, batch_size: int = 64) -> Tensor:
        """-log p of whole sequences (B, 1 + length), condition first, among all ids: float64 (B,) on the CPU."""
        found = [
            token_nats(self.prior(part[:, :-1].to(self.device)), part[:, 1:].to(self.device)).double().sum(1).cpu()
            for part in sequences.split(batch_size)
        ]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images of any size (C, H, W) or (B, C, H, W) -> codes int64 (B, h, w[, depth]) on the CPU."""
        if not isinstance(images, Tensor):
            raise UserError(
                f"images are of type {type(images).__name__}, expected a tensor; torch.from_numpy makes one"
            )
        images = images[None] if images.ndim == 3 else images
        size = self.tokenizer.config.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.tokenizer.config.channels:
            raise UserError(
                f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (B, "
                f"{self.tokenizer.config.channels}, H, W)"
            )
        if images.shape[-2:] != torch.Size(size):
            images = torch.stack([centre(fit(image, size, self.tokenizer.config.fit), size) for image in images])
        return self.tokenizer.encode(images.to(self.device)).cpu()

    def _labels(self, classes: Any) -> list[int]:
        """A string is a name or an index, a number always an index."""
        if classes is None:
            return find_classes(None, self.prior)
        single = isinstance(classes, str) or not hasattr(classes, "__iter__") or getattr(classes, "ndim", 1) == 0
        found: list[int] = []
        for one in [classes] if single else classes:
            found += find_classes([one], self.prior) if isinstance(one, str) else [operator.index(one)]
        return found

    def draw(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        settings: SamplingSettings | None = None,
        seed: int = 0,
        batch_size: int = 64,
        on_token: Callable[[Tensor], object] | None = None,
        kept: Tensor | None = None,
    ) -> Samples:
        """Draw images of the endless series of a seed; an image does not depend on which others are drawn.

        Args:
            indices: which images, e.g. range(64).
            labels: the classes that the series goes through in turn, -1 for none; by default all.
            settings: by default temperature 1 and nothing else.
            batch_size: images drawn at once.
            on_token: called with each column of tokens (b,) as it is drawn, e.g. for a progress bar.
            kept: tokens (m, k) that images begin with, in turn; image i goes on from kept[i % m].

        Raises `UsageError` for a label that the model does not know.
        """
        indices, settings = list(indices), settings or SamplingSettings()
        codes, nats = self.draw_codes(indices, labels, settings, seed, batch_size, on_token, kept)
        given = self._cycle(labels)
        chosen = torch.tensor([given[index % len(given)] for index in indices], dtype=torch.long)
        return Samples(indices, chosen, codes, nats, self.decode(codes))

    def _cycle(self, labels: Sequence[int] | None) -> list[int]:
        """The classes of a series, checked."""
        cycle = list(range(self.classes)) or [-1] if labels is None else list(labels)
        unknown = [label for label in cycle if not -1 <= label < self.classes]
        if unknown:
            raise UsageError(f"--class: found {unknown[0]}, but the model has {self.classes} classes")
        if not cycle:
            raise ValueError("no classes to go through; give at least one, or None for all")
        return cycle

    def draw_codes(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None,
        settings: SamplingSettings,
        seed: int,
        batch_size: int,
        on_token: Callable[[Tensor], object] | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The codes of `draw` (B, h, w[, depth]), and their nats (B,), both on the CPU."""
        vocabulary, cycle = self.prior.vocabulary, self._cycle(labels)
        self.check(settings, cycle)
        if batch_size < 1:
            raise UsageError(f"--batch-size: found {batch_size}, expected at least 1")
        if not 0 <= seed < 2**64:
            raise UsageError(f"--seed: found {seed}, expected 0 to 2^64-1")
        if kept is None:
            kept = torch.empty(1, 0, dtype=torch.long)
        round_trip = math.lcm(len(cycle), len(kept))

        def drawn(some: Sequence[int]) -> Drawn:
            parts = [
                self._drawn(some[first : first + batch_size], cycle, settings, seed, batch_size, on_token, kept)
                for first in range(0, len(some), batch_size)
            ]
            return Drawn(torch.cat([part.tokens for part in parts]), torch.cat([part.nats for part in parts]))

        if not indices:
            found = Drawn(torch.empty(0, vocabulary.length, dtype=torch.long), torch.zeros(0, dtype=torch.float64))
        elif settings.oversample == 1:
            found = drawn(indices)
        else:
            stayed: dict[int, tuple[Tensor, Tensor]] = {}
            for batch in batches(list(dict.fromkeys(indices)), round_trip, settings.oversample, batch_size):
                candidates, groups = selected(batch, round_trip, settings.oversample)
                some = drawn(candidates)
                row = places(some.nats, groups)
                stayed |= {index: (some.tokens[row[index]], some.nats[row[index]]) for index in batch}
            tokens, nats = zip(*(stayed[index] for index in indices), strict=True)
            found = Drawn(torch.stack(tokens), torch.stack(nats))
        return vocabulary.to_codes(found.tokens), found.nats

    def _drawn(
        self,
        indices: Sequence[int],
        cycle: list[int],
        settings: SamplingSettings,
        seed: int,
        batch_size: int,
        on_token: Callable[[Tensor], object] | None,
        kept: Tensor,
    ) -> Drawn:
        """The whole sequences of one batch, without their conditions, on the CPU."""
        vocabulary = self.prior.vocabulary
        rows = CPU_ROWS if self.precision == "fp32" else 1
        if self.device.type == "cuda":
            rows = batch_size  # the last batch too is computed as a full one
        condition = vocabulary.class_id(torch.tensor([cycle[index % len(cycle)] for index in indices]))[:, None]
        given = kept[[index % len(kept) for index in indices]]
        found = generate(
            self._decoder,
            torch.cat([condition, given], 1),
            [vocabulary.allowed(position) for position in range(given.shape[1], vocabulary.length)],
            image_uniforms(seed, indices, vocabulary.length)[:, given.shape[1] :],
            settings,
            torch.cat([torch.full_like(condition, vocabulary.null), given], 1) if self.classes else None,
            rows,
            on_token,
        )
        return Drawn(torch.cat([given, found.tokens.cpu()], 1), found.nats.cpu())

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w[, depth]) -> uint8 images (B, C, H, W) on the CPU; an image depends on its own codes alone."""
        height, width = (side * self.tokenizer.factor for side in codes.shape[1:3])
        chunk = max(DECODE_PIXELS[self.device.type] // (height * width), DECODE_IMAGES)
        images = torch.empty(len(codes), self.tokenizer.config.channels, height, width, dtype=torch.uint8)
        for first in range(0, len(codes), chunk):
            part = codes[first : first + chunk]
            fill = torch.arange(chunk).clamp(max=len(part) - 1)  # padding repeats the last image
            decoded = self.tokenizer.decode(part.cpu()[fill].to(self.device))
            images[first : first + chunk] = to_uint8(decoded[: len(part)]).cpu()
        return images
