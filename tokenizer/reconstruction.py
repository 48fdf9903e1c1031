"""Validation of a training run: the metrics of reconstructions, and the picture that compares some of them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import make_grid

from vqgen.files import atomic_path
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.data.dataset import ImageDataset, ordered_batches
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.losses.lpips import PerceptualDistance

from .metrics import ReconstructionMetrics
from .model import Tokenizer

SHOWN = 32  # images in a comparison


@dataclass(frozen=True)
class Reconstructions:
    """Metrics of a set by name, and its first images and their reconstructions, uint8 (n, C, H, W)."""

    metrics: dict[str, float]
    originals: Tensor
    images: Tensor


def reconstruct(
    tokenizer: Tokenizer,
    dataset: ImageDataset,
    count: int,
    batch_size: int,
    config: ImageConfig,
    perceptual: PerceptualDistance | None,
    accelerator: Accelerator,
) -> Reconstructions:
    """Measure the reconstructions of a fixed subset of `count` images, divided among the processes of `accelerator`."""
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    metrics = ReconstructionMetrics(tokenizer, perceptual, device, accelerator.mixed_precision)
    none = torch.zeros(0, config.channels, *config.size, dtype=torch.uint8)
    originals, images = [none], [none]
    for batch in ordered_batches(dataset, fixed_subset(count, len(dataset))[rank::world], batch_size, config):
        results, _ = metrics.reconstruct(batch.images)
        if sum(map(len, originals)) < SHOWN:
            originals.append(batch.images)
            images.append(results.cpu())
    return Reconstructions(metrics.compute(), torch.cat(originals)[:SHOWN], torch.cat(images)[:SHOWN])


def write_png_atomic(path: Path, image: Tensor) -> None:
    """Write a uint8 image (1 or 3, H, W) as PNG, atomically."""
    with atomic_path(path) as temporary:  # torchvision's `write_png` does not report a full disk
        temporary.write_bytes(encode_png(image.cpu()).numpy().tobytes())


def write_comparison(path: Path, result: Reconstructions) -> None:
    """Write a PNG in which each row of originals is followed by the row of their reconstructions."""
    columns = min(8, len(result.images))
    # White images complete the last row.
    blank = torch.full_like(result.images[:1], 255).expand(-len(result.images) % columns, -1, -1, -1)
    pair = [torch.cat([part, blank]).split(columns) for part in (result.originals, result.images)]
    rows = [row for rows in zip(*pair) for row in rows]
    write_png_atomic(path, make_grid(torch.cat(rows), nrow=columns, padding=2, pad_value=255))
