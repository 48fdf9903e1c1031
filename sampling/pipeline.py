"""A prior's model folder as one object that draws images: labels to codes to pixels."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.hardware import precision_of

from ..prior.model import Prior
from ..tokenizer.model import Tokenizer
from ..tokenizer.pixels import to_uint8
from .decoder import Decoder
from .generate import generate, image_uniforms
from .logits import SamplingSettings

DEFAULT_MODEL = Path("runs/demo/prior")
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
    """The folder that was named, else $VQGEN_MODEL, else the demo's. Raises `UsageError` where there is none."""
    if model is not None:
        return model
    if os.environ.get("VQGEN_MODEL"):
        return Path(os.environ["VQGEN_MODEL"])
    if DEFAULT_MODEL.is_dir():
        return DEFAULT_MODEL
    raise UsageError(
        f"--model: not given, $VQGEN_MODEL is not set and there is no {DEFAULT_MODEL}; "
        "name the run folder of a prior, or train one with vqgen-demo"
    )


def find_device(device: str | torch.device) -> torch.device:
    """The device that was named; `auto` is CUDA where there is one, else the CPU. Raises `UsageError`."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError:
        found = None
    if found is None or found.type not in DECODE_PIXELS:
        raise UsageError(f"--device: found {device}, expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: found {device}, but torch sees {torch.cuda.device_count()} CUDA devices; use auto")
    return found


@dataclass(frozen=True)
class Samples:
    """Images as drawn, row by row, on the CPU."""

    indices: list[int]
    labels: Tensor
    """int64 (B,); -1 = no class."""
    codes: Tensor
    """int64 (B, h, w) or (B, h, w, depth)."""
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
        self._decoder = Decoder(prior.backbone, prior.vocabulary.length)

    @classmethod
    def load(cls, model: str | Path, device: str | torch.device = "auto", precision: str = "auto") -> "Generator":
        """Read a prior's folder and the tokenizer inside it. Raises `UserError` where they do not belong together."""
        folder, place = Path(model), find_device(device)
        prior = Prior.load(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer")
        if tokenizer.fingerprint != prior.tokenizer_fingerprint:
            raise UserError(
                f"{folder / 'tokenizer'} has fingerprint {str(tokenizer.fingerprint)[:12]}, but the prior in {folder} "
                f"was trained on codes of {prior.tokenizer_fingerprint[:12]}; put that tokenizer there"
            )
        return cls(prior, tokenizer, place, precision)

    @property
    def classes(self) -> int:
        """Number of classes; 0 where the prior is unconditional."""
        return self.prior.vocabulary.classes

    def check(self, settings: SamplingSettings) -> None:
        """Raise `UsageError` for settings that this model has no use for."""
        if settings.guidance_scale != 1 and self.classes and not self.prior.label_dropout:
            raise UsageError(
                f"--guidance-scale: found {settings.guidance_scale:g}, but the prior was trained with "
                "--label-dropout 0 and never saw an image without its class; leave it at 1"
            )
        if settings.guidance_scale != 1 and not self.classes:
            raise UsageError(
                f"--guidance-scale: found {settings.guidance_scale:g}, but the model is unconditional; leave it at 1"
            )

    def sample(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        settings: SamplingSettings | None = None,
        seed: int = 0,
        batch_size: int = 64,
        on_token: Callable[[Tensor], object] | None = None,
    ) -> Samples:
        """Draw images.

        Args:
            indices: which images of the endless series of this seed, e.g. range(64).
            labels: the class of each, -1 for none; by default image i is of class i modulo the number of classes.
            settings: by default temperature 1 and nothing else.
            batch_size: images drawn at once.
            on_token: called with each column of tokens (b,) as it is drawn, e.g. for a progress bar.

        Raises `UsageError` for a label that the model does not know.
        """
        indices, settings = list(indices), settings or SamplingSettings()
        self.check(settings)
        if labels is None:
            labels = [index % self.classes if self.classes else -1 for index in indices]
        if len(labels) != len(indices):
            raise ValueError(f"{len(labels)} labels for {len(indices)} indices")
        unknown = [label for label in labels if not -1 <= label < self.classes]
        if unknown:
            raise UsageError(f"--class: found {unknown[0]}, but the model has {self.classes} classes")
        given = torch.tensor(labels, dtype=torch.long)
        parts = [slice(first, first + batch_size) for first in range(0, len(indices), batch_size)]
        drawn = [self._codes(indices[p], given[p], settings, seed, batch_size, on_token) for p in parts]
        codes = torch.cat(drawn) if drawn else torch.empty(0, *self.tokenizer.grid, dtype=torch.long)
        return Samples(indices, given, codes, self.decode(codes))

    def _codes(
        self,
        indices: list[int],
        labels: Tensor,
        settings: SamplingSettings,
        seed: int,
        batch_size: int,
        on_token: Callable[[Tensor], object] | None,
    ) -> Tensor:
        """The codes of one batch, on the CPU."""
        vocabulary = self.prior.vocabulary
        rows = CPU_ROWS if self.precision == "fp32" else 1
        if self.device.type == "cuda":
            rows = batch_size  # the last batch too is computed as a full one
        condition = vocabulary.class_id(labels)[:, None]
        tokens = generate(
            self._decoder,
            condition,
            [vocabulary.allowed(position) for position in range(vocabulary.length)],
            image_uniforms(seed, indices, vocabulary.length),
            settings,
            torch.full_like(condition, vocabulary.null) if self.classes else None,
            rows,
            on_token,
        )
        return vocabulary.to_codes(tokens).cpu()

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
