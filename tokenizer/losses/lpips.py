"""LPIPS (Zhang et al. 2018): the `lpips` library's networks and heads with explicitly loaded backbone weights."""

import copy
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vqgen.artifact import read_tensors, refuse_non_finite
from vqgen.errors import UserError
from vqgen.files import is_file

from .lpips_kernels import FixedConvolution, difference, with_cached_gradient
from .options import PerceptualNet, check_size

# Positions of the convolutions in torchvision's `features` of each network.
_CONVOLUTIONS = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}


class PerceptualDistance(nn.Module):
    """LPIPS between two batches of images; weights are frozen, and only the first batch receives a gradient.

    Architecture, scaling and heads are the library's. The passes are implemented here because the library's keep
    activations of the targets for a gradient and use many temporary tensors.

    Args:
        net: the backbone, "vgg" or "alex".
        weights: a safetensors file with `features.N.weight` and `features.N.bias` of torchvision's vgg16 or alexnet,
            or "torchvision" to load torchvision's own (downloaded on first use).

    Raises:
        UserError: the file is missing, damaged, or does not contain exactly these convolutions.
    """

    distance: Any
    """The library's module, with its names of weights."""

    def __init__(self, net: PerceptualNet, weights: str) -> None:
        super().__init__()
        self.net = net
        # First, because building the network takes seconds.
        found, source = convolutions(net, weights)
        import lpips

        with warnings.catch_warnings():
            # The library calls torchvision with a deprecated argument.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            # `pnet_rand` builds the backbone without downloading weights; `_load` fills them in.
            self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self._slices: dict[tuple[torch.device, torch.dtype], list[nn.Sequential]] = {}
        self._load(found, source)
        self.requires_grad_(False).eval()

    def _load(self, found: dict[str, Tensor], source: str) -> None:
        """Copy the convolutions into the library's backbone; `source` names them in errors."""
        own = {
            int(name): layer
            for part in self.distance.net.children()
            for name, layer in part.named_children()
            if isinstance(layer, nn.Conv2d)
        }
        for index, layer in own.items():
            for kind in ("weight", "bias"):
                tensor, parameter = found[f"features.{index}.{kind}"], getattr(layer, kind)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"--perceptual-weights: {source} has features.{index}.{kind} of shape {tuple(tensor.shape)}, "
                        f"the {self.net} backbone needs {tuple(parameter.shape)}"
                    )
                parameter.data.copy_(tensor)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stay in evaluation mode: the linear heads have dropout, which is not part of the distance."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """LPIPS of each pair of images (B, C, H, W) in [-1, 1]: (B,), float32; grey is repeated to three channels.

        Raises `UsageError` for images too small for the backbone's pooling layers.
        """
        check_size(self.net, *images.shape[2:])
        with torch.no_grad():
            wanted = self._features(targets)
        weights = [head.model[-1].weight.flatten() for head in self.distance.lins]

        def measure(images: Tensor) -> Tensor:
            layers = [difference(*layer) for layer in zip(self._features(images), wanted, weights)]
            return torch.stack(layers).sum(dim=0)

        return with_cached_gradient(measure, images)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of each slice of the backbone."""
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        maps = [self.distance.scaling_layer(images)]
        for part in self._backbone(images.device):
            maps.append(part(maps[-1]))
        return maps[1:]

    def _backbone(self, device: torch.device) -> list[nn.Sequential]:
        """Return the slices in autocast's precision; autocast itself would cast frozen weights in every pass."""
        own, kind = next(self.distance.net.parameters()).dtype, device.type
        key = device, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        if key not in self._slices:
            net = self.distance.net if key[1] == own else copy.deepcopy(self.distance.net).to(*key)
            parts = [[FixedConvolution(m) if isinstance(m, nn.Conv2d) else m for m in part] for part in net.children()]
            self._slices[key] = [nn.Sequential(*part) for part in parts]
        return self._slices[key]


def _convolution_names(net: str) -> set[str]:
    """Return torchvision's names of the backbone's convolutions."""
    return {f"features.{index}.{kind}" for index in _CONVOLUTIONS[net] for kind in ("weight", "bias")}


def check_weights(net: str, weights: str, option: str = "--perceptual-weights", download: str = "torchvision") -> None:
    """Raise `UserError` for a file that is missing, damaged or of another network; reads only its header.

    Args:
        option: the option that names the file, for errors.
        download: the option's value that means torchvision's own weights.
    """
    if weights == download:
        return
    path = Path(os.path.expanduser(weights))
    if not is_file(path):
        state = "is not a file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"{option}: {path} {state}; name a safetensors file, or {download}")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{option}: {path} is not a complete safetensors file ({error})") from error
    odd = min(_convolution_names(net) ^ names, default=None)
    if odd:
        state = "misses" if odd in _convolution_names(net) else "has an unknown"
        name = {"vgg": "VGG16", "alex": "AlexNet"}[net]
        raise UserError(f"{option}: {path} {state} {odd}, so it does not hold exactly the convolutions of {name}")


def convolutions(
    net: str, weights: str, option: str = "--perceptual-weights", download: str = "torchvision"
) -> tuple[dict[str, Tensor], str]:
    """Return the backbone's convolutions by torchvision's names, and their source; see `check_weights`."""
    if weights == download:
        from torchvision import models

        try:
            model = models.vgg16(weights="IMAGENET1K_V1") if net == "vgg" else models.alexnet(weights="IMAGENET1K_V1")
        except OSError as error:
            raise UserError(
                f"{option}: torchvision could not download its {net} weights ({error}); "
                "name a local safetensors file instead"
            ) from error
        return {
            key: value for key, value in model.state_dict().items() if key in _convolution_names(net)
        }, "torchvision"
    check_weights(net, weights, option, download)
    path = Path(os.path.expanduser(weights))
    found = read_tensors(path)
    refuse_non_finite(found, f"{option}: {path}")
    return {key: value.to(torch.float32) for key, value in found.items()}, str(path)
