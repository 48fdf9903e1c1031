"""Validation of a training run: the metrics of reconstructions, and the picture that compares some of them."""

import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from vqgen.errors import UsageError
from vqgen.files import atomic_path, open_regular
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.data.dataset import ImageDataset, ordered_batches
from vqgen.tokenizer.data.pixels import image_grid
from vqgen.tokenizer.losses.lpips import PerceptualDistance

from .metrics import ReconstructionMetrics
from .model import Tokenizer

SHOWN = 32  # images in a comparison
_HEADER = 33  # bytes of a PNG's signature and IHDR chunk
_TEXT = b"tEXtSoftware\0vqgen"
# The chunk by which a picture is known as ours.
_MARK = struct.pack(">I", len(_TEXT) - 4) + _TEXT + struct.pack(">I", zlib.crc32(_TEXT))


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
    perceptual: PerceptualDistance | None,
    accelerator: Accelerator,
) -> Reconstructions:
    """Measure the reconstructions of a fixed subset of `count` images, divided among the processes of `accelerator`.

    An output that is not finite does not end the run that is validated. Raises `UserError` where no image is intact.
    """
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    metrics = ReconstructionMetrics(tokenizer, perceptual, device, accelerator.mixed_precision, finite=False)
    none = torch.zeros(0, dataset.config.channels, *dataset.config.size, dtype=torch.uint8)
    originals, images = [none], [none]
    for batch in ordered_batches(dataset, fixed_subset(count, len(dataset))[rank::world], batch_size):
        results, _ = metrics.reconstruct(batch.images)
        if sum(map(len, originals)) < SHOWN:
            originals.append(batch.images)
            images.append(results.cpu())
    return Reconstructions(metrics.compute(), torch.cat(originals)[:SHOWN], torch.cat(images)[:SHOWN])


@cache
def _png_encoder() -> Callable[[Tensor, int], Tensor]:
    """torchvision's PNG encoder: (image, compression level) -> bytes.

    From its library alone where that is found: the import of torchvision takes longer than drawing 64 images.
    """
    package = find_spec("torchvision")
    for folder in (package and package.submodule_search_locations) or ():
        for library in Path(folder).glob("image*.so"):
            with suppress(OSError, AttributeError):
                torch.ops.load_library(library)
                return torch.ops.image.encode_png
    from torchvision.io import encode_png

    return encode_png


def write_png_atomic(path: Path, image: Tensor, marked: bool = False) -> None:
    """Write a uint8 image (1 or 3, H, W) as PNG, atomically; `marked` so that `refuse_foreign_png` knows it again."""
    data = _png_encoder()(image.cpu(), 6).numpy().tobytes()
    with atomic_path(path) as temporary:  # torchvision's `write_png` does not report a full disk
        temporary.write_bytes(data[:_HEADER] + _MARK + data[_HEADER:] if marked else data)


def refuse_foreign_png(path: Path, option: str) -> None:
    """Raise `UsageError` where `path` is anything but a new file or a PNG that was written `marked`."""
    if not os.path.lexists(path):
        return
    start = b""
    with suppress(OSError), open_regular(path) as file:
        start = file.read(_HEADER + len(_MARK))
    if start[_HEADER:] != _MARK:
        raise UsageError(f"{option}: {path} is there and no picture of vqgen; move it or name another")


def write_comparison(path: Path, result: Reconstructions) -> None:
    """Write a PNG in which each row of originals is followed by the row of their reconstructions.

    Nothing is written where this process measured none, because all images of its share are broken.
    """
    if not len(result.images):
        return
    columns = min(8, len(result.images))
    # White images complete the last row.
    blank = torch.full_like(result.images[:1], 255).expand(-len(result.images) % columns, -1, -1, -1)
    pair = [torch.cat([part, blank]).split(columns) for part in (result.originals, result.images)]
    rows = [row for rows in zip(*pair) for row in rows]
    write_png_atomic(path, image_grid(torch.cat(rows), columns))
