"""Text: captions as a part of the prefix, in training, sampling, likelihoods and export."""

import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import NAMES, SIZE, make_prior, write_codes
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from processes import SAMPLE, run_together
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import vqgen.sampling.sample as program
from vqgen.config import parse
from vqgen.errors import UsageError, UserError
from vqgen.evaluation import program as evaluate
from vqgen.evaluation.report import program as report
from vqgen.prior import train
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.export.program import main as export
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.prior.parts.text import FILE, Text, TextTokenizer
from vqgen.prior.train import PriorTraining
from vqgen.prior.trainer import refuse_unused
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.codes.format import CodeFiles, Manifest, ShardEntry, SplitEntry, checksum, shard_name, write_shard

COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large", "Huge")


def caption(code: int) -> str:
    """Of an image that has this code everywhere."""
    return f"a {SIZES[code % 3]} {COLOURS[code // 3]} square"


def write_squares(folder: Path, model: Path) -> Path:
    """Images of one code each, with the caption of that code, the class of its size, and a fifth without a caption."""
    folder.mkdir()
    splits = {}
    for number, (split, count) in enumerate({"train": 360, "heldout": 60}.items()):
        codes = np.arange(count) % SIZE
        captions = [caption(code) if row % 5 else "" for row, code in enumerate(codes)]
        path = folder / shard_name(number)
        write_shard(path, np.tile(codes[:, None, None, None], (1, 1, 2, 3)), codes % 3, SIZE, captions=captions)
        splits[split] = SplitEntry(1, count, [ShardEntry(path.name, count, checksum(path))])
    mark = str(Prior.load(model).tokenizer_fingerprint)
    manifest = Manifest(SIZE, [2, 3], 1, [4, 6], 3, NAMES, mark, "d" * 64, "fp32", "0", splits, captions=True)
    manifest.write(folder)
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    return folder


WORDS = "--dim 32 --layers 2 --heads 2 --dropout 0 --lr 3e-3 --lr-warmup 10 --batch-size 48 --seed 1"
WORDS += " --precision fp32 --preview-images 12"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """codes/, and prior/, which is trained on them with text, a source and classes; treat them as read-only."""
    folder = tmp_path_factory.mktemp("text")
    codes = write_squares(folder / "codes", make_prior(folder / "of"))
    words = ["--codes", codes, "--output", folder / "prior", "--steps", 250, "--validate-every", 125, *WORDS.split()]
    assert train.main([str(word) for word in [*words, "--inpainting", 0.2, "--label-dropout", 0.3]]) == 0
    return folder


@pytest.fixture(scope="module")
def generator(place: Path) -> Generator:
    return Generator.load(place / "prior", "cpu", "fp32")


def text_of(conditioning: Conditioning) -> Text:
    return next(part for part in conditioning.parts if isinstance(part, Text))


# ---- the BPE ----


CORPUS = ["a photo of a sneaker", "a photo of a Shirt", "ein Foto, schön: 3 Äpfel"] * 3


@given(st.text(max_size=40))
@example("\u00d9\u1df7")  # a letter with a mark that Unicode knows since version 14
def test_every_text_has_ids_and_case_and_composition_do_not_matter(text: str) -> None:
    found = TextTokenizer.trained(CORPUS, 300)
    normal = unicodedata.normalize("NFC", text)
    ids = found.encode(text)
    assert all(0 <= each < len(found) <= 300 for each in ids)
    assert found.bpe.decode(ids).removeprefix(" ") == found.bpe.normalizer.normalize_str(normal).removeprefix(" ")
    assert ids == found.encode(normal) == found.encode(unicodedata.normalize("NFD", text))
    assert found.encode("SNEAKER Schön") == found.encode("sneaker scho\u0308n")


def test_frequent_words_are_one_token() -> None:
    found = TextTokenizer.trained(CORPUS, 4096)
    assert len(found.encode("a photo of a sneaker")) == 5
    assert found.encode("sneaker")[0] == found.encode("a photo of a sneaker")[-1]
    assert found.rest("a photo of a sneaker  and more", 3) == "a sneaker  and more" and not found.rest("a", 1)
    apart = unicodedata.normalize("NFD", "\u00d9\u1df7") * 8  # has more tokens than composed, as `encode` takes it
    assert not found.rest(apart, len(found.encode(apart)))


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = "import random; from vqgen.prior.parts.text import TextTokenizer\n"
    code += "w = ['w%d' % (i % 97) + 'xy'[i % 2] * (i % 5) for i in range(3000)]; random.Random(1).shuffle(w)\n"
    code += "print(TextTokenizer.trained((' '.join(w[i:i + 7]) for i in range(2990)), 600).fingerprint)"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": s}
        )
        for s in "12"
    ]
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) == 65


def damaged() -> Iterator[Any]:
    def change(function: Any) -> Any:
        def apply(text: str) -> str:
            value = json.loads(text)
            function(value["model"])
            return json.dumps(value)

        return apply

    yield lambda text: text[:-5]
    yield lambda text: "[1]"
    yield lambda text: "{}"
    yield lambda text: text + " " * 2**22
    yield change(lambda model: model.pop("vocab"))
    yield change(lambda model: model["vocab"].pop("a"))
    yield change(lambda model: model["vocab"].update(a=5000))
    yield change(lambda model: model["vocab"].update(a=model["vocab"]["b"]))
    yield change(lambda model: model["merges"].append(["zz", "top"]))
    yield change(lambda model: model["merges"].append(["a"]))
    yield change(lambda model: model.update(merges="a b"))
    yield change(lambda model: model["merges"].reverse())
    yield change(lambda model: model["vocab"].update(another=len(model["vocab"])))


@pytest.mark.parametrize("number", range(len(list(damaged()))))
def test_a_damaged_file_is_one_line(place: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "prior"
    shutil.copytree(place / "prior", folder)
    path = folder / FILE
    path.write_text(list(damaged())[number](path.read_text()))
    with pytest.raises(UserError) as error:
        Prior.load(folder)
    assert FILE in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=FILE):
        Prior.load(folder)


@pytest.mark.parametrize(
    "change",
    [{"length": 0}, {"ids": 2**40}, {"dropout": 1.5}, {"fingerprint": 3}, {"length": "9"}, {"uncaptioned": 1}],
)
def test_a_damaged_description_is_one_line(place: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "prior"
    shutil.copytree(place / "prior", folder)
    about = json.loads((folder / "vqgen.json").read_text())
    about["text"] |= change
    (folder / "vqgen.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"vqgen\.json"):
        Prior.load(folder)


# ---- sequences ----


def squares(folder: Path, captions: list[str], **options: Any) -> Sequences:
    write_codes(folder, (len(captions),), size=SIZE, captions=captions)
    files = CodeFiles(folder, "train")
    return Sequences(files, Conditioning.for_files(files, ObjectiveConfig(**options)))


def test_text_stands_first_and_has_the_highest_ids(tmp_path: Path) -> None:
    captions = ["a red shoe", "a shoe", "", "a red red red red red shoe", *["a red shoe"] * 400]
    found = squares(tmp_path, captions, inpainting=0.5)
    conditioning, text = found.conditioning, text_of(found.conditioning)
    assert [part.name for part in conditioning.parts] == ["text", "source", "class"] and text.dropout == 0.15
    assert text.length == 3, "one caption in 404 is longer"
    assert text.first == SIZE + len(NAMES) + 2 and conditioning.size == text.first + text.ids
    assert text.absent == [conditioning.size - 1] * 3
    layout = conditioning.plain
    batch = found.rows(np.arange(4), np.zeros(4, np.int64)).tokens
    assert batch.shape == (4, 3 + 1 + 6)
    null, ids = text.absent[0], [text.first + each for each in text.tokenizer.encode("a red shoe")]
    assert batch[:, :3].tolist() == [ids, [null, ids[0], ids[2]], [null] * 3, [ids[0], ids[1], ids[1]]]
    assert layout.split(batch)[0].shape == (4, 4)
    # Dropping and guidance leave out all of it.
    torch.manual_seed(0)
    dropped = layout.dropped(batch[:1].expand(4000, -1))
    share = (dropped[:, :3] == null).float().mean(0)
    assert torch.equal(share, share[:1].expand(3)) and share[0] == pytest.approx(0.15, abs=0.02)
    assert layout.without(batch)[:, :3].eq(null).all()


def test_the_options_of_text(tmp_path: Path) -> None:
    captions = [" ".join(["shoe"] * (1 + i % 100)) for i in range(300)]
    assert text_of(squares(tmp_path / "a", captions).conditioning).length == 64
    found = text_of(squares(tmp_path / "b", captions, text_length=7, text_vocabulary=256, text_dropout=0).conditioning)
    assert (found.length, found.ids, found.dropout) == (7, 257, 0)
    plain = squares(tmp_path / "c", captions, text_length=0).conditioning
    write_codes(tmp_path / "d", size=SIZE)
    without = CodeFiles(tmp_path / "d", "train")
    assert plain.describe() == Conditioning.for_files(without).describe() and [p.name for p in plain.parts] == ["class"]
    with pytest.raises(UsageError, match="--text-length"):
        Conditioning.for_files(without, ObjectiveConfig(text_length=8))
    for option, value in (("--text-dropout", "0.3"), ("--text-vocabulary", "500")):
        with pytest.raises(UsageError, match=f"{option}: found {value}"):
            refuse_unused(parse(PriorTraining, ["--codes", "codes", option, value]), without)
    refuse_unused(parse(PriorTraining, ["--codes", "codes", "--config", "emoji-prior"]), without)  # a preset may
    # Without classes it says how often text and source are dropped together, where there are both and they are read.
    dropout = ["--codes", "codes", "--label-dropout", "0.3"]
    refuse_unused(parse(PriorTraining, dropout), without)
    labels = np.full(9, -1)
    for name, source, further, used in (
        ("t", False, [], False),
        ("s", True, [], False),
        ("b", True, [], True),
        ("n", True, ["--text-length", "0"], False),
    ):
        read = None if name == "s" else ["a shoe"] * 9
        write_codes(tmp_path / name, size=SIZE, names=None, labels=labels, source=source, captions=read)
        config, files = parse(PriorTraining, [*dropout, *further]), CodeFiles(tmp_path / name, "train")
        with nullcontext() if used else pytest.raises(UsageError, match=r"--label-dropout: found 0\.3"):
            refuse_unused(config, files)
    with pytest.raises(UserError, match="--text-length 0"):
        squares(tmp_path / "e", [""] * 4)


def test_weights_of_text_start_a_run_with_the_same_captions_alone(tmp_path: Path) -> None:
    one, same, other = (
        squares(tmp_path / name, texts).conditioning
        for name, texts in (("a", ["a shoe"] * 4), ("b", ["a shoe"] * 5), ("c", ["a bag x"] * 4))
    )
    own = text_of(one)
    assert (slice(own.first, own.first + own.ids),) * 2 in one.common_ids(same)
    assert len(one.common_ids(same)) == len(one.common_ids(other)) + 1


def untrained(folder: Path, captions: list[str], **options: Any) -> Generator:
    """A random prior that was trained on these captions, and on classes."""
    tokenizer = Generator.load(make_prior(folder / "of"), "cpu", "fp32").tokenizer
    conditioning = squares(folder / "codes", captions, **options).conditioning
    prior = Prior(PriorConfig(dim=16, layers=2, heads=2), conditioning, (3, 4, 6), "f" * 64)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    return Generator(prior, tokenizer, torch.device("cpu"), "fp32")


def test_guidance_needs_a_condition_that_is_given_and_learned_to_be_without(tmp_path: Path) -> None:
    for name, options, own, other in (
        ("text", {"text_dropout": 0}, {"prompts": "a red shoe"}, {"classes": "bag"}),
        ("label", {"label_dropout": 0}, {"classes": "bag"}, {"prompts": "a red shoe"}),
    ):
        generator = untrained(tmp_path / name, ["a red shoe"] * 4, **options)
        with pytest.raises(UsageError, match=rf"^--guidance-scale: found 8, [^-]*--{name}-dropout 0, [^-]*$"):
            generator.sample(1, **own, guidance_scale=8.0)
        generator.sample(1, **own, **other, guidance_scale=8.0)
        plain = generator.sample(2, **own)
        generator.recommended = {"guidance_scale": 8.0}  # is left out
        assert torch.equal(generator.sample(2, **own).codes, plain.codes)
        conditions = generator.conditioning.conditions({"text": "a red shoe", "class": "bag"})
        assert generator.settings({}, conditions).guidance_scale == 8


def test_a_prompt_is_needed_where_every_image_of_training_had_one(tmp_path: Path) -> None:
    always = untrained(tmp_path / "always", ["a shoe"] * 4, text_dropout=0)
    images = always.sample(2, prompts="a shoe").images
    for call in (
        lambda: always.sample(2),
        lambda: always.sample(2, prompts=["a shoe", ""]),
        lambda: always.complete(images, 1),
        lambda: always.log_likelihood(images, "bag"),
    ):
        with pytest.raises(UsageError, match=r"^--prompt: .*--text-dropout 0"):
            call()
    assert always.log_likelihood(images, conditions={"text": "a shoe"}).shape == (2,)
    with pytest.raises(UsageError, match="prompts: conditions has 'text', too"):
        always.sample(2, prompts="a shoe", conditions={"text": "a bag"})
    sometimes = untrained(tmp_path / "sometimes", ["a shoe", ""] * 2, text_dropout=0)
    assert sometimes.sample(2).codes.shape == sometimes.sample(2, prompts="a shoe", guidance_scale=2.0).codes.shape
    for generator, found in ((always, False), (sometimes, True)):
        about = generator.conditioning.describe()
        assert about["text"]["uncaptioned"] is found
        part = Text.from_description(about)
        assert part and (part.guidable, part.required) == (found, not found)
        del about["text"]["uncaptioned"]  # as in folders of earlier versions: it is not known whether there were any
        part = Text.from_description(about)
        assert part and (part.guidable, part.required) == (False, False) and part.describe() == {"text": about["text"]}


# ---- a trained prior ----


def drawn(generator: Generator, n: int, **options: Any) -> list[int]:
    """The code of each image where all its codes are the same, -1 where they are not."""
    codes = generator.sample(n, seed=3, **options).codes.flatten(1)
    return [int(row[0]) if (row == row[0]).all() else -1 for row in codes]


def test_the_prompt_decides_what_is_drawn(place: Path, generator: Generator) -> None:
    prompts = [caption(code) for code in range(SIZE)]
    for further in ({}, {"guidance_scale": 2.0}):
        found = drawn(generator, 48, prompts=prompts, **further)
        assert np.mean([code == i % SIZE for i, code in enumerate(found)]) > 0.9
    samples = generator.sample(4, prompts="a SMALL  red square ")
    assert samples.labels.tolist() == [-1] * 4
    again = generator.sample(4, conditions={"text": "a small red square", "class": -1})
    assert torch.equal(samples.codes, again.codes) and torch.equal(samples.nats, again.nats)
    # A class with a text that leaves the size open; without either, everything.
    large = drawn(generator, 32, prompts=["a blue square"], classes="shoe", guidance_scale=2.0)
    assert np.mean([code == 7 for code in large]) > 0.5
    assert len(set(drawn(generator, 64))) > 6
    assert (place / "prior" / FILE).is_file() and (place / "prior" / "images" / "step-00000250.png").is_file()


def test_every_prompt_is_encoded_once_for_a_whole_series(cli, place: Path, tmp_path: Path, monkeypatch) -> None:
    """Not for every batch, nor for every image that has it."""
    encoded: list[str] = []
    of_value = Text.of_value
    monkeypatch.setattr(Text, "of_value", lambda self, value: (encoded.append(value), of_value(self, value))[1])
    words = ["--model", place / "prior", "--n", 12, "--batch-size", 2, "--device", "cpu", "--precision", "fp32"]
    given = [caption(code) for code in (1, 5, 9)]
    words = [*words, "--prompt", *given, "--guidance-scale", 2]
    assert cli(program.main, *words, "--output", tmp_path / "plain").code == 0
    assert encoded == given
    encoded.clear()
    words += ["--init-image", tmp_path / "plain" / "00000.png", "--box", 0, 0, 2, 2]
    result = cli(program.main, *words, "--output", tmp_path / "filled")
    assert result.code == 0, result.err
    assert encoded == given


def test_what_is_no_prompt_is_one_line(generator: Generator, tmp_path: Path) -> None:
    length = text_of(generator.conditioning).length
    assert length == 4
    for wrong, parts in (
        ("a small red square on a table", ("4 tokens", "on a table")),
        ([], ("no values",)),
        ([3], ("expected text",)),
    ):
        with pytest.raises(UsageError) as error:
            generator.sample(1, prompts=wrong)  # type: ignore[arg-type]
        assert all(part in str(error.value) for part in ("--prompt", *parts))
    with pytest.raises(UsageError, match="no condition to be guided to; name some with --prompt, --class"):
        generator.sample(1, prompts="", guidance_scale=2)
    with pytest.raises(UsageError, match="--prompt: the model has no such condition"):
        Generator.load(make_prior(tmp_path / "plain"), "cpu").sample(1, prompts="a shoe")


def test_planned_prompts_are_those_that_are_read_whole(generator: Generator) -> None:
    part, long = text_of(generator.conditioning), "a small red square on a table"
    assert part.readable([long, "a square", caption(4)]) == ["a square", caption(4)]
    assert part.readable([long, "a" + long]) == ["a small red square", "aa small red"]
    for text in ("\u00e4\u00f6\u00fc\u4e00\u4e8c", " ".join(["x" * 30] * 3), "\U0001f600" * 5):
        assert [part.tokenizer.rest(each, part.length) for each in part.readable([text])] == [""]
    assert len(generator.sample(2, prompts=part.readable([long, "a" + long])).images) == 2
    with pytest.raises(UsageError, match=r"--prompt: .*longer"):
        generator.sample(1, prompts=[long])


def test_holes_are_filled_by_the_prompt(generator: Generator) -> None:
    images = generator.sample(2, prompts=[caption(4)], seed=1).images
    mask = torch.ones(4, 6, dtype=torch.bool)
    found = generator.inpaint(images, mask, n=8, conditions={"text": [caption(2), caption(9)]}, paste=False).codes
    right = found.flatten(1).eq(torch.tensor([2, 9]).repeat(4)[:, None]).float().mean()
    assert right > 0.8
    kept = generator.complete(images, 1, conditions={"text": caption(4)})
    assert torch.equal(kept.codes[:, 0], generator.encode(images)[:, 0])
    larger = generator.sample(1, prompts=[caption(5)], size=(8, 12))
    assert larger.images.shape == (1, 3, 8, 12) and larger.codes.eq(5).float().mean() > 0.5
    images = generator.sample(2, seed=1, prompts=[caption(0), caption(7)]).images
    right, wrong = (
        generator.log_likelihood(images, conditions={"text": [caption(a), caption(b)]}) for a, b in ((0, 7), (7, 0))
    )
    assert right.shape == (2,) and not torch.equal(right, wrong)


def test_the_command_line_takes_prompts(cli, place: Path, tmp_path: Path) -> None:
    words = ["--model", place / "prior", "--n", 4, "--device", "cpu", "--precision", "fp32", "--guidance-scale", 1.5]
    prompts = ["--prompt", "a small  red square", "a large blue square"]
    first = cli(program.main, *words, *prompts, "--output", tmp_path / "one")
    assert first.code == 0, first.err
    about = json.loads((tmp_path / "one" / "samples.json").read_text())
    assert about["conditions"]["text"] == ["a small red square", "a large blue square"]
    assert [image["text"] for image in about["images"]] == about["conditions"]["text"] * 2
    assert [image["class"] for image in about["images"]] == [None] * 4
    with Image.open(tmp_path / "one" / "grid.png") as grid:
        assert grid.size == (2 * 8 + 2, 2 * 6 + 2), "one column a prompt"
    for ended in run_together(SAMPLE, *words, *prompts, "--batch-size", 1, "--output", tmp_path / "both"):
        ended.ok()
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "both"))
    assert one == two, "two processes draw the same"
    # A file of prompts is the same run, which goes on; another prompt is another run.
    (tmp_path / "prompts.txt").write_text("\ufeffa small red square\n\n  a large blue square\n")
    words[3] = 6
    more = cli(program.main, *words, "--prompt-file", tmp_path / "prompts.txt", "--output", tmp_path / "one")
    assert more.code == 0 and "(4 were there)" in more.out
    other = cli(program.main, *words, "--prompt", "a square", "--output", tmp_path / "one")
    assert other.code == 2 and "--output" in other.err and "a square" in other.err
    (tmp_path / "long.txt").write_text("a square\none two three four five six\n")
    for wrong, code, parts in (
        (["--prompt", "a", "--prompt-file", tmp_path / "prompts.txt"], 2, ("--prompt-file",)),
        (["--prompt-file", tmp_path / "none.txt"], 1, ("--prompt-file", "none.txt")),
        (["--prompt", "one two three four five six"], 2, ("--prompt", "tokens")),
        (["--prompt-file", tmp_path / "long.txt"], 2, ("--prompt-file", "long.txt", "tokens", "five six")),
        (["--prompt", "a square", "--layout", "folders"], 2, ("--layout", "name them with --class")),
    ):
        found = cli(program.main, *words, *wrong, "--output", tmp_path / "two")
        assert found.code == code and all(part in found.err for part in parts), found.err
    (tmp_path / "empty.txt").write_text(" \n")
    found = cli(program.main, *words, "--prompt-file", tmp_path / "empty.txt", "--output", tmp_path / "two")
    assert found.code == 1 and "empty.txt" in found.err
    (tmp_path / "many.txt").write_text("a square\n" * 66)
    found = cli(program.main, *words[:2], "--prompt-file", tmp_path / "many.txt", "--output", tmp_path / "many")
    assert found.code == 0 and len(list((tmp_path / "many").glob("[0-9]*.png"))) == 66, "every prompt is drawn"
    plain = make_prior(tmp_path / "plain")
    found = cli(program.main, "--model", plain, "--prompt", "a shoe", "--output", tmp_path / "two")
    assert found.code == 2 and "--prompt" in found.err and not (tmp_path / "two").exists()
    assert str(plain) in found.err and "trained without text" in found.err


def test_every_prompt_is_drawn_in_every_class(cli, place: Path, tmp_path: Path, monkeypatch) -> None:
    """Whatever their numbers have in common, and each is encoded once."""
    encoded: list[str] = []
    of_value = Text.of_value
    monkeypatch.setattr(Text, "of_value", lambda self, value: (encoded.append(value), of_value(self, value))[1])
    prompts = [caption(code) for code in (1, 5)]
    words = ["--model", place / "prior", "--device", "cpu", "--precision", "fp32", "--prompt", *prompts]
    styled = [*words, "--class", "bag", "shoe"]
    for name, further in {
        "counted": ["--n", 8],
        "each": ["--num-per-class", 4],
        "folders": ["--layout", "folders"],
    }.items():
        result = cli(program.main, *styled, *further, "--output", tmp_path / name)
        assert result.code == 0 and "without a --prompt" not in result.out, result.err
        about = json.loads((tmp_path / name / "samples.json").read_text())
        assert about["n"] == (64 if name == "folders" else 8)
        pairs = [(image["text"], image["class"]) for image in about["images"]]
        assert pairs[:4] == [(text, kind) for text in prompts for kind in ("bag", "shoe")] and pairs[4:8] == pairs[:4]
    assert encoded == 3 * prompts
    # By default as many as there are pairs, a prompt a row of the grid.
    (tmp_path / "many.txt").write_text("a square\n" * 35)
    words[-3:] = ["--prompt-file", tmp_path / "many.txt", "--class", "bag", "shoe"]
    assert cli(program.main, *words, "--output", tmp_path / "many").code == 0
    assert len(list((tmp_path / "many").glob("[0-9]*.png"))) == 70
    with Image.open(tmp_path / "many" / "grid.png") as grid:
        assert grid.size == (2 * 8 + 2, 35 * 6 + 2)
    few = cli(program.main, *words, "--num-per-class", 34, "--output", tmp_path / "few")
    assert few.code == 2 and "--num-per-class: found 34, but each of 35 prompts" in few.err
    # An image has its own prompt and class.
    images = [tmp_path / "counted" / f"{number:05}.png" for number in range(2)]
    further = ["--init-image", *images, "--box", 0, 0, 2, 2, "--n", 4]
    assert cli(program.main, *styled, *further, "--output", tmp_path / "filled").code == 0
    about = json.loads((tmp_path / "filled" / "samples.json").read_text())
    pairs = [(image["text"], image["class"]) for image in about["images"]]
    assert pairs == 2 * [*zip(prompts, ("bag", "shoe"), strict=True)]
    (tmp_path / "more.txt").write_text("a square\n" * 66)
    further = ["--prompt-file", tmp_path / "more.txt", "--init-image", *images, "--box", 0, 0, 2, 2]
    assert (
        cli(program.main, *words[:2], *further, "--class", "bag", "shoe", "--output", tmp_path / "each-once").code == 0
    )
    assert len(list((tmp_path / "each-once").glob("[0-9]*.png"))) == 66
    # Without a text there is none in the list.
    result = cli(program.main, *words[:2], "--n", 1, "--class", "bag", "--output", tmp_path / "none")
    assert result.code == 0 and "without a --prompt" in result.out
    assert json.loads((tmp_path / "none" / "samples.json").read_text())["images"][0]["text"] is None


def test_likelihoods_and_reports_of_text(cli, place: Path, tmp_path: Path) -> None:
    words = ["--model", place / "prior", "--codes", place / "codes", "--split", "heldout", "--precision", "fp32"]
    found = []
    for name, further in (("with", []), ("without", ["--unconditional"])):
        path = tmp_path / f"{name}.json"
        result = cli(evaluate.main, "likelihood", *words, *further, "--output", path)
        assert result.code == 0, result.err
        found.append(json.loads(path.read_text())["metrics"]["nats_per_token"])
    assert found[0] < found[1] - 0.1
    shutil.copytree(place / "codes", tmp_path / "codes")
    write_codes(tmp_path / "codes", size=SIZE)
    about = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    about["tokenizer_fingerprint"] = Prior.load(place / "prior").tokenizer_fingerprint
    (tmp_path / "codes" / "manifest.json").write_text(json.dumps(about))
    words[3], words[5] = tmp_path / "codes", "train"
    refused = cli(evaluate.main, "likelihood", *words, "--output", tmp_path / "other.json")
    assert refused.code == 1 and "captions" in refused.err
    assert cli(evaluate.main, "likelihood", *words, "--unconditional", "--output", tmp_path / "other.json").code == 0
    result = cli(report.main, place / "prior", "--output", tmp_path / "report.html")
    assert result.code == 0, result.err


def test_an_exported_prior_draws_the_same_from_the_documented_prefix(cli, place: Path, tmp_path: Path) -> None:
    result = cli(export, "--model", place / "prior", "--output", tmp_path / "export")
    assert result.code == 0, result.err
    generator = Generator.load(place / "prior", "cpu", "fp32")
    card, part = (tmp_path / "export/README.md").read_text(), text_of(generator.conditioning)
    first, null = map(int, re.findall(r"`\(library|, each plus (\d+), with (\d+) in front", card)[-1])
    assert (first, null) == (part.first, part.absent[0]) and f"{first} to {null - 1} text" in card
    tokenizer = Tokenizer.from_file(str(tmp_path / "export" / FILE))
    prompts = [caption(7), "a Red square"]
    ids = [[first + each for each in tokenizer.encode(prompt).ids] for prompt in prompts]
    text = torch.tensor([[null] * (part.length - len(each)) + each for each in ids])
    prefix = torch.cat([text, torch.full((2, 1), generator.conditioning.null)], 1)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    allowed = list(range(SIZE))
    tokens = theirs.generate(
        prefix,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, ids: allowed,
        pad_token_id=generator.conditioning.null,
    )
    ours = generator.sample(2, prompts=prompts, temperature=0)
    assert torch.equal(generator.vocabulary.to_codes(tokens[:, part.length + 1 :]), ours.codes)
    small = cli(export, "--model", place / "prior", "--to", "vqgen", "--output", tmp_path / "small")
    assert small.code == 0, small.err
    assert torch.equal(
        Generator.load(tmp_path / "small", "cpu", "fp32").sample(2, prompts=prompts).codes,
        generator.sample(2, prompts=prompts).codes,
    )


def test_a_run_continues_with_its_own_captions_alone(cli, place: Path, tmp_path: Path) -> None:
    words = ["--codes", place / "codes", *WORDS.split(), "--validate-every", 4, "--checkpoint-every", 4]
    for steps in (4, 8):
        result = cli(train.main, *words, "--steps", steps, "--output", tmp_path / "run")
        assert result.code == 0, result.err
    path = tmp_path / "run" / FILE
    path.write_text(TextTokenizer.trained(CORPUS, 300).text)
    refused = cli(train.main, *words, "--steps", 12, "--output", tmp_path / "run")
    assert refused.code == 1 and FILE in refused.err and "captions" in refused.err
    again = cli(train.main, *words, "--steps", 8, "--overwrite", "--output", tmp_path / "run")
    assert again.code == 0 and path.read_text() == (place / "prior" / FILE).read_text()
    wrong = cli(train.main, *words, "--steps", 8, "--text-length", 2000, "--output", tmp_path / "other")
    assert wrong.code == 2 and "--text-length" in wrong.err
