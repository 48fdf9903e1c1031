"""vqgen-eval translation: metrics against the generator's images, non-local means, colourfulness, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SIZE, make_photos, make_square_prior
from processes import run_together
from torch import Tensor

import vqgen.evaluation.program as evaluate
from vqgen.evaluation.receipt import flatten
from vqgen.evaluation.tasks.classical import colourfulness, non_local_means
from vqgen.evaluation.tasks.images import Encoded
from vqgen.prior.likelihood import token_nats
from vqgen.prior.parts.source import MaskedSource, PairedSource
from vqgen.sampling.generator import Generator
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.codes.degrade import degrade, keep_of, parse_degradations, source_seed
from vqgen.tokenizer.codes.manifest import SourceRecord
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.metrics import psnr, ssim
from vqgen.tokenizer.reconstruction import write_png_atomic

DATA = 12  # images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = PairedSource(SourceRecord("degraded", [8, 8], "d" * 64, ["grey"]), 0.1)
    return make_square_prior(tmp_path_factory.mktemp("model"), source)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"), DATA)


@pytest.fixture
def measured(cli, tmp_path: Path, model: Path, photos: Path):
    """Call `vqgen-eval translation` and return its receipt."""

    def call(*words: Any) -> dict[str, Any]:
        given = ["--model", model, "--data", photos, "--split", "test", "--output", tmp_path / "receipt.json"]
        result = cli(evaluate.main, "translation", *given, "--device", "cpu", *words)
        assert result.code == 0, result.err
        return json.loads((tmp_path / "receipt.json").read_text())

    return call


def images_of(folder: Path) -> tuple[Tensor, list[int]]:
    data = open_images(str(folder), "test", ImageConfig([16, 16]))
    return torch.stack([data[index].image for index in range(len(data))]), data.labels.tolist()


def test_metrics_are_those_of_the_generators_translations(cli, measured, tmp_path: Path, model: Path, photos: Path):
    found = measured("--seed", 3, "--source-guidance-scale", 1.5, "--batch-size", 5)
    assert found["details"] == {"degradations": ["grey"], "source_kept": True} and found["counts"] == {"images": DATA}
    generator, (images, labels) = Generator.load(model, "cpu", "fp32"), images_of(photos)
    grey = degrade(images, parse_degradations(["grey"]), range(DATA))
    codes, sources = generator.encode(images), generator.encode(grey)
    others = sources[Encoded(torch.arange(DATA), codes, labels, "").others]
    # The likelihood, with sequences made by hand.
    unknown, label = generator.conditioning.size - 1, torch.tensor(labels)[:, None] + SIZE
    for name, source in {"source": sources, "shuffled": others, "absent": torch.full_like(codes, unknown)}.items():
        sequences = torch.cat([source.flatten(1), label, codes.flatten(1)], 1)
        with torch.no_grad():
            logits = generator.prior(sequences[:, :-1])[:, -64:]
        nats = token_nats(logits, codes.flatten(1)).mean().item()
        assert found["metrics"]["nats"][name] == pytest.approx(nats, rel=1e-5)
    # The pictures.
    settings = generator_settings(source_guidance_scale=1.5)
    shown = {"input": grey, "reconstruction": generator.decode(codes)}
    for name, source in {"translated": sources, "shuffled": others}.items():
        drawn = generator.draw(range(DATA), {"source": list(source), "class": labels}, settings, seed=3)
        shown[name] = drawn.images
    # What is decoded gets the luma of its own source, as users do.
    shown["decoded"], keep = shown["translated"], keep_of(["grey"])
    assert keep is not None
    shown |= {name: keep(shown[name], grey) for name in ("reconstruction", "translated", "shuffled")}
    pasted = generator.translate(grey, classes=labels, seed=3, source_guidance_scale=1.5)
    assert torch.equal(shown["translated"], pasted.images)
    for name, each in shown.items():
        for metric, function in {"psnr": psnr, "ssim": ssim}.items():
            assert found["metrics"][metric][name] == pytest.approx(function(each, images).mean().item(), rel=1e-4)
        expected = colourfulness(each).mean().item()
        assert found["metrics"]["colourfulness"][name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found["metrics"]["colourfulness"]["input"] == 0 < found["metrics"]["colourfulness"]["original"]
    assert set(found["metrics"]["psnr"]) == set(shown) and "lpips" not in found["metrics"]
    assert cli(evaluate.main, "replay", tmp_path / "receipt.json").out.startswith("same: ")
    plain = measured("--seed", 3, "--source-guidance-scale", 1.5, "--no-paste")
    assert plain["details"]["source_kept"] is False and "decoded" not in plain["metrics"]["psnr"]
    assert plain["metrics"]["psnr"]["translated"] == pytest.approx(found["metrics"]["psnr"]["decoded"])


def test_the_classical_method_gets_the_noise_that_comes_last(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(
        "vqgen.evaluation.tasks.translation.non_local_means",
        lambda images, sigma: (given.append(sigma), images)[1],
    )
    found = measured("--source", "blur:1", "noise:0.1-0.3", "--n", 2)
    assert given and given == pytest.approx([0.2 * 255] * len(given)) and "non_local_means" in found["metrics"]["psnr"]
    given.clear()
    found = measured("--source", "noise:0.2", "blur:1", "--n", 2)  # what is left of the noise is not known
    assert not given and "non_local_means" not in found["metrics"]["psnr"]


def test_processes_may_have_no_image(measured, tmp_path: Path, model: Path, photos: Path) -> None:
    alone = measured("--n", 2)
    words = ["--model", model, "--data", photos, "--split", "test", "--device", "cpu", "--n", 2]
    words += ["--output", tmp_path / "three.json"]
    for ended in run_together("vqgen.evaluation.program", "translation", *words, hooks=(None, None, None)):
        ended.ok()
    three = json.loads((tmp_path / "three.json").read_text())
    assert dict(flatten(three["metrics"])) == pytest.approx(dict(flatten(alone["metrics"])), rel=1e-5)


def generator_settings(**given: Any):
    from vqgen.sampling.settings import SamplingSettings

    return SamplingSettings(**given)


def test_noise_is_that_of_the_seed_and_removed_by_the_classical_method(measured, photos: Path) -> None:
    found = measured("--source", "noise:0.1-0.2", "--n", 6)
    assert found["metrics"]["psnr"]["non_local_means"] > found["metrics"]["psnr"]["input"] + 3
    assert 13 < found["metrics"]["psnr"]["input"] < 20.5, "between the limits of that noise"
    images, chain = images_of(photos)[0], parse_degradations(["noise:0.1-0.2"])
    noisy = degrade(images, chain, [source_seed(0, index) for index in range(DATA)])
    chosen = fixed_subset(6, DATA)
    expected = psnr(noisy, images)[chosen].mean().item()
    assert found["metrics"]["psnr"]["input"] == pytest.approx(expected, rel=1e-5), "as vqgen-tokenize would"
    again = measured("--source", "noise:0.1-0.2", "--n", 6, "--batch-size", 4)
    assert again["fingerprints"] == found["fingerprints"]
    other = measured("--source", "noise:0.1-0.2", "--n", 6, "--seed", 1)
    assert other["fingerprints"]["sources"] != found["fingerprints"]["sources"]
    assert other["fingerprints"]["data"] == found["fingerprints"]["data"]


def test_pairs_are_measured_with_the_partners_of_other_data(measured, tmp_path: Path, photos: Path) -> None:
    """As a degradation that gives the same sources; an image without a partner is an error, or is left out."""
    paired = PairedSource(SourceRecord("paired", [8, 8], "d" * 64, description="upside by name"), 0.1)
    model, partners = make_square_prior(tmp_path / "pairs", paired), tmp_path / "upside"
    for path in photos.rglob("*.png"):  # in another split: partners are looked up in all
        if "test" in path.parts:
            place = partners / "train" / path.relative_to(photos / "test")
            write_png_atomic(place, decode(path.read_bytes(), 3).flip(1))
    (partners / "test" / "bag").mkdir(parents=True)
    write_png_atomic(partners / "test" / "bag" / "more.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    words = ["--model", model, "--source-data", partners, "--batch-size", 5]
    found = measured(*words)
    images, labels = images_of(photos)
    upside = images.flip(2)
    generator = Generator.load(model, "cpu", "fp32")
    translated = generator.translate(upside, classes=labels).images
    for name, shown in {"input": upside, "translated": translated}.items():
        assert found["metrics"]["psnr"][name] == pytest.approx(psnr(shown, images).mean().item(), rel=1e-5)
    assert found["details"]["source_kept"] is False and "12 of 12" in found["details"]["pairs"]
    # One partner less.
    next((partners / "train").rglob("*.png")).unlink()
    with pytest.raises(AssertionError, match="--source-data"):
        measured(*words)
    assert measured(*words, "--unpaired", "skip")["counts"] == {"images": DATA - 1}
    damaged = next((partners / "train").rglob("*.png"))
    damaged.write_bytes(b"no image")
    with pytest.raises(AssertionError, match=damaged.name):
        measured(*words, "--unpaired", "skip")


def test_a_prior_that_always_had_a_source_has_no_nll_without(measured, tmp_path: Path) -> None:
    always = PairedSource(SourceRecord("degraded", [8, 8], "d" * 64, ["grey"]), 0.0)
    found = measured("--model", make_square_prior(tmp_path / "always", always), "--n", 4)
    assert found["metrics"]["nats"].keys() == {"source", "shuffled"}


def test_noise_of_any_strength_is_removed() -> None:
    images = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8)
    assert torch.equal(non_local_means(images, 255 * 8**0.5), images)
    for height, width in (3, 3), (2, 5), (1, 1):
        assert torch.equal(non_local_means(images[..., :height, :width], 200.0), images[..., :height, :width])


def test_non_local_means_is_that_of_a_naive_loop() -> None:
    """Of a small image, with the window cut to what can be mirrored."""
    random = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 2, 6, 5), dtype=torch.uint8, generator=random)
    found, sigma, reach = non_local_means(image, 20.0), 20.0, 3
    mirrored = torch.nn.functional.pad(image.double(), [reach + 1] * 4, mode="reflect")[0]
    for y in range(6):
        for x in range(5):
            own = mirrored[:, y + reach : y + reach + 3, x + reach : x + reach + 3]
            total, weights = torch.zeros(2, dtype=torch.float64), 0.0
            for top in range(2 * reach + 1):
                for left in range(2 * reach + 1):
                    patch = mirrored[:, y + top : y + top + 3, x + left : x + left + 3]
                    distance = float((patch - own).square().mean())
                    weight = torch.tensor(-max(distance - 2 * sigma**2, 0) / (0.55 * sigma) ** 2).exp()
                    total, weights = total + weight * patch[:, 1, 1], weights + weight
            assert (found[0, :, y, x].double() - total / weights).abs().max() <= 0.5 + 1e-3


def test_colourfulness_is_that_of_its_definition() -> None:
    assert colourfulness(torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8).expand(-1, 3, -1, -1)).tolist() == [0] * 4
    red = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0] = 200  # rg = 200 and yb = 100 everywhere
    assert colourfulness(red).item() == pytest.approx(0.3 * (200**2 + 100**2) ** 0.5)
    red[..., 0] = 0  # half black: the standard deviations are half the values
    assert colourfulness(red).item() == pytest.approx(0.5 * 50000**0.5 + 0.3 * 0.5 * 50000**0.5)


def test_what_does_not_fit_is_named(cli, tmp_path: Path, model: Path, photos: Path) -> None:
    plain, filling = make_square_prior(tmp_path / "plain"), make_square_prior(tmp_path / "filling", MaskedSource(0.5))
    paired = PairedSource(SourceRecord("paired", [8, 8], "d" * 64, description="sketches by name"), 0.1)
    other = PairedSource(SourceRecord("degraded", [4, 4], "d" * 64, ["grey"]), 0.1)
    pairs, small = make_square_prior(tmp_path / "pairs", paired), make_square_prior(tmp_path / "small", other)
    for words, named in (
        (["--model", plain], "--model: "),
        (["--model", filling], "--source"),
        (["--model", pairs], "--source: "),
        (["--model", small], "4x4"),
        (["--source", "noise:3"], "noise:3"),
        (["--model", pairs, "--source-data", photos, "--source", "grey"], "--source"),
        (["--pair-by", "key"], "--pair-by"),
        (["--unpaired", "skip"], "--unpaired"),
        (["--n", 13], "--n: found 13"),
    ):
        given = ["--model", model, "--data", photos, "--split", "test", "--output", tmp_path / "receipt.json", *words]
        result = cli(evaluate.main, "translation", *given)
        assert result.code == 2 and named in result.err and result.err.count("\n") == 1, (words, result.err)
    missing = [*given[:-2], "--model", pairs, "--source-data", tmp_path / "none"]
    result = cli(evaluate.main, "translation", *missing)
    assert result.code == 1 and "--source-data" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "receipt.json").exists()
