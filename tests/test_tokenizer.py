"""The tokenizer's parts: layers, discriminator, LPIPS, the model with its folder, and figures of reconstructions."""

import copy
import json
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision import models
from torchvision.io import decode_png, read_file

from vqgen.errors import UsageError, UserError
from vqgen.tokenizer import images as image_module
from vqgen.tokenizer.discriminator import PatchDiscriminator
from vqgen.tokenizer.images import ImageConfig, open_images
from vqgen.tokenizer.layers import Decoder, Encoder, ModelConfig
from vqgen.tokenizer.model import Tokenizer, TokenizerConfig
from vqgen.tokenizer.perceptual import PerceptualDistance
from vqgen.tokenizer.pixels import to_float, to_uint8
from vqgen.tokenizer.quantize import QuantizerConfig
from vqgen.tokenizer.reconstruct import psnr, reconstruct, write_comparison

REALDATA = Path(os.environ.get("VQGEN_REALDATA", "~/.cache/vqgen-realdata")).expanduser()


def sizes(**options) -> ModelConfig:
    return ModelConfig(**{"width": 8, "multipliers": [1, 2], "blocks": 1, "latent_dim": 6, "groups": 4, **options})


def make(size=(16, 24), channels=3, seed=0, codebook="ema", l2=True, **options) -> Tokenizer:
    torch.manual_seed(seed)
    quantizer = QuantizerConfig(codebook_size=32, code_dim=4, codebook=codebook, l2_normalize=l2)
    return Tokenizer(TokenizerConfig(list(size), channels, sizes(**options), quantizer))


def noise(*shape, seed=0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- layers ----


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize(
    ("size", "multipliers", "attention"),
    [((16, 24), [1, 2], True), ((28, 28), [1], True), ((32, 16), [1, 1, 2], False)],
)
def test_shapes(channels, patch, size, multipliers, attention):
    config = sizes(multipliers=multipliers, patch=patch, attention=attention)
    factor = patch * 2 ** (len(multipliers) - 1)
    assert config.factor == factor
    torch.manual_seed(0)
    latents = Encoder(channels, config)(noise(2, channels, *size))
    assert latents.shape == (2, 6, size[0] // factor, size[1] // factor)
    assert Decoder(channels, config)(latents).shape == (2, channels, *size)


def without_norms(module: nn.Module) -> nn.Module:
    """The module with identities for its group norms, which carry something of every pixel everywhere."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.GroupNorm):
                setattr(parent, name, nn.Identity())
    return module


@pytest.mark.parametrize(("multipliers", "patch"), [([1, 2, 2], 1), ([1, 2], 2), ([1], 4), ([1, 1, 1], 2)])
def test_every_pixel_reaches_its_own_code_and_every_code_its_own_pixels(multipliers, patch):
    """Tile (i, j) of the image stands for code (i, j): also the last row and column, where padding could shift them."""
    config = sizes(multipliers=multipliers, patch=patch, attention=False)
    torch.manual_seed(0)
    encoder = without_norms(Encoder(1, config)).double()
    decoder = without_norms(Decoder(1, config)).double()
    factor = config.factor
    x = noise(1, 1, 16, 32).double().requires_grad_()
    z = noise(1, 6, 16 // factor, 32 // factor).double().requires_grad_()
    for i, j in ((0, 0), (0, 32 // factor - 1), (16 // factor - 1, 0), (16 // factor - 1, 32 // factor - 1)):
        tile = slice(i * factor, (i + 1) * factor), slice(j * factor, (j + 1) * factor)
        (gradient,) = torch.autograd.grad(encoder(x)[..., i, j].sum(), x)
        assert (gradient[0, 0][tile] != 0).all()
        (gradient,) = torch.autograd.grad(decoder(z)[0, 0][tile].sum(), z)
        assert (gradient[..., i, j] != 0).all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": 3}, "--groups: 3 does not divide 8"),
        ({"multipliers": [1, 2], "width": 6, "groups": 4}, "--groups: 4 does not divide 6"),
        ({"multipliers": []}, "--multipliers"),
        ({"multipliers": [1, 0]}, "--multipliers"),
        ({"width": 0}, "--width"),
        ({"patch": 0}, "--patch"),
        ({"blocks": 0}, "--blocks"),
        ({"latent_dim": 0}, "--latent-dim"),
        ({"groups": 0}, "--groups"),
        ({"dropout": 1.0}, "--dropout"),
    ],
)
def test_impossible_layers_are_named(options, named):
    with pytest.raises(UsageError, match=named) as caught:
        sizes(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "patch"), [((30, 32), 2), ((32, 18), 2), ((2, 2), 2)])
def test_a_size_that_the_factor_does_not_divide_is_named(size, patch):
    with pytest.raises(UsageError, match=f"--size: {size[0]}x{size[1]} .* factor 4 .*--patch {patch}"):
        make(size=size, patch=patch)


def test_attention_on_and_off():
    def mixes(model: nn.Module) -> int:
        return sum(type(module).__name__ == "Attention" for module in model.modules())

    on, off = sizes(), sizes(attention=False)
    assert mixes(Encoder(3, on)) == mixes(Decoder(3, on)) == 1
    assert mixes(Encoder(3, off)) == mixes(Decoder(3, off)) == 0

    def far_reach(config: ModelConfig) -> bool:
        """Whether one corner of a wide image reaches the latent at the other end."""
        torch.manual_seed(0)
        encoder = without_norms(Encoder(1, config))
        x = noise(1, 1, 4, 256).requires_grad_()
        (gradient,) = torch.autograd.grad(encoder(x)[..., -1].sum(), x)
        return bool((gradient[..., :8] != 0).any())

    assert far_reach(on) and not far_reach(off)


def test_attention_is_that_of_the_paper():
    config = sizes()
    torch.manual_seed(0)
    attention = next(m for m in Encoder(3, config).modules() if type(m).__name__ == "Attention")
    x = noise(2, 16, 3, 5)
    normed = F.group_norm(x, 4, attention.norm.weight, attention.norm.bias, eps=1e-6)
    query, key, value = attention.qkv(normed).flatten(2).chunk(3, dim=1)  # (B, C, HW)
    weights = (query.transpose(1, 2) @ key / math.sqrt(16)).softmax(dim=-1)
    expected = x + attention.out((value @ weights.transpose(1, 2)).view(x.shape))
    torch.testing.assert_close(attention(x), expected)


def test_dropout_is_in_both_halves_and_only_in_training():
    torch.manual_seed(0)
    config = sizes(dropout=0.5)
    for half, x in ((Encoder(3, config), noise(1, 3, 16, 16)), (Decoder(3, config), noise(1, 6, 8, 8))):
        assert not torch.equal(half(x), half(x))
        half.eval()
        assert torch.equal(half(x), half(x))


def test_channels_last_gives_the_same_values():
    tokenizer = make(patch=2).eval()
    x = noise(2, 3, 16, 24)
    plain = tokenizer(x)
    fast = copy.deepcopy(tokenizer).to(memory_format=torch.channels_last)
    out = fast(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(out.quantized.codes, plain.quantized.codes)
    torch.testing.assert_close(out.images, plain.images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.quantized.loss, plain.quantized.loss)
    assert fast(x.contiguous(memory_format=torch.channels_last)).images.shape == x.shape


# ---- the discriminator ----


@pytest.mark.parametrize(
    ("size", "layers", "grid"),
    [([32, 32], 2, (6, 6)), ([32, 48], 3, (2, 4)), ([28, 28], 3, (1, 1)), ([24, 40], 3, (1, 3)), ([16, 16], 1, (6, 6))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_discriminator_judges_overlapping_patches(channels, size, layers, grid):
    torch.manual_seed(0)
    judge = PatchDiscriminator(channels, size, 6, layers)
    images = noise(3, channels, *size)
    logits = judge(images)
    assert logits.shape == (3, 1, *grid)
    # The logits of an image depend on no other image.
    torch.testing.assert_close(judge(images[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "layers"), [([16, 16], 3), ([16, 64], 3), ([28, 28], 4), ([4, 4], 1)])
def test_too_many_strided_layers_are_named(size, layers):
    with pytest.raises(UsageError, match=f"--gan-layers: {layers} .* {size[0]}x{size[1]}"):
        PatchDiscriminator(3, size, 4, layers)


# ---- LPIPS ----

NETS = {"vgg": "vgg16_features.safetensors", "alex": "alexnet_features.safetensors"}


def weights(net: str) -> Path:
    path = REALDATA / "weights" / NETS[net]
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_of(request):
    """A backbone's name and its distance; built once, since that takes seconds."""
    path = weights(request.param)
    return request.param, PerceptualDistance(request.param, str(path))


@pytest.fixture(scope="module")
def alex():
    return PerceptualDistance("alex", str(weights("alex")))


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """16 photographs of the CIFAR-10 test set, uint8 (16, 3, 32, 32)."""
    path = REALDATA / "cifar10" / "test.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    rows = next(pq.ParquetFile(path).iter_batches(16, columns=["image"]))["image"].to_pylist()
    encoded = [torch.from_numpy(np.frombuffer(row["bytes"], np.uint8).copy()) for row in rows]
    return torch.stack([decode_png(data) for data in encoded])


alexnet = models.alexnet  # as it is, for the tests that put another in its place


def fake_backbone(net: str):
    """A torchvision network as `lpips` calls it, with the convolutions of the local file."""
    # The layers of vgg16 and alexnet without their classifiers, which are nearly all of their weight.
    features = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False) if net == "vgg" else alexnet().features
    stored = load_file(weights(net))
    features.load_state_dict({name.removeprefix("features."): value for name, value in stored.items()})
    return SimpleNamespace(
        features=features, state_dict=lambda: {**stored, "classifier.0.weight": torch.zeros(1), "classifier.0.bias": 0}
    )


def test_lpips_equals_the_library(lpips_of, photos, monkeypatch):
    import lpips

    net, distance = lpips_of
    # The library as it loads itself where torchvision may download.
    monkeypatch.setattr(models, "vgg16" if net == "vgg" else "alexnet", lambda pretrained: fake_backbone(net))
    theirs = lpips.LPIPS(net=net, verbose=False).eval()
    images, targets = to_float(photos[:4]), to_float(photos[4:8])
    with torch.no_grad():
        expected = theirs(images, targets).flatten()
        found = distance(images, targets)
    assert found.shape == (4,) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert found.min() > 0.05, "random heads or a random backbone would give no such distances"
    torch.testing.assert_close(distance(images, images), torch.zeros(4))


def test_more_noise_is_more_distance(lpips_of, photos):
    _, distance = lpips_of
    images = to_float(photos)
    disturbance = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rising = [distance(images + s * disturbance, images).mean().item() for s in (0.0, 0.03, 0.1, 0.3, 1.0)]
    assert rising == sorted(rising) and rising[0] == 0 and rising[1] > 0


def test_lpips_takes_grey_images(lpips_of):
    _, distance = lpips_of
    config = ImageConfig(size=[32, 32], channels=1, cache_mb=0)
    data = open_images("demo", "heldout", config)
    images = to_float(torch.stack([data[i].image for i in range(4)]))
    with torch.no_grad():
        found = distance(images[:2], images[2:])
        colour = distance(images[:2].repeat(1, 3, 1, 1), images[2:].repeat(1, 3, 1, 1))
    assert found.min() > 0
    torch.testing.assert_close(found, colour)


def test_lpips_weights_are_fixed_and_it_never_trains(alex):
    images = noise(2, 3, 32, 32).requires_grad_()
    targets = noise(2, 3, 32, 32, seed=1)
    before = alex(images, targets)
    holder = nn.Module()
    holder.part = alex
    holder.train()
    assert not any(module.training for module in alex.modules())
    assert torch.equal(alex(images, targets), before)
    before.sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in alex.parameters())


@pytest.mark.parametrize("shade", [-1.0, 0.0, 1.0])
def test_lpips_of_flat_images_has_a_finite_gradient(alex, shade):
    images = torch.full((1, 3, 32, 32), shade, requires_grad=True)
    alex(images, noise(1, 3, 32, 32)).sum().backward()
    assert torch.isfinite(images.grad).all()


def test_images_too_small_for_the_backbone_are_named(alex):
    assert torch.isfinite(alex(noise(1, 3, 31, 40), noise(1, 3, 31, 40, seed=1))).all()
    with pytest.raises(UserError, match=r"--perceptual-net: alex needs at least 31 pixels .* 28x40"):
        alex(noise(1, 3, 28, 40), noise(1, 3, 28, 40))


def tensors_of(net: str) -> dict[str, torch.Tensor]:
    """Small tensors under the right names; only their names and shapes are looked at."""
    numbers = {"vgg": (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "alex": (0, 3, 6, 8, 10)}[net]
    return {f"features.{n}.{kind}": torch.zeros(1) for n in numbers for kind in ("weight", "bias")}


def refused(net, path) -> str:
    with pytest.raises(UserError, match="--perceptual-weights") as caught:
        PerceptualDistance(net, str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_lpips_without_its_file(tmp_path):
    assert "does not exist" in refused("vgg", tmp_path / "none.safetensors")
    assert "does not exist" in refused("vgg", tmp_path)


def test_lpips_with_a_damaged_file(tmp_path):
    save_file(tensors_of("alex"), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in {"cut": data[:-2], "short": data[:20], "empty": b"", "other": b"\x80\x04" + data}.items():
        (tmp_path / name).write_bytes(content)
        assert "not a whole safetensors file" in refused("alex", tmp_path / name)


def test_lpips_with_the_other_network(tmp_path):
    for net, other in (("vgg", "alex"), ("alex", "vgg")):
        save_file(tensors_of(other), tmp_path / f"{other}.safetensors")
        assert f"not the {net} backbone" in refused(net, tmp_path / f"{other}.safetensors")


def test_lpips_with_a_missing_or_an_unknown_tensor(tmp_path):
    path = tmp_path / "some.safetensors"
    tensors = tensors_of("alex")
    del tensors["features.6.bias"]
    save_file(tensors, path)
    assert "misses features.6.bias" in refused("alex", path)
    save_file({**tensors_of("alex"), "classifier.1.weight": torch.zeros(1)}, path)
    assert "unknown classifier.1.weight" in refused("alex", path)


def test_lpips_with_a_wrong_shape(tmp_path):
    tensors = load_file(weights("alex"))
    tensors["features.3.weight"] = tensors["features.3.weight"][:, :, :3, :3].contiguous()
    save_file(tensors, tmp_path / "w.safetensors")
    text = refused("alex", tmp_path / "w.safetensors")
    assert "features.3.weight of shape (192, 64, 3, 3)" in text and "(192, 64, 5, 5)" in text


def test_lpips_by_torchvision(alex, monkeypatch):
    def fetching(weights=None, pretrained=False):
        return fake_backbone("alex") if weights == "IMAGENET1K_V1" else alexnet()

    monkeypatch.setattr(models, "alexnet", fetching)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fetched = PerceptualDistance("alex", "torchvision")
    assert all(torch.equal(one, two) for one, two in zip(fetched.parameters(), alex.parameters()))

    def offline(weights=None, pretrained=False):
        raise OSError("no route to host")

    monkeypatch.setattr(models, "alexnet", offline)
    with pytest.raises(UserError, match=r"--perceptual-weights: .*no route to host.*local safetensors"):
        PerceptualDistance("alex", "torchvision")


# ---- the model and its folder ----


@pytest.mark.parametrize(("codebook", "l2"), [("ema", True), ("ema", False), ("gradient", True), ("gradient", False)])
def test_encode_and_decode_are_the_halves_of_forward(codebook, l2):
    tokenizer = make(codebook=codebook, l2=l2).eval()
    x = noise(2, 3, 16, 24)
    out = tokenizer(x)
    codes = tokenizer.encode(x)
    assert (tokenizer.factor, tokenizer.grid, tokenizer.depth, tokenizer.codebook_size) == (2, (8, 12), 1, 32)
    assert codes.shape == (2, 8, 12) and codes.dtype == torch.int64 and torch.equal(codes, out.quantized.codes)
    assert not codes.is_inference() and not tokenizer.decode(codes).requires_grad
    torch.testing.assert_close(tokenizer.decode(codes), out.images, atol=1e-5, rtol=1e-4)


def test_other_sizes_that_the_factor_divides():
    tokenizer = make().eval()
    for height, width in ((8, 8), (2, 6), (32, 20)):
        codes = tokenizer.encode(noise(1, 3, height, width))
        assert codes.shape == (1, height // 2, width // 2)
        assert tokenizer.decode(codes).shape == (1, 3, height, width)


@pytest.mark.parametrize("shape", [(1, 16, 24), (4, 16, 24), (3, 15, 24), (3, 16, 23)])
def test_images_that_do_not_fit_are_refused(shape):
    text = "x".join(map(str, shape))
    with pytest.raises(UserError, match=rf"images are {text}; this tokenizer takes 3 channels .* divisible by 2"):
        make().encode(noise(1, *shape))


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_folder_round_trip_is_bit_identical(tmp_path, codebook):
    tokenizer = make(codebook=codebook, patch=2, dropout=0.1)
    for seed in range(3):  # so that the learned state is not that of a new model
        tokenizer(noise(2, 3, 16, 24, seed=seed))
    assert tokenizer.fingerprint is None
    mark = tokenizer.eval().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert mark == tokenizer.fingerprint == loaded.fingerprint and len(mark) == 64
    assert not loaded.training and loaded.config == tokenizer.config
    x = noise(2, 3, 16, 24, seed=9)
    assert torch.equal(loaded.encode(x), tokenizer.encode(x))
    assert torch.equal(loaded(x).images, tokenizer(x).images)
    assert loaded.save(tmp_path / "again") == mark
    other = make(codebook=codebook, patch=2, seed=1)
    assert other.save(tmp_path / "other") != mark


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_the_folder_holds_what_inference_needs_and_nothing_else(tmp_path, codebook):
    tokenizer = make(codebook=codebook)
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "vqgen.json"]
    names = set(load_file(tmp_path / "model.safetensors"))
    learning = {f"quantizer.{name}" for name in ("idle", *(("counts", "sums") if codebook == "ema" else ()))}
    assert names == set(tokenizer.state_dict()) - learning and "quantizer.codebook" in names
    about = json.loads((tmp_path / "vqgen.json").read_text())
    assert about["kind"] == "tokenizer" and about["grid"] == [8, 12] and about["codebook_size"] == 32
    assert about["architecture"]["image_size"] == [16, 24] and about["architecture"]["channels"] == 3


def not_loaded(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Tokenizer.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_folders_are_refused(tmp_path):
    make().save(tmp_path)
    path, data = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    path.write_bytes(data[:-100])
    assert "not a whole safetensors file" in not_loaded(tmp_path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "fingerprint" in not_loaded(tmp_path)
    path.unlink()
    assert "does not exist" in not_loaded(tmp_path)
    path.write_bytes(data)
    Tokenizer.load(tmp_path)
    (tmp_path / "vqgen.json").unlink()
    assert "not a tokenizer folder" in not_loaded(tmp_path)


def drop(about):
    del about["architecture"]


def widen(about):
    about["architecture"]["model"]["width"] = 16


def deepen(about):
    about["architecture"]["model"]["blocks"] = 2


def enlarge(about):
    about["architecture"]["quantizer"]["codebook_size"] = 64


def relearn(about):
    about["architecture"]["model"]["surprise"] = 1


def retype(about):
    about["architecture"]["model"]["width"] = "wide"


def reclass(about):
    about["kind"] = "prior"


@pytest.mark.parametrize("change", [drop, widen, deepen, enlarge, relearn, retype, reclass])
def test_edited_descriptions_are_refused(tmp_path, change):
    make().save(tmp_path)
    about = json.loads((tmp_path / "vqgen.json").read_text())
    change(about)
    (tmp_path / "vqgen.json").write_text(json.dumps(about))
    not_loaded(tmp_path)


def test_the_weights_of_another_model_are_refused(tmp_path):
    make().save(tmp_path / "one")
    make(seed=1).save(tmp_path / "two")
    (tmp_path / "one" / "model.safetensors").write_bytes((tmp_path / "two" / "model.safetensors").read_bytes())
    assert "fingerprint" in not_loaded(tmp_path / "one")


# ---- figures of reconstructions ----


@pytest.fixture(scope="module")
def measured():
    """A tokenizer, 20 held-out demo images (1, 24, 16), and their reconstructions one by one."""
    config = ImageConfig(size=[24, 16], channels=1)
    data = open_images("demo", "heldout", config)
    tokenizer = make((24, 16), 1).eval()
    originals = torch.stack([data[i].image for i in range(20)])
    with torch.no_grad():
        codes = [tokenizer.encode(to_float(image[None])) for image in originals]
        results = torch.cat([to_uint8(tokenizer.decode(code)) for code in codes])
    return tokenizer, data, config, originals, torch.cat(codes), results


def figures(measured, batch_size: int, perceptual=None):
    tokenizer, data, config, *_ = measured
    return reconstruct(tokenizer, data, 20, batch_size, config, perceptual, Accelerator(cpu=True))


def test_figures_are_those_of_torchmetrics(measured):
    _, _, _, originals, codes, results = measured
    found = figures(measured, 8)
    one, two = results.float(), originals.float()
    each = peak_signal_noise_ratio(one, two, data_range=255.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(results, originals), each)
    assert found.figures["psnr"] == pytest.approx(each.mean().item(), rel=1e-5)
    pooled = peak_signal_noise_ratio(one, two, data_range=255.0)
    assert abs(found.figures["psnr"] - pooled.item()) > 1e-3, "the two kinds of mean would not be told apart"
    ssim = structural_similarity_index_measure(one / 255, two / 255, data_range=1.0)
    assert found.figures["ssim"] == pytest.approx(float(ssim), abs=1e-4)
    assert torch.equal(found.originals, originals) and torch.equal(found.images, results)
    # The histogram counted by hand.
    counts: dict[int, int] = {}
    for code in codes.flatten().tolist():
        counts[code] = counts.get(code, 0) + 1
    total = sum(counts.values())
    assert total == 20 * 12 * 8
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert found.figures["codes_used"] == len(counts) and found.figures["usage"] == len(counts) / 32
    assert found.figures["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-4)
    assert "lpips" not in found.figures


def test_figures_do_not_depend_on_the_batch_size(measured):
    whole = figures(measured, 20).figures
    for batch_size in (1, 7):
        assert figures(measured, batch_size).figures == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_lpips_is_measured_on_eight_bit_images(measured):
    _, _, _, originals, _, results = measured

    class Fake(nn.Module):
        def forward(self, images, targets):
            return (images - targets).abs().flatten(1).mean(dim=1)

    expected = (to_float(results) - to_float(originals)).abs().mean().item()
    assert figures(measured, 6, Fake()).figures["lpips"] == pytest.approx(expected, rel=1e-5)


def test_psnr_by_hand():
    images = torch.tensor([0, 10, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    targets = torch.tensor([0, 0, 0], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    found = psnr(images, targets)
    assert found[1] == pytest.approx(20 * math.log10(255 / 10), rel=1e-5)
    assert found[2] == pytest.approx(0, abs=1e-5)
    assert torch.isfinite(found[0]) and found[0] > 100


def test_comparison_shows_each_image_above_its_reconstruction(measured, tmp_path):
    _, _, _, originals, _, results = measured
    write_comparison(tmp_path / "pairs.png", figures(measured, 8))
    picture = decode_png(read_file(str(tmp_path / "pairs.png")))
    # 20 images in rows of 8 of 24x16 pixels, with 2 pixels between them.
    assert torch.equal(picture[:1, 2:26, 2:18], originals[0])
    assert torch.equal(picture[:1, 28:52, 2:18], results[0])
    assert torch.equal(picture[:1, 2:26, 20:36], originals[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.png"]


def test_broken_images_are_left_out_of_the_figures(measured, monkeypatch):
    tokenizer, data, config, originals, _, results = measured
    given = image_module.ordered_batches

    def without_the_first(dataset, indices, batch_size, settings):
        return given(dataset, [i for i in indices if i != 0], batch_size, settings)

    monkeypatch.setattr("vqgen.tokenizer.reconstruct.ordered_batches", without_the_first)
    found = reconstruct(tokenizer, data, 20, 8, config, None, Accelerator(cpu=True))
    assert found.figures["psnr"] == pytest.approx(psnr(results[1:], originals[1:]).mean().item(), rel=1e-5)
