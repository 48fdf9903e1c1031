"""Figures of reconstructions: of each image, and of a whole set as it streams by."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.losses.lpips import PerceptualDistance

from .model import Tokenizer

SMALLEST = 8
"""Pixels a side that SSIM needs."""


class ReconstructionMetrics:
    """The figures of a set of reconstructions; only sums over it are kept.

    Of 8-bit images, every image weighing the same whatever its size:

    - `psnr` (dB): the mean of the images' own PSNRs.
    - `psnr_of_mse` (dB): 10 log10(4 / MSE), where MSE is the mean over all images in [-1, 1]. Published figures are the
      one or the other, often without saying which; this one is never the higher.
    - `mse_over_variance`: that MSE by the variance of the originals' values about their single mean, so that 1 is what
      the best plain grey would get. van den Oord et al.'s own example code reports it.
    - `ssim`: Wang et al. 2004, 11-pixel Gaussian window, on [0, 1]. In float32 whatever autocast says: in 16 bits its
      variances drown, and even two equal images get 0.83.
    - `lpips`: where `perceptual` is given.

    Of the codes, at each depth by itself and then averaged over the depths: `codes_used`, how many of the codebook
    occur; `usage`, their share of it; `perplexity`, exp of the entropy of their histogram.
    """

    def __init__(self, tokenizer: Tokenizer, perceptual: PerceptualDistance | None, device: torch.device) -> None:
        self.perceptual = perceptual
        # A process may have no image at all, where there are few: every sum starts at 0 in all of them.
        names = ("images", "psnr", "mse", "value", "square", "ssim", *(["lpips"] if perceptual is not None else []))
        self.sums = {name: torch.zeros((), device=device) for name in names}
        self.counts = torch.zeros(tokenizer.depth, tokenizer.codebook_size, dtype=torch.long, device=device)

    def add(self, originals: Tensor, results: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Take in uint8 images (B, C, H, W), their reconstructions, and the codes (B, h, w[, depth]) between them.

        Returns `psnr`, `ssim` and, where it is measured, `lpips` of each image: (B,) float32.
        """
        each = {"psnr": psnr(results, originals), "ssim": ssim(results, originals)}
        if self.perceptual is not None:
            each["lpips"] = self.perceptual(to_float(results), to_float(originals))
        values = to_float(originals).flatten(1)
        further = {
            "images": torch.ones_like(each["psnr"]),
            "mse": mse(results, originals),
            "value": values.mean(dim=1),
            "square": values.square().mean(dim=1),
        }
        for name, figures in {**each, **further}.items():
            self.sums[name] += figures.sum()
        depth, size = self.counts.shape
        shifted = codes.reshape(-1, depth) + size * torch.arange(depth, device=codes.device)
        self.counts += torch.bincount(shifted.flatten(), minlength=depth * size).view(depth, size)
        return each

    def figures(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """The figures of all that was added, in every process of `accelerator` where it is given."""
        sums, counts = torch.stack(list(self.sums.values())), self.counts
        if accelerator is not None:
            sums, counts = (cast(Tensor, accelerator.reduce(part, "sum")) for part in (sums, counts))
        total, *rest = sums.tolist()
        mean = {name: value / total for name, value in zip(list(self.sums)[1:], rest)}
        figures = {
            "psnr": mean["psnr"],
            "psnr_of_mse": float(_decibels(torch.tensor(mean["mse"]))),
            "mse_over_variance": mean["mse"] / max(mean["square"] - mean["value"] ** 2, 1e-10),
            "ssim": mean["ssim"],
        }
        if "lpips" in mean:
            figures["lpips"] = mean["lpips"]
        return figures | code_metrics(counts)


def code_metrics(counts: Tensor) -> dict[str, float]:
    """Compute `codes_used`, `usage` and `perplexity` from counts of the codes, (depth, K)."""
    counts = counts.cpu().double()
    share = counts / counts.sum(dim=1, keepdim=True)
    used = (counts > 0).double().sum(dim=1)
    entropy = -(share * share.clamp_min(1e-10).log()).sum(dim=1)
    return {
        "codes_used": float(used.mean()),
        "usage": float(used.mean() / counts.shape[1]),
        "perplexity": float(entropy.exp().mean()),
    }


def mse(images: Tensor, targets: Tensor) -> Tensor:
    """Mean square error in [-1, 1] of each pair of uint8 images (B, C, H, W) -> (B,), float32."""
    return ((images.float() - targets.float()) / 127.5).square().flatten(1).mean(dim=1)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images (B, C, H, W) -> (B,), float32.

    10 log10(255^2 / MSE), the mean square over an image's pixels and channels; of equal images 116 dB.
    """
    return _decibels(mse(images, targets))


def _decibels(error: Tensor) -> Tensor:
    """PSNR of mean square errors in [-1, 1], where the peak is 2."""
    return 10 * torch.log10(4 / error.clamp_min(1e-11))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """SSIM of each pair of uint8 images (B, C, H, W) of at least 8 pixels a side -> (B,), float32.

    Its luminance term is a ratio of means, so black must be 0: over [-1, 1] it would be another figure.
    """
    with torch.autocast(images.device.type, enabled=False):
        one, two = images.float() / 255, targets.float() / 255
        value = structural_similarity_index_measure(one, two, reduction="none", data_range=1.0)
    assert isinstance(value, Tensor)
    return value
