"""The models in the package: there, small, themselves, and as good as their cards say."""

import json
from pathlib import Path

import pytest
import torch
from helpers.realdata import real
from PIL import Image
from safetensors import safe_open

import vqgen
from vqgen.errors import UserError
from vqgen.evaluation import program as evaluate
from vqgen.evaluation.receipt import read_receipt
from vqgen.files import DESCRIPTION, read_bytes, read_json
from vqgen.prior.model import Prior
from vqgen.sampling import sample
from vqgen.sampling.generator import DEFAULT, SHIPPED
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer import encode, reconstruct
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.model import Tokenizer

ROOT = Path(__file__).parents[1]
RECEIPTS = ROOT / "benchmarks" / "results" / "receipts" / "cifar10" / "package"
STYLES = ["fluent-3d", "fluent-flat", "noto", "twemoji"]
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.mark.parametrize("folder", SHIPPED.values(), ids=SHIPPED)
def test_it_is_small_and_in_16_bits(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30 * 10**6
    for weights in (folder / "model.safetensors", folder / "tokenizer" / "model.safetensors"):
        with safe_open(weights, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_it_draws_ten_classes_without_being_named(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQGEN_MODEL", raising=False)
    result = cli(sample.main, "--n", 10, "--temperature", 0.9, "--device", "cpu")
    assert result.code == 0 and str(DEFAULT) in result.out, result.err
    drawn = json.loads((tmp_path / "samples" / "samples.json").read_text())
    assert [image["class"] for image in drawn["images"]] == NAMES
    images = vqgen.Generator.load(device="cpu").sample(4, classes="ship", temperature=0.9)
    assert images.images.shape == (4, 3, 32, 32) and len(images.codes.flatten(1).unique(dim=0)) == 4
    # Pictures, not noise: neighbouring pixels are alike.
    pixels = images.images.float()
    assert (pixels[..., 1:] - pixels[..., :-1]).abs().mean() < 0.5 * pixels.std()


def test_programs_know_tokenizers_and_priors_by_name(cli, tmp_path, monkeypatch):
    """A folder of that name, as of data, is in nobody's way; a run of the user's own comes first."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.randint(256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for number, image in enumerate(pixels):
        path = tmp_path / "cifar10" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(path)
    whole = vqgen.Generator.load(DEFAULT, "cpu")
    words = ["--data", "cifar10", "--tokenizer", "cifar10", "--holdout", 0.5, "--output", "codes", "--device", "cpu"]
    result = cli(encode.main, *words)
    assert result.code == 0, result.err
    assert json.loads(Path("codes/manifest.json").read_text())["tokenizer_fingerprint"] == whole.tokenizer.fingerprint
    assert Tokenizer.load("codes/tokenizer").fingerprint == whole.tokenizer.fingerprint
    words = ["cifar10/0", "--tokenizer", "cifar10-restorer", "--output", "pictures", "--device", "cpu"]
    assert cli(reconstruct.main, *words).code == 0 and len(list(Path("pictures").glob("0*.png"))) == 3
    result = cli(evaluate.main, "reconstruction", "--data", "cifar10", "--tokenizer", "cifar10")
    assert result.code == 2 and "--output" in result.err, result.err
    assert Prior.load("cifar10").fingerprint == whole.prior.fingerprint
    Path("cifar10/machine.json").touch()  # of a run that is not finished
    for load in Tokenizer.load, Prior.load, vqgen.Generator.load:
        with pytest.raises(UserError, match=f"cifar10 is not a .* folder: it holds no {DESCRIPTION}"):
            load("cifar10")


def test_its_receipts_are_of_this_very_model():
    generator = vqgen.Generator.load(DEFAULT, "cpu")
    marks = {"prior": generator.prior.fingerprint, "tokenizer": generator.tokenizer.fingerprint}
    names = ("reconstruction", "reconstruction-1000", "likelihood", "samples", "samples-guided", "samples-guidance-1.5")
    for name in (*names, "settings"):
        found = read_receipt(RECEIPTS / f"{name}.json")["fingerprints"]
        assert marks.items() & found.items() and all(found.get(key, mark) == mark for key, mark in marks.items()), name
    drawn = read_receipt(RECEIPTS / "samples.json")["fingerprints"]["samples"]
    for name in ("accuracy", "samples-efficientnet-lite0"):
        assert read_receipt(RECEIPTS / f"{name}.json")["fingerprints"]["samples"] == drawn, name
    chosen = read_receipt(RECEIPTS / "settings.json")["details"]["chosen"]
    assert generator.settings({}) == SamplingSettings(**chosen)


def test_emoji_are_drawn_by_name_in_the_style(cli, tmp_path):
    """Hearts of the colour of the prompt, four styles of each."""
    colours = {"red heart": 0, "green heart": 1, "blue heart": 2}
    words = ["--model", "emoji", "--prompt", *colours, "--class", *STYLES, "--n", 12, "--device", "cpu"]
    result = cli(sample.main, *words, "--output", tmp_path / "hearts")
    assert result.code == 0, result.err
    drawn = json.loads((tmp_path / "hearts" / "samples.json").read_text())["images"]
    assert [(image["text"], image["class"]) for image in drawn] == [(t, style) for t in colours for style in STYLES]
    right = 0
    for image in drawn:
        pixels = decode(read_bytes(tmp_path / "hearts" / image["file"]), 3).float()
        assert pixels.shape == (3, 64, 64)
        right += int(pixels[:, 24:40, 24:40].mean((1, 2)).argmax()) == colours[image["text"]]
        assert pixels[:, :6, :6].mean() > 200, "the corner is white"
    assert right >= 10


def test_the_receipts_of_emoji_are_of_this_very_model():
    generator = vqgen.Generator.load("emoji", "cpu")
    marks = {"prior": generator.prior.fingerprint, "tokenizer": generator.tokenizer.fingerprint}
    for name in ("reconstruction", "likelihood", "text"):
        found = read_receipt(RECEIPTS.parents[1] / "emoji" / f"{name}.json")["fingerprints"]
        assert marks.items() & found.items() and all(found.get(key, mark) == mark for key, mark in marks.items()), name
    found = read_json(ROOT / "benchmarks" / "results" / "uses" / "emoji.json")
    assert (found["model"], found["tokenizer"]) == (marks["prior"], marks["tokenizer"])
    assert found["settings"] == generator.recommended
    options = read_receipt(RECEIPTS.parents[1] / "emoji" / "text.json")["options"]
    assert {name: options[name] for name in generator.recommended} == generator.recommended


@pytest.mark.slow
def test_its_reconstructions_are_what_the_receipt_says(cli):
    """The metrics of the first 1,000 test images of CIFAR-10, measured again."""
    path = RECEIPTS / "reconstruction-1000.json"
    words = ["--data", real("cifar10"), "--tokenizer", DEFAULT / "tokenizer", "--device", "cpu"]
    result = cli(evaluate.main, "replay", path, *words)
    assert result.code == 0 and result.out.startswith("same"), result.err


@pytest.mark.slow
def test_its_likelihood_is_what_the_card_says():
    """Nats a token of the first 1,000 test images of CIFAR-10, against the card's value over all 10,000."""
    from vqgen.tokenizer.data.dataset import open_images
    from vqgen.tokenizer.data.options import ImageConfig

    images = open_images(str(real("cifar10")), "test", ImageConfig([32, 32]))
    generator = vqgen.Generator.load(DEFAULT, "cpu", "fp32")
    given = [images[index] for index in range(1000)]
    labels = [sample.label for sample in given]
    nats = -generator.log_likelihood(torch.stack([sample.image for sample in given]), labels).mean() / 64
    card = (DEFAULT / "README.md").read_text(encoding="utf-8")
    stated = float(card.split("| prior, given the class | ")[1].split()[0])
    assert nats.item() == pytest.approx(stated, rel=0.01)
