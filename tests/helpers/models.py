"""Small untrained models, and code files made by hand."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import write_png

from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes, Part
from vqgen.prior.parts.text import Text, TextTokenizer
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.format import (
    Manifest,
    ShardEntry,
    SourceRecord,
    SplitEntry,
    checksum,
    code_shape,
    shard_name,
    write_shard,
)
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import ResidualConfig, VQConfig

SIZE = 12
"""Codes of the codebook."""
NAMES = ["shirt", "shoe", "bag"]


def write_codes(
    folder: Path,
    counts=(5, 4),
    views=1,
    depth=1,
    labels=None,
    names=NAMES,
    size=300,
    source: np.ndarray | bool = False,
    captions: list[str] | None = None,
) -> np.ndarray:
    """Write code files whose codes differ by image, view and position; return them (n, views, 2, 3[, depth]).

    Source codes are `source`, of the shape of the codes, or for True the codes counted from the largest down.
    """
    total, shape = sum(counts), code_shape((2, 3), depth)
    codes = np.arange(total * views * math.prod(shape)).reshape(total, views, *shape) % size
    labels = np.arange(total) % 3 if labels is None else labels
    sources = source if isinstance(source, np.ndarray) else size - 1 - codes if source else None
    shards, start = [], 0
    for number, count in enumerate(counts):
        path, rows = folder / shard_name(number), slice(start, start + count)
        further = None if sources is None else sources[rows], None if captions is None else captions[rows]
        write_shard(path, codes[rows], labels[rows], size, *further)
        shards.append(ShardEntry(path.name, count, checksum(path)))
        start += count
    splits = {"train": SplitEntry(views, total, shards), "heldout": SplitEntry(1, 0, [])}
    record = None if sources is None else SourceRecord("degraded", [2, 3], "d" * 64, ["grey"])
    manifest = Manifest(size, [2, 3], depth, [4, 6], 3, names, "f" * 64, "d" * 64, "fp32", "0", splits)
    dataclasses.replace(manifest, source=record, captions=captions is not None).write(folder)
    return codes


def make_prior(folder: Path, backbone="llama", depth=1, names=NAMES) -> Path:
    """A random prior of 2x3 codes with its tokenizer."""
    torch.manual_seed(0)
    model = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    options = {"codebook_size": SIZE, "code_dim": 4}
    quantizer = ResidualConfig(**options, depth=depth) if depth > 1 else VQConfig(**options)
    tokenizer = Tokenizer(TokenizerConfig([4, 6], 3, model, quantizer))
    mark = tokenizer.save(folder / "made-of")
    conditioning = Conditioning(Vocabulary(SIZE, depth, (2, 3)), [Classes(len(names or []), names)])
    prior = Prior(PriorConfig(backbone, dim=16, layers=2, heads=2), conditioning, (3, 4, 6), mark)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    prior.save(folder, folder / "made-of")
    return folder


def make_square_prior(folder: Path, *parts: Part, names: list[str] | None = NAMES) -> Path:
    """A random prior of 8x8 codes with the tokenizer of its 16x16 images; its classes are in the order of folders."""
    torch.manual_seed(0)
    model = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    tokenizer = Tokenizer(TokenizerConfig([16, 16], 3, model, VQConfig(codebook_size=SIZE, code_dim=4)))
    mark = tokenizer.save(folder / "made-of")
    classes = Classes(len(names or []), sorted(names or []) or None)
    conditioning = Conditioning(Vocabulary(SIZE, 1, (8, 8)), [*parts, classes])
    prior = Prior(PriorConfig(dim=16, layers=2, heads=2), conditioning, (3, 16, 16), mark)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    prior.save(folder, folder / "made-of")
    return folder


def text_part(captions: list[str], length: int = 9, **about: Any) -> Text:
    """A text part, with a tokenizer trained on these captions, for `make_square_prior`."""
    tokenizer = TextTokenizer.trained(captions, 300)
    usual = {"length": length, "ids": len(tokenizer) + 1, "dropout": 0.1, "fingerprint": tokenizer.fingerprint}
    part = Text.from_description({"text": usual | about})
    assert part is not None
    part.tokenizer = tokenizer
    return part


def make_photos(folder: Path, count: int) -> Path:
    """Smooth 16x16 images of these classes in train/ and, the same ones, test/; their colours differ."""
    random, ramp = torch.Generator().manual_seed(0), torch.linspace(0, 60, 16)
    for index in range(count):
        place = folder / "test" / NAMES[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 150, (3, 1, 1), generator=random) + ramp + ramp[:, None]
        noise = torch.randint(0, 20, (3, 16, 16), generator=random)
        write_png((image + noise).to(torch.uint8), str(place / f"{index}.png"))
    shutil.copytree(folder / "test", folder / "train")
    return folder


def codes_for(folder: Path, model: Path, **options) -> Path:
    """Code files as if made by the tokenizer of this prior."""
    folder.mkdir()
    write_codes(folder, size=SIZE, **options)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = Prior.load(model).tokenizer_fingerprint
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def conditioning_of(codebook_size, depth, grid, classes, names=None) -> Conditioning:
    """Class-conditional sequences, or unconditional ones without classes."""
    return Conditioning(Vocabulary(codebook_size, depth, grid), [Classes(classes, names or NAMES[:classes] or None)])


def small_prior(backbone="llama", depth=1, classes=3, codebook_size=8, dropout=0.1, seed=0, mark="f" * 64) -> Prior:
    torch.manual_seed(seed)
    config = PriorConfig(backbone=backbone, dim=16, layers=2, heads=2, dropout=dropout)
    return Prior(config, conditioning_of(codebook_size, depth, (2, 3), classes), (3, 4, 6), mark)


def tokens_for(prior: Prior, batch=4, seed=0) -> torch.Tensor:
    """Random legal sequences (B, 1 + length): a condition and codes, each in the range of its position."""
    vocabulary = prior.vocabulary
    random = torch.Generator().manual_seed(seed)
    shape = (batch, *code_shape(vocabulary.grid, vocabulary.depth))
    codes = torch.randint(vocabulary.codebook_size, shape, generator=random)
    classes = prior.conditioning.classes
    labels = torch.randint(-1, max(classes.count, 1), (batch,), generator=random)
    return torch.cat([classes.of_labels(labels)[:, None], vocabulary.to_tokens(codes)], dim=1)
