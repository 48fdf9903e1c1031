"""Images as features: the networks behind FID and its like, and one pass over a set of images.

No weights are fetched unless `download` is asked for, and none are unpickled but the library's own.
"""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vqgen.artifact import fingerprint, read_tensors
from vqgen.errors import UsageError, UserError
from vqgen.tokenizer.losses.lpips import convolutions

Network = Literal["inception", "fd-vgg16"]
LEAST_VGG16 = 16
"""Pixels a side that leave something after VGG16's fourth pooling."""


class Extractor(Protocol):
    """A network that is not trained: uint8 images (B, 3, H, W) -> features (B, D) and, of Inception, logits."""

    name: str
    """What the Fréchet distance in its features is called."""
    kernel: str
    """What the kernel distance in its features is called."""
    fingerprint: str
    """sha256 of its weights."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Inception:
    """The network of the published FID, by torch-fidelity: 2,048 features of images brought to 299 pixels as TensorFlow
    did it, and the logits of the Inception Score."""

    name, kernel = "fid", "kid"

    def __init__(self, weights: str, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        def build(path: str | None) -> nn.Module:
            return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], path, verbose=False)

        if weights == "download":
            try:
                self.network = build(None)
            except OSError as error:
                raise UserError(f"--weights: the download failed ({error}); name a local file instead") from error
        else:
            state = _inception_state(Path(weights).expanduser())
            # The library reads its file as a pickle: it gets one that was written here, of tensors alone.
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "inception.pth"
                torch.save(state, path)
                try:
                    self.network = build(str(path))
                except RuntimeError as error:
                    reason = " ".join(str(error).split())[:200]
                    raise UserError(f"--weights: {weights} is not the Inception network of FID ({reason})") from error
        self.fingerprint = fingerprint(self.network.state_dict())
        self.network.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images)
        return features, logits


def _inception_state(path: Path) -> dict[str, Tensor]:
    """The weights in a .safetensors file, or in a .pth file that holds nothing but tensors. Raises `UserError`."""
    if not path.is_file():
        raise UserError(f"--weights: {path} does not exist; name a file, or download")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on a file that is not its own
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"--weights: {path} cannot be read as tensors ({reason}); name another file") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights: {path} holds more than tensors by name; name another file")
    return state


class Vgg16:
    """The last convolutions of VGG16 (Simonyan & Zisserman 2015), averaged over the image: 512 features.

    For machines without the Inception network. Images keep their size, so figures of different sizes do not compare;
    nor do they with FID, which is why they are called otherwise.
    """

    name, kernel = "fd-vgg16", "kd-vgg16"

    def __init__(self, weights: str, device: torch.device) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        found, _ = convolutions("vgg", weights, "--weights", "download")
        self.network = make_layers(cfgs["D"])[:30].eval().requires_grad_(False)  # up to the last ReLU
        try:
            self.network.load_state_dict({name.removeprefix("features."): value for name, value in found.items()})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--weights: {weights} is not VGG16 ({reason}); name another file") from error
        self.fingerprint = fingerprint(self.network.state_dict())
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean, self.deviation = (
            torch.tensor(values, device=device)[:, None, None]
            for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if min(images.shape[2:]) < LEAST_VGG16:
            sides = "x".join(map(str, images.shape[2:]))
            raise UsageError(f"--extractor: fd-vgg16 needs {LEAST_VGG16} pixels a side, found {sides}; use inception")
        x = (images.float() / 255 - self.mean) / self.deviation
        return self.network(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3)), None


def extractor_for(network: Network, weights: str | None, device: torch.device) -> Extractor:
    """Build a network with the weights of a local file, or with its own download where `weights` says so."""
    if weights is None:
        raise UsageError(f"--weights: {network} needs its weights; name a local file, or say download")
    try:
        import torch_fidelity  # noqa: F401  # which all distances need, before anything is computed

        return (Inception if network == "inception" else Vgg16)(weights, device)
    except ImportError as error:
        raise UsageError(f"--extractor: {network} needs torch-fidelity; pip install torch-fidelity") from error
    except SafetensorError as error:
        raise UserError(f"--weights: {weights} is not a whole safetensors file ({error})") from error


@dataclass
class PixelHash:
    """A fingerprint of a set of images, whatever their order: the sum of each one's sha256, over pixels and label."""

    total: int = 0
    count: int = 0

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Take in uint8 (B, C, H, W) and labels (B,), -1 for none."""
        head = " ".join(map(str, images.shape[1:])).encode()
        for image, label in zip(images.cpu().contiguous().numpy(), labels.tolist(), strict=True):
            self.add_one(head + b" %d\n" % label + image.tobytes())

    def add_one(self, content: bytes) -> None:
        """Take in one member of the set, whatever it is made of."""
        digest = hashlib.sha256(content).digest()
        self.total = (self.total + int.from_bytes(digest, "big")) % 2**256
        self.count += 1

    def join(self, others: Iterable["PixelHash"]) -> "PixelHash":
        """That of several sets together."""
        others = list(others)
        return PixelHash(sum(o.total for o in others) % 2**256, sum(o.count for o in others))

    def hexdigest(self) -> str:
        return hashlib.sha256(b"%d %064x" % (self.count, self.total)).hexdigest()


@torch.inference_mode()
def extract(extractor: Extractor, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """uint8 images (B, 1 or 3, H, W) -> float32 features (B, D) and logits on the CPU; grey becomes colour."""
    given = images.to(device)
    features, logits = extractor(given.expand(-1, 3, -1, -1) if given.shape[1] == 1 else given)
    return features.float().cpu(), None if logits is None else logits.float().cpu()
