"""Negative log-likelihood of code files under a prior: overall, by class and by position."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from vqgen.devices import on_main, precision_of, processes
from vqgen.errors import UserError
from vqgen.metric import Metric
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.likelihood import rated, tabulate
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.progress import progress
from vqgen.sampling.generator import find_model
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.reconstruction import refuse_foreign_png, write_png_atomic

from .measurement import Measurement, SetHash, check_classes, check_count
from .options import LikelihoodConfig
from .receipt import environment

_METRICS = (
    Metric("nats_per_token", "Negative log-likelihood", "nats per token", "lower"),
    Metric("perplexity", "Perplexity of the prior", "codes", "lower"),
    Metric("bits_per_dimension", "Bits per dimension (rate of the codes)", "bits", "lower"),
    Metric("nats_by_class", "Negative log-likelihood", "nats per token", "lower"),
)
METRICS = {metric.name: metric for metric in _METRICS}
# Colour map from dark blue over red to light yellow: (position, red, green, blue).
COLOURS = ((0.0, 10, 10, 50), (0.35, 110, 20, 110), (0.65, 225, 80, 60), (1.0, 255, 245, 190))
CELL = 24  # pixels per side of a cell of the heat map


def heat_map(grid: Tensor) -> Tensor:
    """Values (h, w) or (depth, h, w) -> uint8 image (3, H, W) of cells, dark (lowest) to light; depths side by side."""
    grid = grid[None] if grid.ndim == 2 else grid
    low, high = grid.min(), grid.max()
    scaled = (grid - low) / (high - low) if high > low else torch.zeros_like(grid)
    stops, *channels = zip(*COLOURS, strict=True)
    colours = np.stack([np.interp(scaled.double().numpy(), stops, channel) for channel in channels], axis=1)
    cells = torch.from_numpy(colours).round().to(torch.uint8).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
    bar = cells.new_full((3, cells.shape[2], CELL // 4), 255)
    return torch.cat([part for cell in cells for part in (bar, cell)][1:], dim=2)


def _open(config: LikelihoodConfig) -> tuple[Prior, CodeFiles]:
    """Read the prior and the code files. Raises `UserError` if they do not belong together."""
    prior, codes = Prior.load(find_model(config.model)), CodeFiles(config.codes, config.split)
    if prior.tokenizer_fingerprint != codes.tokenizer_fingerprint:
        theirs, ours = codes.tokenizer_fingerprint[:12], prior.tokenizer_fingerprint[:12]
        what = f"{config.codes} holds codes of the tokenizer {theirs}"
        raise UserError(f"{what}, but the prior in {config.model} was trained on those of {ours}; give its codes")
    check_classes(prior, codes.class_names, config.unconditional, str(config.codes))
    kept = [part for part in prior.conditioning.plain.parts if not (config.unconditional and part.guidable)]
    for problem in [part.misfit(codes) for part in kept]:
        if problem:
            raise UserError(f"{config.codes} {problem}; give codes that have them, or --unconditional")
    if not len(codes):
        raise UserError(f"{config.codes} holds no {config.split} images; choose another --split")
    codes.check()
    return prior, codes


def _fingerprint(codes: CodeFiles, chosen: Sequence[int]) -> str:
    """Fingerprint of the codes and classes of images, of all processes together."""
    vocabulary = Vocabulary(codes.codebook_size, codes.depth, codes.grid)
    conditioning, seen = Conditioning(vocabulary, [Classes.for_files(codes, ObjectiveConfig())]), SetHash()
    for batch in Sequences(codes, conditioning).ordered(chosen, 1000):
        seen.add_images(conditioning.split(batch.tokens)[1], conditioning.part(batch.tokens, "class")[:, 0])
    return seen.over_processes().hexdigest()


def _conditions(
    codes: CodeFiles, conditioning: Conditioning, chosen: Sequence[int], unconditional: bool
) -> dict[str, str]:
    """Fingerprint of images with all that stands in front of their codes, where that is more than a class.

    Of `unconditional` ones it is that of what they have still, as training never left it out.
    """
    parts = conditioning.plain.parts
    if len(parts) == 1 or (unconditional and all(part.guidable for part in parts)):
        return {}
    seen = SetHash()
    for batch in Sequences(codes, conditioning).ordered(chosen, 1000):
        tokens = batch.layout.without(batch.tokens) if unconditional else batch.tokens
        seen.add_images(tokens, torch.full((len(batch),), -1))
    return {"sequences": seen.over_processes().hexdigest()}


def measure_likelihood(config: LikelihoodConfig) -> Measurement:
    """Negative log-likelihood, perplexity and rate of code files under a prior. Raises `UserError`."""
    if heat := config.map:
        on_main(lambda: refuse_foreign_png(heat, "--map"))
    prior, codes = _open(config)
    count = check_count(config.n, len(codes), "--n", f"the {config.split} split of {config.codes}")
    device = torch.device(processes().device or "cpu")
    precision = precision_of(config.precision, device)
    AcceleratorState._reset_state()  # an earlier measurement in this process may have had another precision
    accelerator = Accelerator(mixed_precision=precision)
    rank, world = accelerator.process_index, accelerator.num_processes
    prior, conditioning = prior.to(device), prior.conditioning
    chosen, sequences = fixed_subset(count, len(codes))[rank::world], Sequences(codes, conditioning)

    def batches():
        with progress(count, "measuring", "img", accelerator.is_main_process) as bar:
            for batch in sequences.ordered(chosen, config.batch_size):
                without = batch.layout.without(batch.tokens) if config.unconditional else batch.tokens
                yield dataclasses.replace(batch, tokens=without)
                bar.update(len(batch) * world)

    sums, counts = tabulate(prior, batches(), accelerator)
    by_position, counts = sums.sum(0) / counts.sum(0), counts[:, 0]  # every code of an image is wanted
    mean = rated(by_position.mean().item(), prior)
    grid = prior.vocabulary.to_grid(by_position[None])[0]
    grid = grid.permute(2, 0, 1) if grid.ndim == 3 else grid
    names = conditioning.group_names
    shown = [group for group in range(len(names)) if counts[group]]
    if config.map and accelerator.is_main_process:
        write_png_atomic(config.map, heat_map(grid), marked=True)
    return Measurement(
        {
            "prior": prior.fingerprint,
            "tokenizer": prior.tokenizer_fingerprint,
            "data": codes.manifest.data_fingerprint,
            "codes": _fingerprint(codes, chosen),
            **_conditions(codes, conditioning, chosen, config.unconditional),
        },
        {"images": count},
        {
            "nats_per_token": mean.nats_per_token,
            "perplexity": math.exp(mean.nats_per_token),
            "bits_per_dimension": mean.bits_per_dimension,
            "nats_by_class": {names[k]: (sums[k].mean() / counts[k]).item() for k in shown},
        },
        environment(device, precision, world),
        {"images_by_class": {names[k]: int(counts[k]) for k in shown}, "nats_by_position": grid.tolist()},
    )
