"""A prior that translates and fills in: its sources are those of code files, or the image's own codes less some."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import NAMES, SIZE, make_prior, write_codes

from vqgen.errors import UsageError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.likelihood import likelihood
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.parts.source import PairedSource
from vqgen.prior.train import main as train
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import Generator
from vqgen.seeding import step_seed, window_slice
from vqgen.tokenizer.codes.format import (
    CodeFiles,
    Manifest,
    ShardEntry,
    SourceRecord,
    SplitEntry,
    checksum,
    write_shard,
)

STYLE = SourceRecord("paired", [2, 3], "d" * 64, description="other by name")


def conditioning(dropout: float = 0.1) -> Conditioning:
    return Conditioning(Vocabulary(SIZE, 1, (2, 3)), [PairedSource(STYLE, dropout, 0.5), Classes(3, NAMES)])


def test_descriptions_keep_both_uses() -> None:
    found = conditioning(0.0)
    again = Conditioning.from_description(found.vocabulary, json.loads(json.dumps(found.describe())))
    assert again.describe() == found.describe() and again.size == found.size
    assert again.paired_source is again.masked_source and again.paired_source is not None
    assert again.paired_source.inpainting == 0.5 and again.paired_source.guidable
    assert again.plain.length == again.length, "sequences have a source, whatever the step"


def test_masked_rows_have_their_own_codes_and_the_others_their_source(tmp_path: Path) -> None:
    write_codes(tmp_path, size=SIZE, source=True)
    files = CodeFiles(tmp_path, "train")
    layout = Conditioning.for_files(files, ObjectiveConfig(inpainting=0.5))
    sequences, rows = Sequences(files, layout), np.arange(4)
    codes, sources = files.gather(rows, rows * 0).flatten(1), files.gather_source(rows, rows * 0).flatten(1)
    unknown = torch.rand(4, 2, 3) < 0.5
    plain, masked = sequences.rows(rows, rows * 0), sequences.rows(rows, rows * 0, unknown)
    assert plain.wanted is None and torch.equal(layout.part(plain.tokens, "source"), sources)
    assert masked.wanted is not None and torch.equal(masked.wanted, unknown.flatten(1))
    own = codes.masked_fill(unknown.flatten(1), layout.null + 1)
    assert torch.equal(layout.part(masked.tokens, "source"), own)
    kinds = {batch.wanted is None for batch, _ in zip(sequences.training(4, 0, 0, 0, 1), range(20))}
    assert kinds == {True, False}


def test_a_large_set_is_read_in_windows_and_gives_its_own_rows(tmp_path: Path, monkeypatch) -> None:
    captions = [f"number {row % 7}" for row in range(33)]
    write_codes(tmp_path, (20, 13), views=2, size=SIZE, source=True, captions=captions)
    files = CodeFiles(tmp_path, "train")
    monkeypatch.setattr("vqgen.prior.dataset.LARGE", 2)
    monkeypatch.setattr("vqgen.seeding.WINDOW", 4)
    monkeypatch.setattr("vqgen.seeding.BLOCK", 2)
    loads, load = [], files.load
    monkeypatch.setattr(files, "load", lambda images, views: loads.append(images) or load(images, views))
    sequences = Sequences(files, Conditioning.for_files(files, ObjectiveConfig(inpainting=0.5)))

    def batches(size: int, first: int, rank: int, world: int) -> list[torch.Tensor]:
        endless = sequences.training(size, 7, first, rank, world)
        return [next(endless).tokens for _ in range(first, 10)]

    one, half = batches(4, 0, 0, 1), [batches(2, 0, rank, 2) for rank in range(2)]
    assert all(torch.equal(tokens, torch.cat(parts)) for tokens, *parts in zip(one, *half, strict=True))
    assert all(map(torch.equal, batches(4, 6, 0, 1), one[6:])), "a run that resumes has the same batches"
    # Of 33 images two windows of 16 and one of 1, with which the batch begins that goes over to the next epoch.
    assert [len(found) for found in loads] == [16, 16, 4, 16, *[8, 8, 2, 8] * 2, 8, 4, 16]
    for step, tokens in enumerate(one):
        images = window_slice(len(files), 7, step, 4)
        views = np.random.default_rng(step_seed(7, step, 1)).integers(2, size=4)
        assert torch.equal(tokens[:, -6:], files.gather(images, views).flatten(1))
        plain = sequences.rows(images, views).tokens
        text = sequences.conditioning.part(tokens, "text")
        assert torch.equal(text, sequences.conditioning.part(plain, "text"))
        assert torch.equal(tokens, plain) or (tokens == sequences.conditioning.null + 1).any(), "or masked"
    with pytest.raises(IndexError, match="not loaded"):
        load([1, 3], [0, 1]).gather([3], [0])
    with pytest.raises(IndexError, match="image 0 to 33"):
        load([0, len(files)], [0, 0])


def test_sources_of_another_grid_leave_no_place_for_the_own_codes(tmp_path: Path) -> None:
    smaller = SourceRecord("paired", [1, 2], "d" * 64, description="other by name")
    sources = np.zeros((4, 1, 1, 2), int)
    write_shard(tmp_path / "a.safetensors", np.zeros((4, 1, 2, 3), int), np.full(4, -1), SIZE, sources)
    entry = ShardEntry("a.safetensors", 4, checksum(tmp_path / "a.safetensors"))
    splits = {"train": SplitEntry(1, 4, [entry])}
    Manifest(SIZE, [2, 3], 1, [4, 6], 3, None, "e" * 64, "d" * 64, "fp32", "0", splits, source=smaller).write(tmp_path)
    files = CodeFiles(tmp_path, "train")
    assert Conditioning.for_files(files).paired_source is not None
    with pytest.raises(UsageError, match=r"--inpainting: found 0.5, .*\[1, 2\]"):
        Conditioning.for_files(files, ObjectiveConfig(inpainting=0.5))


def write_doubled(folder: Path, mark: str, tokenizer: Path) -> None:
    """Code files of random codes, whose lower row is the upper one; the source is each code less one."""
    folder.mkdir()
    splits = {}
    for number, (split, count) in enumerate({"train": 240, "heldout": 60}.items()):
        upper = np.random.default_rng(number).integers(SIZE, size=(count, 1, 1, 3))
        codes = np.concatenate([upper, upper], 2)
        path = folder / f"codes-{number:05}.safetensors"
        write_shard(path, codes, np.full(count, -1), SIZE, (codes - 1) % SIZE)
        splits[split] = SplitEntry(1, count, [ShardEntry(path.name, count, checksum(path))])
    Manifest(SIZE, [2, 3], 1, [4, 6], 3, None, mark, "d" * 64, "fp32", "0", splits, source=STYLE).write(folder)
    shutil.copytree(tokenizer, folder / "tokenizer")


def test_one_prior_learns_to_translate_and_to_fill_in(cli, tmp_path: Path) -> None:
    model = make_prior(tmp_path / "of", names=None)
    write_doubled(tmp_path / "codes", str(Prior.load(model).tokenizer_fingerprint), model / "tokenizer")
    words = ["--codes", tmp_path / "codes", "--output", tmp_path / "run", "--dim", 32, "--layers", 2, "--heads", 2]
    words += ["--dropout", 0, "--lr", 6e-3, "--lr-warmup", 10, "--steps", 400, "--batch-size", 32, "--seed", 1]
    words += ["--validate-every", 400, "--preview-images", 4, "--inpainting", 0.5]
    result = cli(train, *words)
    assert result.code == 0, result.err
    prior, files = Prior.load(tmp_path / "run"), CodeFiles(tmp_path / "codes", "heldout")
    data, accelerator, rows = Sequences(files, prior.conditioning), Accelerator(cpu=True), range(60)
    upper = torch.zeros(60, 2, 3, dtype=torch.bool)
    upper[:, 0] = True
    translated = likelihood(prior, data.ordered(rows, 60), accelerator).nats_per_token
    filled = likelihood(prior, data.ordered(rows, 60, upper), accelerator).nats_per_token
    chance = float(np.log(SIZE))
    assert translated < 0.2 * chance and filled < 0.5 * chance

    generator = Generator.load(tmp_path / "run", "cpu", "fp32")
    codes = files.gather(np.arange(8), np.zeros(8, int))
    drawn = generator.draw(range(8), {"source": (codes - 1) % SIZE}, seed=0).codes
    assert (drawn == codes).float().mean() > 0.9, "translated"
    with torch.no_grad():
        images = generator.decode(codes)
    vary = generator.vary(images, 0.5, seed=1)
    assert vary.images.shape == images.shape
    assert generator.sample(3, seed=1).codes.shape == (3, 2, 3), "plain drawing has an unknown source"
    assert generator.translate(images[:2], seed=1).codes.shape == (2, 2, 3)
    larger = generator.sample(1, size=(8, 12), seed=1)
    assert larger.images.shape == (1, 3, 8, 12)
