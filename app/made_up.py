"""What stands in, in the trial of a prior, for what is not there yet: its codes, and what samples are drawn from."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from vqgen.config import parse
from vqgen.errors import UsageError
from vqgen.sampling.sample import SampleConfig
from vqgen.tokenizer.encode import TokenizeConfig

if TYPE_CHECKING:
    from vqgen.prior.conditioning import Conditions
    from vqgen.sampling.generator import Generator
    from vqgen.sampling.settings import SamplingSettings
    from vqgen.tokenizer.codes.format import SourceRecord

    from .trial import Stage

MOST_IMAGES = 4096
"""Most images of made-up codes that a prior is tried on."""


def write_codes(stage: "Stage", folder: Path) -> None:
    """Write code files of random codes, as those of this tokenizer on these images would be, and the tokenizer."""
    import numpy as np

    from vqgen.tokenizer.codes.format import Manifest, ShardEntry, SplitEntry, checksum, code_shape, write_shard
    from vqgen.tokenizer.data.sources import open_source
    from vqgen.tokenizer.model import Tokenizer
    from vqgen.tokenizer.train import TokenizerTraining

    config = parse(TokenizerTraining, stage.tokenizer)
    model, random = Tokenizer(config.architecture()), np.random.default_rng(0)
    mark, shape = model.save(folder / "tokenizer"), code_shape(model.grid, model.depth)
    splits, source = {}, _source_of(stage, list(model.grid))
    for split, images in zip(("train", "heldout"), stage.images):
        count, path = min(images, MOST_IMAGES), folder / f"{split}.safetensors"
        codes = random.integers(model.codebook_size, size=(count, 1, *shape))
        labels = random.integers(len(stage.classes), size=count) if stage.classes else np.full(count, -1)
        if stage.unlabelled:
            labels[0] = -1
        captions = None
        if stage.text_column:
            found = open_source(config.data, split, config.images.holdout, stage.text_column).captions or [""]
            found = list(islice(filter(None, found), count)) or found  # the first images may have none
            captions = [found[row % len(found)] for row in range(count)]
        sources = random.permutation(codes) if source else None
        write_shard(path, codes, labels, model.codebook_size, sources, captions)
        splits[split] = SplitEntry(1, count, [ShardEntry(path.name, count, checksum(path))])
    names = stage.classes or None
    Manifest(
        model.codebook_size, list(model.grid), model.depth, config.images.size, config.images.channels, names, mark,
        "0" * 64, "fp32", "", splits, captions=stage.text_column is not None, source=source,
    ).write(folder)  # fmt: skip


def _source_of(stage: "Stage", grid: list[int]) -> "SourceRecord | None":
    """What the source codes are, by the options of the encoding; None where there are none."""
    from vqgen.tokenizer.codes.format import SourceRecord

    config = parse(TokenizeConfig, stage.codes)
    if config.source_data is not None:
        return SourceRecord("paired", grid, "0" * 64, description="made up")
    return SourceRecord("degraded", grid, "0" * 64, config.source) if config.source else None


def conditions_of(generator: "Generator", samples: SampleConfig, image: Path) -> "tuple[Conditions, SamplingSettings]":
    """Conditions and settings of the images that `samples` asks for, checked as vqgen-sample does it.

    Given images are made up: all of them are the file `image`; of images in windows or with a part that is kept a whole
    window is drawn. Raises `UserError`.
    """
    import torch

    from vqgen.sampling.write_samples import Series
    from vqgen.tokenizer.reconstruction import write_png_atomic

    conditioning, (height, width) = generator.conditioning, generator.tokenizer.config.image_size
    write_png_atomic(image, torch.zeros(generator.tokenizer.config.channels, height, width, dtype=torch.uint8))
    samples.init_image = [image] if samples.init_image else None
    samples.source_image = [image] if samples.source_image else None
    if samples.mask or samples.box:
        samples.mask, samples.box = None, [0, 0, width, height]
    if prompts := samples.prompts:
        if conditioning.text is None:
            raise UsageError("--prompt: the prior is trained without captions; leave it out, or give --text-column")
        samples.prompt, samples.prompt_file = conditioning.text.readable(prompts), None
    series = Series.of(samples, generator)
    conditions, filling = series.conditions, series.filling
    if filling:
        windows = filling.grid != generator.vocabulary.grid
        sourced = conditioning.masked_source is not None if windows else filling.sourced
        conditions = generator.seen(conditions, replace(generator.canvas((height, width)), sourced=sourced))
    return conditions, series.settings
