"""LPIPS (Zhang et al. 2018) by the `lpips` library, with a backbone that is never silently random."""

import warnings
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vqgen.errors import UsageError, UserError

# Positions of the convolutions in torchvision's `features` of each network.
_CONVOLUTIONS = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}
# Pixels a side that leave something after the last pooling.
_SMALLEST = {"vgg": 16, "alex": 31}


class PerceptualDistance(nn.Module):
    """LPIPS between two batches of images; its weights are fixed and no gradient reaches them.

    Args:
        net: the backbone, "vgg" or "alex".
        weights: a safetensors file with `features.N.weight` and `features.N.bias` of torchvision's vgg16 or alexnet,
            or "torchvision" to load torchvision's own (it downloads them on first use).

    Raises:
        UserError: the file is missing, damaged, or does not hold exactly these convolutions.
    """

    def __init__(self, net: Literal["vgg", "alex"], weights: str) -> None:
        super().__init__()
        self.net = net
        # Before the network is built, which takes seconds.
        found, source = _convolutions(net, weights)
        import lpips  # the library is needed by runs with a perceptual distance alone

        with warnings.catch_warnings():
            # The library still calls torchvision by an older argument, which warns on every construction.
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            # `pnet_rand`: the backbone is built without looking for weights of its own; they follow here.
            self.distance = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
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
        pair = [t.expand(-1, 3, -1, -1) if t.shape[1] == 1 else t for t in (images, targets)]
        return self.distance(*pair).float().flatten()


def check_size(net: str, height: int, width: int) -> None:
    """Raise `UsageError` for images that leave nothing after the backbone's last pooling."""
    if min(height, width) < _SMALLEST[net]:
        raise UsageError(
            f"--perceptual-net: {net} needs at least {_SMALLEST[net]} pixels a side, found {height}x{width}; "
            f"use {'vgg' if net == 'alex' else 'larger images, or no perceptual loss'}"
        )


def _convolutions(net: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """The backbone's convolutions by torchvision's names, and where they came from."""
    wanted = {f"features.{index}.{kind}" for index in _CONVOLUTIONS[net] for kind in ("weight", "bias")}
    if weights == "torchvision":
        from torchvision import models

        try:
            model = models.vgg16(weights="IMAGENET1K_V1") if net == "vgg" else models.alexnet(weights="IMAGENET1K_V1")
        except OSError as error:
            raise UserError(
                f"--perceptual-weights: torchvision could not fetch its {net} weights ({error}); "
                "name a local safetensors file instead"
            ) from error
        return {key: value for key, value in model.state_dict().items() if key in wanted}, "torchvision"
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(f"--perceptual-weights: {path} does not exist; name a safetensors file, or torchvision")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--perceptual-weights: {path} is not a whole safetensors file ({error})") from error
    if set(tensors) != wanted:
        odd = sorted(wanted ^ set(tensors))[0]
        state = "misses" if odd in wanted else "has an unknown"
        raise UserError(f"--perceptual-weights: {path} {state} {odd}, so it is not the {net} backbone of LPIPS")
    return {key: value.to(torch.float32) for key, value in tensors.items()}, str(path)
