"""Larger pictures: whether the windows in which they are drawn leave seams."""

import torch
from torch import Tensor

from vqgen.devices import rank_and_world
from vqgen.errors import UsageError
from vqgen.evaluation.measurement import Measurement, SetHash, start_processes
from vqgen.evaluation.receipt import environment
from vqgen.metric import Metric
from vqgen.progress import progress
from vqgen.sampling.drawing import Recipe
from vqgen.sampling.generator import Generator
from vqgen.sampling.windows import windows

from .images import Columns, Neighbours, shares
from .options import WindowsConfig

_METRICS = (
    Metric("step", "Mean difference of neighbouring pixels", "of 255"),
    Metric("seam", "Step across seams over steps inside windows"),
)
METRICS = {metric.name: metric for metric in _METRICS}
"""A seam lies between neighbouring codes that were drawn in different windows, of which the first draws all its codes
and the others what is not there yet. `step` is the mean absolute difference of the pixels on both sides of a seam
(`seams`), and of those on both sides of a border of two codes of the same window (`inside`): both at borders of codes.
"""


def owners(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """The place in the order of drawing of the window that draws each cell of a mask, bool (h, w) -> int64 (h, w)."""
    found = torch.full(cells.shape, -1)
    for place, window in enumerate(windows(cells[None], grid)):
        found[window.rows, window.columns][window.unknown[0]] = place
    return found


def measure_windows(config: WindowsConfig) -> Measurement:
    """Draw larger pictures, and compare steps across their seams with those inside of windows. Raises `UserError`."""
    device, (rank, world) = start_processes(config.device), rank_and_world()
    generator = Generator.load(config.model, device, config.precision)
    canvas, factor = generator.canvas(config.size), generator.tokenizer.factor
    if canvas.grid == generator.vocabulary.grid:
        found = " ".join(map(str, config.size))
        raise UsageError(f"--size: {found} is the size of training, drawn in one window; give a larger one")
    conditions = generator.conditioning.conditions()
    recipe = Recipe(conditions, config.sampling, config.seed, config.batch_size)
    generator.check(config.sampling, generator.seen(conditions, canvas))

    def over_pixels(values: Tensor) -> Tensor:
        return values.repeat_interleave(factor, 0).repeat_interleave(factor, 1)

    owner = over_pixels(owners(canvas.cells[0], generator.vocabulary.grid))
    number = over_pixels(torch.arange(canvas.grid[0] * canvas.grid[1]).view(canvas.grid))
    seams = Neighbours.where(owner, torch.ne)
    inside = Neighbours.where(owner, torch.eq) & Neighbours.where(number, torch.ne)
    columns, pixels, indices = Columns(), SetHash(), list(shares(config.n))
    with progress(config.n, "drawing", "img", rank == 0) as bar:
        for first in range(0, len(indices), config.batch_size):
            part = indices[first : first + config.batch_size]
            codes, _ = generator.draw_filling(canvas, part, recipe)
            images = generator.decode(codes)
            pixels.add_images(images, torch.full((len(part),), -1))
            columns.add("seams", seams.step(images))
            columns.add("inside", inside.step(images))
            bar.update(len(part) * world)
    steps = columns.means()
    return Measurement(
        {
            "prior": generator.prior.fingerprint,
            "tokenizer": generator.tokenizer.fingerprint,
            "images": pixels.over_processes().hexdigest(),
        },
        {"images": config.n, "windows": int(owner.max()) + 1},
        {"step": steps, "seam": steps["seams"] / max(steps["inside"], 1e-6)},
        environment(device, generator.precision, world),
    )
