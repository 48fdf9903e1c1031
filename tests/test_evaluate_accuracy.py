"""vqgen-eval accuracy and settings: what samples teach a classifier, and the search for sampling settings."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.models import NAMES, make_prior, make_square_prior
from torchvision.io import write_png

import vqgen.evaluation.program as evaluate
from vqgen.errors import UserError
from vqgen.evaluation.classifier import Classifier, classifier_of, shuffled_batches
from vqgen.evaluation.distances import kernel_distance
from vqgen.evaluation.options import ClassifierTraining
from vqgen.evaluation.tasks.settings import Judge, best_of, kernel_distances
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings, read_recommended
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import DEMO

CLASSES = sorted(NAMES)


def write_classes(folder, count, seed=0, names=CLASSES):
    """Noisy 16x16 images, a class darker than the next one, in folders of the classes."""
    random = torch.Generator().manual_seed(seed)
    for index in range(count):
        place = folder / names[index % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        image = 90 * (index % len(names)) + torch.randint(0, 60, (3, 16, 16), generator=random)
        write_png(image.to(torch.uint8), str(place / f"{index:03d}.png"))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    for seed, (split, count) in enumerate((("train", 60), ("val", 30), ("test", 30))):
        write_classes(root / split, count, seed)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_square_prior(tmp_path_factory.mktemp("model"))


@pytest.fixture
def measured(cli, tmp_path, real):
    """Call `vqgen-eval accuracy` with few steps, and return what it gave and its receipt."""

    def call(samples, *words):
        path = tmp_path / "accuracy.json"
        given = ["--samples", samples, "--data", real, "--steps", 15, "--batch-size", 16, "--device", "cpu"]
        result = cli(evaluate.main, "accuracy", *given, "--seeds", 0, 1, "--output", path, *words)
        return result, json.loads(path.read_text()) if path.exists() else None

    return call


def test_good_samples_teach_as_much_as_real_images_and_wrong_labels_nothing(cli, measured, tmp_path, real, model):
    good = write_classes(tmp_path / "good", 48, 7)
    result, found = measured(good, "--tokenizer", model / "tokenizer")
    assert result.code == 0, result.err
    metrics = found["metrics"]
    assert metrics["cas"]["samples"] > 0.9 and metrics["cas"]["real"] > 0.9
    assert metrics["cas_share"] == pytest.approx(metrics["cas"]["samples"] / metrics["cas"]["real"])
    assert set(metrics["cas"]) == {"samples", "real", "reconstructions"}
    assert found["counts"] == {"samples": 48, "real images": 48, "tested": 30}
    for name, by_class in metrics["cas_by_class"].items():  # as many of each class are tested
        assert sum(by_class.values()) / 3 == pytest.approx(metrics["cas"][name]) and list(by_class) == CLASSES
        assert sum(found["details"]["seeds"][name]) / 2 == pytest.approx(metrics["cas"][name])
    again = cli(evaluate.main, "replay", tmp_path / "accuracy.json", "--tolerance", 0.1)
    assert again.code == 0 and again.out.startswith("same"), again.err

    wrong = write_classes(tmp_path / "wrong", 48, 7, CLASSES[1:] + CLASSES[:1])
    result, found = measured(wrong, "--n", 30)
    assert result.code == 0, result.err
    assert found["metrics"]["cas"]["samples"] < 0.1 and found["counts"]["real images"] == 30
    assert found["metrics"]["cas"]["real"] > 0.9, "the real images are of all classes, too"
    assert "reconstructions" not in found["metrics"]["cas"]


def test_classes_may_be_in_another_order(measured, tmp_path, real):
    """Those of folders are in alphabetical order, those of samples.json in the prior's."""
    folder = write_classes(tmp_path / "samples", 24, 7)
    _, found = measured(folder)
    names, files = CLASSES[1:] + CLASSES[:1], sorted(folder.rglob("*.png"))
    listed = [{"file": str(path.relative_to(folder)), "label": names.index(path.parent.name)} for path in files]
    (folder / "samples.json").write_text(json.dumps({"class_names": names, "images": listed}))
    _, again = measured(folder)
    assert found["metrics"]["cas"]["samples"] > 0.9 and again["metrics"]["cas"]["samples"] > 0.9
    assert list(again["metrics"]["cas_by_class"]["samples"]) == CLASSES


def test_reconstructions_are_of_images_that_are_fitted_as_the_tokenizer_s(measured, tmp_path, model):
    samples = write_classes(tmp_path / "samples", 12)
    result, found = measured(samples, "--tokenizer", model / "tokenizer", "--fit", "pad")
    assert result.code == 1 and not found
    assert "was trained with --fit crop, the real images get pad" in result.err and len(result.err.splitlines()) == 1


def test_a_classifier_reads_images_as_it_is_told(cli, tmp_path, real):
    data = shutil.copytree(real, tmp_path / "data")
    (data / "train" / CLASSES[0] / "cut.png").write_bytes(b"no image")
    words = ["--data", data, "--size", 16, "--steps", 2, "--device", "cpu", "--max-broken", 0.1, "--workers", 0]
    results = [
        cli(evaluate.main, "classifier", *words, "--output", tmp_path / fit, "--fit", fit) for fit in ("crop", "pad")
    ]
    assert all(result.code == 0 and "skipped, broken" in result.err for result in results), results[0].err
    result = cli(evaluate.main, "classifier", *words, "--output", tmp_path / "strict", "--max-broken", 0)
    assert result.code == 1 and "cut.png" in result.err.splitlines()[-1]


def test_the_test_split_is_never_trained_on(measured, tmp_path, real):
    """Test images whose labels contradict the others: an accuracy near 1 would need to have seen them."""
    other = tmp_path / "other"
    shutil.copytree(real, other)
    shutil.rmtree(other / "test")
    write_classes(other / "test", 30, 2, CLASSES[1:] + CLASSES[:1])
    samples = write_classes(tmp_path / "samples", 30, 7)
    result, found = measured(samples, "--data", other)
    assert result.code == 0 and all(value < 0.1 for value in found["metrics"]["cas"].values()), result.err
    assert measured(samples, "--data", other, "--split", "heldout")[1]["metrics"]["cas"]["samples"] > 0.9


def test_real_images_without_a_class_are_not_counted(measured, tmp_path, real):
    data = shutil.copytree(real, tmp_path / "data")
    for index, path in enumerate(sorted((data / "train").rglob("*.png"))):
        shutil.copy(path, data / "train" / f"unlabelled-{index}.png")
    result, found = measured(write_classes(tmp_path / "samples", 30, 7), "--data", data, "--steps", 1)
    assert result.code == 0 and found["counts"]["samples"] == found["counts"]["real images"] == 30, result.err


def test_a_class_of_which_nothing_is_tested_is_left_out(cli, measured, tmp_path, real):
    data = shutil.copytree(real, tmp_path / "data")
    for path in (data / "test" / CLASSES[1]).iterdir():
        path.unlink()
    write_classes(data / "test", 1, 9, CLASSES[:1])
    result, found = measured(write_classes(tmp_path / "samples", 12), "--data", data)
    assert result.code == 0, result.err
    assert all(list(shares) == [CLASSES[0], CLASSES[2]] for shares in found["metrics"]["cas_by_class"].values())
    path = tmp_path / "accuracy.json"
    assert "NaN" not in path.read_text()
    again = cli(evaluate.main, "replay", path, "--tolerance", 0.1)
    assert again.code == 0, again.err
    # A receipt of an earlier version has NaN there.
    found["metrics"]["cas_by_class"]["samples"][CLASSES[1]] = math.nan
    path.write_text(json.dumps(found))
    again = cli(evaluate.main, "replay", path, "--tolerance", 0.1)
    assert again.code == 0, again.err


def test_what_does_not_fit_is_refused_by_name(measured, tmp_path, real, model):
    samples = write_classes(tmp_path / "samples", 12)
    write_classes(tmp_path / "animals", 12, names=["cat", "dog"])
    (tmp_path / "flat").mkdir()
    write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "flat" / "0.png"))
    shutil.copytree(real, tmp_path / "untested", ignore=shutil.ignore_patterns("test"))
    small = make_prior(tmp_path / "small")
    for words, code, parts in (
        ([tmp_path / "animals"], 1, ["--data", "cat"]),
        ([tmp_path / "flat"], 1, ["--samples", "classes"]),
        ([samples, "--n", 13], 2, ["--n", "13", "12"]),
        ([write_classes(tmp_path / "many", 200)], 2, ["--n", "fewer than 200 samples"]),
        ([samples, "--seeds", 1, 1], 2, ["--seeds", "1 1"]),
        ([samples, "--width", 12], 2, ["--width", "12"]),
        ([samples, "--split", "train"], 2, ["--split", "train"]),
        ([samples, "--tokenizer", small / "tokenizer"], 1, ["--tokenizer", "3x4x6"]),
        ([samples, "--data", tmp_path / "untested"], 1, ["test", "untested"]),
    ):
        result, _ = measured(*words)
        assert result.code == code and len(result.err.splitlines()) == 1, result.err
        assert all(part in result.err for part in parts), result.err


def test_shuffled_batches_show_every_image_once_an_epoch_and_mirror_half():
    images = torch.arange(40 * 4, dtype=torch.uint8).view(40, 1, 1, 4)
    batches = shuffled_batches(images, torch.arange(40), 8, 3, flip=True)
    shown = [next(batches) for _ in range(10)]
    for epoch in (shown[:5], shown[5:]):
        assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(40))
    mirrored = torch.cat([pictures[:, 0, 0, 0] > pictures[:, 0, 0, 3] for pictures, _ in shown])
    assert 20 < mirrored.sum() < 60
    pictures, labels = next(shuffled_batches(images, torch.arange(40), 8, 3, flip=False))
    assert torch.equal(pictures, images[labels])


# The search


@pytest.fixture(scope="module")
def judge(tmp_path_factory, real):
    folder = tmp_path_factory.mktemp("judge") / "classifier"
    words = ["classifier", "--data", real, "--size", 16, "--steps", 15, "--batch-size", 16, "--output", folder]
    assert evaluate.main([str(word) for word in words]) == 0
    return folder


def test_the_search_writes_what_sampling_then_uses(cli, tmp_path, real, model, judge):
    prior = tmp_path / "prior"
    shutil.copytree(model, prior)
    words = ["--model", prior, "--data", real, "--classifier", judge, "--n", 24, "--device", "cpu"]
    grid = ["--guidance-scale", 1, 2, "--guidance-schedule", "constant", "linear", "--min-p", 0, 0.5]
    result = cli(evaluate.main, "settings", *words, *grid, "--output", tmp_path / "settings.json")
    assert result.code == 0 and "generation_config.json" in result.out, result.err
    found = json.loads((tmp_path / "settings.json").read_text())
    distances, accuracies = (found["metrics"][name] for name in ("class_kernel_distance", "classifier_accuracy"))
    assert len(distances) == len(accuracies) == found["counts"]["settings"] == 6  # no schedule without guidance
    chosen = SamplingSettings(**found["details"]["chosen"])
    generator = Generator.load(prior, "cpu")
    assert generator.settings({}) == chosen
    # The metrics are those of the samples that the settings give.
    assert {"plain", "--min-p 0.5 --guidance-scale 2 --guidance-schedule linear"} <= distances.keys()
    drawn = generator.draw(range(24), None, SamplingSettings())
    chosen_classes = Classifier.load(judge, torch.device("cpu")).choose(drawn.images)
    assert accuracies["plain"] == pytest.approx((chosen_classes == drawn.labels).double().mean().item())
    again = cli(evaluate.main, "replay", tmp_path / "settings.json")
    assert again.code == 0 and again.out.startswith("same"), again.err

    # A second search replaces its own file; another's is not replaced, and is refused before any work.
    one = [*words, "--guidance-scale", 1.5, "--min-p", 0.25, "--output", tmp_path / "settings.json"]
    assert cli(evaluate.main, "settings", *one).code == 0
    assert read_recommended(prior)["guidance_scale"] == 1.5 and read_recommended(prior)["min_p"] == 0.25
    (prior / "generation_config.json").write_text('{"temperature": 0.5}')
    result = cli(evaluate.main, "settings", *one)
    assert result.code == 1 and str(prior / "generation_config.json") in result.err
    assert (prior / "generation_config.json").read_text() == '{"temperature": 0.5}'


def test_the_search_trains_a_classifier_where_none_is_given(cli, tmp_path, real, model, monkeypatch):
    prior, receipt = shutil.copytree(model, tmp_path / "prior"), tmp_path / "settings.json"
    words = ["--model", prior, "--data", real, "--classifier-steps", 15, "--batch-size", 16, "--n", 24]
    words += ["--guidance-scale", 1, "--min-p", 0, 0.5, "--device", "cpu", "--output", receipt]
    assert cli(evaluate.main, "settings", *words).code == 0
    assert cli(evaluate.main, "replay", receipt).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"prior", "settings.json"}
    # It is another classifier after other steps.
    before = json.loads(receipt.read_text())["fingerprints"]["classifier"]
    words[words.index("--classifier-steps") + 1] = 16
    assert cli(evaluate.main, "settings", *words).code == 0
    assert json.loads(receipt.read_text())["fingerprints"]["classifier"] != before
    diverging = partial(ClassifierTraining, lr=1e30)
    monkeypatch.setattr("vqgen.evaluation.tasks.settings.ClassifierTraining", diverging)
    result = cli(evaluate.main, "settings", *words)
    assert result.code == 2 and "diverged" in result.err and "--lr" not in result.err, "which it does not have"


def test_without_classes_the_classifier_learns_how_images_are_turned(cli, tmp_path, real):
    """The samples of a prior without classes are compared with validation images in ten parts."""
    model, receipt = make_square_prior(tmp_path / "prior", names=None), tmp_path / "settings.json"
    words = ["--model", model, "--data", real, "--classifier-steps", 15, "--batch-size", 16, "--n", 40]
    words += ["--min-p", 0, 0.5, "--device", "cpu", "--output", receipt]
    result = cli(evaluate.main, "settings", *words)
    assert result.code == 0, result.err
    found = json.loads(receipt.read_text())["metrics"]
    assert set(found["class_kernel_distance"]) == {"plain", "--min-p 0.5"}  # no guidance, which needs a class
    assert all(0 <= share <= 1 for share in found["classifier_accuracy"].values())
    again = cli(evaluate.main, "replay", receipt)
    assert again.code == 0 and again.out.startswith("same"), again.err
    result = cli(evaluate.main, "settings", *words, "--guidance-scale", 2)
    assert result.code == 2 and "guidance" in result.err


def test_no_guidance_is_tried_unasked_where_every_image_had_its_class(cli, tmp_path, real, model, judge):
    prior = shutil.copytree(model, tmp_path / "prior")
    about = json.loads((prior / "vqgen.json").read_text())
    (prior / "vqgen.json").write_text(json.dumps(about | {"label_dropout": 0}))
    words = ["settings", "--model", prior, "--data", real, "--classifier", judge, "--n", 24, "--device", "cpu"]
    words += ["--min-p", 0, 0.5, "--output", tmp_path / "receipt.json"]
    result = cli(evaluate.main, *words)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "receipt.json").read_text())["metrics"]["class_kernel_distance"]
    assert set(found) == {"plain", "--min-p 0.5"}
    result = cli(evaluate.main, *words, "--guidance-scale", 2)
    assert result.code == 2 and "--guidance-scale" in result.err and "--label-dropout 0" in result.err


def test_a_classifier_tells_how_images_are_turned():
    """Squares by quarters, other images by halves; the seed decides which."""
    images = open_images(str(DEMO), "train", ImageConfig(size=[16, 16], channels=1), augment=True)
    training = ClassifierTraining(data=str(DEMO), output=Path("none"), size=[16, 16], channels=1, steps=40)
    model = classifier_of(images, training, torch.device("cpu"), turned=True)
    shown = open_images(str(DEMO), "heldout", ImageConfig(size=[16, 16], channels=1)).__getitems__(range(100)).images
    right = [(model.choose(shown.rot90(turn, (2, 3))) == turn).float().mean() for turn in range(4)]
    assert sum(right) / 4 > 0.6, right
    wide = open_images(str(DEMO), "train", ImageConfig(size=[16, 24], channels=1))
    other = classifier_of(wide, replace(training, steps=1), torch.device("cpu"), turned=True)
    assert len(other.config.class_names) == 2


def test_what_the_search_cannot_use_is_refused_by_name(cli, tmp_path, real, model, judge):
    unconditional = make_prior(tmp_path / "unconditional", names=None)
    few = shutil.copytree(real, tmp_path / "few")
    for path in [path for name in CLASSES[:2] for path in sorted((few / "val" / name).iterdir())[1:]]:
        path.unlink()
    base = {"--model": model, "--data": real, "--classifier": judge, "--n": 24, "--device": "cpu"}
    for changed, code, parts in (
        ({"--model": unconditional}, 2, ["--classifier", "no classes"]),
        ({"--classifier": model}, 1, ["prior", "classifier"]),
        ({"--data": few}, 1, ["--data", "1 of 3 classes"]),
        ({"--temperature": 0}, 2, ["--temperature", "0"]),
        ({"--guidance-schedule": "late"}, 2, ["--guidance-schedule", "late"]),
        ({"--n": 5}, 2, ["--n", "5"]),
    ):
        words = [word for pair in (base | changed).items() for word in pair]
        result = cli(evaluate.main, "settings", *words, "--output", tmp_path / "receipt.json")
        assert result.code == code and len(result.err.splitlines()) == 1, result.err
        assert all(part in result.err for part in parts), result.err
    assert not (model / "generation_config.json").exists() and not (tmp_path / "receipt.json").exists()


def test_the_search_leaves_rare_classes_out_of_the_distance(cli, tmp_path, real, model, judge):
    prior, distances = shutil.copytree(model, tmp_path / "prior"), []
    words = ["--model", prior, "--classifier", judge, "--n", 24, "--guidance-scale", 1, "--min-p", 0, "--device", "cpu"]
    for number, kept in enumerate((slice(None), slice(0, 1), slice(1, 2))):
        data, receipt = shutil.copytree(real, tmp_path / f"data-{number}"), tmp_path / f"{number}.json"
        bags = sorted((data / "val" / "bag").iterdir())
        for path in set(bags) - set(bags[kept]):
            path.unlink()
        result = cli(evaluate.main, "settings", *words, "--data", data, "--output", receipt)
        assert result.code == 0 and ("not compared: bag" in result.err) == (number > 0), result.err
        found = json.loads(receipt.read_text())
        assert found["details"]["not_compared"] == ["bag"] * (number > 0)
        distances.append(found["metrics"]["class_kernel_distance"]["plain"])
    assert distances[1] == pytest.approx(distances[2]), "the image that is left plays no part"
    assert distances[0] != pytest.approx(distances[1])


def test_half_of_the_classes_have_to_be_compared():
    judge, groups = Judge(None, list("abcdef"), True), torch.tensor([0, 0, 2, 2, 3, 3, 3, 5])
    assert judge.compared(groups, 12) == [0, 2, 3]
    for few, n in ((groups[:4], 12), (groups, 11)):
        with pytest.raises(UserError):
            judge.compared(few, n)


def test_the_distance_within_classes_is_that_of_torch_fidelity():
    random = torch.Generator().manual_seed(0)
    samples, real = (torch.randn(40, 8, generator=random) + shift for shift in (0.0, 0.5))
    found = kernel_distances(samples, torch.zeros(40), real, torch.zeros(40), [0])
    assert found.item() == pytest.approx(kernel_distance(samples, real)[0], rel=1e-4)
    labels = torch.arange(40) % 2
    by_class = kernel_distances(samples, labels, real, labels, [0, 1])
    for label in (0, 1):
        alone = kernel_distance(samples[labels == label], real[labels == label])[0]
        assert by_class[label].item() == pytest.approx(alone, rel=1e-4)


def test_the_distance_within_classes_sees_wrong_classes_and_sameness():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(1000) % 2
    centre = (2.0 * labels - 1)[:, None]

    def features(spread=1.0):
        return centre + spread * torch.randn(1000, 4, generator=random)

    real, good, same = features(), features(), features(0.4)
    others = torch.where(torch.rand(1000, generator=random) < 0.3, 1 - labels, labels)
    cases = [(good, labels), (good, others), (same, labels)]
    distances = [kernel_distances(*case, real, labels, [0, 1]).mean().item() for case in cases]
    assert abs(distances[0]) < 0.2 * min(distances[1:]), distances


def test_ties_of_the_distance_are_broken_by_accuracy():
    least, near = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.2, 0.9, 0.0, 1.1])
    far = least + torch.tensor([0.5, 0.6, 0.5, 0.6])
    assert best_of([far, least, near], [0.9, 0.5, 0.6]) == 2
    assert best_of([far, least, near], [0.9, 0.6, 0.6]) == 1
    assert best_of([least], [0.0]) == 0
    # One standard error of the difference over the classes, not one standard deviation: 1 / 2 here.
    scattered = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 3**0.5 / 2
    for mean, chosen in ((0.45, 1), (0.55, 0)):
        assert best_of([torch.zeros(4), scattered + mean], [0.5, 0.6]) == chosen
