"""vqgen-likelihood: how well a prior predicts code files, by class and by position.

The output folder gets likelihood.json and positions.png, a map of the grid: what each code costs, dark where the prior
knows it beforehand.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from vqgen import __version__
from vqgen.config import command
from vqgen.devices import precision_of, processes
from vqgen.errors import UsageError, UserError
from vqgen.files import write_json
from vqgen.options import at_least
from vqgen.progress import progress
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.reconstruction import write_png_atomic

from .dataset import Sequences
from .likelihood import rated, tabulate
from .model import Prior

FIGURES, MAP = "likelihood.json", "positions.png"
# Dark blue over red to light yellow, as (position, red, green, blue).
COLOURS = ((0.0, 10, 10, 50), (0.35, 110, 20, 110), (0.65, 225, 80, 60), (1.0, 255, 245, 190))
CELL = 24


@dataclass
class LikelihoodConfig:
    """What is measured, with what."""

    model: Path
    """Run or model folder of the prior."""
    codes: Path
    """Folder of code files, of the tokenizer that the prior was trained with."""
    output: Path | None = None
    """Folder for likelihood.json and positions.png, which are replaced there; by default likelihood-SPLIT inside the
    model's folder, with what is measured otherwise in its name."""
    split: Literal["heldout", "train"] = "heldout"
    """Which images of the code files."""
    n: int = 0
    """Images to measure, the same ones from all over the set; 0 = all."""
    unconditional: bool = False
    """Leave the classes out, as guidance does."""
    batch_size: int = 64
    """Images at once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Autocast; auto takes 16 bits where the hardware has them, which is faster and off by about 0.1 %."""

    def __post_init__(self) -> None:
        at_least(self, n=0, batch_size=1)


def heat_map(grid: Tensor) -> Tensor:
    """Values (h, w) or (depth, h, w) -> uint8 (3, H, W): a cell each, from the lowest (dark) to the highest (light);
    depths side by side."""
    grid = grid[None] if grid.ndim == 2 else grid
    low, high = grid.min(), grid.max()
    scaled = (grid - low) / (high - low) if high > low else torch.zeros_like(grid)
    stops = torch.tensor(COLOURS, dtype=torch.float64)
    upper = torch.searchsorted(stops[:, 0].contiguous(), scaled.double().contiguous()).clamp(1, len(stops) - 1)
    before, after = stops[upper - 1], stops[upper]
    share = ((scaled - before[..., 0]) / (after[..., 0] - before[..., 0]))[..., None]
    colours = (before[..., 1:] + share * (after[..., 1:] - before[..., 1:])).round().to(torch.uint8)
    cells = colours.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).permute(0, 3, 1, 2)
    bar = cells.new_full((3, cells.shape[2], CELL // 4), 255)
    return torch.cat([part for cell in cells for part in (bar, cell)][1:], dim=2)


def measure(config: LikelihoodConfig) -> dict[str, Any]:
    """Measure the prior; what likelihood.json holds, the same in all processes. Raises `UserError`."""
    prior, codes = Prior.load(config.model), CodeFiles(config.codes, config.split)
    if prior.tokenizer_fingerprint != codes.tokenizer_fingerprint:
        raise UserError(
            f"{config.codes} holds codes of the tokenizer {codes.tokenizer_fingerprint[:12]}, but the prior in "
            f"{config.model} was trained on those of {prior.tokenizer_fingerprint[:12]}; give its codes"
        )
    conditioning, known = prior.conditioning, prior.conditioning.classes.names or []
    if conditioning.classes.count and (codes.class_names or []) != known and not config.unconditional:
        theirs = ", ".join(codes.class_names or []) or "none"
        raise UserError(
            f"{config.codes} has the classes {theirs}, the prior has {', '.join(known)}; give codes of its classes, "
            "or --unconditional"
        )
    if config.unconditional and conditioning.classes.informative:
        conditioning.check_absence("--unconditional:")
    if not len(codes):
        raise UserError(f"{config.codes} holds no {config.split} images; choose another --split")
    if config.n > len(codes):
        raise UsageError(
            f"--n: found {config.n}, but the {config.split} split of {config.codes} holds {len(codes)}; ask for fewer"
        )
    device = torch.device(processes().device or "cpu")
    precision = precision_of(config.precision, device)
    accelerator = Accelerator(mixed_precision=precision)
    prior = prior.to(device)
    count = config.n or len(codes)
    mine = fixed_subset(count, len(codes))[accelerator.process_index :: accelerator.num_processes]
    sequences = Sequences(codes, conditioning)

    def batches():
        with progress(count, "measuring", "img", accelerator.is_main_process) as bar:
            for tokens in sequences.ordered(mine, config.batch_size):
                yield conditioning.without(tokens) if config.unconditional else tokens
                bar.update(len(tokens) * accelerator.num_processes)

    sums, counts = tabulate(prior, batches(), accelerator)
    length = prior.vocabulary.length
    by_position = sums.sum(0) / counts.sum()
    mean = rated(by_position.mean().item(), prior)
    grid = prior.vocabulary.to_grid(by_position[None])[0]
    grid = grid.permute(2, 0, 1) if grid.ndim == 3 else grid
    by_class = {
        name: {
            "images": int(counts[group]),
            **_figures(rated((sums[group].sum() / counts[group] / length).item(), prior)),
        }
        for group, name in enumerate(conditioning.group_names)
        if counts[group]
    }
    accelerator.wait_for_everyone()
    return {
        "version": __version__,
        "model": str(config.model),
        "prior_fingerprint": prior.fingerprint,
        "tokenizer_fingerprint": prior.tokenizer_fingerprint,
        "data_fingerprint": codes.manifest.data_fingerprint,
        "split": config.split,
        "images": count,
        "unconditional": config.unconditional,
        "precision": precision.replace("no", "fp32"),
        "device": device.type,
        **_figures(mean),
        "by_class": by_class,
        "nats_by_position": grid.tolist(),
    }


def write(config: LikelihoodConfig, found: dict[str, Any]) -> Path:
    """Write likelihood.json and positions.png; the folder they are in."""
    kind = ("-unconditional" if config.unconditional else "") + (f"-{found['images']}" if config.n else "")
    kind += "" if found["precision"] == "fp32" else f"-{found['precision']}"
    output = config.output or config.model / f"likelihood-{config.split}{kind}"
    write_png_atomic(output / MAP, heat_map(torch.tensor(found["nats_by_position"], dtype=torch.float64)))
    write_json(output / FIGURES, found)
    return output


def _figures(found: Any) -> dict[str, float]:
    return {**asdict(found), "perplexity": math.exp(found.nats_per_token)}


def run(config: LikelihoodConfig) -> None:
    """See how well a prior predicts code files: nats a token, bits a dimension, by class and by position."""
    found = measure(config)
    if not processes().is_main_process:
        return
    output = write(config, found)
    for name, each in found["by_class"].items() if len(found["by_class"]) > 1 else ():
        print(f"{name}: {each['nats_per_token']:.4f} nats per token over {each['images']} images")
    print(
        f"{found['images']} {found['split']} images: {found['nats_per_token']:.4f} nats per token, perplexity "
        f"{found['perplexity']:.1f}; {found['bits_per_dimension']:.4f} bits per dimension, the rate of the codes"
    )
    print(f"look at {output / MAP}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-likelihood", LikelihoodConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
