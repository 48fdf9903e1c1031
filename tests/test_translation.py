"""Translation: a prior that is given the codes of another image, and the images that it makes of them."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import NAMES, SIZE, make_prior, write_codes
from processes import run_together
from torch import Tensor
from transformers import AutoModelForCausalLM

import vqgen.sampling.sample as program
import vqgen.tokenizer.codes.degrade as degrade_module
from vqgen.errors import UsageError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.export.program import main as export
from vqgen.prior.likelihood import likelihood
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig
from vqgen.prior.parts.part import ABSENT, Classes
from vqgen.prior.parts.source import UNKNOWN, MaskedSource, PairedSource
from vqgen.prior.train import main as train
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import Generator
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
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.reconstruction import write_png_atomic

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


def test_parts_are_left_out_at_their_shares_and_together(tmp_path: Path) -> None:
    """Independent dropout alone leaves hardly a row without any condition, with which guidance by both compares."""
    write_codes(tmp_path, size=SIZE, source=True)
    files = CodeFiles(tmp_path, "train")
    layout = Conditioning.for_files(files, ObjectiveConfig(source_dropout=0.5, label_dropout=0.2))
    tokens = Sequences(files, layout).rows(np.arange(8000) % 9, np.zeros(8000, np.int64)).tokens
    torch.manual_seed(0)
    dropped = layout.dropped(tokens)
    source, label = (dropped[:, :6] == NULL + 1).all(1), dropped[:, 6] == NULL
    both = 0.1 + 0.9 * (0.4 / 0.9) * (0.1 / 0.9)
    for found, share in ((source, 0.5), (label, 0.2), (source & label, both)):
        assert abs(found.float().mean() - share) < 0.02


def test_sources_of_a_series_are_checked_and_encoded_as_each_alone(generator: Generator) -> None:
    part = generator.conditioning.paired_source
    assert part is not None
    shape = part.vocabulary.shape
    codes = torch.arange(math.prod(shape)).reshape(shape) % part.vocabulary.codebook_size
    values = [codes, ABSENT, (codes * 0).tolist(), torch.full(shape, UNKNOWN)]
    rows = part.of_values(values)
    assert rows.tolist() == [part.of_values([value])[0].tolist() for value in values]
    assert rows[0].tolist() == part.of_value(codes) and rows[1].tolist() == rows[3].tolist() == part.absent
    for wrong in (codes[1:], codes + part.vocabulary.codebook_size, codes.float(), codes - 2):
        with pytest.raises(UsageError, match="source: found"):
            part.of_values([codes, wrong])


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
    for wrong in (0, 1, True, "0.5"):
        with pytest.raises(ValueError, match="inpainting"):
            Conditioning.from_description(found.vocabulary, {**about, "inpainting": wrong})


def test_options_that_do_not_fit_the_codes_are_named(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    write_codes(tmp_path / "with", size=SIZE, source=True)
    write_codes(tmp_path / "without", size=SIZE)
    both, plain = (CodeFiles(tmp_path / name, "train") for name in ("with", "without"))
    with pytest.raises(UsageError, match=r"--source-dropout: found 0.3, .*without"):
        Conditioning.for_files(plain, ObjectiveConfig(source_dropout=0.3))
    assert Conditioning.for_files(plain).paired_source is None
    trained = Conditioning.for_files(both)
    part = trained.paired_source
    assert part is not None and not part.misfit(both) and "no source codes" in part.misfit(plain)
    absent = next(Sequences(plain, trained).ordered([0], 1))  # what NLL without a source is measured on
    assert (absent.layout.part(absent.tokens, "source") == torch.tensor(part.absent)).all()
    others = PairedSource(SourceRecord("paired", [2, 3], "d" * 64, description="other by name"))
    assert "degraded" in others.misfit(both)


def test_a_prior_goes_on_with_sources_of_its_own_task_alone(cli, tmp_path: Path) -> None:
    prior = make_prior(tmp_path / "prior")
    write_shifted(tmp_path / "codes", Prior.load(prior).tokenizer_fingerprint, prior / "tokenizer")
    words = ["--codes", tmp_path / "codes", "--output", tmp_path / "run", "--dim", 16, "--layers", 1, "--heads", 2]
    words += ["--batch-size", 8, "--precision", "fp32", "--preview-images", 0, "--checkpoint-every", 2, "--steps"]
    assert cli(train, *words, 2).code == 0
    file = tmp_path / "codes" / "manifest.json"
    file.write_text(file.read_text().replace('"grey"', '"blur:2"'))
    result = cli(train, *words, 4)
    assert result.code == 1 and "--codes" in result.err and "blur:2" in result.err and "grey" in result.err
    file.write_text(file.read_text().replace('"blur:2"', '"grey"'))
    assert cli(train, *words, 4).code == 0


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


# Translating


def model_with(folder: Path, parts: list, backbone: str = "llama", depth: int = 1) -> Path:
    """A random prior of 2x3 codes with these parts, with its tokenizer; images 4x6."""
    plain = Prior.load(make_prior(folder / "of", backbone, depth))
    torch.manual_seed(1)
    conditioning = Conditioning(plain.vocabulary, parts)
    prior = Prior(plain.config, conditioning, plain.image_shape, plain.tokenizer_fingerprint)
    with torch.no_grad():
        for weight in prior.backbone.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)  # so that sources differ
    prior.save(folder / "prior", folder / "of" / "tokenizer")
    return folder / "prior"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with(tmp_path_factory.mktemp("model"), [PairedSource(GREY, 0.1), Classes(3, NAMES)])


@pytest.fixture(scope="module")
def generator(model: Path) -> Generator:
    return Generator.load(model, "cpu", "fp32")


def luma(images: Tensor) -> Tensor:
    return (images.float() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)


def photos(count: int = 3, height: int = 4, width: int = 6) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=random)


def test_translations_are_drawn_with_the_codes_of_their_sources(generator: Generator) -> None:
    images = photos()
    found = generator.translate(images, seed=3)
    assert found.images.shape == (3, 3, 4, 6) and found.labels.tolist() == [-1, -1, -1]
    given = {"source": generator.encode(images), "class": [-1]}
    assert torch.equal(found.codes, generator.draw(range(3), given, seed=3).codes)
    without = [generator.draw(range(2), {"source": source, "class": [-1]}, seed=3).codes for source in (-1, [-1, -1])]
    assert torch.equal(*without)
    assert not torch.equal(found.codes, generator.translate(images.flip(0), seed=3).codes)
    more = generator.translate(images, n=8, classes=["bag", "shoe"], seed=3)
    assert more.labels.tolist() == [2, 1] * 4
    assert torch.equal(generator.translate(images[1], classes="shoe", n=2, seed=3).codes[1], more.codes[1])
    larger = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert generator.translate(larger).codes.shape == (3, 2, 3)
    # The prior is for grey sources: images have the luma of theirs, and all else from their codes.
    plain = generator.translate(images, seed=3, paste=False)
    assert torch.equal(plain.images, generator.decode(found.codes)) and torch.equal(plain.codes, found.codes)
    assert torch.equal(found.images, degrade_module.keep_of(["grey"])(plain.images, images))
    assert (luma(found.images) - luma(images)).abs().max() <= 0.51 < (luma(plain.images) - luma(images)).abs().max()
    assert torch.equal(more.images[4], generator.translate(images, n=5, classes=["bag", "shoe"], seed=3).images[4])
    # Completion has the source, too.
    half = generator.complete(images, mask_rows=1, conditions={"source": generator.encode(images)})
    assert torch.equal(half.codes[:, 0], generator.encode(images)[:, 0])


@pytest.mark.parametrize(
    "about",
    [
        SourceRecord("degraded", [2, 3], "d" * 64, ["noise:0.1"]),
        SourceRecord("degraded", [2, 3], "d" * 64, ["downscale:2", "grey"]),
        SourceRecord("paired", [2, 3], "d" * 64, description="sketches by name"),
        SourceRecord("degraded", [1, 2], "d" * 64, ["grey"]),
    ],
)
def test_nothing_is_kept_of_other_sources(cli, tmp_path: Path, about: SourceRecord) -> None:
    model = model_with(tmp_path, [PairedSource(about, 0.1), Classes(3, NAMES)])
    generator = Generator.load(model, "cpu", "fp32")
    found = generator.translate(photos())
    assert torch.equal(found.images, generator.decode(found.codes))
    write_png_atomic(tmp_path / "a.png", photos(1)[0])
    words = ["--model", model, "--device", "cpu", "--source-image", tmp_path / "a.png", "--output", tmp_path / "out"]
    assert cli(program.main, *words).code == 0
    assert "paste" not in json.loads((tmp_path / "out" / "samples.json").read_text())


def test_of_several_degradations_it_is_said_which_leaves_something(cli, tmp_path: Path) -> None:
    about = SourceRecord("degraded", [2, 3], "d" * 64, ["noise:0.1", "or", "grey"])
    model = model_with(tmp_path, [PairedSource(about, 0.1), Classes(3, NAMES)])
    generator, images = Generator.load(model, "cpu", "fp32"), photos(1)
    plain, kept = generator.translate(images), generator.translate(images, degraded_by=["grey"])
    assert torch.equal(plain.images, generator.decode(plain.codes)) and torch.equal(plain.codes, kept.codes)
    assert (luma(kept.images) - luma(images)).abs().max() <= 0.51 < (luma(plain.images) - luma(images)).abs().max()
    assert torch.equal(generator.translate(images, degraded_by="grey").images, kept.images)
    assert torch.equal(generator.translate(images, degraded_by=["downscale:4"]).images, plain.images)
    with pytest.raises(UsageError, match="gray"):
        generator.translate(images, degraded_by="gray")
    write_png_atomic(tmp_path / "a.png", images[0])
    words = ["--model", model, "--device", "cpu", "--source-image", tmp_path / "a.png", "--output", tmp_path / "out"]
    assert cli(program.main, *words, "--source", "grey").code == 0
    found = decode((tmp_path / "out" / "translated" / "a.png").read_bytes(), 3)
    assert (luma(found[None]) - luma(images)).abs().max() <= 1.51  # that of an image which was made grey and rounded


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "source_guidance_scale": 3.0}, {"oversample": 1.25}])
def test_a_translation_depends_on_no_batch_and_no_number_of_threads(generator: Generator, settings: dict) -> None:
    images, threads = photos(5), torch.get_num_threads()
    whole = generator.translate(images, n=20, classes=["bag", "shoe"], batch_size=32, **settings)
    try:
        for count, size in ((1, 7), (2, 3), (2, 64)):
            torch.set_num_threads(count)
            again = generator.translate(images, n=20, classes=["bag", "shoe"], batch_size=size, **settings)
            assert torch.equal(again.codes, whole.codes) and torch.equal(again.nats, whole.nats)
            assert torch.equal(again.images, whole.images)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("scales", "classes", "rows"),
    [
        ((1, 1), "bag", 1),
        ((2, 1), "bag", 2),
        ((1, 2), None, 2),
        ((1, 2), "bag", 3),
        ((2, 2), "bag", 2),
        ((2, 3), "bag", 3),
        ((2, 0), "bag", 3),
    ],
)
def test_only_rows_that_count_are_computed(generator: Generator, monkeypatch, scales, classes, rows) -> None:
    started: list[int] = []
    start = generator.decoder.start
    monkeypatch.setattr(generator.decoder, "start", lambda count: (started.append(count), start(count))[1])
    both = dict(zip(("guidance_scale", "source_guidance_scale"), map(float, scales)))
    found = generator.translate(photos(1), n=16, classes=classes, **both)
    plain = started[0] // rows
    assert started == [plain * rows] and plain >= 16
    # What is drawn follows the equation: here the probability of the first code at low temperature.
    layout = generator.conditioning
    conditions = layout.conditions({"source": generator.encode(photos(1)), "class": classes}, absent=True)
    prefix = layout.prefixes(conditions, [0])
    source = layout.without(prefix, [layout.classes])
    assert layout.paired_source is not None
    none = layout.without(source, [layout.paired_source])
    with torch.no_grad():
        a, b, c = (generator.prior(ids)[:, -1, :SIZE] for ids in (prefix, source, none))
    wanted = c + scales[1] * (b - c) + scales[0] * (a - b)
    greedy = generator.translate(photos(1), classes=classes, temperature=0, **both).codes
    assert int(greedy.flatten()[0]) == int(wanted.argmax()) and found.codes.shape == (16, 2, 3)


def test_what_a_prior_cannot_do_is_one_line(tmp_path: Path, generator: Generator) -> None:
    for name, parts, word in (("masked", [MaskedSource(0.5)], "fill in"), ("plain", [], "without source codes")):
        other = Generator.load(model_with(tmp_path / name, [*parts, Classes(3, NAMES)]), "cpu", "fp32")
        with pytest.raises(UsageError, match=f"--source-image: .*{word}"):
            other.translate(photos())
        with pytest.raises(UsageError, match="--source-guidance-scale: found 2"):
            other.sample(1, source_guidance_scale=2.0)
    with pytest.raises(UsageError, match=r"--source-guidance-scale: found 2, .*no condition"):
        generator.sample(1, source_guidance_scale=2.0)
    with pytest.raises(UsageError, match=r"--guidance-scale: found 2, .*--class"):
        generator.translate(photos(), guidance_scale=2.0)
    with pytest.raises(UsageError, match="--size"):
        generator.sample(1, size=(8, 12), conditions={"source": generator.encode(photos())})
    assert generator.sample(1, size=(8, 12)).images.shape == (1, 3, 8, 12)
    with pytest.raises(UsageError, match="--inpainting"):
        generator.vary(photos(), 0.5)
    always = Generator.load(
        model_with(tmp_path / "always", [PairedSource(GREY, 0.0), Classes(3, NAMES)]), "cpu", "fp32"
    )
    with pytest.raises(UsageError, match="--source-dropout 0"):
        always.sample(1)
    with pytest.raises(UsageError, match=r"^--size: .*--source-dropout 0"):
        always.sample(1, size=(8, 12))
    with pytest.raises(UsageError, match=r"--source-guidance-scale: .*--source-dropout 0"):
        always.translate(photos(), source_guidance_scale=2.0)
    assert len(always.translate(photos()).codes) == 3


@pytest.mark.parametrize("depth", [1, 2])
def test_transformers_translates_as_we_do(cli, tmp_path: Path, depth: int) -> None:
    """By the model card: source codes, class, and greedy codes of the allowed ids."""
    model = model_with(tmp_path, [PairedSource(GREY, 0.1), Classes(3, NAMES)], depth=depth)
    assert cli(export, "--model", model, "--output", tmp_path / "export").code == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    generator, null = Generator.load(model, "cpu", "fp32"), SIZE * depth + 3
    ours = generator.translate(photos(), classes="shoe", temperature=0)
    vocabulary = generator.vocabulary
    source = vocabulary.to_tokens(generator.encode(photos()))
    prefix = torch.cat([source, torch.full((3, 1), null - 2)], 1)

    def allowed(_row: int, ids: Tensor) -> list[int]:
        return list(range(*vocabulary.allowed(len(ids) - prefix.shape[1])))

    tokens = theirs.generate(
        prefix,
        attention_mask=torch.ones_like(prefix),  # else codes of the source with the id that pads are hidden
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=vocabulary.length,
        pad_token_id=0,
    )
    assert torch.equal(vocabulary.to_codes(tokens[:, prefix.shape[1] :]), ours.codes)
    card = (tmp_path / "export" / "README.md").read_text()
    assert (
        f"{null + 1} an unknown code" in card
        and f"The {6 * depth} ids before the last one" in card
        and "(grey)" in card
    )


# The command line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images, one of them with a name that the grid of samples has."""
    for image, name in zip(photos(5, 8, 8), ("b", "a", "grid", "x y", "c.d"), strict=True):
        write_png_atomic(tmp_path / "given" / f"{name}.png", image)
    return tmp_path / "given"


@pytest.fixture
def sample(cli, model: Path, tmp_path: Path):
    def run(*words):
        output = [] if "--output" in words else ["--output", tmp_path / "out"]
        return cli(program.main, "--model", model, "--device", "cpu", *output, *words)

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


STEMS = ["a", "b", "c.d", "grid", "x y"]


def test_translations_keep_the_names_of_their_sources(sample, folder: Path, tmp_path: Path, generator, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = sample("--source-image", folder, "--source-guidance-scale", 1.5, "--seed", 2)
    assert result.code == 0, result.err
    found, about = files(tmp_path / "out"), json.loads((tmp_path / "out" / "samples.json").read_text())
    assert list(found) == ["grid.png", *(f"translated/{stem}.png" for stem in STEMS)]
    assert about["stems"] == STEMS and about["settings"]["source_guidance_scale"] == 1.5
    assert [each["file"] for each in about["images"]] == list(found)[1:]
    assert about["source_images"][0].endswith("a.png") and len(about["conditions"]["source"]) == 64
    images = torch.stack([decode(path.read_bytes(), 3) for path in sorted(folder.iterdir())])
    drawn = generator.translate(images, source_guidance_scale=1.5, seed=2)
    for image, stem in zip(drawn.images, STEMS, strict=True):
        assert torch.equal(decode(found[f"translated/{stem}.png"], 3), image)
    assert about["paste"] is True and len(about["source_fingerprint"]) == 64
    plain = sample("--source-image", folder, "--source-guidance-scale", 1.5, "--seed", 2, "--no-paste", "--output", "x")
    assert plain.code == 0 and files(Path("x")).keys() == found.keys() and files(Path("x")) != found
    decoded = generator.decode(drawn.codes)
    assert torch.equal(decode((Path("x") / "translated" / "b.png").read_bytes(), 3), decoded[1])
    # It is continued and checked as any run.
    words = "--source-image", folder, "--source-guidance-scale", 1.5, "--seed", 2
    assert "holds these 5 images" in sample(*words).out
    (tmp_path / "out" / "translated" / "a.png").unlink()
    (tmp_path / "out" / "translated" / "b.png").write_bytes(b"")
    again = sample(*words)
    assert "2 images in" in again.out and "b.png was damaged" in again.err and files(tmp_path / "out") == found
    (tmp_path / "out" / "translated" / "mine.png").write_bytes(b"mine")
    for more, named in (
        (["--n", 7], "--n 7"),
        (["--source-guidance-scale", 2], "source guidance scale 1.5, now 2"),
        (["--source", "grey"], "source "),
        (["--no-paste"], "paste True, now False"),
    ):
        refused = sample(*words, *more)
        assert refused.code == 2 and "another run" in refused.err and len(refused.err) < 400
        assert named in refused.err and "stems" not in refused.err, refused.err
    assert sample(*words, "--n", 7, "--output", "numbered").code == 0
    refused = sample(*words, "--output", "numbered")
    assert refused.code == 2 and "--n 5" in refused.err and "stems" not in refused.err
    assert sample(*words[:2], "--n", 3, "--overwrite").code == 0
    assert list(files(tmp_path / "out")) == ["00000.png", "00001.png", "00002.png", "grid.png", "translated/mine.png"]


def test_pixels_of_a_source_that_are_kept_tell_runs_apart(sample, folder: Path, tmp_path: Path, generator) -> None:
    """Its codes alone would not: other pixels may have the same ones."""
    first = decode((folder / "a.png").read_bytes(), 3)
    other = first ^ 1
    assert torch.equal(generator.encode(first), generator.encode(other))
    assert sample("--source-image", folder / "a.png").code == 0
    write_png_atomic(folder / "a.png", other)
    refused = sample("--source-image", folder / "a.png")
    assert refused.code == 2 and "source fingerprint" in refused.err


def test_a_prior_that_needs_a_source_completes_nothing(cli, folder: Path, tmp_path: Path) -> None:
    """It says so, and does not ask for --source-image beside options that refuse it."""
    words = [
        "--model",
        model_with(tmp_path / "always", [PairedSource(GREY, 0.0), Classes(3, NAMES)]),
        "--device",
        "cpu",
    ]
    for given in (["--init-image", folder / "a.png", "--keep-rows", 1], ["--init-image", folder], ["--size", 8, 12]):
        result = cli(program.main, *words, "--output", tmp_path / "out", *given)
        assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()
        assert f"{given[0]}: " in result.err and "--source-dropout 0" in result.err, result.err


def test_all_classes_of_a_source_are_drawn(sample, folder: Path, tmp_path: Path) -> None:
    result = sample("--source-image", folder / "a.png", "--class", "bag", "shoe", "shirt")
    assert result.code == 0, result.err
    listed = json.loads((tmp_path / "out" / "samples.json").read_text())["images"]
    assert [(each["file"], each["class"]) for each in listed] == [
        ("00000.png", "bag"),
        ("00001.png", "shoe"),
        ("00002.png", "shirt"),
    ]


def test_sources_that_overwriting_would_remove_are_refused(sample, folder: Path, tmp_path: Path) -> None:
    assert sample("--source-image", folder).code == 0
    before = files(tmp_path / "out")
    refused = sample("--source-image", tmp_path / "out" / "translated", "--overwrite")
    assert refused.code == 2 and "--source-image: " in refused.err and files(tmp_path / "out") == before


def test_sources_are_degraded_by_the_seed_and_their_place(sample, folder: Path, tmp_path: Path, generator) -> None:
    assert sample("--source-image", folder, "--source", "noise:0.2", "--seed", 4).code == 0
    images = torch.stack([decode(path.read_bytes(), 3) for path in sorted(folder.iterdir())])
    seeds = [degrade_module.source_seed(4, index) for index in range(5)]
    noisy = degrade_module.degrade(generator.fitted(images), degrade_module.parse_degradations(["noise:0.2"]), seeds)
    ours = generator.translate(noisy, seed=4).images
    assert torch.equal(decode((tmp_path / "out" / "translated" / "c.d.png").read_bytes(), 3), ours[2])


def test_names_that_are_no_text_are_replaced(sample, folder: Path, tmp_path: Path) -> None:
    for name in (b"\xff\xfe.png", b"n\nl?.png", b"e\xe9.png"):
        shutil.copy(folder / "a.png", os.fsdecode(os.fsencode(folder) + b"/" + name))
    result = sample("--source-image", folder)
    assert result.code == 0, result.err
    found = files(tmp_path / "out")
    assert len(found) == 9
    (tmp_path / "out" / "translated" / "a.png").unlink()
    assert "1 images in" in sample("--source-image", folder).out and files(tmp_path / "out") == found


def test_two_processes_translate_what_one_translates(sample, model, folder: Path, tmp_path: Path) -> None:
    words = ["--source-image", folder, "--n", 9, "--source-guidance-scale", 2, "--class", "bag", "shoe"]
    words += ["--guidance-scale", 3, "--layout", "folders", "--source", "noise:0.1"]
    two = ["--model", model, *words, "--batch-size", 2, "--device", "cpu", "--output", tmp_path / "two"]
    for ended in run_together("vqgen.sampling.sample", *two):
        ended.ok()
    assert sample(*words).code == 0
    assert files(tmp_path / "two") == files(tmp_path / "out") and len(files(tmp_path / "out")) == 10
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["degradations"] == ["noise:0.1"]
    plain = sample(*words[:-2], "--output", tmp_path / "plain")
    assert plain.code == 0 and files(tmp_path / "plain") != files(tmp_path / "out"), "noise changes the sources"


def test_sources_that_do_not_fit_are_one_line(sample, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    shutil.copy(folder / "a.png", tmp_path / "more" / "A.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    for words, code, parts in (
        (["--source-image", folder, tmp_path / "more"], 2, ["a.png", "A.png", "--source-image"]),
        (["--source-image", tmp_path / "broken.png"], 1, ["broken.png"]),
        (["--source-image", tmp_path / "none.png"], 1, ["none.png"]),
        (["--source-image", folder, "--init-image", folder], 2, ["--init-image"]),
        (["--source-image", folder, "--size", 8, 12], 2, ["--size"]),
        (["--source", "grey"], 2, ["--source-image"]),
        (["--source-image", folder, "--source", "sepia"], 2, ["--source", "sepia"]),
        (["--source-image", folder, "--guidance-scale", 2], 2, ["--guidance-scale", "--class"]),
    ):
        result = sample(*words)
        assert result.code == code and len(result.err.strip().splitlines()) == 1, result.err
        assert all(part in result.err for part in parts), result.err
    assert not (tmp_path / "out").exists()
    assert sample("--source-image", folder, tmp_path / "more", "--n", 12).code == 0, "numbers need no names"


@pytest.mark.parametrize("stems", [["../a"], ["a/b"], [".a"], [""], ["a", "b"], "a"])
def test_a_list_with_odd_names_is_refused(sample, folder: Path, tmp_path: Path, stems) -> None:
    assert sample("--source-image", folder / "a.png").code == 0
    path = tmp_path / "out" / "samples.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stems": stems}))
    result = sample("--source-image", folder / "a.png", "--overwrite")
    assert result.code == 1 and "samples.json" in result.err and (tmp_path / "out" / "translated" / "a.png").exists()
