"""The tokenizer: images to grids of codes and back, and its model folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqgen.artifact import load_artifact, refuse_others, save_artifact
from vqgen.config import as_dict, from_dict
from vqgen.errors import UserError
from vqgen.tokenizer.data.pixels import to_float, to_uint8
from vqgen.tokenizer.quantizers.base import Quantized
from vqgen.tokenizer.shipped import find_tokenizer

from .networks import decoder_for, encoder_for
from .options import TokenizerConfig
from .quantizers import quantizer_for

# Tolerance of float images beyond [-1, 1], for arithmetic in 16 bits.
_RANGE_TOLERANCE = 0.01


@dataclass(frozen=True)
class TokenizerOutput:
    """Reconstructed images (B, C, H, W), not clamped, and the result of the quantizer."""

    images: Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder (VQ-VAE, van den Oord et al. 2017; VQGAN, Esser et al. 2021).

    `forward` is for training: it takes float images (B, C, H, W) in [-1, 1] without checks. `encode`, `decode` and
    `reconstruct` are for inference: they check their arguments and compute no gradients. Where the encoder's or the
    decoder's output is not finite, as in 16 bits, they raise `UserError`; on an accelerator only `check_finite` does.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder_for(config.channels, config.model)
        self.quantizer = quantizer_for(config.model.latent_dim, config.quantizer)
        self.decoder = decoder_for(config.channels, config.model)
        self.fingerprint: str | None = None
        """sha256 of the weights as saved or loaded; None before."""
        self.codes_are_frozen = False
        """Whether the decoder alone is trained; see `freeze_codes`."""
        self._finite: dict[str, Tensor] = {}  # of encoder and decoder, see `check_finite`

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels a side of one code."""
        return self.config.model.factor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes of an image of the configured size."""
        height, width = self.config.image_size
        return height // self.factor, width // self.factor

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def depth(self) -> int:
        """Codes a position."""
        return self.quantizer.depth

    @property
    def last_weight(self) -> nn.Parameter:
        """Weight of the decoder's last layer."""
        return self.decoder.last_weight

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images (B, C, H, W); in training mode also update the codebook, unless it is frozen."""
        if self.codes_are_frozen:
            with torch.no_grad():
                codes = self.quantizer.encode(self.encoder(images))
                latents = self.quantizer.decode(codes)
            quantized = Quantized(latents, codes, latents.new_zeros(()), {})
        else:
            quantized = self.quantizer(self.encoder(images))
        return TokenizerOutput(self.decoder(quantized.z_q), quantized)

    def freeze_codes(self) -> None:
        """Keep encoder and quantizer as they are in training: only the decoder learns, and images keep their codes."""
        self.codes_are_frozen = True
        self.encoder.requires_grad_(False)
        self.quantizer.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Tokenizer":
        super().train(mode)
        if self.codes_are_frozen:
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def has_codes_of(self, other: "Tokenizer") -> bool:
        """Whether both give every image the same codes: all options that decide these and all weights but the decoder's
        are equal."""
        states = [
            {name: value for name, value in each.inference_state().items() if not name.startswith("decoder.")}
            for each in (self, other)
        ]
        same = self.config.codes_options() == other.config.codes_options() and states[0].keys() == states[1].keys()
        return same and all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    @torch.no_grad()
    def encode(self, images: Tensor, at_once: bool = True) -> Tensor:
        """Encode images into codes int64 (B, H/f, W/f), or (B, H/f, W/f, depth) where `depth` is more than 1.

        Args:
            images: (B, C, H, W), uint8 or float in [-1, 1], on any device; H and W divisible by `factor`, any size.
            at_once: raise at once for latents that are not finite; else `take_finite` tells.

        The codes are on the tokenizer's device. Evaluation mode applies also in training mode. Raises `UserError` for
        images of another shape, type or range.
        """
        with self._evaluation_mode():
            pixels = self._checked_images(images)
            if not len(pixels):  # PixelUnshuffle fails on empty batches
                depth = [self.depth] if self.depth > 1 else []
                sides = [side // self.factor for side in pixels.shape[2:]]
                return torch.zeros(0, *sides, *depth, dtype=torch.long, device=pixels.device)
            latents = self.encoder(pixels)
            self._note_finite("encoder", latents, at_once)
            return self.quantizer.encode(latents)

    @torch.no_grad()
    def decode(self, codes: Tensor, at_once: bool = True) -> Tensor:
        """Decode codes into images float32 (B, C, h*f, w*f) in [-1, 1], on the tokenizer's device.

        Args:
            codes: (B, h, w), or (B, h, w, depth) where `depth` is more than 1; any integer type, any device.
            at_once: raise at once for images that are not finite; else `take_finite` tells.

        Raises `UserError` for codes of another shape or type, or outside the codebook.
        """
        with self._evaluation_mode():
            images = self.decoder(self.quantizer.decode(self._checked_codes(codes))).float()
            self._note_finite("decoder", images, at_once)
            return images.clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Encode and decode images; shape, data type and device are those of `images`. See `encode`."""
        decoded = self.decode(self.encode(images))
        self.check_finite()
        return (to_uint8(decoded) if images.dtype == torch.uint8 else decoded).to(images)

    def _note_finite(self, part: str, output: Tensor, at_once: bool) -> None:
        """Note whether an output is finite; where `at_once`, check it at once on a CPU, which is not waited for."""
        finite = output.isfinite().all()
        self._finite[part] = finite & self._finite.get(part, finite)  # another thread may clear it
        if at_once and output.device.type == "cpu":
            self.check_finite()

    def take_finite(self) -> Tensor:
        """Return whether every output of `encode` and `decode` was finite since it was asked last, bool (), on the
        device, without waiting for it."""
        found = list(self._finite.values())
        self._finite.clear()
        return torch.stack(found).all() if found else torch.tensor(True, device=next(self.parameters()).device)

    def check_finite(self) -> None:
        """Raise `UserError` where an output of `encode` or `decode` was not finite. Waits for the device: call it where
        their results are read."""
        for part, finite in list(self._finite.items()):
            if not finite:
                self._finite.clear()
                raise not_finite(part)

    def _checked_images(self, images: Tensor) -> Tensor:
        """Check images and return them as float32 on the tokenizer's device."""
        expected = "expected a tensor (B, C, H, W), uint8 or float in [-1, 1]"
        if not isinstance(images, Tensor):
            advice = "convert a PIL image or an array x by torchvision.transforms.v2.functional.to_image(x)[None]"
            raise UserError(f"images are of type {type(images).__name__}, {expected}: {advice}")
        if images.ndim != 4:
            advice = ": image[None] is a batch of one" if images.ndim == 3 else ""
            raise UserError(f"images have shape {tuple(images.shape)}, {expected}{advice}")
        channels, height, width = images.shape[1:]
        fits = all(side >= self.factor and side % self.factor == 0 for side in (height, width))
        if channels != self.config.channels or not fits:
            raise UserError(
                f"images are {channels}x{height}x{width}; this tokenizer takes {self.config.channels} channels "
                f"and sides divisible by {self.factor}: convert, crop or resize them"
            )
        weights = next(self.parameters())
        if weights.dtype != torch.float32:
            raise UserError(
                f"the tokenizer's weights are {_name(weights.dtype)}, but the quantizer needs float32: "
                "keep float32 weights, and use torch.autocast for 16 bits"
            )
        if images.dtype == torch.uint8:
            return to_float(images.to(weights.device))
        if not images.is_floating_point():
            raise UserError(f"images are {_name(images.dtype)}, {expected}")
        if images.numel():
            low, high = torch.stack(images.aminmax()).tolist()
            if not (low >= -1 - _RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):  # NaN fails too
                raise UserError(
                    f"images hold values from {low:g} to {high:g}, {expected}: "
                    "give 0 to 255 as uint8, or as images / 127.5 - 1"
                )
        return images.to(weights)

    def _checked_codes(self, codes: Tensor) -> Tensor:
        """Check codes and return them as int64 on the tokenizer's device.

        On CUDA a lookup out of range is an assertion that ends all further work of the process on the device.
        """
        expected = f"expected integers (B, h, w{f', {self.depth}' if self.depth > 1 else ''})"
        if not isinstance(codes, Tensor) or codes.dtype == torch.bool or codes.is_floating_point():
            found = f"are {_name(codes.dtype)}" if isinstance(codes, Tensor) else f"are of type {type(codes).__name__}"
            raise UserError(f"codes {found}, {expected}")
        depth = list(codes.shape[3:])
        if codes.ndim < 3 or not all(codes.shape[1:3]) or depth != ([self.depth] if self.depth > 1 else []):
            raise UserError(f"codes have shape {tuple(codes.shape)}, {expected}")
        codes = codes.to(torch.int64)  # torch has no minimum of most unsigned types
        if codes.numel():
            low, high = torch.stack(codes.aminmax()).tolist()
            if low < 0 or high >= self.codebook_size:
                raise UserError(
                    f"codes run from {low} to {high}, but the codebook has 0 to {self.codebook_size - 1}; "
                    "use codes of this tokenizer"
                )
        return codes.to(next(self.parameters()).device)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Switch to evaluation mode inside the context: dropout would make codes random."""
        before = self.training
        if before:
            self.eval()
        try:
            yield
        finally:
            if before:
                self.train()

    def inference_state(self) -> dict[str, Tensor]:
        """Return the tensors that encoding and decoding need."""
        return {k: v for k, v in self.state_dict().items() if k not in self._training_names()}

    def _training_names(self) -> set[str]:
        return {f"quantizer.{name}" for name in self.quantizer.training_state}

    def save(self, folder: Path) -> str:
        """Write the model folder and return its fingerprint."""
        description = {
            "architecture": as_dict(self.config),
            "grid": list(self.grid),
            "codebook_size": self.codebook_size,
            "depth": self.depth,
        }
        self.fingerprint = save_artifact(Path(folder), "tokenizer", description, self.inference_state())
        return self.fingerprint

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Tokenizer":
        """Load a model folder, or that of a model of the package by its name, in evaluation mode.

        Raises `UserError` for missing or damaged files.
        """
        folder = find_tokenizer(Path(folder))
        artifact = load_artifact(folder, "tokenizer")
        architecture = artifact.description.get("architecture")
        config = from_dict(TokenizerConfig, architecture, str(folder / "vqgen.json"))
        with torch.device("meta"):
            promised = cls(config).inference_state()
        refuse_others(artifact.tensors, promised, folder)
        tokenizer = cls(config)
        own = tokenizer.state_dict()
        tokenizer.load_state_dict({**artifact.tensors, **{name: own[name] for name in tokenizer._training_names()}})
        tokenizer.fingerprint = artifact.fingerprint
        return tokenizer.eval().to(device)


def not_finite(part: str) -> UserError:
    """The error of an output that is not finite."""
    return UserError(f"--precision: the {part}'s output is not finite; use fp32, or another tokenizer where it is that")


def _name(dtype: torch.dtype) -> str:
    """Name of a data type without its module."""
    return str(dtype).removeprefix("torch.")
