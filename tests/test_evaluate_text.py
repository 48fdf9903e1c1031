"""vqgen-eval text: ranks against a naive computation, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_photos, make_square_prior, text_part
from torch import Tensor

import vqgen.evaluation.program as evaluate
from vqgen.evaluation.tasks import text
from vqgen.evaluation.tasks.text import rank
from vqgen.prior.parts.part import ABSENT
from vqgen.prior.parts.text import Text
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig

WORDS = ["red", "green", "blue", "dark", "light", "grey"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_square_prior(tmp_path_factory.mktemp("model"), text_part([f"a {word} square" for word in WORDS]))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captions of two images each, two of which differ in case alone; one image without, and one too long."""
    folder = make_photos(tmp_path_factory.mktemp("photos"), 14)
    for path in folder.rglob("*.png"):
        number = int(path.stem)
        words = f"a {WORDS[number % 6]} square"
        words = words.upper() if number == 7 else words * 9 if number == 12 else words
        if number != 13:
            path.with_suffix(".txt").write_text(words)
    return folder


class Colours:
    """Stands in for an extractor: the colour of each quarter of the image."""

    name, size, classes, fingerprint = "colours", 12, 0, "c" * 64

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.avg_pool2d(images.float(), 8).flatten(1), None


@pytest.fixture
def measured(cli, tmp_path: Path, model: Path, photos: Path, monkeypatch):
    """Call `vqgen-eval text`."""
    monkeypatch.setattr(text, "extractor_for", lambda network, weights, device: Colours())

    def call(*words: Any) -> Any:
        given = ["--model", model, "--data", photos, "--split", "test", "--text-column", "txt"]
        return cli(evaluate.main, "text", *given, "--output", tmp_path / "receipt.json", "--device", "cpu", *words)

    return call


def test_ranks_count_ties_half() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [2.0, 2.0, 0.0]])
    assert rank(scores, torch.tensor([0, 1, 2])).tolist() == [1, 2, 3]
    assert rank(scores, torch.tensor([1, 0, 0])).tolist() == [3, 2, 1.5]


@pytest.mark.parametrize("words", [[], ["--unconditional"]])
def test_ranks_are_those_of_a_naive_computation(
    cli, measured, tmp_path: Path, model: Path, photos: Path, words: list[str]
) -> None:
    """Images have the captions and, unless it is left out, the class of their folder."""
    result = measured("--n", 6, "--per-prompt", 2, "--seed", 5, "--batch-size", 4, *words)
    assert result.code == 0 and "Mean reciprocal rank" in result.out, result.err
    found = json.loads((tmp_path / "receipt.json").read_text())
    assert found["counts"] == {"captions": 6, "images drawn": 12} and len(found["fingerprints"]["captions"]) == 64
    generator = Generator.load(model, "cpu", "fp32")
    data = open_images(str(photos), "test", ImageConfig([16, 16]), text_column="txt")
    assert data.captions is not None
    part = next(part for part in generator.conditioning.parts if isinstance(part, Text))
    chosen = text.choose(data, part, text.TextConfig(model=model, data=str(photos), n=6))
    captions = [data.captions[index] for index in chosen]
    assert len({caption.lower() for caption in captions}) == 6 and all(len(caption) < 20 for caption in captions)
    images = torch.stack([data[index].image for index in chosen])
    labels = [ABSENT if words else data[index].label for index in chosen]
    assert len(set(labels)) == (1 if words else 3)
    likelihood = []
    for own, image in enumerate(images):
        given = [{"text": [caption], "class": [labels[own]]} for caption in captions]
        nats = [-generator.log_likelihood(image, conditions=each).item() for each in given]
        likelihood.append(1 + sum(each < nats[own] for each in nats))
    series = generator.conditioning.conditions({"text": captions, "class": labels}, absent=True)
    drawn = generator.draw(range(12), series, seed=5).images
    features, _ = Colours()(images)
    centre, by_features = features.mean(0), []
    for place, image in enumerate(drawn):
        (own,) = Colours()(image[None])[0]
        scores = [torch.cosine_similarity(own - centre, each - centre, dim=0).item() for each in features]
        by_features.append(1 + sum(each > scores[place % 6] for each in scores))
    for name, ranks in {"likelihood": likelihood, "features": by_features}.items():
        values = torch.tensor(ranks).double()
        assert found["metrics"]["reciprocal_rank"][name] == pytest.approx((1 / values).mean().item())
        assert found["metrics"]["median_rank"][name] == values.quantile(0.5).item()
        assert found["metrics"]["first"][name] == pytest.approx((values == 1).double().mean().item())
    assert found["metrics"]["median_rank"]["chance"] == 3.5
    assert found["metrics"]["reciprocal_rank"]["chance"] == pytest.approx(
        (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6) / 6
    )
    assert cli(evaluate.main, "replay", tmp_path / "receipt.json").out.startswith("same: ")
    assert measured("--n", 6, "--extractor", "none").code == 0
    found = json.loads((tmp_path / "receipt.json").read_text())
    assert set(found["metrics"]["first"]) == {"likelihood", "chance"} and found["counts"]["images drawn"] == 0


def test_settings_are_not_searched_by_samples_without_their_captions(cli, tmp_path: Path, model: Path, photos: Path):
    words = ["--model", model, "--data", photos, "--output", tmp_path / "settings.json", "--device", "cpu"]
    result = cli(evaluate.main, "settings", *words, "--n", 24)
    assert result.code == 2 and "images with captions" in result.err, result.err


def test_what_does_not_fit_is_named(measured, tmp_path: Path, photos: Path) -> None:
    plain = make_square_prior(tmp_path / "plain")
    (tmp_path / "unlabelled").mkdir()
    for path in (photos / "test").rglob("*.*"):
        shutil.copy(path, tmp_path / "unlabelled" / path.name)
    for words, code, named in (
        (["--data", tmp_path / "unlabelled", "--split", "train"], 1, "has the classes none, the prior has"),
        (["--n", 7], 2, "--n: found 7"),
        (["--n", 1], 2, "--n: found 1"),
        (["--model", plain], 2, "--model: "),
        (["--text-column", "colour"], 1, "--text-column"),
        (["--extractor", "none", "--weights", "file"], 2, "--weights"),
    ):
        result = measured("--n", 6, *words)
        assert result.code == code and named in result.err and result.err.count("\n") == 1, (words, result.err)
    assert not (tmp_path / "receipt.json").exists()
