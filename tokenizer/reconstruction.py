"""Reconstructions: the one step behind every figure of them, the validation of a training run, and its picture."""

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
from vqgen.tokenizer.data.pixels import to_uint8
from vqgen.tokenizer.losses.lpips import PerceptualDistance

from .metrics import ReconstructionMetrics
from .model import Tokenizer

SHOWN = 32
"""Images in a comparison."""


@dataclass(frozen=True)
class Reconstructions:
    """What `reconstruct` measured, and the first images beside their reconstructions, uint8 (n, C, H, W)."""

    figures: dict[str, float]
    originals: Tensor
    images: Tensor


def pass_through(
    tokenizer: Tokenizer, originals: Tensor, metrics: ReconstructionMetrics
) -> tuple[Tensor, dict[str, Tensor]]:
    """uint8 images (B, C, H, W) -> their reconstructions, uint8, and the figures of each, which are added to the set's.

    Both on the tokenizer's device, where `originals` must lie.
    """
    codes = tokenizer.encode(originals)
    results = to_uint8(tokenizer.decode(codes))
    return results, metrics.add(originals, results, codes)


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
    """Measure the reconstructions of `count` images of `dataset`, shared among the processes."""
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    metrics = ReconstructionMetrics(tokenizer, perceptual, device)
    none = torch.zeros(0, config.channels, *config.size, dtype=torch.uint8)
    originals, images = [none], [none]
    for batch in ordered_batches(dataset, fixed_subset(count, len(dataset))[rank::world], batch_size, config):
        given = batch.images.to(device)
        results, _ = pass_through(tokenizer, given, metrics)
        if sum(len(part) for part in originals) < SHOWN:
            originals.append(given.cpu())
            images.append(results.cpu())
    return Reconstructions(metrics.figures(accelerator), torch.cat(originals)[:SHOWN], torch.cat(images)[:SHOWN])


def write_png_atomic(path: Path, image: Tensor) -> None:
    """Write a uint8 image (1 or 3, H, W) as PNG, atomically."""
    # Encoded in memory first: torchvision's own writing to a file does not notice a full disk.
    data = encode_png(image.cpu()).numpy().tobytes()
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_comparison(path: Path, result: Reconstructions) -> None:
    """A PNG of pairs: rows of originals, each above the row of their reconstructions."""
    columns = min(8, len(result.images))
    # The last rows are filled with white: else their reconstructions would stand beside the originals.
    blank = torch.full_like(result.images[:1], 255).expand(-len(result.images) % columns, -1, -1, -1)
    given = [torch.cat([part, blank]).split(columns) for part in (result.originals, result.images)]
    rows = [row for pair in zip(*given) for row in pair]
    write_png_atomic(path, make_grid(torch.cat(rows), nrow=columns, padding=2, pad_value=255))
