"""Reconstructions of held-out images: figures over the set, and a picture of the first ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.io import encode_png
from torchvision.utils import make_grid

from vqgen.artifact import atomic_path

from .images import ImageConfig, ImageDataset, ordered_batches
from .model import Tokenizer
from .perceptual import PerceptualDistance
from .pixels import to_float, to_uint8

_SHOWN = 32


@dataclass(frozen=True)
class Reconstructions:
    """What `reconstruct` measured, and the first images beside their reconstructions, uint8 (n, C, H, W)."""

    figures: dict[str, float]
    originals: Tensor
    images: Tensor


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 images (B, C, H, W) -> (B,), float32.

    10 log10(255^2 / MSE), the mean square over an image's pixels and channels; equal images count as MSE 1e-10.
    """
    error = (images.float() - targets.float()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / error.clamp_min(1e-10))


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    count: int,
    batch_size: int,
    config: ImageConfig,
    perceptual: PerceptualDistance | None,
    accelerator: Accelerator,
) -> Reconstructions:
    """Encode and decode the first `count` images of `dataset`, shared among the processes.

    Figures, each a mean over images of 8-bit reconstructions: `psnr` (dB), `ssim` (Wang et al. 2004, 11-pixel
    Gaussian window), `lpips` where `perceptual` is given. Over all codes of the set: `codes_used`, `usage` (their
    share of the codebook) and `perplexity` (exp of the entropy of their histogram).
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    device = accelerator.device
    # A process may have no image at all, where there are few: every sum starts at 0 in all of them.
    names = ["images", "psnr", "ssim", *(["lpips"] if perceptual is not None else [])]
    sums = torch.zeros(len(names), device=device)
    histogram = torch.zeros(tokenizer.codebook_size, device=device, dtype=torch.long)
    height, width = config.size
    none = torch.zeros(0, config.channels, height, width, dtype=torch.uint8)
    originals, images = [none], [none]
    for batch in ordered_batches(dataset, range(rank, count, world), batch_size, config):
        original = batch.images.to(device)
        target = to_float(original)
        codes = tokenizer.encode(target)
        result = to_uint8(tokenizer.decode(codes).float())
        histogram += torch.bincount(codes.flatten(), minlength=tokenizer.codebook_size)
        measured = [torch.ones(len(original), device=device), psnr(result, original), _ssim(result, original)]
        if perceptual is not None:
            measured.append(perceptual(to_float(result), target))
        sums += torch.stack([values.sum() for values in measured])
        if sum(len(part) for part in originals) < _SHOWN:
            originals.append(original.cpu())
            images.append(result.cpu())
    total, *means = cast(Tensor, accelerator.reduce(sums, "sum")).tolist()
    counts = cast(Tensor, accelerator.reduce(histogram, "sum")).cpu().double()
    share = counts / counts.sum()
    used = int((counts > 0).sum())
    figures = {name: value / total for name, value in zip(names[1:], means)}
    figures |= {
        "codes_used": float(used),
        "usage": used / tokenizer.codebook_size,
        "perplexity": float(torch.exp(-(share * share.clamp_min(1e-10).log()).sum())),
    }
    return Reconstructions(figures, torch.cat(originals)[:_SHOWN], torch.cat(images)[:_SHOWN])


def _ssim(images: Tensor, targets: Tensor) -> Tensor:
    """SSIM of each pair of uint8 images (B, C, H, W) -> (B,).

    Its luminance term is a ratio of means, so black must be 0: over [-1, 1] it would be another figure.
    """
    one, two = images.float() / 255, targets.float() / 255
    value = structural_similarity_index_measure(one, two, reduction="none", data_range=1.0)
    assert isinstance(value, Tensor)
    return value


def write_png_atomic(path: Path, image: Tensor) -> None:
    """Write a uint8 image (1 or 3, H, W) as PNG, atomically."""
    # Encoded in memory first: torchvision's own writing to a file does not notice a full disk.
    data = encode_png(image.cpu()).numpy().tobytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_comparison(path: Path, result: Reconstructions) -> None:
    """A PNG of pairs: rows of originals, each above the row of their reconstructions."""
    rows = [part for pair in zip(result.originals.split(8), result.images.split(8)) for part in pair]
    write_png_atomic(path, make_grid(torch.cat(rows), nrow=8, padding=2, pad_value=255))
