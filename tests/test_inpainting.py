"""Inpainting: a prior that is given the image's own codes, some of them unknown, in front of the sequence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import NAMES, SIZE, make_prior, write_codes
from transformers import AutoModelForCausalLM

from vqgen.errors import UsageError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.likelihood import likelihood
from vqgen.prior.model import Prior
from vqgen.prior.objective import objective
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.prior.parts import Classes
from vqgen.prior.source import UNKNOWN, Source, masked, random_masks
from vqgen.prior.train import main
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.format import (
    CodeFiles,
    Manifest,
    ShardEntry,
    SplitEntry,
    checksum,
    shard_name,
    write_shard,
)


def sequences(folder: Path, share: float, depth: int = 1) -> Sequences:
    files = CodeFiles(folder, "train")
    return Sequences(files, Conditioning.for_files(files, ObjectiveConfig(inpainting=share)))


def test_masks_are_of_the_stated_kinds() -> None:
    masks = random_masks(4000, (6, 8), np.random.default_rng(0))
    assert masks.shape == (4000, 6, 8) and masks.flatten(1).any(1).all(), "an image with nothing to learn is a waste"
    everything = masks.flatten(1).all(1)
    assert 0.08 < everything.float().mean() < 0.13
    rows, columns = masks.any(2), masks.any(1)
    rectangles = masks == (rows[:, :, None] & columns[:, None, :])
    found = rectangles.flatten(1).all(1) & ~everything
    assert 0.4 < found.float().mean() < 0.55
    shares = masks[~found & ~everything].float().mean((1, 2))
    assert torch.histc(shares, 5, 0, 1).min() > 200, "shares are even from 0 to 1"


@pytest.mark.parametrize("depth", [1, 2])
def test_sequences_have_the_images_own_codes_less_the_unknown(tmp_path: Path, depth: int) -> None:
    codes = torch.from_numpy(write_codes(tmp_path, depth=depth, size=SIZE).astype(np.int64))
    found = sequences(tmp_path, 0.5)
    vocabulary, layout = found.conditioning.vocabulary, found.conditioning
    unknown = random_masks(9, (2, 3), np.random.default_rng(1))
    batch = found.rows(np.arange(9), np.zeros(9, np.int64), unknown)
    length, null = 6 * depth, SIZE * depth + 3
    assert layout.length == length + 1 and layout.plain.length == 1 and layout.size == null + 2
    assert batch.tokens.shape == (9, 2 * length + 1)
    source, label, target = batch.tokens.split([length, 1, length], 1)
    assert label[:, 0].tolist() == [null - 3 + index % 3 for index in range(9)]
    assert torch.equal(vocabulary.to_codes(target), codes[:, 0])
    assert batch.wanted is not None
    assert torch.equal(source, torch.where(batch.wanted, null + 1, target))
    assert torch.equal(batch.wanted.view(9, 6, depth).all(2).view(9, 2, 3), unknown)
    plain = found.rows(np.arange(9), np.zeros(9, np.int64))
    assert torch.equal(plain.tokens, batch.tokens[:, length:]) and plain.layout.parts == [layout.classes]


def test_a_share_of_the_steps_is_masked_the_same_in_every_process(tmp_path: Path) -> None:
    write_codes(tmp_path, views=2)
    found = sequences(tmp_path, 0.4)
    stream = found.training(6, 3, 0, 0, 1)
    whole = [next(stream) for _ in range(200)]
    assert 0.3 < np.mean([batch.wanted is not None for batch in whole]) < 0.5
    parts = [sequences(tmp_path, 0.4).training(3, 3, 100, rank, 2) for rank in range(2)]
    for batch in whole[100:]:
        first, second = (next(part) for part in parts)
        assert torch.equal(batch.tokens, torch.cat([first.tokens, second.tokens]))
        assert first.share == second.share == batch.share
        if batch.wanted is not None and first.wanted is not None and second.wanted is not None:
            assert torch.equal(batch.wanted, torch.cat([first.wanted, second.wanted]))
            assert batch.share == pytest.approx(batch.wanted.float().mean().item())
    # Without inpainting the images and views of each step are those of any run.
    plain = sequences(tmp_path, 0).training(6, 3, 0, 0, 1)
    for batch in whole:
        codes = batch.layout.split(batch.tokens)[1]
        other = next(plain)
        assert torch.equal(codes, other.layout.split(other.tokens)[1])


def test_descriptions_keep_the_source(tmp_path: Path) -> None:
    vocabulary = Vocabulary(SIZE, 1, (2, 3))
    found = Conditioning(vocabulary, [Source(0.25), Classes(3, NAMES)])
    again = Conditioning.from_description(vocabulary, json.loads(json.dumps(found.describe())))
    assert again.source is not None and again.source.inpainting == 0.25 and again.size == found.size
    without = Conditioning.from_description(vocabulary, Conditioning(vocabulary, [Classes(3, NAMES)]).describe())
    assert without.source is None and without.plain.length == without.length
    for share in (0, 1, -0.5, "x", True):
        with pytest.raises(ValueError):
            Source.from_description({"inpainting": share})


def test_requests_with_and_without_a_source() -> None:
    vocabulary = Vocabulary(SIZE, 1, (2, 3))
    found = Conditioning(vocabulary, [Source(0.5), Classes(3, NAMES)])
    unknown, null = found.size - 1, found.null
    plain = found.conditions({"class": ["shoe"]})
    assert found.layout(plain).prefixes(plain, [0]).tolist() == [[SIZE + 1]]
    codes = torch.arange(6).view(1, 2, 3)
    mask = torch.tensor([[[False, True, False]] * 2])
    given = found.conditions({"source": masked(codes, mask)}, absent=True)
    layout = found.layout(given)
    assert layout.prefixes(given, [0, 1]).tolist() == [[0, unknown, 2, 3, unknown, 5, null]] * 2
    # Guidance on the class keeps the source.
    sequence = torch.cat([layout.prefixes(given, [0]), torch.zeros(1, 6, dtype=torch.long)], 1)
    assert torch.equal(layout.without(sequence), sequence)
    for wrong in (codes + 10, codes[:, :1], codes[0, 0]):
        with pytest.raises(UsageError, match="source"):
            found.conditions({"source": [wrong[0]]})
    assert masked(torch.zeros(1, 2, 3, 4, dtype=torch.long), mask)[0, 0, 1].tolist() == [UNKNOWN] * 4


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_a_prior_learns_to_use_what_comes_after_a_hole(cli, tmp_path: Path, backbone: str) -> None:
    """Images of one code each: a hole in the first cell can be filled from what follows it, and only so."""
    model, folder = make_prior(tmp_path / "of"), tmp_path / "codes"
    folder.mkdir()
    write_uniform(folder, str(Prior.load(model).tokenizer_fingerprint), model / "tokenizer")
    words = ["--codes", folder, "--output", tmp_path / "run", "--backbone", backbone, "--dim", 32, "--layers", 2]
    words += ["--heads", 2, "--dropout", 0, "--steps", 200, "--lr", 3e-3, "--lr-warmup", 10, "--inpainting", 0.5]
    words += ["--batch-size", 32, "--validate-every", 100, "--preview-images", 4, "--seed", 1]
    result = cli(main, *words)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    assert {"heldout/inpainting_nats_per_token", "train/inpainting_loss", "train/loss"} <= set(last)
    prior, files = Prior.load(tmp_path / "run"), CodeFiles(folder, "heldout")
    assert prior.conditioning.source is not None and prior.conditioning.source.inpainting == 0.5
    every, accelerator = range(len(files)), Accelerator(cpu=True)
    mask = torch.zeros(len(files), 2, 3, dtype=torch.bool)
    mask[:, 0, 0] = True
    data = Sequences(files, prior.conditioning)
    filled = likelihood(prior, data.ordered(every, 10, mask), accelerator).nats_per_token
    plain = likelihood(prior, data.ordered(every, 10), accelerator).nats_per_token
    assert filled < 0.3 and plain < 0.8, "ln 12 / 6 = 0.41 nats a token is all there is to know"
    # The same weights in transformers, from the same tokens.
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokens = next(data.ordered(every, 4, mask)).tokens
    with torch.no_grad():
        torch.testing.assert_close(other(tokens).logits, prior(tokens))


def write_uniform(folder: Path, mark: str, tokenizer: Path) -> None:
    """Code files of 240 training and 60 held-out images, each of one code alone."""
    splits = {}
    for number, (split, count) in enumerate({"train": 240, "heldout": 60}.items()):
        codes = (np.arange(count) * 7 % SIZE)[:, None, None, None].repeat(2, 2).repeat(3, 3)
        write_shard(folder / shard_name(number), codes, np.full(count, -1), SIZE)
        entry = ShardEntry(shard_name(number), count, checksum(folder / shard_name(number)))
        splits[split] = SplitEntry(1, count, [entry])
    Manifest(SIZE, [2, 3], 1, [4, 6], 3, None, mark, "d" * 64, "fp32", "0", splits).write(folder)
    shutil.copytree(tokenizer, folder / "tokenizer")


def test_the_weight_of_a_step_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 12), torch.randint(12, (4, 6))
    wanted = torch.rand(4, 6) < 0.4
    weights = wanted / wanted.float().mean()
    config = ObjectiveConfig(label_smoothing=0.1, z_loss=1e-3)
    whole = objective(logits, targets, config, weights)[1]
    parts = [
        objective(*part[:2], config, part[2])[1] for part in zip(logits.chunk(2), targets.chunk(2), weights.chunk(2))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    alone = objective(logits[wanted][None], targets[wanted][None], config)[1]
    torch.testing.assert_close(whole, alone)


def test_a_source_takes_positions_and_one_id() -> None:
    config, vocabulary = PriorConfig(dim=16, layers=1, heads=2), Vocabulary(SIZE, 1, (2, 3))
    with_source, without = (
        Prior(config, Conditioning(vocabulary, parts), (3, 4, 6), "f" * 64)
        for parts in ([Source(0.5), Classes(3, NAMES)], [Classes(3, NAMES)])
    )
    assert with_source.backbone.config.max_position_embeddings == 13
    assert with_source.flops_per_token() == without.flops_per_token() + 2 * 16, "those of a plain sequence"
