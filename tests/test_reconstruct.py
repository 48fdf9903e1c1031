"""Reconstructions: their metrics, the picture of a validation, and vqgen-reconstruct."""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.realdata import backbone, real
from PIL import Image
from processes import write_images
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.io import decode_image, read_image, write_png

from vqgen.config import save as save_config
from vqgen.errors import UserError
from vqgen.seeding import fixed_subset
from vqgen.tokenizer import comparison
from vqgen.tokenizer.data import dataset as image_module
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float, to_uint8
from vqgen.tokenizer.metrics import SMALLEST, ReconstructionMetrics, mse, psnr, ssim
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import ResidualConfig, VQConfig
from vqgen.tokenizer.reconstruct import ReconstructConfig, main
from vqgen.tokenizer.reconstruct_inputs import batches_of_one_size, find_images, read_images
from vqgen.tokenizer.reconstruction import Reconstructions, reconstruct, write_comparison
from vqgen.tokenizer.train import TokenizerTraining


def make(size=(24, 16), channels=1, quantizer=None, multipliers=(1, 2)) -> Tokenizer:
    torch.manual_seed(0)
    model = VQGANConfig(width=8, multipliers=list(multipliers), blocks=1, latent_dim=6, groups=4)
    quantizer = quantizer or VQConfig(codebook_size=32, code_dim=4)
    return Tokenizer(TokenizerConfig(list(size), channels, model, quantizer)).eval()


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ---- metrics ----


@pytest.fixture(scope="module")
def measured():
    """A tokenizer, 20 held-out demo images (1, 24, 16), and their reconstructions one by one."""
    config = ImageConfig(size=[24, 16], channels=1)
    data = open_images("demo", "heldout", config)
    tokenizer = make()
    originals = torch.stack([data[i].image for i in fixed_subset(20, len(data))])
    codes = torch.cat([tokenizer.encode(image[None]) for image in originals])
    results = torch.cat([to_uint8(tokenizer.decode(code[None])) for code in codes])
    return tokenizer, data, config, originals, codes, results


def validate(measured, batch_size: int, perceptual=None) -> Reconstructions:
    tokenizer, data, *_ = measured
    return reconstruct(tokenizer, data, 20, batch_size, perceptual, Accelerator(cpu=True))


def by_hand(codes: list[int], size: int) -> dict[str, float]:
    """Metrics of the codes, counted one by one."""
    shares = [n / len(codes) for n in Counter(codes).values()]
    entropy = -sum(share * math.log(share) for share in shares)
    return {"codes_used": len(shares), "usage": len(shares) / size, "perplexity": math.exp(entropy)}


def test_metrics_are_those_of_torchmetrics(measured):
    _, _, _, originals, codes, results = measured
    found = validate(measured, 8)
    one, two = results.float(), originals.float()
    each = peak_signal_noise_ratio(one, two, data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(results, originals), each)
    error = ((to_float(results) - to_float(originals)) ** 2).mean().item()
    structure = structural_similarity_index_measure(one / 255, two / 255, data_range=1.0)
    assert found.metrics == pytest.approx(
        {
            "psnr": each.mean().item(),
            "psnr_of_mse": peak_signal_noise_ratio(one, two, data_range=255.0).item(),
            "mse_over_variance": error / to_float(originals).var(unbiased=False).item(),
            "ssim": float(structure),
            **by_hand(codes.flatten().tolist(), 32),
        },
        rel=1e-4,
    )
    assert found.metrics["psnr"] - found.metrics["psnr_of_mse"] > 1e-3, "the two kinds of mean would not be told apart"
    assert torch.equal(found.originals, originals) and torch.equal(found.images, results)


def test_metrics_do_not_depend_on_the_batch_size(measured):
    whole = validate(measured, 20).metrics
    for batch_size in (1, 7):
        assert validate(measured, batch_size).metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_metrics_are_those_of_float32_whatever_autocast_says(measured):
    """SSIM's variances drown in 16 bits: even equal images would get less than 1."""
    _, _, _, originals, _, results = measured
    with torch.autocast("cpu", torch.bfloat16):
        inside = ssim(results, originals), ssim(originals, originals), psnr(results, originals)
    torch.testing.assert_close(inside, (ssim(results, originals), torch.ones(20), psnr(results, originals)))


def test_psnr_by_hand():
    images = torch.tensor([0, 10, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    targets = torch.tensor([0, 0, 0], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    found = psnr(images, targets)
    assert found[1] == pytest.approx(20 * math.log10(255 / 10), rel=1e-5)
    assert found[2] == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(found[0]) and found[0] > 100
    assert mse(images, targets)[2] == pytest.approx(4)


def test_ssim_takes_the_smallest_size_that_is_allowed():
    images = pixels(2, 3, SMALLEST, SMALLEST)
    torch.testing.assert_close(ssim(images, images), torch.ones(2))


def test_a_plain_grey_explains_nothing():
    """`mse_over_variance` is 1 for the best single shade, and 4 for its mirror image."""
    metrics = ReconstructionMetrics(make(), None, torch.device("cpu"))
    originals = torch.cat([torch.full((1, 1, 24, 16), shade, dtype=torch.uint8) for shade in (0, 254)])
    codes = torch.zeros(2, 12, 8, dtype=torch.long)
    each = metrics.add(originals, torch.full_like(originals, 127), codes)
    assert metrics.compute()["mse_over_variance"] == pytest.approx(1, rel=1e-4)
    assert each.keys() == {"psnr", "ssim"} and each["psnr"].shape == (2,)
    mirrored = ReconstructionMetrics(make(), None, torch.device("cpu"))
    mirrored.add(originals, originals.flip(0), codes)
    assert mirrored.compute()["mse_over_variance"] == pytest.approx(4, rel=1e-4)


def test_images_of_any_size_weigh_the_same():
    metrics = ReconstructionMetrics(make(), None, torch.device("cpu"))
    pairs = [
        (pixels(1, 1, 8, 8), pixels(1, 1, 8, 8, seed=1) // 8),
        (pixels(1, 1, 64, 32), pixels(1, 1, 64, 32, seed=2)),
    ]
    for original, result in pairs:
        metrics.add(original, result, torch.zeros(1, 2, 2, dtype=torch.long))
    found = metrics.compute()
    errors = [((to_float(a) - to_float(b)) ** 2).mean().item() for a, b in pairs]
    assert found["psnr"] == pytest.approx(sum(10 * math.log10(4 / error) for error in errors) / 2, rel=1e-5)
    assert found["psnr_of_mse"] == pytest.approx(10 * math.log10(4 / (sum(errors) / 2)), rel=1e-5)


def test_each_depth_has_its_own_histogram():
    """Two depths with four codes each, together eight: half of each codebook and not all of one."""
    tokenizer = make(quantizer=ResidualConfig(codebook_size=8, code_dim=4, depth=2))
    metrics = ReconstructionMetrics(tokenizer, None, torch.device("cpu"))
    codes = torch.stack([torch.arange(24) % 4, 4 + torch.arange(24) % 4], dim=1).view(1, 4, 6, 2)
    metrics.add(pixels(1, 1, 24, 16), pixels(1, 1, 24, 16), codes)
    found = metrics.compute()
    assert (found["codes_used"], found["usage"]) == (4, 0.5) and found["perplexity"] == pytest.approx(4)
    # Depths that are used unevenly: the mean of their metrics.
    codes[..., 1] = 7
    metrics = ReconstructionMetrics(tokenizer, None, torch.device("cpu"))
    metrics.add(pixels(1, 1, 24, 16), pixels(1, 1, 24, 16), codes)
    found = metrics.compute()
    assert (found["codes_used"], found["usage"]) == (2.5, 2.5 / 8) and found["perplexity"] == pytest.approx(2.5)


class Distance(nn.Module):
    """In the place of LPIPS."""

    def forward(self, images, targets):
        return (images - targets).abs().flatten(1).mean(dim=1)


def test_lpips_is_measured_on_eight_bit_images(measured):
    _, _, _, originals, _, results = measured
    expected = (to_float(results) - to_float(originals)).abs().mean().item()
    assert validate(measured, 6, Distance()).metrics["lpips"] == pytest.approx(expected, rel=1e-5)
    assert "lpips" not in validate(measured, 6).metrics


@pytest.mark.parametrize("count", [1, 3, 8, 20])
def test_comparison_shows_each_image_above_its_reconstruction(measured, tmp_path, count):
    _, _, _, originals, _, results = measured
    write_comparison(tmp_path / "pairs.png", Reconstructions({}, originals[:count], results[:count]))
    picture = read_image(str(tmp_path / "pairs.png"))
    columns = min(count, 8)
    assert picture.shape == (3, 26 * 2 * -(-count // 8) + 2, 18 * columns + 2)
    for i in range(count):
        top, left = 2 + 52 * (i // 8), 2 + 18 * (i % 8)
        assert torch.equal(picture[:1, top : top + 24, left : left + 16], originals[i])
        assert torch.equal(picture[:1, top + 26 : top + 50, left : left + 16], results[i])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.png"]


def test_broken_images_are_left_out_of_the_validate(measured, monkeypatch):
    tokenizer, data, _, originals, _, results = measured
    given = image_module.ordered_batches

    def without_the_first(dataset, indices, batch_size):
        return given(dataset, indices[1:] if len(indices) == 20 else indices, batch_size)

    monkeypatch.setattr("vqgen.tokenizer.reconstruction.ordered_batches", without_the_first)
    found = reconstruct(tokenizer, data, 20, 8, None, Accelerator(cpu=True))
    assert found.metrics["psnr"] == pytest.approx(psnr(results[1:], originals[1:]).mean().item(), rel=1e-5)


def test_no_intact_image_is_one_line(measured, monkeypatch, tmp_path):
    tokenizer, data, *_ = measured
    monkeypatch.setattr("vqgen.tokenizer.reconstruction.ordered_batches", lambda *_: iter(()))
    with pytest.raises(UserError, match="--data"):
        reconstruct(tokenizer, data, 20, 8, None, Accelerator(cpu=True))
    # One process of several may have none although others have some.
    none = torch.zeros(0, 1, 24, 16, dtype=torch.uint8)
    write_comparison(tmp_path / "none.png", Reconstructions({}, none, none))
    assert not list(tmp_path.iterdir())


# ---- vqgen-reconstruct ----


@pytest.fixture(scope="module")
def grey(tmp_path_factory) -> Path:
    """The folder of a tokenizer of grey 24x16 images with factor 4."""
    folder = tmp_path_factory.mktemp("grey")
    make(multipliers=(1, 1, 2)).save(folder)
    return folder


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    """The folder of a tokenizer of 32-pixel colour images with factor 4."""
    folder = tmp_path_factory.mktemp("colour")
    make((32, 32), 3, multipliers=(1, 1, 2)).save(folder)
    return folder


def content(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def save(path: Path, image: torch.Tensor) -> torch.Tensor:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(image, str(path))
    return image


def test_pictures_and_metrics_are_those_of_the_tokenizer(tmp_path, cli, grey):
    images = [save(tmp_path / "in" / f"{i}.png", pixels(1, 24, 16, seed=i)) for i in range(3)]
    images.append(save(tmp_path / "in" / "3.png", pixels(1, 40, 64, seed=3)))
    out = tmp_path / "out"
    result = cli(main, tmp_path / "in", "--tokenizer", grey, "--output", out, "--precision", "fp32")
    assert (result.code, result.err) == (0, "")
    assert names(out) == {*(f"0000{i}-{i}.png" for i in range(4)), "grid.png", "metrics.json"}
    tokenizer, found = Tokenizer.load(grey), content(out)
    again = [tokenizer.reconstruct(image[None])[0] for image in images]
    for i, (image, back) in enumerate(zip(images, again)):
        picture = read_image(str(out / f"0000{i}-{i}.png"))[:1]
        height, width = image.shape[1:]
        assert picture.shape == (1, height, 3 * width + 8)
        assert torch.equal(picture[..., :width], image) and (picture[..., width : width + 4] == 255).all()
        assert torch.equal(picture[..., width + 4 : 2 * width + 4], back)
        difference = (4.0 * (image.float() - back.float()).abs()).clamp(max=255).to(torch.uint8)
        assert torch.equal(picture[..., 2 * width + 8 :], difference)
        entry = found["pictures"][i]
        assert entry["psnr"] == pytest.approx(psnr(back[None], image[None]).item(), rel=1e-5)
        assert entry["ssim"] == pytest.approx(ssim(back[None], image[None]).item(), rel=1e-4)
        assert entry["size"] == entry["original_size"] == [height, width]
    each = [psnr(back[None], image[None]).item() for image, back in zip(images, again)]
    error = sum(mse(back[None], image[None]).item() for image, back in zip(images, again)) / 4
    codes = [code for image in images for code in tokenizer.encode(image[None]).flatten().tolist()]
    expected = {"psnr": sum(each) / 4, "psnr_of_mse": 10 * math.log10(4 / error), **by_hand(codes, 32)}
    assert {name: found["metrics"][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (found["images"], found["cropped"], found["shrunk"], found["resized"], found["skipped"]) == (4, 0, 0, 0, [])
    assert found["tokenizer_fingerprint"] == tokenizer.fingerprint and found["other_size"] == 1
    *lines, total, notes, last = result.out.splitlines()
    assert len(lines) == 4 and lines[3].startswith(f"{tmp_path / 'in' / '3.png'}: 40x64 pixels, ")
    assert f"PSNR {each[3]:.4g} dB, SSIM {found['pictures'][3]['ssim']:.4g}" in lines[3]
    assert total.startswith(f"4 images: PSNR {sum(each) / 4:.4g} dB") and "codebook of 32" in total
    assert f"{10 * math.log10(4 / error):.4g} dB" in total and "LPIPS" not in total
    assert notes.startswith("1 of another size than the 24x16") and last.endswith(str(out / "grid.png"))


def test_files_folders_and_other_sources_on_one_line(tmp_path, cli, grey):
    """Also a name with a comma and spaces, a palette, transparency and a colour picture for a grey tokenizer."""
    folder, parquet = tmp_path / "folder", Path(image_module.__file__).parent / "demo" / "heldout.parquet"
    save(tmp_path / "one, two.png", pixels(1, 24, 16))
    save(folder / "class" / "x.png", pixels(3, 24, 16))
    Image.new("RGBA", (16, 24), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("P", (16, 24)).save(folder / "palette.gif")
    out = tmp_path / "out"
    words = [tmp_path / "one, two.png", "--tokenizer", grey, folder, "--n", 7, "--output", out, parquet]
    result = cli(main, *words)
    assert (result.code, result.err) == (0, "")
    found = content(out)
    expected = [tmp_path / "one, two.png", *(folder / name for name in ("class/x.png", "clear.png", "palette.gif"))]
    expected = [*map(str, expected), *(f"{parquet} row {row}" for row in range(3))]
    assert [entry["image"] for entry in found["pictures"]] == expected
    assert [entry["file"][:5] for entry in found["pictures"]] == [f"0000{i}" for i in range(7)]
    assert found["pictures"][0]["file"] == "00000-one_two.png" and found["data"] == [
        str(w) for w in (words[0], folder, parquet)
    ]
    assert (read_image(str(out / "00002-clear.png"))[..., :16] == 255).all(), "transparent is white"


def test_a_held_out_split_of_its_own_is_taken(tmp_path, cli, grey):
    for split, shade in (("train", 0), ("val", 255)):
        for i in range(3):
            save(tmp_path / "in" / split / "a" / f"{i}.png", torch.full((1, 24, 16), shade, dtype=torch.uint8))
    for split, expected in (("auto", "val"), ("heldout", "val"), ("train", "train")):
        out = tmp_path / split
        assert cli(main, tmp_path / "in", "--tokenizer", grey, "--output", out, "--split", split).code == 0
        assert {Path(entry["image"]).parents[1].name for entry in content(out)["pictures"]} == {expected}
    # Without one: its test split, else all of them, or those that a training holds out.
    (tmp_path / "in" / "val").rename(tmp_path / "in" / "test")
    for split in ("auto", "test"):
        out = tmp_path / f"{split} of two"
        assert cli(main, tmp_path / "in", "--tokenizer", grey, "--output", out, "--split", split).code == 0
        assert {Path(entry["image"]).parents[1].name for entry in content(out)["pictures"]} == {"test"}
    (tmp_path / "in" / "test").rename(tmp_path / "in" / "val")
    assert cli(main, tmp_path / "in" / "val", "--tokenizer", grey, "--output", tmp_path / "all").code == 0
    assert content(tmp_path / "all")["images"] == 3
    words = [tmp_path / "in" / "val", "--tokenizer", grey, "--split", "heldout", "--holdout", 0.4]
    assert cli(main, *words, "--output", tmp_path / "some").code == 0
    held = open_images(str(tmp_path / "in" / "val"), "heldout", ImageConfig(holdout=0.4))
    assert [e["image"] for e in content(tmp_path / "some")["pictures"]] == [held.source.item_name(0)]


def test_as_many_images_are_held_out_as_in_the_run(tmp_path, cli, grey):
    folder, model = tmp_path / "in", tmp_path / "run"
    for i in range(20):
        save(folder / f"{i:02d}.png", pixels(1, 24, 16, seed=i))
    shutil.copytree(grey, model)
    words = [folder, "--tokenizer", model, "--pictures", 0, "--output"]
    result = cli(main, *words, tmp_path / "unknown", "--split", "heldout")
    assert content(tmp_path / "unknown")["images"] == 1 and f"--holdout 0.05 of {folder}, as no run" in result.err
    result = cli(main, *words, tmp_path / "said", "--split", "heldout", "--holdout", 0.1)
    assert content(tmp_path / "said")["images"] == 2 and "--holdout" not in result.err
    save_config(TokenizerTraining(str(folder), images=ImageConfig(holdout=0.1)), model / "config.yaml")
    for split, count in (("heldout", 2), ("train", 18)):
        assert cli(main, *words, tmp_path / split, "--split", split).code == 0
        assert content(tmp_path / split)["images"] == count
    result = cli(main, *words, tmp_path / "more", "--split", "heldout", "--holdout", 0.3)
    assert result.code == 2 and "--holdout: found 0.3" in result.err and "0.1" in result.err
    assert cli(main, *words, tmp_path / "less", "--split", "heldout", "--holdout", 0.05).code == 0
    save_config(TokenizerTraining(f"stream:{folder}"), model / "config.yaml")
    result = cli(main, *words, tmp_path / "stream", "--split", "heldout")
    assert result.code == 2 and "--data" in result.err and f"stream:{folder}" in result.err
    assert cli(main, *words, tmp_path / "stream").code == 0
    save_config(TokenizerTraining("stream:shards"), model / "config.yaml")
    result = cli(main, *words, tmp_path / "others", "--split", "heldout")
    assert result.code == 0 and f"--data: {folder}" in result.err and "stream:shards" in result.err


def test_images_keep_their_size_but_for_the_edges(tmp_path, cli, grey):
    image = save(tmp_path / "a.png", pixels(1, 27, 33))
    out = tmp_path / "out"
    result = cli(main, tmp_path / "a.png", "--tokenizer", grey, "--output", out, "--amplify", 0)
    assert "24x32 of 27x33 pixels" in result.out and "1 cropped at the edges" in result.out
    picture = read_image(str(out / "00000-a.png"))[:1]
    assert picture.shape == (1, 24, 68) and torch.equal(picture[..., :32], image[:, 1:25, :32])
    assert content(out)["pictures"][0]["original_size"] == [27, 33] and content(out)["cropped"] == 1


def test_large_images_are_shrunk_with_their_aspect(tmp_path, cli, grey):
    save(tmp_path / "a.png", torch.full((1, 90, 200), 77, dtype=torch.uint8))
    for largest, size in ((100, [44, 100]), (0, [88, 200]), (200, [88, 200])):
        out = tmp_path / str(largest)
        result = cli(main, tmp_path / "a.png", "--tokenizer", grey, "--output", out, "--largest", largest)
        assert content(out)["pictures"][0]["size"] == size
        assert (f"1 shrunk to --largest {largest}" in result.out) == (largest == 100) == bool(content(out)["shrunk"])
        assert (read_image(str(out / "00000-a.png"))[0, :, : size[1]] == 77).all(), "no black edge"


def test_resized_images_give_the_metrics_of_the_run(tmp_path, cli, grey):
    """What a validation measures: the same images, prepared alike."""
    out = tmp_path / "out"
    words = ["demo", "--tokenizer", grey, "--resize", "--precision", "fp32", "--batch-size", 70]
    result = cli(main, *words, "--output", out)
    assert result.code == 0 and "1000 resized as in training" in result.out
    config = ImageConfig(size=[24, 16], channels=1)
    data = open_images("demo", "heldout", config)
    validation = reconstruct(Tokenizer.load(grey), data, 1000, 25, None, Accelerator(cpu=True))
    assert content(out)["metrics"] == pytest.approx(validation.metrics, rel=1e-5)
    assert len(content(out)["pictures"]) == 32 and len(result.out.splitlines()) == 3, "too many to be told one by one"


def test_what_cannot_be_shown_is_named_and_the_rest_goes_on(tmp_path, cli, colour):
    save(tmp_path / "in" / "b.png", pixels(3, 32, 32))
    save(tmp_path / "in" / "c.png", pixels(3, 7, 300))
    (tmp_path / "in" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnot at all")
    (tmp_path / "in" / "d.png").write_bytes(b"")
    out = tmp_path / "out"
    result = cli(main, tmp_path / "in", "--tokenizer", colour, "--output", out)
    assert result.code == 0 and names(out) == {"00001-b.png", "grid.png", "metrics.json"}
    assert [line.split(" (")[0] for line in result.err.splitlines()] == [
        f"skipped: {tmp_path / 'in' / name}.png" for name in "acd"
    ]
    assert "too small: 7x300 pixels, at least 8 a side" in result.err and "3 skipped" in result.out
    assert len(content(out)["skipped"]) == 3 and content(out)["images"] == 1


def refused(result, code: int, *parts: str) -> None:
    line = result.err.splitlines()[-1]
    assert result.code == code and line.startswith("vqgen-reconstruct: ") and result.out == ""
    for part in parts:
        assert part in line, line


def test_metrics_of_an_output_that_is_not_finite_are_refused():
    metrics = ReconstructionMetrics(make(), None, torch.device("cpu"))
    metrics.reconstruct(pixels(2, 1, 24, 16))
    metrics.tokenizer._finite["decoder"] = torch.tensor(False)  # as an accelerator, which is not waited for, leaves it
    with pytest.raises(UserError, match="--precision"):
        metrics.compute()


def broken_decoder() -> Tokenizer:
    tokenizer = make()
    tokenizer.decoder.register_forward_hook(lambda _module, _given, found: found / 0)
    return tokenizer


def test_an_output_that_is_not_finite_ends_no_validation(measured):
    _, data, *_ = measured
    found = reconstruct(broken_decoder(), data, 4, 4, None, Accelerator(cpu=True))
    assert found.metrics.keys() >= {"psnr", "ssim"} and found.images.shape == (4, 1, 24, 16)


@pytest.mark.parametrize("broken", [True, False])
def test_an_output_that_is_not_finite_ends_all_processes_at_once(monkeypatch, broken):
    """One whose own output is finite gets to know by the sums; one whose output is not takes part in these."""
    reduced = []

    def all_reduce(tensor: torch.Tensor) -> None:
        reduced.append(tensor)
        if tensor.ndim == 1:
            tensor[-1] += not broken  # of the other process

    monkeypatch.setattr("vqgen.tokenizer.metrics.dist.is_initialized", lambda: True)
    monkeypatch.setattr("vqgen.tokenizer.metrics.dist.all_reduce", all_reduce)
    metrics = ReconstructionMetrics(broken_decoder() if broken else make(), None, torch.device("cpu"))
    metrics.reconstruct(pixels(2, 1, 24, 16))
    with pytest.raises(UserError, match="--precision"):
        metrics.compute()
    assert len(reduced) == 2


def test_pictures_beside_the_images_of_a_split_are_none_of_them(tmp_path, cli, grey, monkeypatch):
    for split in ("train", "val"):
        for index in range(2):
            save(tmp_path / "in" / split / f"{index}.png", pixels(1, 24, 16, seed=index))
    words = [tmp_path / "in", "--tokenizer", grey, "--output"]
    refused(cli(main, *words, tmp_path / "in" / "val" / "out"), 2, "--output")
    assert cli(main, *words, tmp_path / "in" / "out").code == 0
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli(main, "demo", *words[1:], tmp_path / "demo" / "out", "--n", 1).code == 0


@pytest.mark.parametrize("split", ["auto", "train"])
def test_pictures_do_not_become_data(tmp_path, cli, grey, split):
    for index in range(4):
        save(tmp_path / "in" / f"{index}.png", pixels(1, 24, 16, seed=index))
    words = [tmp_path / "in", "--tokenizer", grey, "--split", split, "--output"]
    refused(cli(main, *words, tmp_path / "in" / "out"), 2, "--output", str(tmp_path / "in" / "out"))
    assert len(list((tmp_path / "in").iterdir())) == 4
    assert cli(main, tmp_path / "in/0.png", *words[1:3], "--output", tmp_path / "in" / "out").code == 0


def test_mistakes_end_in_one_line_and_write_nothing(tmp_path, cli, colour):
    image, out = tmp_path / "a.png", tmp_path / "out"
    save(image, pixels(3, 32, 32))
    (tmp_path / "text.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    end = ["--tokenizer", colour, "--output", out]
    refused(cli(main, *end), 2, "IMAGES or --data is needed")
    refused(cli(main, "--data=[]", *end), 2, "--data: found nothing")
    refused(cli(main, image, "--output", out), 2, "--tokenizer is needed")
    refused(cli(main, image, "--data", image, *end), 2, "--data: given twice", str(image))
    refused(cli(main, tmp_path / "catt.png", *end), 1, "catt.png does not exist")
    refused(cli(main, "catt.jpg", *end), 1, "catt.jpg does not exist")
    refused(cli(main, tmp_path / "none", *end), 1, f"--data: {tmp_path / 'none'} does not exist")
    refused(cli(main, tmp_path / "empty", *end), 1, "holds no images")
    refused(cli(main, tmp_path / "text.txt", *end), 1, "none of 1 images", "text.txt (no known image format)")
    refused(cli(main, image, "--tokenizer", tmp_path / "none", "--output", out), 1, "not a tokenizer folder")
    refused(cli(main, image, *end, "--perceptual-weights", tmp_path / "none"), 1, "--perceptual-weights", "not exist")
    refused(cli(main, image, *end, "--batch-size", 0), 2, "--batch-size: found 0, expected at least 1")
    refused(cli(main, image, *end, "--largest", -1), 2, "--largest: found -1")
    refused(cli(main, image, *end, "--largest", 64, "--resize"), 2, "--largest: found 64 with --resize")
    refused(cli(main, image, *end, "--perceptual-net", "alex"), 2, "--perceptual-net: found alex and no")
    refused(cli(main, image, *end, "--amplify", "nan"), 2, "--amplify: found nan")
    refused(cli(main, image, *end, "--holdout", 1), 2, "--holdout: found 1")
    for split in ([], ["--split", "test"]):
        refused(
            cli(main, "demo", *end, *split, "--holdout", 0.1), 2, "--holdout: found 0.1, but --split", "nothing out"
        )
    refused(cli(main, image, *end, "--split", "heldout"), 2, "--split: found heldout", str(image))
    refused(cli(main, image, *end, "--amplify", 2, "--pictures", 0), 2, "--amplify: found 2", "--pictures 0")
    refused(cli(main, image, "--tokenizer", colour, "--output", image), 2, "--output", "is a file")
    assert names(tmp_path) == {"a.png", "text.txt", "empty"}


def test_several_processes_are_refused(tmp_path, cli, colour, monkeypatch):
    monkeypatch.setattr(comparison, "processes", lambda cpu: SimpleNamespace(num_processes=2, device="cpu"))
    refused(cli(main, "demo", "--tokenizer", colour, "--output", tmp_path / "out"), 2, "is one process, found 2")


def test_files_of_others_are_never_touched(tmp_path, cli, grey):
    first, second, out = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "out"
    save(first, pixels(1, 24, 16))
    save(second, pixels(1, 24, 16, seed=1))
    end = ["--tokenizer", grey, "--output", out]
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(cli(main, first, *end), 2, "holds notes.txt, which vqgen-reconstruct did not write")
    (out / "notes.txt").unlink()
    (out / ".keep").touch()  # hidden files are no reason
    assert cli(main, first, *end).code == 0
    refused(cli(main, first, *end), 2, "holds reconstructions already", "--overwrite")
    before = (out / "00000-a.png").read_bytes()
    # Another picture takes the place of the first; what else lies there stays.
    (out / "00001-mine.png").write_text("mine")
    assert cli(main, second, *end, "--overwrite").code == 0
    assert names(out) == {".keep", "00000-b.png", "00001-mine.png", "metrics.json", "grid.png"}
    # A picture in the way that no run wrote.
    (out / "00000-a.png").write_bytes(before)
    refused(cli(main, first, *end, "--overwrite"), 2, "holds 00000-a.png, which vqgen-reconstruct did not write")
    assert content(out)["pictures"][0]["image"] == str(second)
    (out / "metrics.json").write_text('{"psnr": 30}')
    refused(cli(main, second, *end, "--overwrite"), 1, str(out / "metrics.json"), "pictures")
    assert (out / "00001-mine.png").read_text() == "mine"


def test_folders_of_version_0_1_are_known(tmp_path, cli, grey):
    """There the list of the pictures was figures.json."""
    save(tmp_path / "a.png", pixels(1, 24, 16))
    out = tmp_path / "out"
    words = [tmp_path / "a.png", "--tokenizer", grey, "--output", out]
    for written in ("figures.json", "figures.partial.json"):
        save(out / "00000-old.png", pixels(1, 24, 16))
        (out / written).write_text('{"pictures": [{"file": "00000-old.png"}]}')
        if written == "figures.json":
            refused(cli(main, *words), 2, "holds reconstructions already", "--overwrite")
        assert cli(main, *words, *(["--overwrite"] if written == "figures.json" else [])).code == 0
        assert names(out) == {"00000-a.png", "grid.png", "metrics.json"}
        for path in out.iterdir():
            path.unlink()


def test_an_interrupted_run_is_done_again(tmp_path, cli, grey, monkeypatch):
    write_images(tmp_path / "in", 5)
    out, written = tmp_path / "out", []
    write = comparison.write_png_atomic

    def fail(path, image):
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(path, image)

    monkeypatch.setattr(comparison, "write_png_atomic", fail)
    words = [tmp_path / "in", "--tokenizer", grey, "--output", out]
    assert cli(main, *words).code == 130
    assert "metrics.partial.json" in names(out) and "metrics.json" not in names(out) and len(names(out)) == 3
    listed = json.loads((out / "metrics.partial.json").read_text())["pictures"][3]["file"]
    (out / f".{listed}.vqgen-{7:016x}.part").touch()
    monkeypatch.setattr(comparison, "write_png_atomic", write)
    # Also where it now has fewer pictures than before.
    assert cli(main, *words, "--pictures", 1).code == 0
    assert len(names(out)) == 3 and names(out) > {"metrics.json", "grid.png"} and content(out)["images"] == 5


def test_a_run_that_computes_nothing_removes_nothing(tmp_path, cli, grey, monkeypatch):
    write_images(tmp_path / "in", 3)
    words = [tmp_path / "in", "--tokenizer", grey, "--output", tmp_path / "out"]
    assert cli(main, *words).code == 0
    before = names(tmp_path / "out")

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(comparison.ReconstructionMetrics, "reconstruct", full)
    refused(cli(main, *words, "--overwrite"), 1, "--batch-size", "do not fit")
    assert names(tmp_path / "out") == before and content(tmp_path / "out")["images"] == 3


def test_metrics_alone(tmp_path, cli, grey):
    out = tmp_path / "out"
    result = cli(main, "demo", "--n", 20, "--tokenizer", grey, "--pictures", 0, "--output", out)
    assert names(out) == {"metrics.json"} and content(out)["images"] == 20 and content(out)["pictures"] == []
    assert result.out.splitlines()[-1].endswith(str(out / "metrics.json"))


def test_lpips_with_real_weights(tmp_path, cli, colour):
    cifar, weights = real("cifar10/test.parquet"), backbone("alex")
    save(tmp_path / "small.png", pixels(3, 28, 40))
    out = tmp_path / "out"
    lpips = ["--perceptual-net", "alex", "--perceptual-weights", weights]
    result = cli(main, tmp_path / "small.png", cifar, "--n", 9, *lpips, "--tokenizer", colour, "--output", out)
    assert result.code == 0 and "alex needs at least 31 pixels a side, found 28x40" in result.err
    found = content(out)
    assert found["images"] == 8 and found["perceptual_net"] == "alex" and len(found["pictures"]) == 8
    each = [entry["lpips"] for entry in found["pictures"]]
    assert found["metrics"]["lpips"] == pytest.approx(sum(each) / 8, rel=1e-5) and min(each) > 0.05
    assert f"LPIPS {sum(each) / 8:.4g}" in result.out
    # With --resize it is known before anything is read.
    grey = tmp_path / "grey"
    make().save(grey)
    words = [cifar, *lpips, "--tokenizer", grey, "--resize", "--output", tmp_path / "none"]
    refused(cli(main, *words), 2, "--perceptual-net: alex needs at least 31 pixels", "24x16")


def test_images_stream_by(tmp_path, grey):
    """Of many images, no more lie in memory than a batch has, and the one after it."""
    write_images(tmp_path, 30)
    config = ReconstructConfig([str(tmp_path)], grey)
    locations, read = find_images(config), []
    assert len(locations) == 30

    class Counted:
        def __init__(self, items):
            self.items = items

        def name(self, item):
            return self.items.name(item)

        def read(self, item):
            read.append(item)
            return self.items.read(item)

    locations = [(Counted(items), row) for items, row in locations]
    groups = batches_of_one_size(read_images(locations, Tokenizer.load(grey), config, []), 8, [24, 16])
    assert len(next(groups)) == 3 and len(read) == 4, "images of 28x28, two pixels for each of 24x16"


def test_neighbours_of_one_size_share_a_batch():
    shapes = [(8, 8), (8, 8), (8, 16), (8, 16), (8, 16), (8, 8), (64, 64), (8, 8)]
    pictures = [SimpleNamespace(image=torch.zeros(3, *shape)) for shape in shapes]
    for batch_size, expected in ((2, [2, 1, 1, 1, 1, 1, 1]), (4, [2, 2, 1, 1, 1, 1]), (99, [2, 3, 1, 1, 1])):
        groups = list(batches_of_one_size(iter(pictures), batch_size, [8, 8]))
        assert [len(group) for group in groups] == expected
        assert [picture for group in groups for picture in group] == pictures
    assert list(batches_of_one_size(iter([]), 4, [8, 8])) == []


def test_the_grid_shows_images_of_any_size(tmp_path, cli, colour):
    save(tmp_path / "in" / "a.png", torch.full((3, 600, 300), 200, dtype=torch.uint8))
    save(tmp_path / "in" / "b.png", torch.full((3, 32, 32), 100, dtype=torch.uint8))
    out = tmp_path / "out"
    assert cli(main, tmp_path / "in", "--tokenizer", colour, "--output", out).code == 0
    grid = decode_image(str(out / "grid.png"))
    assert grid.shape == (3, 2 * 258 + 2, 2 * 130 + 2), "the largest side is 256"
    assert (grid[:, 2:258, 2:130] == 200).all()
    assert (grid[:, 66:194, 132:260] == 100).all() and (grid[:, 2:65, 132:260] == 255).all(), "4 times as large"


@pytest.mark.parametrize("name", ["fifo.png", "fifo", f"./{'x' * 300}.png", "~nobody/such.png", "cycle.png"])
def test_data_that_is_no_image_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.png")
    os.mkfifo("fifo")
    Path("cycle.png").symlink_to("cycle.png")
    with pytest.raises(UserError):
        find_images(ReconstructConfig([name], tmp_path))


def test_names_that_are_not_utf8_are_written(tmp_path, grey, cli):
    name = os.fsdecode(b"\xff\n\x1b[1m")
    write_images(tmp_path / "data/plain", 2)
    (tmp_path / "data/plain").rename(tmp_path / "data" / name)
    (tmp_path / "data" / name / f"{name}.png").write_bytes(b"broken")
    result = cli(main, tmp_path / "data", "--tokenizer", grey, "--output", tmp_path / "out")
    assert result.code == 0 and "\x1b" not in result.err + result.out, result.err
    assert len(content(tmp_path / "out")["skipped"]) == 1
