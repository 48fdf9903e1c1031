"""LPIPS (Zhang et al. 2018) on the networks of the `lpips` library, with a backbone that is never silently random."""

import copy
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgen.errors import UsageError, UserError

from .lpips_kernels import FixedConvolution, difference, remembered

# Positions of the convolutions in torchvision's `features` of each network.
_CONVOLUTIONS = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
# Pixels a side that leave something after the last pooling.
_SMALLEST = {"vgg": 16, "alex": 31}


class PerceptualDistance(nn.Module):
    """LPIPS between two batches of images; its weights are fixed, and gradients reach the first batch alone.

    Architecture, scaling and heads are the library's. The passes are made here: it keeps for a gradient what the
    targets need none for, and compares features in as many tensors as the formula has signs.

    Args:
        net: the backbone, "vgg" or "alex".
        weights: a safetensors file with `features.N.weight` and `features.N.bias` of torchvision's vgg16 or alexnet,
            or "torchvision" to load torchvision's own (it downloads them on first use).

    Raises:
        UserError: the file is missing, damaged, or does not hold exactly these convolutions.
    """

    distance: Any
    """The library's module: the weights, under the names it gives them."""

    def __init__(self, net: Literal["vgg", "alex"], weights: str) -> None:
        super().__init__()
        self.net = net
        # Before the network is built, which takes seconds.
        found, source = convolutions(net, weights)
        import lpips  # the library is needed by runs with a perceptual distance alone

        with warnings.catch_warnings():
            # The library still calls torchvision by an older argument, which warns on every construction.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            # `pnet_rand`: the backbone is built without looking for weights of its own; they follow here.
            self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self._slices: dict[tuple[torch.device, torch.dtype], list[nn.Sequential]] = {}
        self._load(found, source)
        self.requires_grad_(False).eval()

    def _load(self, found: dict[str, Tensor], source: str) -> None:
        """Put the named convolutions into the slices the library cuts the backbone into."""
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
        """Stays in evaluation mode: the linear heads have dropout, which is no part of the distance."""
        return super().train(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """LPIPS of each pair: (B, C, H, W) in [-1, 1] twice -> (B,), float32; grey is repeated to three channels.

        Raises `UsageError` for images too small for the backbone's pooling.
        """
        check_size(self.net, *images.shape[2:])
        with torch.no_grad():
            wanted = self._features(targets)
        weights = [head.model[-1].weight.flatten() for head in self.distance.lins]

        def measure(images: Tensor) -> Tensor:
            layers = [difference(*layer) for layer in zip(self._features(images), wanted, weights)]
            return torch.stack(layers).sum(dim=0)

        return remembered(measure, images)

    def _features(self, images: Tensor) -> list[Tensor]:
        """The feature maps of each slice of the backbone."""
        images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        maps = [self.distance.scaling_layer(images)]
        for part in self._backbone(images.device):
            maps.append(part(maps[-1]))
        return maps[1:]

    def _backbone(self, device: torch.device) -> list[nn.Sequential]:
        """The slices in autocast's precision; it would cast weights that are not trained anew in every pass."""
        own, kind = next(self.distance.net.parameters()).dtype, device.type
        key = device, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        if key not in self._slices:
            net = self.distance.net if key[1] == own else copy.deepcopy(self.distance.net).to(*key)
            parts = [[FixedConvolution(m) if isinstance(m, nn.Conv2d) else m for m in part] for part in net.children()]
            self._slices[key] = [nn.Sequential(*part) for part in parts]
        return self._slices[key]


def check_size(net: str, height: int, width: int) -> None:
    """Raise `UsageError` for images that leave nothing after the backbone's last pooling."""
    if min(height, width) < _SMALLEST[net]:
        raise UsageError(
            f"--perceptual-net: {net} needs at least {_SMALLEST[net]} pixels a side, found {height}x{width}; "
            f"use {'vgg' if net == 'alex' else 'larger images, or no perceptual loss'}"
        )


def _wanted(net: str) -> set[str]:
    """The names of the backbone's convolutions."""
    return {f"features.{index}.{kind}" for index in _CONVOLUTIONS[net] for kind in ("weight", "bias")}


def check_weights(net: str, weights: str, option: str = "--perceptual-weights", download: str = "torchvision") -> None:
    """Raise `UserError` for a file that is missing, damaged or of another network; reads its head alone.

    Args:
        option, download: the option that names the file, and its word for torchvision's own weights.
    """
    if weights == download:
        return
    path = Path(weights).expanduser()
    if not path.is_file():
        state = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{option}: {path} {state}; name a safetensors file, or {download}")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{option}: {path} is not a whole safetensors file ({error})") from error
    odd = min(_wanted(net) ^ names, default=None)
    if odd:
        state = "misses" if odd in _wanted(net) else "has an unknown"
        name = {"vgg": "VGG16", "alex": "AlexNet"}[net]
        raise UserError(f"{option}: {path} {state} {odd}, so it does not hold the convolutions of {name} alone")


def convolutions(
    net: str, weights: str, option: str = "--perceptual-weights", download: str = "torchvision"
) -> tuple[dict[str, Tensor], str]:
    """The backbone's convolutions by torchvision's names, and where they came from; see `check_weights`."""
    if weights == download:
        from torchvision import models

        try:
            model = models.vgg16(weights="IMAGENET1K_V1") if net == "vgg" else models.alexnet(weights="IMAGENET1K_V1")
        except OSError as error:
            raise UserError(
                f"{option}: torchvision could not fetch its {net} weights ({error}); "
                "name a local safetensors file instead"
            ) from error
        return {key: value for key, value in model.state_dict().items() if key in _wanted(net)}, "torchvision"
    check_weights(net, weights, option, download)
    path = Path(weights).expanduser()
    return {key: value.to(torch.float32) for key, value in load_file(path).items()}, str(path)
