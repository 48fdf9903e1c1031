"""Scan orders: grids flipped and transposed in training, named by a token, against overfitting."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from helpers.models import NAMES, SIZE, make_prior, write_codes

from vqgen.errors import UsageError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.parts.scan import Scan, scanned
from vqgen.prior.train import main as train
from vqgen.prior.trainer import PriorTrainer
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.codes.format import (
    CodeFiles,
    Manifest,
    ShardEntry,
    SourceRecord,
    SplitEntry,
    checksum,
    write_shard,
)

RASTER = SIZE + 3 + 4  # codes, three classes and null, three other orders of a grid that is not square


@pytest.mark.parametrize("shape", [(3, 3), (3, 3, 2)])
def test_the_orders_are_the_eight_symmetries_of_a_square(shape: tuple[int, ...]) -> None:
    codes = torch.arange(int(np.prod(shape))).view(1, *shape).expand(8, *shape)
    found = scanned(codes, np.arange(8))
    assert torch.equal(found[0], codes[0])
    assert len({tuple(grid.flatten().tolist()) for grid in found}) == 8
    assert torch.equal(found[1], codes[0].flip(1)) and torch.equal(found[2], codes[0].flip(0))
    assert torch.equal(found[4], codes[0].transpose(0, 1))
    assert torch.equal(found.flatten(1).sort().values, codes.flatten(1).sort().values)


def test_descriptions_keep_the_orders() -> None:
    found = Conditioning(Vocabulary(SIZE, 1, (2, 3)), [Scan(4), Classes(3, NAMES)])
    again = Conditioning.from_description(found.vocabulary, json.loads(json.dumps(found.describe())))
    assert again.describe() == found.describe() and again.size == found.size == RASTER + 1
    assert again.scan is not None and again.scan.ids == 4
    for wrong in (1, True, "8", None):
        with pytest.raises(ValueError, match="scan_orders"):
            Scan.from_description({"scan_orders": wrong})
    with pytest.raises(UsageError, match="scan: found 2"):
        found.conditions({"scan": [2]})
    assert found.prefixes(found.conditions({"class": [1]}), [0]).tolist() == [[RASTER, SIZE + 1]]


def test_other_orders_end_at_three_quarters_of_the_run(tmp_path: Path) -> None:
    """Held-out sequences are in raster order; in training every sequence says its order, and its codes are in it."""
    write_codes(tmp_path, size=SIZE)
    files = CodeFiles(tmp_path, "train")
    sequences = Sequences(files, Conditioning.for_files(files, ObjectiveConfig(scan_orders=True)))
    ordered = next(sequences.ordered(range(5), 5)).tokens
    assert (ordered[:, 0] == RASTER).all()
    grids = {tuple(row[2:].tolist()) for row in ordered}

    def share(progress: float) -> float:
        batches = [b.tokens for b, _ in zip(sequences.training(5, 0, 0, 0, 1, lambda step: progress), range(200))]
        for row in torch.cat(batches[:3]):
            grid = scanned(row[2:].view(1, 2, 3), np.array([RASTER - int(row[0])]))  # each of the four undoes itself
            assert tuple(grid.flatten().tolist()) in grids
        return float((torch.cat(batches)[:, 0] != RASTER).double().mean())

    assert share(0.0) == pytest.approx(0.75, abs=0.05) and share(0.5) == pytest.approx(0.75, abs=0.05)
    assert share(0.625) == pytest.approx(0.375, abs=0.06)
    assert share(0.75) == share(1.0) == 0


def test_square_grids_are_transposed_too() -> None:
    source = SourceRecord("degraded", [2, 3], "d" * 64, ["grey"])
    for grid, of, ids in ([3, 3], None, 8), ([2, 3], None, 4), ([3, 3], source, 4):
        files = cast(CodeFiles, SimpleNamespace(grid=grid, source=of))
        scan = Scan.for_files(files, ObjectiveConfig(scan_orders=True))
        assert scan is not None and scan.ids == ids
        assert Scan.for_files(files, ObjectiveConfig()) is None


def test_utilisation_counts_the_tokens_of_prefixes() -> None:
    """A sequence of 2 tokens and 6 codes is fed but for its last code."""
    layout = Conditioning(Vocabulary(SIZE, 1, (2, 3)), [Scan(4), Classes(3, NAMES)])
    trainer = cast(PriorTrainer, SimpleNamespace(conditioning=layout, vocabulary=layout.vocabulary, flops=5, peak=1000))
    assert PriorTrainer.rates(trainer, 10.0) == {"tokens_per_second": 60.0, "mfu": 10 * 7 * 5 / 1000}


def test_a_prior_of_several_orders_draws_in_raster_order(cli, tmp_path: Path, monkeypatch) -> None:
    model = make_prior(tmp_path / "of")
    folder, mark = tmp_path / "codes", str(Prior.load(model).tokenizer_fingerprint)
    folder.mkdir()
    codes = np.random.default_rng(0).integers(SIZE, size=(12, 1, 2, 3))
    splits = {}
    for number, split in enumerate(("train", "heldout")):
        path = folder / f"codes-{number:05}.safetensors"
        write_shard(path, codes, np.arange(12) % 3, SIZE)
        splits[split] = SplitEntry(1, 12, [ShardEntry(path.name, 12, checksum(path))])
    Manifest(SIZE, [2, 3], 1, [4, 6], 3, NAMES, mark, "d" * 64, "fp32", "0", splits).write(folder)
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    words = ["--codes", tmp_path / "codes", "--output", tmp_path / "run", "--dim", 16, "--layers", 1, "--heads", 2]
    words += ["--steps", 8, "--batch-size", 4, "--lr-warmup", 1, "--validate-every", 4, "--inpainting", 0.5]
    shown: list[dict[str, torch.Tensor]] = []
    conditions = PriorTrainer._preview_conditions
    monkeypatch.setattr(PriorTrainer, "_preview_conditions", lambda own: shown.append(conditions(own)) or shown[-1])
    result = cli(train, *words, "--scan-orders", "--preview-images", 2)
    assert shown and not any(shown), "the classes in columns, as without other orders"
    assert result.code == 0, result.err
    assert "scan, 1 token" in result.err + result.out
    generator = Generator.load(tmp_path / "run", "cpu", "fp32")
    drawn = generator.sample(3, classes=[1], seed=0)
    assert drawn.codes.shape == (3, 2, 3)
    assert generator.vary(drawn.images, 0.5).codes.shape == (3, 2, 3)
    assert "scan" not in generator.conditioning.record(generator.conditioning.conditions({"class": [1]}))
