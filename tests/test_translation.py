"""Translation: a prior that is given the codes of another image, and the images that it makes of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import NAMES, SIZE, make_prior, write_codes
from torch import Tensor
from transformers import AutoModelForCausalLM

from vqgen.errors import UsageError, UserError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.likelihood import likelihood
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.parts import Classes
from vqgen.prior.source import UNKNOWN, MaskedSource, PairedSource
from vqgen.prior.train import main as train
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.format import (
    CodeFiles,
    Manifest,
    ShardEntry,
    SourceRecord,
    SplitEntry,
    checksum,
    shard_name,
    write_shard,
)

GREY = SourceRecord("degraded", [2, 3], "d" * 64, ["grey"])
NULL = SIZE + 3


def layout_of(grid: tuple[int, int] = (2, 3), dropout: float = 0.1, depth: int = 1) -> Conditioning:
    about = SourceRecord("degraded", list(grid), "d" * 64, ["grey"])
    return Conditioning(Vocabulary(SIZE, depth, (2, 3)), [PairedSource(about, dropout), Classes(3, NAMES)])


# The part


@pytest.mark.parametrize("depth", [1, 2])
def test_every_sequence_begins_with_the_source_of_its_view(tmp_path: Path, depth: int) -> None:
    sources = np.random.default_rng(0).integers(SIZE, size=(9, 2, 2, 3, *([depth] if depth > 1 else [])))
    codes = write_codes(tmp_path, views=2, depth=depth, size=SIZE, source=sources)
    files = CodeFiles(tmp_path, "train")
    found = Sequences(files, Conditioning.for_files(files))
    layout, length, null = found.conditioning, 6 * depth, SIZE * depth + 3
    assert layout.length == layout.plain.length == length + 1 and layout.size == null + 2
    views = np.arange(9) % 2
    tokens = found.rows(np.arange(9), views).tokens
    source, label, target = tokens.split([length, 1, length], 1)
    rows = np.arange(9), views
    assert torch.equal(layout.vocabulary.to_codes(source), torch.from_numpy(sources[rows]))
    assert torch.equal(layout.vocabulary.to_codes(target), torch.from_numpy(codes[rows].astype(np.int64)))
    assert label[:, 0].tolist() == [null - 3 + index % 3 for index in range(9)]


def test_dropout_takes_the_source_away_as_a_whole(tmp_path: Path) -> None:
    write_codes(tmp_path, size=SIZE, source=True)
    files = CodeFiles(tmp_path, "train")
    layout = Conditioning.for_files(files, ObjectiveConfig(source_dropout=0.4, label_dropout=0))
    tokens = Sequences(files, layout).rows(np.arange(400) % 9, np.zeros(400, np.int64)).tokens
    torch.manual_seed(0)
    dropped = layout.dropped(tokens)
    absent = (dropped[:, :6] == NULL + 1).all(1)
    assert 0.3 < absent.float().mean() < 0.5
    assert torch.equal(dropped[~absent], tokens[~absent]) and torch.equal(dropped[:, 6:], tokens[:, 6:])
    assert torch.equal(layout.without(tokens, [layout.paired_source])[:, :6], torch.full((400, 6), NULL + 1))


def test_all_parts_are_left_out_together_in_half_of_the_rows(tmp_path: Path) -> None:
    """Independent dropout alone leaves hardly a row without any condition, with which guidance by both compares."""
    write_codes(tmp_path, size=SIZE, source=True)
    files = CodeFiles(tmp_path, "train")
    layout = Conditioning.for_files(files, ObjectiveConfig(source_dropout=0.2, label_dropout=0.2))
    tokens = Sequences(files, layout).rows(np.arange(8000) % 9, np.zeros(8000, np.int64)).tokens
    torch.manual_seed(0)
    dropped = layout.dropped(tokens)
    source, label = (dropped[:, :6] == NULL + 1).all(1), dropped[:, 6] == NULL
    for found, share in ((source & label, 0.2), (source & ~label, 0.08), (label & ~source, 0.08)):
        assert abs(found.float().mean() - share) < 0.02


def test_a_source_has_a_grid_of_its_own() -> None:
    layout = layout_of(grid=(1, 2))
    assert layout.length == 3 and layout.vocabulary.length == 6
    conditions = layout.conditions({"source": torch.tensor([[[4, 5]]]), "class": ["bag"]})
    assert layout.prefixes(conditions, [0]).tolist() == [[4, 5, SIZE + 2]]
    nothing = layout.conditions()
    assert layout.prefixes(nothing, [1]).tolist() == [[NULL + 1, NULL + 1, SIZE + 1]]
    for wrong in (torch.zeros(2, 3), torch.full((1, 2), SIZE)):
        with pytest.raises(UsageError, match="source"):
            layout.conditions({"source": [wrong]})
    partly = layout.conditions({"source": [torch.tensor([[UNKNOWN, 5]])]})
    assert layout.prefixes(partly, [0])[0, :2].tolist() == [NULL + 1, 5]


def test_descriptions_say_what_the_prior_was_trained_for() -> None:
    found = layout_of(dropout=0.25)
    about = json.loads(json.dumps(found.describe()))
    assert about["source"]["degradations"] == ["grey"]
    again = Conditioning.from_description(found.vocabulary, about)
    assert again.paired_source is not None and again.masked_source is None
    assert again.paired_source.about == GREY and again.paired_source.dropout == 0.25
    assert again.describe() == found.describe() and again.length == found.length and again.size == found.size
    for wrong in (
        {"dropout": 1},
        {"dropout": True},
        {"grid": [2]},
        {"grid": [0, 3]},
        {"grid": [2, 2**17]},
        {"kind": "other"},
        {"degradations": "grey"},
        {"degradations": []},
        {"order": "columns"},
    ):
        with pytest.raises((ValueError, KeyError)):
            PairedSource.from_description({"source": {**about["source"], **wrong}})
    for wrong in ([], "x", {}, None, {"dropout": 0.1}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            PairedSource.from_description({"source": wrong})
    with pytest.raises(ValueError, match="inpainting"):
        Conditioning.from_description(found.vocabulary, {**about, "inpainting": 0.5})


def test_one_kind_of_source_for_one_prior(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    write_codes(tmp_path / "with", size=SIZE, source=True)
    write_codes(tmp_path / "without", size=SIZE)
    both, plain = (CodeFiles(tmp_path / name, "train") for name in ("with", "without"))
    with pytest.raises(UsageError, match=r"--inpainting: found 0.5, .*with"):
        Conditioning.for_files(both, ObjectiveConfig(inpainting=0.5))
    with pytest.raises(UsageError, match=r"--source-dropout: found 0.3, .*without"):
        Conditioning.for_files(plain, ObjectiveConfig(source_dropout=0.3))
    assert Conditioning.for_files(plain).paired_source is None
    sequences = Sequences(plain, Conditioning.for_files(both))
    with pytest.raises(UserError, match="without has no source"):
        next(sequences.ordered([0], 1))


# Training


def write_shifted(folder: Path, mark: str, tokenizer: Path) -> None:
    """Code files of 240 training and 60 held-out images of random codes, whose source is each code less one."""
    folder.mkdir()
    splits = {}
    for number, (split, count) in enumerate({"train": 240, "heldout": 60}.items()):
        codes = np.random.default_rng(number).integers(SIZE, size=(count, 1, 2, 3))
        write_shard(folder / shard_name(number), codes, np.full(count, -1), SIZE, (codes - 1) % SIZE)
        entry = ShardEntry(shard_name(number), count, checksum(folder / shard_name(number)))
        splits[split] = SplitEntry(1, count, [entry])
    Manifest(SIZE, [2, 3], 1, [4, 6], 3, None, mark, "d" * 64, "fp32", "0", splits, source=GREY).write(folder)
    shutil.copytree(tokenizer, folder / "tokenizer")


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_a_prior_learns_to_use_its_source(cli, tmp_path: Path, backbone: str) -> None:
    """Started from a plain prior. The source tells every code, without it there is nothing to know."""
    model = make_prior(tmp_path / "of", backbone, names=None)
    mark = str(Prior.load(model).tokenizer_fingerprint)
    write_shifted(tmp_path / "codes", mark, model / "tokenizer")
    words = ["--codes", tmp_path / "codes", "--output", tmp_path / "run", "--backbone", backbone, "--dim", 16]
    words += ["--layers", 2, "--heads", 2, "--dropout", 0, "--lr", 1e-2, "--lr-warmup", 10, "--steps", 300]
    words += ["--batch-size", 32, "--validate-every", 150, "--preview-images", 4, "--seed", 1, "--init", model]
    result = cli(train, *words)
    assert result.code == 0, result.err
    prior, files = Prior.load(tmp_path / "run"), CodeFiles(tmp_path / "codes", "heldout")
    assert prior.conditioning.paired_source is not None and prior.conditioning.paired_source.about == GREY
    data, accelerator = Sequences(files, prior.conditioning), Accelerator(cpu=True)
    batch = next(data.ordered(range(60), 60))

    def nats(source: Tensor) -> float:
        tokens = torch.cat([source, batch.tokens[:, 6:]], 1)
        return likelihood(prior, [type(batch)(tokens, batch.layout)], accelerator).nats_per_token

    source = batch.tokens[:, :6]
    assert nats(source) < 0.5
    assert 2.2 < nats(torch.full_like(source, prior.conditioning.size - 1)) < 3.2, "ln 12 is 2.48"
    assert nats(source.roll(1, 0)) > 3, "another image's source costs more than none"
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        torch.testing.assert_close(other(batch.tokens).logits, prior(batch.tokens))


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_a_plain_prior_is_where_a_source_prior_starts(tmp_path: Path, backbone: str) -> None:
    plain = Prior.load(make_prior(tmp_path / "plain", backbone))
    prior = Prior(plain.config, layout_of(), plain.image_shape, plain.tokenizer_fingerprint)
    before = {name: value.clone() for name, value in prior.backbone.state_dict().items()}
    prior.start_from(tmp_path / "plain")
    own, given = prior.backbone.state_dict(), plain.backbone.state_dict()
    unknown = slice(NULL + 1, NULL + 2)
    for name, value in given.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")):
            assert torch.equal(own[name][: NULL + 1], value) and torch.equal(own[name][unknown], before[name][unknown])
        elif name.endswith("wpe.weight"):  # the class and the codes keep their positions
            assert torch.equal(own[name][6:], value) and torch.equal(own[name][:6], before[name][:6])
        else:
            assert torch.equal(own[name], value)
    # And an inpainting prior, whose id for unknown codes it shares.
    masked = Conditioning(prior.vocabulary, [MaskedSource(0.5), Classes(3, NAMES)])
    assert (slice(NULL + 1, NULL + 2),) * 2 in layout_of().common_ids(masked)
