"""--text-column of vqgen-eval inpainting and translation: the prior is given the captions of the images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_photos, make_square_prior, text_part

import vqgen.evaluation.program as evaluate
from vqgen.prior.parts.source import PairedSource
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.codes.degrade import degrade, parse_degradations
from vqgen.tokenizer.codes.format import SourceRecord
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig

COUNT = 8
CAPTIONS = ["a red square", "a green square", "a blue square", "a red square on a green square beside another one"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior of text and a source that is a grey image, or the image itself in part."""
    source = PairedSource(SourceRecord("degraded", [8, 8], "d" * 64, ["grey"]), 0.1, 0.2)
    return make_square_prior(tmp_path_factory.mktemp("model"), source, text_part(CAPTIONS * 3, 4))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_photos(tmp_path_factory.mktemp("photos"), COUNT)
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text(CAPTIONS[int(path.stem) % 4])
    return folder


@pytest.fixture
def measured(cli, tmp_path: Path, model: Path, photos: Path):
    def call(command: str, *words: Any) -> dict[str, Any]:
        given = ["--model", model, "--data", photos, "--split", "test", "--output", tmp_path / "receipt.json"]
        result = cli(evaluate.main, command, *given, "--device", "cpu", *words)
        assert result.code == 0, result.err
        return json.loads((tmp_path / "receipt.json").read_text())

    return call


def test_translations_are_given_the_captions_as_far_as_they_are_read(cli, measured, tmp_path, model, photos) -> None:
    found, without = measured("translation", "--text-column", "txt"), measured("translation")
    assert found["metrics"]["nats"]["source"] != without["metrics"]["nats"]["source"]
    assert "captions" in found["fingerprints"] and "captions" not in without["fingerprints"]
    generator = Generator.load(model, "cpu", "fp32")
    data = open_images(str(photos), "test", ImageConfig([16, 16]), text_column="txt")
    images = torch.stack([data[index].image for index in range(COUNT)])
    assert data.captions is not None and sorted(data.captions) == sorted(CAPTIONS * 2)
    texts = [" ".join(caption.split()[:4]) for caption in data.captions]
    sources = generator.encode(degrade(images, parse_degradations(["grey"]), range(COUNT)))
    given = {"class": data.labels.tolist(), "text": texts, "source": list(sources)}
    nats = generator.nats(generator.encode(images), generator.conditioning.conditions(given, absent=True))
    assert found["metrics"]["nats"]["source"] == pytest.approx(nats.mean().item(), rel=1e-5)
    measured("translation", "--text-column", "txt")
    assert cli(evaluate.main, "replay", tmp_path / "receipt.json").out.startswith("same: ")


def test_fillings_are_given_the_captions(measured, model: Path, tmp_path: Path) -> None:
    words = ["--diverse", 1, "--fillings", 2]
    found, without = (measured("inpainting", *more, *words) for more in (["--text-column", "txt"], []))
    for name in ("surroundings", "before"):
        assert found["metrics"]["hole_nats"][name] != without["metrics"]["hole_nats"][name]
    assert found["fingerprints"]["captions"] != without["fingerprints"].get("captions")
    # A plain prior beside it is told what it knows.
    itself = measured("inpainting", "--text-column", "txt", "--plain", model, *words)["metrics"]["hole_nats"]
    assert itself["plain"] == itself["before"]
    shorter = make_square_prior(tmp_path / "shorter", text_part(CAPTIONS * 3, 2))
    cut = measured("inpainting", "--text-column", "txt", "--plain", shorter, *words)["metrics"]["hole_nats"]
    assert cut["plain"] != measured("inpainting", "--plain", shorter, *words)["metrics"]["hole_nats"]["plain"]
    textless = make_square_prior(tmp_path / "plain")
    plain = [measured("inpainting", *more, "--plain", textless, *words) for more in (["--text-column", "txt"], [])]
    assert plain[0]["metrics"]["hole_nats"]["plain"] == plain[1]["metrics"]["hole_nats"]["plain"]


def test_captions_for_a_prior_without_text_are_refused(cli, tmp_path: Path, photos: Path) -> None:
    model = make_square_prior(tmp_path / "model", PairedSource(SourceRecord("degraded", [8, 8], "d" * 64, ["grey"])))
    words = ["--model", model, "--data", photos, "--split", "test", "--text-column", "txt"]
    result = cli(evaluate.main, "translation", *words, "--output", tmp_path / "r.json", "--device", "cpu")
    assert result.code == 2 and result.err.count("\n") == 1
    assert "--text-column: found txt" in result.err and "without text" in result.err
