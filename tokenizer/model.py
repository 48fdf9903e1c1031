"""The tokenizer: images to grids of codes and back, and its model folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vqgen.artifact import load_artifact, save_artifact
from vqgen.config import as_dict, from_dict
from vqgen.errors import UsageError, UserError

from .layers import Decoder, Encoder, ModelConfig
from .quantize import Quantized, QuantizerConfig, VectorQuantizer


@dataclass
class TokenizerConfig:
    """The architecture, as kept in `vqgen.json`."""

    image_size: list[int]
    """Height and width of the training images, in pixels."""
    channels: int
    """1 for grey, 3 for RGB."""
    model: ModelConfig = field(default_factory=ModelConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    fit: Literal["crop", "pad"] = "crop"
    """How training images of another aspect ratio were fitted; tokenizing does the same."""

    def __post_init__(self) -> None:
        factor = self.model.factor
        if any(side < factor or side % factor for side in self.image_size):
            height, width = self.image_size
            raise UsageError(
                f"--size: {height}x{width} is not divisible by the downsampling factor {factor} "
                f"of --multipliers {self.model.multipliers} and --patch {self.model.patch}; change one of them"
            )


@dataclass(frozen=True)
class TokenizerOutput:
    """Reconstructed images (B, C, H, W), not clamped, and what the quantizer returned."""

    images: Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """Encoder, quantizer and decoder (VQ-VAE, van den Oord et al. 2017; VQGAN, Esser et al. 2021).

    Images are float (B, C, H, W) in [-1, 1], H and W divisible by `factor`; codes are int64 (B, H/f, W/f).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.channels, config.model)
        self.quantizer = VectorQuantizer(config.model.latent_dim, config.quantizer)
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
        return self.config.quantizer.codebook_size

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
        """Images (B, C, H, W) in [-1, 1] -> codes int64 (B, H/f, W/f); a size that does not fit is a `UserError`."""
        channels, height, width = images.shape[1:]
        if channels != self.config.channels or height % self.factor or width % self.factor:
            raise UserError(
                f"images are {channels}x{height}x{width}; this tokenizer takes {self.config.channels} channels "
                f"and sides divisible by {self.factor}"
            )
        return self.quantizer.encode(self.encoder(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> images (B, C, h*f, w*f), about [-1, 1], not clamped."""
        return self.decoder(self.quantizer.decode(codes))

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
