"""Metrics of reconstructions: the registry, and `ReconstructionMetrics`, which measures a set of images as it streams.

A metric of single images is one entry of `RECONSTRUCTION` with a function; logs, receipts and reports follow.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from vqgen.errors import UserError
from vqgen.metric import Metric
from vqgen.tokenizer.data.pixels import to_float, to_uint8
from vqgen.tokenizer.losses.lpips import PerceptualDistance

from .model import Tokenizer, not_finite

SMALLEST = 8
"""Smallest height and width in pixels that SSIM is defined for."""


def mse(images: Tensor, targets: Tensor) -> Tensor:
    """Mean square error in [-1, 1] of each pair of uint8 images (B, C, H, W) -> (B,), float32."""
    return ((images.float() - targets.float()) / 127.5).square().flatten(1).mean(dim=1)


def _decibels(error: Tensor) -> Tensor:
    return 10 * torch.log10(4 / error.clamp_min(1e-11))  # in [-1, 1] the peak is 2


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images (B, C, H, W) -> (B,), float32.

    10 log10(255^2 / MSE), with the MSE over an image's pixels and channels; 116 dB for equal images.
    """
    return _decibels(mse(images, targets))


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004, 11-pixel Gaussian window) of each pair of uint8 images (B, C, H, W) -> (B,), float32.

    Computed on [0, 1], because the luminance term depends on where black is. The mean is over all pixels: windows at
    the border see the image mirrored (torchmetrics), where the reference program takes windows inside the image alone.
    Images need `SMALLEST` pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # a second of importing

    # In 16 bits the variances lose their digits: even two equal images get 0.83.
    with torch.autocast(images.device.type, enabled=False):
        one, two = images.float() / 255, targets.float() / 255
        return cast(Tensor, structural_similarity_index_measure(one, two, reduction="none", data_range=1.0))


_METRICS = (
    Metric("psnr", "PSNR", "dB", "higher", psnr),
    Metric("psnr_of_mse", "PSNR of the mean square error", "dB", "higher"),
    Metric("mse_over_variance", "MSE over variance", "", "lower"),
    Metric("ssim", "SSIM", "", "higher", ssim),
    Metric("lpips", "LPIPS", "", "lower"),
    Metric("codes_used", "Codes used"),
    Metric("usage", "Codebook usage", "share of the codes", "higher"),
    Metric("perplexity", "Perplexity of the codes"),
)
RECONSTRUCTION = {metric.name: metric for metric in _METRICS}
"""Metrics of reconstructions by name, in the order in which they are listed.

An entry's function compares uint8 reconstructions and originals (B, C, H, W), any size, and returns one value an image
(B,); the metric of a set is the mean over its images. The entries without a function:

- `psnr_of_mse` (dB): 10 log10(4 / MSE), where MSE is the mean over all images in [-1, 1]. Publications state either
  this or the mean of the images' PSNRs (`psnr`), often without saying which; this one is never the higher.
- `mse_over_variance`: that MSE divided by the variance of all values of the originals, so that 1 is reached by the best
  constant image (van den Oord et al.'s example code reports it).
- `lpips`: measured where a perceptual network is given.
- `codes_used`, `usage`, `perplexity`: see `code_metrics`.
"""


class ReconstructionMetrics:
    """Measures the reconstructions of a set of images batch by batch; keeps sums, not images.

    Every image has the same weight whatever its size. Metrics are computed in float32 under any precision.

        metrics = ReconstructionMetrics(tokenizer, perceptual, device, "bf16")
        for batch in batches:
            images, each = metrics.reconstruct(batch.images)
        metrics.compute()  # {"psnr": 26.4, ...}

    Args:
        perceptual: network of LPIPS, on `device`; None leaves LPIPS out.
        device: where the tokenizer lies.
        precision: autocast of the tokenizer: bf16 or fp16; fp32 or Accelerate's no for none.
        finite: refuse an output of the tokenizer that is not finite; a training goes on instead.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        perceptual: PerceptualDistance | None,
        device: torch.device,
        precision: str = "fp32",
        finite: bool = True,
    ) -> None:
        self.tokenizer, self.perceptual, self.device, self.finite = tokenizer, perceptual, device, finite
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.functions = {metric.name: metric.function for metric in RECONSTRUCTION.values() if metric.function}
        # The same sums in every process, also in one that gets no image.
        names = ["images", "mse", "value", "square", *self.functions, *(["lpips"] if perceptual is not None else [])]
        self.sums = {name: torch.zeros((), device=device) for name in names}
        self.counts = torch.zeros(tokenizer.depth, tokenizer.codebook_size, dtype=torch.long, device=device)

    @torch.no_grad()
    def reconstruct(self, originals: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruct uint8 images (B, C, H, W) and add them to the set.

        Returns the reconstructions, uint8 (B, C, H, W) on `device`, and the metrics of each image as `add` does.
        """
        originals = originals.to(self.device)
        at_once = self.finite and not dist.is_initialized()  # the others would wait for this process in `compute`
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            codes = self.tokenizer.encode(originals, at_once)
            results = to_uint8(self.tokenizer.decode(codes, at_once))
        return results, self.add(originals, results, codes)

    @torch.no_grad()
    def add(self, originals: Tensor, results: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Add uint8 images (B, C, H, W), their reconstructions and their codes (B, h, w[, depth]) to the set.

        Returns the metrics of each image, (B,) float32, by name.
        """
        with torch.autocast(self.device.type, enabled=False):
            each = {name: function(results, originals) for name, function in self.functions.items()}
            if self.perceptual is not None:
                each["lpips"] = self.perceptual(to_float(results), to_float(originals))
            values = to_float(originals).flatten(1)
            further = {"mse": mse(results, originals), "value": values.mean(dim=1)}
            further["square"] = values.square().mean(dim=1)
            for name, column in {**each, **further}.items():
                self.sums[name] += column.sum()
            self.sums["images"] += len(values)
        depth, size = self.counts.shape
        shifted = codes.reshape(-1, depth) + size * torch.arange(depth, device=codes.device)
        self.counts += torch.bincount(shifted.flatten(), minlength=depth * size).view(depth, size)
        return each

    def compute(self) -> dict[str, float]:
        """Return the metrics of everything added by all processes, by name, in the order of `RECONSTRUCTION`.

        Raises `UserError` where no process added an image, or the tokenizer's output was not finite.
        """
        broken = ~self.tokenizer.take_finite()
        sums, counts = torch.stack([*self.sums.values(), broken.float()]), self.counts.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        total, *rest, broken_in = sums.tolist()  # the same in all processes, so that all of them raise or none
        if self.finite and broken_in:
            raise not_finite("tokenizer")
        if not total:
            raise UserError("--data: no image that was to be measured is intact; replace or remove the broken ones")
        mean = {name: value / total for name, value in zip(list(self.sums)[1:], rest)}
        found = mean | code_metrics(counts)
        found["psnr_of_mse"] = float(_decibels(torch.tensor(mean["mse"])))
        found["mse_over_variance"] = mean["mse"] / max(mean["square"] - mean["value"] ** 2, 1e-10)
        return {name: found[name] for name in RECONSTRUCTION if name in found}


def code_metrics(counts: Tensor) -> dict[str, float]:
    """Compute the metrics of codes from how often each occurs, (depth, K); each is the mean over the depths.

    `codes_used`: how many of the K codes occur; `usage`: their share; `perplexity`: exp of the entropy of the codes.
    """
    counts = counts.cpu().double()
    share = counts / counts.sum(dim=1, keepdim=True)
    used = (counts > 0).double().sum(dim=1)
    entropy = -(share * share.clamp_min(1e-10).log()).sum(dim=1)
    return {
        "codes_used": float(used.mean()),
        "usage": float(used.mean() / counts.shape[1]),
        "perplexity": float(entropy.exp().mean()),
    }
