"""Inpainting: a prior that is given the image's own codes, some of them unknown, in front of the sequence."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import NAMES, SIZE, make_prior, write_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import SAMPLE, run_together
from transformers import AutoModelForCausalLM

import vqgen.sampling.sample as program
from vqgen.errors import UsageError, UserError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.export.program import main as export
from vqgen.prior.likelihood import likelihood
from vqgen.prior.model import Prior
from vqgen.prior.objective import objective
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.parts.source import UNKNOWN, MaskedSource, masked, random_masks
from vqgen.prior.selection import NATS, NATS_OF_HOLES, selected_by
from vqgen.prior.train import main
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding.generate import image_uniforms
from vqgen.sampling.decoding.logits import choose
from vqgen.sampling.filling import Filling, cells_of, continued, fitted_masks, paste
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings
from vqgen.sampling.windows import windows
from vqgen.tokenizer.codes.format import (
    CodeFiles,
    Manifest,
    ShardEntry,
    SplitEntry,
    checksum,
    shard_name,
    write_shard,
)
from vqgen.tokenizer.data.decoding import decode, read_size
from vqgen.tokenizer.reconstruction import write_png_atomic


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
    found = Conditioning(vocabulary, [MaskedSource(0.25), Classes(3, NAMES)])
    again = Conditioning.from_description(vocabulary, json.loads(json.dumps(found.describe())))
    assert again.masked_source is not None and again.masked_source.inpainting == 0.25 and again.size == found.size
    without = Conditioning.from_description(vocabulary, Conditioning(vocabulary, [Classes(3, NAMES)]).describe())
    assert without.masked_source is None and without.plain.length == without.length
    for share in (0, 1, -0.5, "x", True):
        with pytest.raises(ValueError):
            MaskedSource.from_description({"inpainting": share})


def test_requests_with_and_without_a_source() -> None:
    vocabulary = Vocabulary(SIZE, 1, (2, 3))
    found = Conditioning(vocabulary, [MaskedSource(0.5), Classes(3, NAMES)])
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
    validated = {row["step"]: row for row in rows if "heldout/inpainting_nats_per_token" in row}
    assert any("best" in row for row in rows)
    for row in (row for row in rows if "best" in row):  # what selects the weights is of both kinds of steps
        nats = [validated[row["step"]][f"heldout/{name}"] for name in (NATS, NATS_OF_HOLES)]
        assert row["best"] == pytest.approx(selected_by(*nats, 0.5))
    prior, files = Prior.load(tmp_path / "run"), CodeFiles(folder, "heldout")
    assert prior.conditioning.masked_source is not None and prior.conditioning.masked_source.inpainting == 0.5
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


def write_uniform(folder: Path, mark: str, tokenizer: Path, names: list[str] | None = None) -> None:
    """Code files of 240 training and 60 held-out images, each of one code alone."""
    splits = {}
    for number, (split, count) in enumerate({"train": 240, "heldout": 60}.items()):
        codes = (np.arange(count) * 7 % SIZE)[:, None, None, None].repeat(2, 2).repeat(3, 3)
        write_shard(folder / shard_name(number), codes, np.full(count, -1), SIZE)
        entry = ShardEntry(shard_name(number), count, checksum(folder / shard_name(number)))
        splits[split] = SplitEntry(1, count, [entry])
    Manifest(SIZE, [2, 3], 1, [4, 6], 3, names, mark, "d" * 64, "fp32", "0", splits).write(folder)
    shutil.copytree(tokenizer, folder / "tokenizer")


def test_the_weight_of_a_step_does_not_depend_on_accumulation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, 12), torch.randint(12, (4, 6))
    wanted = torch.rand(4, 6) < 0.4
    weights = wanted / wanted.float().mean()
    config, vocabulary = ObjectiveConfig(label_smoothing=0.1, z_loss=1e-3), Vocabulary(12, 1, (2, 3))
    whole = objective(logits, targets, config, vocabulary, weights)[1]
    parts = [
        objective(*part[:2], config, vocabulary, part[2])[1]
        for part in zip(logits.chunk(2), targets.chunk(2), weights.chunk(2))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    alone = objective(logits[wanted][None], targets[wanted][None], config, vocabulary)[1]
    torch.testing.assert_close(whole, alone)


def test_a_source_takes_positions_and_one_id() -> None:
    config, vocabulary = PriorConfig(dim=16, layers=1, heads=2), Vocabulary(SIZE, 1, (2, 3))
    with_source, without = (
        Prior(config, Conditioning(vocabulary, parts), (3, 4, 6), "f" * 64)
        for parts in ([MaskedSource(0.5), Classes(3, NAMES)], [Classes(3, NAMES)])
    )
    assert with_source.backbone.config.max_position_embeddings == 13
    assert with_source.flops_per_token() == without.flops_per_token() + 2 * 16, "those of a plain sequence"


def prior_with_source(folder: Path, backbone: str = "llama", depth: int = 1) -> Path:
    """A random prior of 2x3 codes that takes a source, with its tokenizer; images 4x6."""
    plain = Prior.load(make_prior(folder / "of", backbone, depth))
    conditioning = Conditioning(Vocabulary(SIZE, depth, (2, 3)), [MaskedSource(0.5), Classes(3, NAMES)])
    torch.manual_seed(1)
    prior = Prior(plain.config, conditioning, plain.image_shape, plain.tokenizer_fingerprint)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    prior.save(folder / "prior", folder / "of" / "tokenizer")
    return folder / "prior"


@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_fills_in_what_we_fill_in(cli, tmp_path: Path, depth: int) -> None:
    """By the model card: source, prefix, known codes forced."""
    model = prior_with_source(tmp_path, depth=depth)
    assert cli(export, "--model", model, "--output", tmp_path / "export").code == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    generator = Generator.load(model, "cpu", "fp32")
    images = torch.randint(256, (2, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :2] = True
    ours = generator.inpaint(images, mask, classes="shoe", temperature=0)
    filling, vocabulary = generator.filling(images, mask), generator.vocabulary
    layout = generator.conditioning
    prefix = layout.prefixes(layout.conditions({"class": "shoe", **filling.conditions}), [0, 1])
    known = filling.known.tokens

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        position = len(ids) - layout.length
        given = int(known[row % 2, position])
        return [given] if given >= 0 else list(range(*vocabulary.allowed(position)))

    tokens = theirs.generate(
        prefix, do_sample=False, prefix_allowed_tokens_fn=allowed, max_new_tokens=vocabulary.length, pad_token_id=0
    )
    assert torch.equal(vocabulary.to_codes(tokens[:, layout.length :]), ours.codes)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "prefix of 1 tokens" in card and f"{layout.size - 1} where one is unknown" in card


# Filling in


def photos(count: int = 2, height: int = 4, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_a_hole_of_pixels_is_a_hole_of_codes_and_their_neighbours() -> None:
    pixels = torch.zeros(1, 16, 24, dtype=torch.bool)
    pixels[0, 5, 13] = True
    assert cells_of(pixels, 4, grow=0)[0].nonzero().tolist() == [[1, 3]]
    grown = cells_of(pixels, 4)[0]
    assert grown[0:3, 2:5].all() and grown.sum() == 9
    pixels[0, 0, 0] = True
    assert cells_of(pixels, 4)[0].sum() == 13 and cells_of(pixels, 4)[0, :2, :2].all()


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("place", [(0, 0), (200, 300), (333, 457), (399, 599)])
def test_a_pixel_of_a_large_mask_is_drawn(mode: str, place: tuple[int, int]) -> None:
    mask = torch.zeros(1, 400, 600, dtype=torch.bool)
    assert not fitted_masks(mask, (4, 6), mode).any()
    mask[0][place] = True
    found = fitted_masks(mask, (4, 6), mode)
    assert found[0, place[0] // 100, place[1] // 100] and found.sum() <= 4


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_known_pixels_stay_and_the_colours_of_the_border_are_taken_on(seed: int) -> None:
    """A drawn image that is darker everywhere becomes the original, beside the border more than far from it."""
    original = photos(2, 24, 24, seed) // 2 + 100
    random = torch.Generator().manual_seed(seed)
    top, left, height, width = torch.randint(2, 10, (4,), generator=random).tolist()
    hole = torch.zeros(2, 24, 24, dtype=torch.bool)
    hole[0, top : top + height, left : left + width] = True
    found = paste(original - 90, original, hole, 16)
    known = (~hole)[:, None].expand(2, 3, 24, 24)
    assert torch.equal(found[known], original[known])
    error = (original.int() - found.int())[0, 0][hole[0]]
    assert 0 <= error.min() <= 2 and error.max() <= 20
    inner = torch.nn.functional.max_pool2d((~hole[0]).float()[None], 3, 1, 1)[0] == 0
    assert not inner.any() or error.float().mean() <= (original.int() - found.int())[0, 0][inner].float().mean()
    nothing = paste(original - 90, original, torch.ones_like(hole), 16)
    assert torch.equal(nothing, original - 90), "without known pixels all is as drawn"


@pytest.mark.parametrize("kind", ["scattered", "hole", "margin"])
def test_differences_are_continued_as_by_the_screened_poisson_equation(kind: str) -> None:
    """Against a direct solution of the equations of all unknown pixels."""
    height, width, reach = {"scattered": (12, 17, 6.0), "hole": (24, 24, 16.0), "margin": (16, 40, 16.0)}[kind]
    random = torch.Generator().manual_seed(0)
    known = torch.rand(1, 1, height, width, generator=random) < (0.15 if kind == "scattered" else 2)
    known[..., 3:-3, 4:-5] &= kind == "margin"
    known[..., 20:] &= kind != "margin"
    values = (torch.randn(1, 1, height, width, generator=random) + 2) * known
    matrix, right = torch.eye(height * width, dtype=torch.float64), values.double().flatten()
    for place in (~known).flatten().nonzero().flatten().tolist():
        row, column = divmod(place, width)
        matrix[place, place] = 1 / reach**2
        for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= r < height and 0 <= c < width:
                matrix[place, place] += 1
                matrix[place, r * width + c] -= 1
    exact = torch.linalg.solve(matrix, right).view(1, 1, height, width)
    found = continued(values, known.float(), reach)
    assert torch.equal(found[known], values[known]) and not known.all()
    assert (found - exact)[~known].square().mean() < 0.05**2 * exact[~known].square().mean()


def test_beyond_its_reach_nothing_changes() -> None:
    drawn, original = torch.full((1, 1, 32, 256), 50, dtype=torch.uint8), torch.full((1, 1, 32, 256), 200).byte()
    hole = torch.zeros(1, 32, 256, dtype=torch.bool)
    hole[..., 32:] = True
    row = paste(drawn, original, hole, 8)[0, 0, 16].tolist()
    assert row[:32] == [200] * 32 and 165 < row[32] < 195 and row[96:] == [50] * 160
    assert row == sorted(row, reverse=True)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_it_is_the_same_on_a_few_rows_or_columns(size: int) -> None:
    drawn, original = torch.full((1, 1, 32, 32), 255, dtype=torch.uint8), torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    hole = torch.zeros(1, 32, 32, dtype=torch.bool)
    hole[..., 16:] = True
    row = paste(drawn, original, hole, 8)[:, :, :1].int()
    few = paste(drawn[..., :size, :], original[..., :size, :], hole[:, :size], 8).int()
    column = paste(drawn[..., :size], original[..., :size], hole.mT[..., :size], 8).int()
    for found in (few, column.mT):
        assert (found - row).abs().max() <= 1 and row.unique().numel() > 8


def test_fillings_are_a_series_like_any_other(tmp_path: Path) -> None:
    generator = Generator.load(prior_with_source(tmp_path), "cpu", "fp32")
    images, mask = photos(3), torch.zeros(4, 6, dtype=torch.bool)
    mask[2:, 4:] = True
    whole = generator.inpaint(images, mask, n=7, seed=5)
    assert whole.images.shape == (7, 3, 4, 6) and whole.labels.tolist() == [-1] * 7
    again = generator.inpaint(images, mask, n=7, seed=5, batch_size=2)
    assert torch.equal(again.images, whole.images) and torch.equal(again.nats, whole.nats)
    hidden = cells_of(mask[None], 2)[0]
    assert hidden.tolist() == [[False, True, True], [False, True, True]]
    kept = generator.encode(images)
    for index in range(7):
        assert torch.equal(whole.codes[index][~hidden], kept[index % 3][~hidden])
    assert not torch.equal(whole.codes[0], whole.codes[3]), "another filling of the same image"
    # The kept codes decide, those behind the hole too.
    other = images.clone()
    other[:, :, :, :2] = 255 - other[:, :, :, :2]
    assert not torch.equal(generator.inpaint(other, mask, n=3, seed=5).codes[:, hidden], whole.codes[:3, hidden])
    unpasted = generator.inpaint(images, mask, n=7, seed=5, paste=False)
    assert torch.equal(unpasted.codes, whole.codes)
    assert torch.equal(whole.images[:, :, ~mask], images[[0, 1, 2, 0, 1, 2, 0]][:, :, ~mask])
    assert torch.equal(unpasted.images, generator.decode(whole.codes))
    # Images of another size are fitted, and the mask with them.
    large = generator.inpaint(photos(1, 8, 12), mask.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert large.images.shape == (1, 3, 4, 6)
    guided = generator.inpaint(images, mask, classes=["bag"], guidance_scale=3.0)
    assert guided.labels.tolist() == [2, 2, 2]


def test_a_variation_draws_a_share_of_the_codes(tmp_path: Path) -> None:
    generator = Generator.load(prior_with_source(tmp_path), "cpu", "fp32")
    images = photos(2)
    kept = generator.encode(images)
    found = generator.vary(images, 0.5, n=40, seed=2)
    changed = torch.stack([found.codes[index] != kept[index % 2] for index in range(40)]).flatten(1)
    assert changed.sum(1).max() <= 3 and changed.float().mean() > 0.3
    assert changed.any(0).all(), "every place varies in some"
    assert torch.equal(generator.vary(images, 0.5, n=10, seed=2).codes, found.codes[:10])
    # Codes are fed alike, one by one, however many there are: in one pass their last bits would be others.
    assert {generator.tokens_of(generator.variation(images, 0.2, n, seed=2)) for n in (1, 2, 40)} == {6}
    assert torch.equal(
        generator.vary(images, 0.2, n=2, seed=2).nats, generator.vary(images, 0.2, n=40, seed=2).nats[:2]
    )


WHOLE, OUTSIDE = torch.ones(4, 6, dtype=torch.bool), torch.arange(9)[:, None].expand(9, 6) < 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda g: g.inpaint(photos(), torch.zeros(4, 6)), "mask: found torch.float32"),
        (lambda g: g.inpaint(photos(), torch.ones(6, 4, dtype=torch.bool)), r"mask: found torch.bool \(6, 4\)"),
        (lambda g: g.inpaint(photos(), torch.zeros(4, 6, dtype=torch.bool)), "mask: no pixel"),
        (lambda g: g.vary(photos(), 0.0), "vary: found 0.0"),
        (lambda g: g.vary(photos(), 1.5), "vary: found 1.5"),
        *((lambda g, n=n: g.inpaint(photos()[:0], WHOLE, n=n), "images: found none") for n in (None, 3)),
        *((lambda g, n=n: g.vary(photos()[:0], 0.5, n=n), "images: found none") for n in (None, 3)),
        *((lambda g, n=n: g.extend(photos()[:0], left=2, n=n), "images: found none") for n in (None, 3)),
        (lambda g: g.inpaint(photos(), WHOLE, n=-1), "--n: found -1"),
        (lambda g: g.inpaint(photos(), WHOLE, conditions={"source": g.encode(photos())}), "--source-image"),
        (lambda g: g.extend(photos(), left=2, conditions={"source": g.encode(photos())}), "--source-image"),
        (lambda g: g.extend(photos(), left=2**64 - 4), "--extend: .*18446744073709551618x4"),
        (lambda g: g.extend(photos(1), 5000, 5000, 5000, 5000), "--extend: .*10006x10004"),
        (lambda g: g.sample(1, size=(9472, 9500)), "--size: .*9500x9472"),
        (lambda g: g.sample(1, size=(8, 6), batch_size=0), "--batch-size: found 0"),
        *((lambda g, seed=seed: g.sample(1, size=(8, 6), seed=seed), "--seed") for seed in (-1, 2**64)),
        (lambda g: g.inpaint(photos(1, 9, 6), OUTSIDE), "mask: .*6x9 to 6x4"),
    ],
)
def test_masks_and_shares_that_do_not_fit_are_named(tmp_path: Path, call, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        call(Generator.load(prior_with_source(tmp_path), "cpu", "fp32"))


def test_a_prior_without_a_source_says_so(tmp_path: Path) -> None:
    generator = Generator.load(make_prior(tmp_path / "plain"), "cpu", "fp32")
    everything = torch.ones(4, 6, dtype=torch.bool)
    for call in (lambda: generator.inpaint(photos(), everything), lambda: generator.vary(photos(), 0.5)):
        with pytest.raises(UsageError, match="trained without --inpainting"):
            call()


@pytest.mark.parametrize("scale", [2, 8])  # several images a thread at once, and one
def test_pasted_pixels_do_not_depend_on_the_number_of_threads(scale):
    """torch interpolates large images in parts, by the number of threads, and rounds differently where it does."""
    random = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (12, 3, 24, 24), generator=random, dtype=torch.uint8)
    originals = blocks.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    drawn = torch.randint(256, originals.shape, generator=random, dtype=torch.uint8)
    pixels = torch.zeros(12, 24 * scale, 24 * scale, dtype=torch.bool)
    pixels[:, 5 * scale : 19 * scale, 4 * scale : 21 * scale] = True
    codes, cells = torch.zeros(12, 24, 24, dtype=torch.long), cells_of(pixels, scale)
    filling = Filling(codes, cells, Vocabulary(SIZE, 1, (24, 24)), True, originals, pixels)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [filling.finished(range(12), drawn), filling.finished([4], drawn[4:5])]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1][0], found[0][4]) and torch.equal(found[1], found[3])


# vqgen-sample


@pytest.fixture(scope="module")
def with_source(tmp_path_factory) -> Path:
    return prior_with_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def sample(cli, with_source: Path, tmp_path: Path):
    """Call vqgen-sample on photo.png, to `tmp_path/out`."""
    write_png_atomic(tmp_path / "photo.png", photos(1)[0])
    white = torch.zeros(1, 4, 6, dtype=torch.uint8)
    white[:, 2:, 4:] = 255
    write_png_atomic(tmp_path / "mask.png", white)
    words = ["--model", with_source, "--output", tmp_path / "out", "--init-image", tmp_path / "photo.png"]
    return lambda *more: cli(program.main, *words, "--device", "cpu", "--precision", "fp32", *more)


def drawn_images(folder: Path) -> torch.Tensor:
    paths = sorted(path for path in folder.glob("*.png") if path.name != "grid.png")
    return torch.stack([decode(path.read_bytes(), 3) for path in paths])


def test_each_given_image_has_a_column_of_the_grid(sample, tmp_path: Path) -> None:
    for name, image in zip("abc", photos(3), strict=True):
        write_png_atomic(tmp_path / f"{name}.png", image)
    several = ["--init-image", *(tmp_path / f"{name}.png" for name in "abc")]
    shapes = []
    for more in (several, [*several, "--columns", 2], []):
        assert sample("--box", 4, 2, 2, 2, "--n", 6, "--overwrite", *more).code == 0
        shapes.append(read_size((tmp_path / "out" / "grid.png").read_bytes())[:2])
    (rows, three), (_, two), (_, square) = shapes
    assert three == square > two and rows == shapes[2][0], "a square of six has three columns, too"
    assert sample("--box", 4, 2, 2, 2, "--n", 12, "--overwrite", *several).code == 0
    assert read_size((tmp_path / "out" / "grid.png").read_bytes())[1] == three


def test_the_program_draws_what_is_white(sample, with_source: Path, tmp_path: Path) -> None:
    assert sample("--mask", tmp_path / "mask.png", "--n", 5, "--seed", 3).code == 0
    found = drawn_images(tmp_path / "out")
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[2:, 4:] = True
    ours = Generator.load(with_source, "cpu", "fp32").inpaint(photos(1), mask, n=5, seed=3)
    assert torch.equal(found, ours.images)
    about = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert about["paste"] is True and len(about["mask_fingerprint"]) == len(about["kept_fingerprint"]) == 64
    # It is continued, and completed where an image is missing; another mask is another run.
    (tmp_path / "out" / "00003.png").unlink()
    assert sample("--box", 4, 2, 2, 2, "--n", 6, "--seed", 3).code == 0, "the same pixels by a box"
    assert torch.equal(drawn_images(tmp_path / "out")[:5], found)
    assert about["mask"] and "box" not in about and "vary" not in about
    for other in (["--box", 3, 2, 2, 2], ["--box", 4, 2, 2, 2, "--no-paste"], ["--vary", 0.5], ["--keep-rows", 1], []):
        result = sample("--n", 6, "--seed", 3, *other)
        assert result.code == 2 and "--overwrite" in result.err, other


def test_the_program_varies_and_takes_several_boxes(sample, with_source: Path, tmp_path: Path) -> None:
    assert sample("--vary", 0.5, "--n", 4, "--batch-size", 3).code == 0
    ours = Generator.load(with_source, "cpu", "fp32").vary(photos(1), 0.5, n=4)
    assert torch.equal(drawn_images(tmp_path / "out"), ours.images)
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["vary"] == 0.5
    refused = sample("--vary", 0.2, "--n", 4)
    assert refused.code == 2 and "vary 0.5, now 0.2" in refused.err
    assert sample("--box", 0, 0, 1, 1, 5, 3, 1, 1, "--n", 2, "--overwrite").code == 0
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["box"] == [0, 0, 1, 1, 5, 3, 1, 1]
    refused = sample("--box", 0, 0, 1, 1, "--n", 2)
    assert refused.code == 2 and "[0, 0, 1, 1, 5, 3, 1, 1], now [0, 0, 1, 1]" in refused.err
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 0] = mask[3, 5] = True
    ours = Generator.load(with_source, "cpu", "fp32").inpaint(photos(1), mask, n=2)
    assert torch.equal(drawn_images(tmp_path / "out"), ours.images)


def test_known_pixels_tell_runs_apart(sample, with_source: Path, tmp_path: Path) -> None:
    """Where every code is drawn, the codes of two photographs are alike, but what is pasted back is not."""
    words = "--box", 2, 0, 2, 4, "--n", 2
    assert sample(*words).code == 0
    path, pixels = tmp_path / "out" / "samples.json", photos(1)[0]
    about = json.loads(path.read_text())
    assert about["kept_codes"] == 0 and len(about["pasted_fingerprint"]) == 64
    drawn_over = pixels.clone()
    drawn_over[:, :, 2:4] ^= 1
    write_png_atomic(tmp_path / "photo.png", drawn_over)
    assert "holds these 2 images" in sample(*words).out, "in the box its pixels have no part"
    write_png_atomic(tmp_path / "photo.png", pixels ^ 1)
    refused = sample(*words)
    assert refused.code == 2 and "--output" in refused.err and "pasted fingerprint" in refused.err
    del about["pasted_fingerprint"]  # as an earlier version wrote it
    path.write_text(json.dumps(about))
    assert "holds these 2 images" in sample(*words).out


def test_images_that_overwriting_would_remove_are_refused(cli, sample, with_source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert sample("--vary", 0.5, "--n", 4).code == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    (tmp_path / "link.png").symlink_to(output / "00003.png")
    words = ["--model", with_source, "--output", output, "--device", "cpu", "--overwrite"]
    photo = tmp_path / "photo.png"
    for option, further in (
        ("--init-image", ["--init-image", photo, output / "00003.png", "--vary", 0.3]),
        ("--init-image", ["--init-image", output / ".." / "out", "--vary", 0.3]),
        ("--init-image", ["--init-image", tmp_path / "link.png"]),
        ("--mask", ["--init-image", photo, "--mask", output / "00001.png"]),
    ):
        result = cli(program.main, *words, *further)
        assert result.code == 2 and f"{option}: " in result.err and result.err.count("\n") == 1, result.err
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    # A picture in the folder that is no sample of its run stays, and can be given.
    write_png_atomic(output / "mine.png", photos(1)[0])
    result = cli(program.main, *words, "--init-image", output / "mine.png", "--vary", 0.3, "--n", 2)
    assert result.code == 0 and len(list(output.glob("0*.png"))) == 2, result.err


def test_a_variation_depends_on_its_own_index(cli, with_source: Path, tmp_path: Path) -> None:
    """Neither on how many there are nor on how that number was given: image i is of the i-th photograph in turn."""
    images, output = photos(3), tmp_path / "out"
    (tmp_path / "in").mkdir()
    for number, image in enumerate(images):
        write_png_atomic(tmp_path / "in" / f"{number}.png", image)
    words = ["--model", with_source, "--device", "cpu", "--precision", "fp32", "--vary", 0.3, "--output", output]
    words += ["--init-image", tmp_path / "in", "--class", *NAMES[:2]]
    generator = Generator.load(with_source, "cpu", "fp32")
    whole = generator.vary(images, 0.3, n=8, classes=NAMES[:2])
    own = generator.encode(images)
    assert all((codes == own[index % 3]).float().mean() > 0.5 for index, codes in enumerate(whole.codes))
    for n in (2, 5, 8):  # each continues the one before
        result = cli(program.main, *words, "--n", n)
        assert result.code == 0, result.err
        assert torch.equal(drawn_images(output), whole.images[:n])
    assert cli(program.main, *words, "--num-per-class", 4, "--overwrite").code == 0
    assert torch.equal(drawn_images(output), whole.images)
    (output / "00005.png").unlink()
    assert cli(program.main, *words, "--n", 3).code == 0  # what is missing of the larger series is drawn as before
    assert torch.equal(drawn_images(output), whole.images)
    write_png_atomic(tmp_path / "in" / "2.png", 255 - images[2])
    assert cli(program.main, *words, "--n", 9).code == 2, "another photograph"
    result = cli(program.main, *words, "--n", 8, "--oversample", 1.5, "--overwrite")
    assert result.code == 2 and "--oversample" in result.err and torch.equal(drawn_images(output), whole.images)


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--box", 0, 0, 7, 1], 2, "--box"),
        (["--box", 0, 0, 1], 2, "--box"),
        (["--box", 0, 0, 0, 1], 2, "--box"),
        (["--box", 0, 0, 1, 1, "--keep-rows", 1], 2, "--keep-rows"),
        (["--vary", 0.2, "--mask", "mask.png"], 2, "--vary"),
        (["--vary", 1.2], 2, "--vary"),
        (["--mask", "small.png"], 1, "small.png"),
        (["--mask", "black.png"], 1, "black.png"),
        (["--mask", "missing.png"], 1, "missing.png"),
        (["--mask", "text.png"], 1, "text.png"),
        (["--init-image", "tall.png", "--box", 0, 0, 6, 1], 2, "--box: 0 0 6 1 is not in what is left of tall.png"),
        (["--init-image", "tall.png", "--mask", "top.png"], 2, "top.png is not in what is left of tall.png"),
        (["--extend", 2**64 - 4, 0, 0, 0], 2, "--extend"),
    ],
)
def test_what_does_not_fit_is_named(sample, tmp_path: Path, words: list, code: int, named: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_png_atomic(Path("small.png"), torch.full((1, 3, 6), 255, dtype=torch.uint8))
    write_png_atomic(Path("black.png"), torch.zeros(1, 4, 6, dtype=torch.uint8))
    Path("text.png").write_text("no image")
    write_png_atomic(Path("tall.png"), photos(1, 9, 6)[0])
    write_png_atomic(Path("top.png"), 255 * OUTSIDE[None].to(torch.uint8))
    result = sample(*words)
    assert result.code == code and named in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "out").exists()


def test_a_mask_needs_an_image_and_a_prior_that_fills_in(cli, sample, tmp_path: Path) -> None:
    plain = make_prior(tmp_path / "plain")
    words = ["--model", plain, "--output", tmp_path / "other", "--mask", tmp_path / "mask.png"]
    result = cli(program.main, *words)
    assert result.code == 2 and "--init-image" in result.err
    result = cli(program.main, *words, "--init-image", tmp_path / "photo.png")
    assert result.code == 2 and "--inpainting" in result.err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_a_plain_prior_is_trained_further(cli, tmp_path: Path, backbone: str) -> None:
    """--init: at the start the plain NLL is that of the prior given, and new token ids have their own weights."""
    model, folder = make_prior(tmp_path / "of", backbone), tmp_path / "codes"
    folder.mkdir()
    write_uniform(folder, str(Prior.load(model).tokenizer_fingerprint), model / "tokenizer", NAMES)
    other = Prior.load(model)
    conditioning = Conditioning(other.vocabulary, [MaskedSource(0.5), Classes(3, NAMES)])
    larger = Prior(other.config, conditioning, other.image_shape, other.tokenizer_fingerprint).eval()
    fresh = {name: value.clone() for name, value in larger.backbone.state_dict().items()}
    larger.start_from(model)
    tokens = torch.cat([torch.tensor([[SIZE], [SIZE + 3]]), torch.randint(SIZE, (2, 6))], 1)
    with torch.no_grad():
        torch.testing.assert_close(larger(tokens)[..., :-1], other(tokens))
    name = "transformer.wte.weight" if backbone == "gpt2" else "model.embed_tokens.weight"
    assert torch.equal(larger.backbone.state_dict()[name][-1], fresh[name][-1])
    words = ["--codes", folder, "--output", tmp_path / "run", "--init", model, "--inpainting", 0.5, "--steps", 4]
    words += ["--backbone", backbone, "--dim", 16, "--layers", 2, "--heads", 2, "--batch-size", 4, "--lr", 0]
    result = cli(main, *words, "--validate-every", 2, "--preview-images", 0)
    assert result.code == 0, result.err
    trained = Prior.load(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(trained(tokens)[..., :-1], other(tokens), rtol=1e-4, atol=1e-4)
    # It is finished without the other prior; other sizes and another tokenizer are refused.
    for wrong, named in ((["--dim", 32], "--init"), (["--layers", 1], "--init"), (["--layers", 3], "--init")):
        result = cli(main, *words, "--output", tmp_path / "wrong", *wrong)
        assert result.code == 1 and named in result.err and not (tmp_path / "wrong" / "checkpoints").exists()


def test_a_prior_of_another_tokenizer_is_no_start(tmp_path: Path) -> None:
    model = make_prior(tmp_path / "of")
    plain = Prior.load(model)
    other = Prior(plain.config, Conditioning(plain.vocabulary, [Classes(3, NAMES)]), plain.image_shape, "0" * 64)
    with pytest.raises(UserError, match=r"--init: .* is of tokenizer"):
        other.start_from(model)


# Larger images


@given(st.integers(2, 9), st.integers(3, 11), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_windows_draw_every_cell_once(height: int, width: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    cells = torch.rand(2, height, width, generator=random) < 0.6
    left, order = cells.clone(), list(windows(cells, (2, 3)))
    for window in order:
        unknown = left[:, window.rows, window.columns]
        assert unknown.shape == (2, 2, 3) and unknown.any() and torch.equal(unknown, window.unknown)
        counts = left.sum(0).unfold(0, 2, 1).unfold(1, 3, 1).sum((2, 3)).flatten()  # of all places, one cell apart
        first = min((int(count), place) for place, count in enumerate(counts) if count)
        assert (int(unknown.sum()), window.rows.start * (width - 2) + window.columns.start) == first
        left[:, window.rows, window.columns] = False
    assert not left.any() and len({window.number for window in order}) == len(order)


def test_windows_overlap_by_half_and_begin_where_most_is_known() -> None:
    order = list(windows(torch.ones(1, 4, 12, dtype=torch.bool), (4, 4)))
    assert [window.columns.start for window in order] == [0, 2, 4, 6, 8]
    assert [int(window.unknown.sum()) for window in order] == [16, 8, 8, 8, 8]
    cells = torch.ones(1, 4, 12, dtype=torch.bool)
    cells[:, :, 4:8] = False
    assert [window.columns.start for window in windows(cells, (4, 4))] == [2, 0, 6, 8]


@pytest.mark.parametrize("sourced", [True, False])
def test_larger_images_are_a_series_like_any_other(tmp_path: Path, sourced: bool) -> None:
    model = prior_with_source(tmp_path) if sourced else make_prior(tmp_path / "plain")
    generator = Generator.load(model, "cpu", "fp32")
    whole = generator.sample(5, size=(8, 14), seed=2, guidance_scale=2.0)
    assert whole.images.shape == (5, 3, 8, 14) and whole.codes.shape == (5, 4, 7)
    assert whole.labels.tolist() == [0, 1, 2, 0, 1]
    again = generator.sample(3, size=(8, 14), seed=2, guidance_scale=2.0, batch_size=2)
    assert torch.equal(again.codes, whole.codes[:3]) and torch.equal(again.nats, whole.nats[:3])
    assert len({codes.numpy().tobytes() for codes in whole.codes}) == 5
    assert torch.equal(generator.decode(whole.codes), whole.images), "decoded as one image"
    for size in ((2, 6), (8, 15), (8,)):
        with pytest.raises(UsageError, match="--size"):
            generator.sample(1, size=size)
    with pytest.raises(UsageError, match="--oversample"):
        generator.sample(1, size=(8, 14), oversample=2.0)
    generator.recommended = {"oversample": 2.0}  # has no effect there, and is left out
    assert torch.equal(generator.sample(5, size=(8, 14), seed=2, guidance_scale=2.0).codes, whole.codes)


def test_images_are_extended_on_every_side(tmp_path: Path) -> None:
    generator = Generator.load(prior_with_source(tmp_path), "cpu", "fp32")
    images = photos(2, 4, 6)
    found = generator.extend(images, left=6, top=2, right=4, bottom=6, n=3, paste=True)
    assert found.images.shape == (3, 3, 12, 16)
    beside = generator.extend(images, left=6)
    assert torch.equal(beside.images[..., 6:], images), "the image is as it was"
    unpasted = generator.extend(images, left=6, top=2, right=4, bottom=6, n=3, paste=False)
    assert torch.equal(unpasted.codes, found.codes)
    for margins in ({"left": 3}, {"left": -2}, {}):
        with pytest.raises(UsageError, match="--extend"):
            generator.extend(images, **margins)


def test_the_program_draws_larger_images(sample, cli, with_source: Path, tmp_path: Path) -> None:
    generator = Generator.load(with_source, "cpu", "fp32")
    assert sample("--extend", 2, 0, 4, 2, "--n", 3).code == 0
    assert torch.equal(drawn_images(tmp_path / "out"), generator.extend(photos(1), 2, 0, 4, 2, n=3).images)
    (tmp_path / "out" / "00001.png").unlink()
    assert sample("--extend", 2, 0, 4, 2, "--n", 3).code == 0
    assert torch.equal(drawn_images(tmp_path / "out"), generator.extend(photos(1), 2, 0, 4, 2, n=3).images)
    words = ["--model", with_source, "--output", tmp_path / "large", "--device", "cpu", "--precision", "fp32"]
    assert cli(program.main, *words, "--size", 8, 10, "--n", 4, "--batch-size", 3).code == 0
    assert torch.equal(drawn_images(tmp_path / "large"), generator.sample(4, size=(8, 10)).images)
    for wrong, named in (
        (["--size", 8, 10, 12], "--size"),
        (["--size", 9, 10], "--size"),
        (["--size", 8, 10, "--init-image", tmp_path / "photo.png"], "--size"),
        (["--extend", 2, 2, 2, 2], "--extend"),
        (["--init-image", tmp_path / "photo.png", "--extend", 2, 2, 2], "--extend"),
        (["--init-image", tmp_path / "photo.png", "--extend", 1, 2, 2, 2], "--extend"),
    ):
        result = cli(program.main, *words, "--overwrite", *wrong)
        assert result.code == 2 and named in result.err, result.err
    kept = drawn_images(tmp_path / "large")
    result = cli(program.main, *words, "--overwrite", "--size", 8, 10, "--n", 4, "--oversample", 1.5)
    assert result.code == 2 and "--oversample" in result.err
    assert torch.equal(drawn_images(tmp_path / "large"), kept), "refused before anything is removed"


@pytest.mark.parametrize(
    "way",
    ["--box 2 0 3 4", "--mask {}/mask.png", "--vary 0.5", "--extend 2 0 4 2", "--keep-rows 1", "--size 8 10"],
    ids=lambda way: way.split()[0],
)
def test_two_processes_draw_what_one_draws(cli, with_source: Path, sample, tmp_path: Path, way: str) -> None:
    given = way.format(tmp_path).split() + ([] if "--size" in way else ["--init-image", tmp_path / "photo.png"])
    words = ["--model", with_source, *given, "--n", 7, "--seed", 2, "--device", "cpu", "--precision", "fp32"]
    if "--keep-rows" not in way:
        words += ["--source-guidance-scale", 2]
    for ended in run_together(SAMPLE, *words, "--batch-size", 2, "--output", tmp_path / "two"):
        ended.ok()
    result = cli(program.main, *words, "--output", tmp_path / "one")
    assert result.code == 0, result.err
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two and len(one) == 9  # with the grid and samples.json


def test_what_surrounds_a_hole_can_be_amplified(tmp_path: Path) -> None:
    """A prior with --inpainting is guided by the known codes against none at all: on its grid, and in windows."""
    generator = Generator.load(prior_with_source(tmp_path), "cpu", "fp32")
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:2, :2] = True
    filling = generator.filling(images, mask)
    plain = generator.inpaint(images, mask, n=12)
    guided = generator.inpaint(images, mask, n=12, source_guidance_scale=6.0)
    assert not torch.equal(plain.codes, guided.codes)
    assert torch.equal(
        generator.inpaint(images, mask, n=12, batch_size=5, source_guidance_scale=6.0).codes, guided.codes
    )
    # Against the prior's own logits of the first code, with the source and with all of it unknown.
    conditions = generator.seen(generator.conditioning.conditions(absent=True), filling)
    layout = generator.conditioning.layout(conditions)
    prefix = layout.prefixes(conditions, range(12))
    source = generator.conditioning.masked_source
    assert source is not None
    with torch.no_grad():
        given, none = (
            generator.prior(ids)[:, -1, : generator.vocabulary.size]
            for ids in (prefix, layout.without(prefix, [source]))
        )
    uniforms = image_uniforms(0, range(12), generator.vocabulary.length)
    expected = choose(none + 6 * (given - none), uniforms[:, 0], SamplingSettings(source_guidance_scale=6.0))
    first = generator.vocabulary.to_tokens(guided.codes)[:, 0]
    assert torch.equal(first, expected) and layout.without(prefix, [source])[:, :6].unique().numel() == 1
    larger = {"n": 3, "size": (8, 12), "seed": 1}
    assert not torch.equal(
        generator.sample(**larger).codes, generator.sample(**larger, source_guidance_scale=6.0).codes
    )
    with pytest.raises(UsageError, match="--source-guidance-scale"):
        generator.sample(2, source_guidance_scale=6.0)
