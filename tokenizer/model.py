"""The tokenizer: images to grids of codes and back, and its model folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vqgen.artifact import load_artifact, save_artifact
from vqgen.config import as_dict, from_dict
from vqgen.errors import UserError
from vqgen.tokenizer.data.pixels import to_float, to_uint8
from vqgen.tokenizer.networks.autoencoder import Decoder, Encoder
from vqgen.tokenizer.quantizers.base import Quantized

from .options import TokenizerConfig
from .quantizers import quantizer_for

# How far float images may reach beyond [-1, 1]: arithmetic in 16 bits.
_ROUNDING = 0.01


@dataclass(frozen=True)
class TokenizerOutput:
    """Reconstructed images (B, C, H, W), not clamped, and what the quantizer returned."""

    images: Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder (VQ-VAE, van den Oord et al. 2017; VQGAN, Esser et al. 2021).

    `forward` trains: it takes float images (B, C, H, W) in [-1, 1], unchecked. `encode`, `decode` and `reconstruct` are
    for everybody else: they check what they are given and keep no gradients.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.channels, config.model)
        self.quantizer = quantizer_for(config.model.latent_dim, config.quantizer)
        self.decoder = Decoder(config.channels, config.model)
        self.fingerprint: str | None = None
        """sha256 of the weights as saved or loaded; None while they may still change."""

    @property
    def factor(self) -> int:
        """Pixels a side that one code stands for."""
        return self.config.model.factor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes for an image of the configured size."""
        height, width = self.config.image_size
        return height // self.factor, width // self.factor

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def depth(self) -> int:
        """Codes a position."""
        return self.quantizer.depth

    def forward(self, images: Tensor) -> TokenizerOutput:
        """Reconstruct images (B, C, H, W); in training mode the codebook learns."""
        quantized = self.quantizer(self.encoder(images))
        return TokenizerOutput(self.decoder(quantized.z_q), quantized)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images -> codes int64 (B, H/f, W/f), or (B, H/f, W/f, depth) where `depth` is more than 1.

        Args:
            images: (B, C, H, W), uint8 or float in [-1, 1], on any device; H and W divisible by `factor`, any size.

        The codes lie on the tokenizer's device. Nothing learns and nothing is random, also in training mode. Raises
        `UserError` for images of another shape, type or range.
        """
        with self._evaluating():
            pixels = self._pixels(images)
            if not len(pixels):  # of which torch makes no patches
                depth = [self.depth] if self.depth > 1 else []
                sides = [side // self.factor for side in pixels.shape[2:]]
                return torch.zeros(0, *sides, *depth, dtype=torch.long, device=pixels.device)
            return self.quantizer.encode(self.encoder(pixels))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes -> images float32 (B, C, h*f, w*f) in [-1, 1], on the tokenizer's device.

        Args:
            codes: (B, h, w), or (B, h, w, depth) where `depth` is more than 1; any integer type, any device.

        Raises `UserError` for codes of another shape or type, or that the codebook does not have.
        """
        with self._evaluating():
            return self.decoder(self.quantizer.decode(self._known(codes))).float().clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images as they come back from their codes: shape, type and device are those of `images`; see `encode`."""
        decoded = self.decode(self.encode(images))
        return (to_uint8(decoded) if images.dtype == torch.uint8 else decoded).to(images)

    def _pixels(self, images: Tensor) -> Tensor:
        """Images as given, checked, as float32 on the tokenizer's device."""
        expected = "expected a tensor (B, C, H, W), uint8 or float in [-1, 1]"
        if not isinstance(images, Tensor):
            advice = "torchvision.transforms.v2.functional.to_image(x)[None] makes one of a PIL image or an array"
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
        weights = self.decoder.last.weight
        if weights.dtype != torch.float32:
            raise UserError(
                f"the tokenizer's weights are {_name(weights.dtype)}, and the quantizer needs float32: "
                "keep them so, and call it inside torch.autocast for 16 bits"
            )
        if images.dtype == torch.uint8:
            return to_float(images.to(weights.device))
        if not images.is_floating_point():
            raise UserError(f"images are {_name(images.dtype)}, {expected}")
        if images.numel():
            low, high = torch.stack(images.aminmax()).tolist()
            if not (low >= -1 - _ROUNDING and high <= 1 + _ROUNDING):  # so written, NaN fails as well
                raise UserError(
                    f"images hold values from {low:g} to {high:g}, {expected}: "
                    "give 0 to 255 as uint8, or as images / 127.5 - 1"
                )
        return images.to(weights)

    def _known(self, codes: Tensor) -> Tensor:
        """Codes as given, checked, as int64 on the tokenizer's device; CUDA would not survive one that is not there."""
        expected = f"expected integers (B, h, w{f', {self.depth}' if self.depth > 1 else ''})"
        if not isinstance(codes, Tensor) or codes.dtype == torch.bool or codes.is_floating_point():
            found = f"are {_name(codes.dtype)}" if isinstance(codes, Tensor) else f"are of type {type(codes).__name__}"
            raise UserError(f"codes {found}, {expected}")
        depth = list(codes.shape[3:])
        if codes.ndim < 3 or not all(codes.shape[1:3]) or depth != ([self.depth] if self.depth > 1 else []):
            raise UserError(f"codes have shape {tuple(codes.shape)}, {expected}")
        codes = codes.to(torch.int64)  # first: torch can compare few of its unsigned types
        if codes.numel():
            low, high = torch.stack(codes.aminmax()).tolist()
            if low < 0 or high >= self.codebook_size:
                raise UserError(
                    f"codes run from {low} to {high}, but the codebook has 0 to {self.codebook_size - 1}; "
                    "they are another tokenizer's"
                )
        return codes.to(self.decoder.last.weight.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while: dropout would make codes random."""
        before = self.training
        if before:
            self.eval()
        try:
            yield
        finally:
            if before:
                self.train()

    def inference_state(self) -> dict[str, Tensor]:
        """The tensors that encoding and decoding need."""
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
        """Read a model folder, in evaluation mode. Raises `UserError` where anything does not fit."""
        folder = Path(folder)
        artifact = load_artifact(folder, "tokenizer")
        architecture = artifact.description.get("architecture")
        tokenizer = cls(from_dict(TokenizerConfig, architecture, str(folder / "vqgen.json")))
        own = tokenizer.state_dict()
        tensors = {**artifact.tensors, **{name: own[name] for name in tokenizer._training_names()}}
        try:
            tokenizer.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: weights and vqgen.json do not fit: {reason}") from error
        tokenizer.fingerprint = artifact.fingerprint
        return tokenizer.eval().to(device)


def _name(dtype: torch.dtype) -> str:
    """A type of numbers as people write it."""
    return str(dtype).removeprefix("torch.")
