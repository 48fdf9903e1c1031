"""vqgen-eval inpainting and windows: metrics against a naive computation, seams of known height, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SIZE, make_photos, make_prior, make_square_prior
from processes import run_together
from torch import Tensor, nn
from torchvision.io import write_png

import vqgen.evaluation.program as evaluate
from vqgen.errors import UsageError
from vqgen.evaluation.receipt import flatten
from vqgen.evaluation.tasks import images as task_images
from vqgen.evaluation.tasks import inpainting
from vqgen.evaluation.tasks.images import Encoded, Neighbours, TaskImages, shares
from vqgen.evaluation.tasks.inpainting import Hole
from vqgen.evaluation.tasks.options import InpaintingConfig
from vqgen.evaluation.tasks.windows import owners
from vqgen.prior.likelihood import token_nats
from vqgen.prior.parts.source import MaskedSource, PairedSource
from vqgen.sampling.filling import REACH, paste
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.codes.format import SourceRecord

DATA = 12  # images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_square_prior(tmp_path_factory.mktemp("model"), MaskedSource(0.5))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("photos"), DATA)


class Distance(nn.Module):
    """Stands in for LPIPS: the mean absolute difference."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Linear(2, 2)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        return (images - targets).abs().flatten(1).mean(1)


@pytest.fixture
def measured(cli, tmp_path: Path, model: Path, photos: Path, monkeypatch):
    """Call `vqgen-eval inpainting` and return its receipt."""
    monkeypatch.setattr(inpainting, "perceptual_of", lambda config, device: Distance())

    def call(*words: Any) -> dict[str, Any]:
        given = ["--model", model, "--data", photos, "--split", "test", "--output", tmp_path / "receipt.json"]
        result = cli(evaluate.main, "inpainting", *given, "--device", "cpu", *words)
        assert result.code == 0, result.err
        return json.loads((tmp_path / "receipt.json").read_text())

    return call


def images_of(folder: Path, generator: Generator) -> tuple[Tensor, Tensor, list[int]]:
    """Images, codes and labels in the order of the data: by class."""
    from vqgen.tokenizer.data.dataset import open_images
    from vqgen.tokenizer.data.options import ImageConfig

    data = open_images(str(folder), "test", ImageConfig([16, 16]))
    images = torch.stack([data[index].image for index in range(len(data))])
    return images, generator.encode(images), data.labels.tolist()


def test_the_hole_and_what_is_drawn_for_it(model: Path) -> None:
    generator = Generator.load(model, "cpu", "fp32")
    hole = Hole.of(InpaintingConfig(model, "demo"), generator)
    assert hole.pixels.nonzero().min() == 4 and hole.pixels.nonzero().max() == 11 and hole.pixels.sum() == 64
    assert hole.cells.sum() == 16 and hole.cells[2:6, 2:6].all()
    assert hole.edge.nonzero().tolist() == [[2, 5], [3, 5], [4, 5], [5, 2], [5, 3], [5, 4], [5, 5]]
    assert hole.drawn.sum() == 36 and hole.drawn[1:7, 1:7].all()
    corner = Hole.of(InpaintingConfig(model, "demo", box=[12, 12, 4, 4]), generator)
    assert not corner.edge.any(), "nothing comes after it"
    with pytest.raises(UsageError, match="--box: 2 2 12 12"):
        Hole.of(InpaintingConfig(model, "demo", box=[2, 2, 12, 12]), generator)


def test_the_nll_is_that_of_sequences_made_by_hand(measured, model: Path, photos: Path) -> None:
    found = measured("--batch-size", 5)
    generator = Generator.load(model, "cpu", "fp32")
    _, codes, labels = images_of(photos, generator)
    encoded = Encoded(torch.arange(DATA), codes, labels, "")
    others = codes[encoded.others]
    hidden = torch.zeros(8, 8, dtype=torch.bool)
    hidden[2:6, 2:6] = True
    edge = hidden.clone()
    edge[2:5, 2:5] = False
    tokens, label = codes.flatten(1), torch.tensor(labels)[:, None] + SIZE
    unknown = generator.conditioning.size - 1
    for name, source in {"surroundings": codes, "shuffled": others, "before": None}.items():
        parts = [] if source is None else [torch.where(hidden.flatten(), unknown, source.flatten(1))]
        sequences = torch.cat([*parts, label, tokens], 1)
        with torch.no_grad():
            logits = generator.prior(sequences[:, :-1])[:, -64:]
        nats = token_nats(logits, tokens).view(-1, 8, 8)
        assert found["metrics"]["hole_nats"][name] == pytest.approx(nats[:, hidden].mean().item(), rel=1e-5)
        assert found["metrics"]["edge_nats"][name] == pytest.approx(nats[:, edge].mean().item(), rel=1e-5)
    nats = found["metrics"]["hole_nats"]
    assert found["metrics"]["gain"]["hole"] == pytest.approx(100 * (1 - nats["surroundings"] / nats["before"]))
    assert found["details"]["standard_errors"]["gain"]["hole"] > 0
    assert found["counts"] == {"images": DATA, "codes of the hole": 16, "codes drawn": 36}
    without = measured("--unconditional")["metrics"]["hole_nats"]
    assert without["before"] != nats["before"]
    # A prior beside it, here itself.
    both = measured("--plain", model)
    assert both["metrics"]["hole_nats"]["plain"] == both["metrics"]["hole_nats"]["before"]
    assert both["metrics"]["gain_over_plain"] == both["metrics"]["gain"]


def test_a_plain_prior_is_given_the_classes_that_it_knows(cli, measured, tmp_path: Path, photos: Path, model) -> None:
    plain = make_square_prior(tmp_path / "plain", names=None)
    given = measured("--plain", plain)["metrics"]["hole_nats"]
    assert given["plain"] == measured("--plain", plain, "--unconditional")["metrics"]["hole_nats"]["plain"]
    other, always = make_square_prior(tmp_path / "o", names=list("abc")), make_square_prior(tmp_path / "a")
    about = json.loads((always / "vqgen.json").read_text())
    (always / "vqgen.json").write_text(json.dumps(about | {"label_dropout": 0}))
    words = ["inpainting", "--model", model, "--data", photos, "--split", "test", "--output", tmp_path / "no.json"]
    for folder, further, found in ((other, [], "a, b, c"), (always, ["--unconditional"], "--label-dropout 0")):
        result = cli(evaluate.main, *words, "--plain", folder, *further)
        assert result.code == 1 and found in result.err and "--plain" in result.err and result.err.count("\n") == 1
    about = json.loads((model / "vqgen.json").read_text())
    source = SourceRecord("degraded", about["grid"], "0" * 64, ["grey"])
    required = make_square_prior(tmp_path / "required", PairedSource(source, dropout=0.0))
    result = cli(evaluate.main, *words, "--plain", required)
    assert result.code == 2 and f"--plain: {required}" in result.err and "--source-dropout 0" in result.err
    assert "plain" in measured("--plain", other, "--unconditional")["metrics"]["hole_nats"]


def test_a_hole_in_the_corner_has_no_edge_and_guidance_by_the_source_is_of_fillings_alone(measured) -> None:
    words = ["--box", 12, 12, 4, 4, "--diverse", 1, "--fillings", 2, "--n", 6]
    plain = measured(*words)
    guided = measured(*words, "--source-guidance-scale", 5, "--guidance-schedule", "linear")
    for found in (plain, guided):
        assert "edge_nats" not in found["metrics"] and found["metrics"]["gain"].keys() == {"hole"}
        assert all(math.isfinite(value) for _, value in flatten(found["metrics"]))
    psnr = [found["metrics"]["hole_psnr"] for found in (plain, guided)]
    assert psnr[0]["before"] == psnr[1]["before"] and psnr[0]["filled"] != psnr[1]["filled"]


def test_every_image_gets_the_surroundings_of_another() -> None:
    for count in (2, 3, 50):
        others = Encoded(torch.arange(count), torch.zeros(count, 1, 1), [], "").others
        assert sorted(others.tolist()) == list(range(count)) and not (others == torch.arange(count)).any()


def test_each_process_compares_the_rows_that_it_draws_whatever_images_are_broken(
    tmp_path: Path, model: Path, monkeypatch
) -> None:
    folder = make_photos(tmp_path / "photos", 102)
    (folder / "test" / "bag" / "2.png").write_bytes(b"no image")
    config = InpaintingConfig(model, str(folder), "test", workers=0)
    images = TaskImages(config, Generator.load(model, "cpu", "fp32"))
    encoded = images.encoded()
    assert len(encoded) == 101
    for rank in range(2):
        monkeypatch.setattr(task_images, "rank_and_world", lambda rank=rank: (rank, 2))
        rows = [row for part, _, _ in images.pixels(encoded) for row in part.tolist()]
        assert rows == list(shares(101))


def test_pictures_are_those_of_the_generator(measured, model: Path, photos: Path) -> None:
    found = measured("--seed", 4, "--temperature", 0.5, "--batch-size", 5)["metrics"]
    generator = Generator.load(model, "cpu", "fp32")
    images, codes, labels = images_of(photos, generator)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    cells = torch.zeros(8, 8, dtype=torch.bool)
    cells[1:7, 1:7] = True
    given = {"seed": 4, "temperature": 0.5}
    filled = generator.inpaint(images, mask, classes=labels, **given).images
    before = generator.complete(images, mask=cells, classes=labels, **given).images
    decoded = {"before": before, "reconstruction": generator.decode(codes)}
    where = mask.expand(len(images), 16, 16), REACH * generator.tokenizer.factor
    pasted = {name: paste(each, images, *where) for name, each in decoded.items()}
    for name, shown in {"filled": filled, **pasted}.items():
        error = ((shown - images.double())[:, :, mask] / 255).square().flatten(1).mean(1)
        assert found["hole_psnr"][name] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-4)
    error = (filled.double() - images).abs().mean() / 127.5
    assert found["lpips"]["filled"] == pytest.approx(error.item(), rel=1e-4)
    unpasted = generator.inpaint(images, mask, classes=labels, paste=False, **given).images.double()
    for seam, shown, low, high in (("seam", filled.double(), 4, 12), ("seam_of_codes", unpasted, 2, 14)):
        rows, columns = shown[..., low:high, :], shown[..., low:high]
        across = [rows[..., x] - rows[..., x - 1] for x in (low, high)]
        across += [columns[..., y, :] - columns[..., y - 1, :] for y in (low, high)]
        hole = rows[..., low:high]
        inside = torch.cat([hole.diff(dim=2).flatten(), hole.diff(dim=3).flatten()]).abs().mean()
        ratio = torch.cat(across, 0).abs().mean() / inside
        assert found[seam]["filled"] == pytest.approx(ratio.item(), rel=1e-4)
    assert found["seam"]["original"] == pytest.approx(1, abs=0.2), "nothing ends at the border of the hole"


def test_seams_and_steps_inside_are_told_apart() -> None:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:5, 3:8] = True
    image = (100 * mask + torch.arange(8) % 2 * 10).to(torch.uint8)[None, None]
    across, inside = (Neighbours.where(mask, pairs) for pairs in (torch.ne, torch.logical_and))
    # 3 pairs on the left with a step of 100 +- 10 each, 5 above and 5 below of 100.
    assert int(across.right.sum()) == 3 and int(across.below.sum()) == 10 and across
    assert across.step(image).item() == pytest.approx((3 * 110 + 10 * 100) / 13)
    assert inside.step(image).item() == pytest.approx(12 * 10 / (12 + 10)), "12 steps of 10 to the right, 10 of 0 down"
    assert not Neighbours.where(mask, lambda a, b: a & ~a)


def test_fillings_that_are_all_the_same_have_no_variety(measured) -> None:
    same = measured("--temperature", 0, "--diverse", 3, "--fillings", 4)["metrics"]["diversity"]
    assert same == {"pixels": 0, "lpips": 0}
    varied = measured("--diverse", 3, "--fillings", 4)["metrics"]["diversity"]
    assert varied["pixels"] > 1 and varied["lpips"] > 0


def test_a_receipt_is_replayed_and_two_processes_agree(cli, tmp_path: Path, model: Path, photos: Path) -> None:
    words = ["--model", model, "--data", photos, "--split", "test", "--n", 9, "--diverse", 3, "--fillings", 3]
    result = cli(evaluate.main, "inpainting", *words, "--device", "cpu")
    assert result.code == 0 and "NLL of the hole, surroundings" in result.out, result.err
    path = model / "inpainting-test-9.json"
    one = json.loads(path.read_text())
    assert set(one["metrics"]["diversity"]) == {"pixels"} and "lpips" not in one["metrics"]
    assert cli(evaluate.main, "replay", path).out.startswith("same: ")
    two = tmp_path / "two.json"
    first, second = run_together("vqgen.evaluation.program", "inpainting", *words, "--device", "cpu", "--output", two)
    assert "receipt" in first.ok().out and not second.ok().out
    both = json.loads(two.read_text())
    assert both["fingerprints"] == one["fingerprints"] and both["counts"] == one["counts"]
    assert dict(flatten(both["metrics"])) == pytest.approx(dict(flatten(one["metrics"])), rel=1e-5)
    changed = json.loads(path.read_text())
    changed["options"]["box"] = [4, 4, 6, 8]
    two.write_text(json.dumps(changed))
    result = cli(evaluate.main, "replay", two)
    assert result.code == 1 and "counts.codes of the hole 16, now 12" in result.err and "hole_nats" in result.err


def test_what_does_not_fit_is_named(cli, tmp_path: Path, model: Path, photos: Path) -> None:
    other = make_prior(tmp_path / "other")
    for split in ("train", "test"):
        (tmp_path / "one" / split).mkdir(parents=True)
        write_png(torch.zeros(3, 16, 16, dtype=torch.uint8), str(tmp_path / "one" / split / "0.png"))
    own = ["--model", model, "--data", photos, "--split", "test", "--output", tmp_path / "receipt.json"]
    for words, code, named in (
        (["--model", other], 2, "--inpainting"),
        (["--plain", other], 1, "--plain"),
        (["--box", 1, 2, 3], 2, "--box"),
        (["--box", 10, 10, 10, 2], 2, "--box"),
        (["--n", 13], 2, "--n: found 13"),
        (["--data", tmp_path / "one"], 1, "--unconditional"),
        (["--data", tmp_path / "one", "--unconditional"], 1, "--data"),
        (["--perceptual-weights", tmp_path / "none"], 1, "--perceptual-weights"),
        (["--fillings", 1], 2, "--fillings"),
    ):
        result = cli(evaluate.main, "inpainting", *own, *words)
        assert result.code == code and named in result.err and result.err.count("\n") == 1, (words, result.err)
    assert not (tmp_path / "receipt.json").exists()


# Windows


def test_each_code_belongs_to_the_window_that_draws_it() -> None:
    found = owners(torch.ones(4, 12, dtype=torch.bool), (4, 4))
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and (found == found[0]).all()
    found = owners(torch.ones(6, 4, dtype=torch.bool), (4, 4))
    assert found[:, 0].tolist() == [0, 0, 0, 0, 1, 1]


def test_seams_of_windows_are_measured_at_borders_of_codes(cli, tmp_path: Path, model: Path) -> None:
    words = ["--model", model, "--size", 16, 24, "--n", 5, "--batch-size", 2, "--device", "cpu"]
    result = cli(evaluate.main, "windows", *words)
    assert result.code == 0 and "Step across seams" in result.out, result.err
    found = json.loads((model / "windows-5.json").read_text())
    shown = Generator.load(model, "cpu", "fp32").sample(5, size=(16, 24)).images.double()
    # 8x12 codes in two windows: the second draws columns 8 to 11.
    right = (shown[..., 1:] - shown[..., :-1]).abs().mean((0, 1, 2))
    below = (shown[..., 1:, :] - shown[..., :-1, :]).abs().mean((0, 1, 3))
    inside = torch.cat([right[1::2][[n for n in range(11) if n != 7]].repeat(16), below[1::2].repeat_interleave(24)])
    assert found["counts"] == {"images": 5, "windows": 2}
    assert found["metrics"]["step"]["seams"] == pytest.approx(right[15].item())
    assert found["metrics"]["step"]["inside"] == pytest.approx(inside.mean().item())
    assert found["metrics"]["seam"] == pytest.approx(right[15].item() / inside.mean().item())
    assert cli(evaluate.main, "replay", model / "windows-5.json").out.startswith("same: ")
    guided = cli(evaluate.main, "windows", *words, "--source-guidance-scale", 3, "--output", model / "guided.json")
    assert guided.code == 0, guided.err
    other = json.loads((model / "guided.json").read_text())
    assert other["fingerprints"]["images"] != found["fingerprints"]["images"]
    for wrong in ([16, 16], [16, 17], [16]):
        result = cli(evaluate.main, "windows", *words, "--size", *wrong)
        assert result.code == 2 and "--size" in result.err and result.err.count("\n") == 1, result.err


def test_a_model_of_the_package_gets_no_receipt_unasked(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(evaluate.main, "windows", "--model", "cifar10", "--size", 32, 48, "--n", 1, "--device", "cpu")
    assert result.code == 2 and "--output" in result.err and "cifar10" in result.err and result.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
