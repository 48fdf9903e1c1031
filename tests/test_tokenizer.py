"""The tokenizer's parts: layers, discriminator, LPIPS, and the model with what it offers and its folder."""

import copy
import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from helpers.realdata import backbone, real
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models
from torchvision.io import decode_png
from torchvision.transforms.v2.functional import to_image

from vqgen.errors import UsageError, UserError
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float, to_uint8
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.autoencoder import Attention, Decoder, Encoder, _attend
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import QUANTIZERS, VQConfig


def sizes(**options) -> VQGANConfig:
    return VQGANConfig(**{"width": 8, "multipliers": [1, 2], "blocks": 1, "latent_dim": 6, "groups": 4, **options})


def make(size=(16, 24), channels=3, seed=0, codebook="ema", l2=True, **options) -> Tokenizer:
    torch.manual_seed(seed)
    quantizer = VQConfig(codebook_size=32, code_dim=4, codebook=codebook, l2_normalize=l2)
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

    def far_reach(config: VQGANConfig) -> bool:
        """Whether one corner of a wide image reaches the latent at the other end."""
        torch.manual_seed(0)
        encoder = without_norms(Encoder(1, config))
        x = noise(1, 1, 4, 256).requires_grad_()
        (gradient,) = torch.autograd.grad(encoder(x)[..., -1].sum(), x)
        return bool((gradient[..., :8] != 0).any())

    assert far_reach(on) and not far_reach(off)


@pytest.mark.parametrize("size", [(3, 5), (12, 12)])
def test_attention_is_that_of_the_paper(size):
    config = sizes()
    torch.manual_seed(0)
    attention = next(m for m in Encoder(3, config).modules() if type(m).__name__ == "Attention")
    x = noise(2, 16, *size).requires_grad_()
    normed = F.group_norm(x, 4, attention.norm.weight, attention.norm.bias, eps=1e-6)
    query, key, value = attention.qkv(normed).flatten(2).chunk(3, dim=1)  # (B, C, HW)
    weights = (query.transpose(1, 2) @ key / math.sqrt(16)).softmax(dim=-1)
    expected = x + attention.out((value @ weights.transpose(1, 2)).view(x.shape))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)
    outer = noise(*x.shape, seed=1)
    found, expected = (torch.autograd.grad(out, x, outer)[0] for out in (attention(x), expected))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_attention_does_not_hold_all_scores():
    attention, x = Attention(16, 4), noise(1, 16, 64, 64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        attention(x)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert x.nbytes <= largest < 4096 * 4096 * 4 / 8  # scores of 4,096 positions


@pytest.mark.parametrize("tokens", [64, 256])
def test_attention_in_half_precision_rounds_no_score(tokens):
    """Scores of 50 rounded to bfloat16 would be wrong by 0.1, and so the weights by a tenth."""
    generator = torch.Generator().manual_seed(0)
    given = [(scale * torch.randn(4, tokens, 64, generator=generator)).bfloat16() for scale in (4, 4, 1)]
    exact = [t.double().requires_grad_() for t in given]
    half = [t.requires_grad_() for t in given]
    outer = torch.randn(4, tokens, 64, generator=generator)
    right = F.scaled_dot_product_attention(*exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = _attend(*half)
    assert found.dtype == torch.bfloat16
    found = [found, *torch.autograd.grad(found, half, outer.bfloat16())]
    for one, other in zip(found, [right, *torch.autograd.grad(right, exact, outer.double())]):
        assert (one.double() - other).norm() < 0.01 * other.norm()


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
def test_discriminator_discriminators_overlapping_patches(channels, size, layers, grid):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels, size, 6, layers)
    images = noise(3, channels, *size)
    logits = discriminator(images)
    assert logits.shape == (3, 1, *grid)
    # The logits of an image depend on no other image.
    torch.testing.assert_close(discriminator(images[1:2]), logits[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "layers"), [([16, 16], 3), ([16, 64], 3), ([28, 28], 4), ([4, 4], 1)])
def test_too_many_strided_layers_are_named(size, layers):
    with pytest.raises(UsageError, match=f"--gan-layers: {layers} .* {size[0]}x{size[1]}"):
        PatchDiscriminator(3, size, 4, layers)


# ---- LPIPS ----


@pytest.fixture(scope="module", params=["alex", "vgg"])
def lpips_of(request):
    """A backbone's name and its distance; built once, since that takes seconds."""
    return request.param, PerceptualDistance(request.param, str(backbone(request.param)))


@pytest.fixture(scope="module")
def alex():
    return PerceptualDistance("alex", str(backbone("alex")))


@pytest.fixture(scope="module")
def photos() -> torch.Tensor:
    """16 photographs of the CIFAR-10 test set, uint8 (16, 3, 32, 32)."""
    rows = next(pq.ParquetFile(real("cifar10/test.parquet")).iter_batches(16, columns=["image"]))["image"].to_pylist()
    encoded = [torch.from_numpy(np.frombuffer(row["bytes"], np.uint8).copy()) for row in rows]
    return torch.stack([decode_png(data) for data in encoded])


alexnet = models.alexnet  # as it is, for the tests that put another in its place


def fake_backbone(net: str):
    """A torchvision network as `lpips` calls it, with the convolutions of the local file."""
    # The layers of vgg16 and alexnet without their classifiers, which are nearly all of their weight.
    features = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=False) if net == "vgg" else alexnet().features
    stored = load_file(backbone(net))
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
    assert "is not a file" in refused("vgg", tmp_path)


def test_lpips_with_a_damaged_file(tmp_path):
    save_file(tensors_of("alex"), tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    for name, content in {"cut": data[:-2], "short": data[:20], "empty": b"", "other": b"\x80\x04" + data}.items():
        (tmp_path / name).write_bytes(content)
        assert "not a complete safetensors file" in refused("alex", tmp_path / name)


def test_lpips_with_the_other_network(tmp_path):
    for net, other in (("vgg", "alex"), ("alex", "vgg")):
        save_file(tensors_of(other), tmp_path / f"{other}.safetensors")
        name = {"vgg": "VGG16", "alex": "AlexNet"}[net]
        assert f"exactly the convolutions of {name}" in refused(net, tmp_path / f"{other}.safetensors")


def test_lpips_with_a_missing_or_an_unknown_tensor(tmp_path):
    path = tmp_path / "some.safetensors"
    tensors = tensors_of("alex")
    del tensors["features.6.bias"]
    save_file(tensors, path)
    assert "misses features.6.bias" in refused("alex", path)
    save_file({**tensors_of("alex"), "classifier.1.weight": torch.zeros(1)}, path)
    assert "unknown classifier.1.weight" in refused("alex", path)


def test_lpips_with_a_wrong_shape(tmp_path):
    tensors = load_file(backbone("alex"))
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


# ---- encode, decode and reconstruct ----


@pytest.mark.parametrize(("codebook", "l2"), [("ema", True), ("ema", False), ("gradient", True), ("gradient", False)])
def test_encode_and_decode_are_the_halves_of_forward(codebook, l2):
    tokenizer = make(codebook=codebook, l2=l2).eval()
    x = noise(2, 3, 16, 24)
    out = tokenizer(x)
    codes = tokenizer.encode(x)
    assert (tokenizer.factor, tokenizer.grid, tokenizer.depth, tokenizer.codebook_size) == (2, (8, 12), 1, 32)
    assert codes.shape == (2, 8, 12) and codes.dtype == torch.int64 and torch.equal(codes, out.quantized.codes)
    assert not codes.is_inference() and not tokenizer.decode(codes).requires_grad
    assert out.images.abs().max() > 1, "nothing would be clamped"
    torch.testing.assert_close(tokenizer.decode(codes), out.images.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    assert torch.equal(tokenizer.reconstruct(x), tokenizer.decode(codes))


@pytest.mark.parametrize("options", [{"attention": True}, {"attention": False, "patch": 2, "multipliers": [1, 1, 2]}])
def test_every_size_that_the_factor_divides(options):
    tokenizer = make(size=(16, 24), **options).eval()
    f = tokenizer.factor
    for height, width in ((f, f), (f, 3 * f), (32, 16), (40, 24), (96, 64)):
        x = noise(2, 3, height, width)
        codes = tokenizer.encode(x)
        assert codes.shape == (2, height // f, width // f)
        torch.testing.assert_close(tokenizer.reconstruct(x), tokenizer(x).images.clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_a_picture_is_the_same_wherever_it_lies_in_a_batch():
    tokenizer = make().eval()
    x = noise(5, 3, 24, 32)
    whole = tokenizer.encode(x)
    for i in range(5):
        assert torch.equal(tokenizer.encode(x[i : i + 1])[0], whole[i])


@pytest.mark.parametrize(("quantizer", "depth"), [("residual", 3), ("product", 2)])
def test_several_codes_a_position(quantizer, depth):
    torch.manual_seed(0)
    settings = QUANTIZERS[quantizer](codebook_size=32, code_dim=4, depth=depth)
    tokenizer = Tokenizer(TokenizerConfig([16, 24], 3, sizes(), settings)).eval()
    x = noise(2, 3, 8, 12)
    codes = tokenizer.encode(x)
    assert codes.shape == (2, 4, 6, depth) and tokenizer.depth == depth
    torch.testing.assert_close(tokenizer.decode(codes), tokenizer(x).images.clamp(-1, 1), atol=1e-5, rtol=1e-4)
    expected = rf"expected integers \(B, h, w, {depth}\)"
    for wrong in (codes[..., 0], codes[..., :1], codes[0]):
        with pytest.raises(UserError, match=rf"codes have shape \({wrong.shape[0]}, .*{expected}"):
            tokenizer.decode(wrong)
    codes[0, 1, 2, -1] = 32
    with pytest.raises(UserError, match=r"codes run from \d+ to 32, but the codebook has 0 to 31"):
        tokenizer.decode(codes)


def test_images_come_back_as_they_were_given():
    """uint8 for uint8, float for float, of their own type, and the same codes for all of them."""
    tokenizer = make().eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = tokenizer.encode(to_float(pixels))
    decoded = tokenizer.decode(codes)
    assert decoded.dtype == torch.float32 and decoded.abs().max() == 1
    assert torch.equal(tokenizer.encode(pixels), codes)
    assert torch.equal(tokenizer.reconstruct(pixels), to_uint8(decoded))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        images = to_float(pixels).to(dtype)
        assert torch.equal(tokenizer.encode(images), tokenizer.encode(images.float()))
        again = tokenizer.reconstruct(images)
        assert again.dtype == dtype and torch.equal(again, tokenizer.reconstruct(images.float()).to(dtype))


def test_photographs_larger_than_those_of_training(photos):
    """2 x 3 photographs as one, for a tokenizer of 32-pixel images."""
    tokenizer = make((32, 32), patch=2).eval()
    mosaic = torch.cat([torch.cat(list(photos[i : i + 3]), dim=2) for i in (0, 3)], dim=1)[None]
    again = tokenizer.reconstruct(mosaic)
    assert again.shape == (1, 3, 64, 96) and again.dtype == torch.uint8
    assert torch.equal(again, to_uint8(tokenizer(to_float(mosaic)).images))
    assert tokenizer.encode(mosaic).unique().numel() > 4, "all would look alike"


def test_pictures_as_pillow_and_numpy_have_them():
    """What the refusal advises works."""
    tokenizer = make().eval()
    array = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    expected = tokenizer.encode(torch.from_numpy(array).permute(2, 0, 1)[None])
    for picture in (array, Image.fromarray(array)):
        with pytest.raises(UserError, match=r"images are of type (ndarray|Image), .*to_image\(x\)\[None\]") as caught:
            tokenizer.encode(picture)
        assert "\n" not in str(caught.value)
        assert torch.equal(tokenizer.encode(to_image(picture)[None]), expected)
        assert torch.equal(tokenizer.decode(tokenizer.encode(to_image(picture)[None])), tokenizer.decode(expected))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 16, 24), "images are 1x16x24; this tokenizer takes 3 channels and sides divisible by 2"),
        (torch.zeros(1, 4, 16, 24), "images are 4x16x24; this tokenizer takes 3 channels"),
        (torch.zeros(1, 3, 15, 24), "images are 3x15x24; .* crop or resize them"),
        (torch.zeros(1, 3, 16, 23), "images are 3x16x23"),
        (torch.zeros(1, 3, 0, 24), "images are 3x0x24"),
        (torch.zeros(3, 16, 24), r"images have shape \(3, 16, 24\), expected .*: image\[None\] is a batch of one"),
        (torch.zeros(16, 24), r"images have shape \(16, 24\), expected a tensor \(B, C, H, W\)"),
        (torch.zeros(1, 3, 16, 24, dtype=torch.int64), "images are int64, expected .* uint8 or float"),
        (torch.zeros(1, 3, 16, 24, dtype=torch.bool), "images are bool"),
        (torch.full((1, 3, 16, 24), 255.0), r"from 255 to 255, expected .*uint8, or as images / 127.5 - 1"),
        (torch.linspace(-2.1, 2.6, 16 * 24).expand(1, 3, -1).reshape(1, 3, 16, 24), "from -2.1 to 2.6"),
        (torch.full((1, 3, 16, 24), -1.1), "from -1.1 to -1.1"),
        (torch.full((1, 3, 16, 24), math.nan), "from nan to nan"),
        ([[0.0]], "images are of type list"),
    ],
)
def test_images_that_cannot_be_encoded_are_named(images, message):
    tokenizer = make()
    for call in (tokenizer.encode, tokenizer.reconstruct):
        with pytest.raises(UserError, match=message) as caught:
            call(images)
        assert "\n" not in str(caught.value)


def test_a_single_odd_pixel_is_found_and_rounding_is_not():
    tokenizer, images = make().eval(), noise(2, 3, 16, 24)
    images[1, 2, 15, 23] = 1.004
    tokenizer.encode(images)
    for value in (1.02, -1.02, math.inf, math.nan):
        images[1, 2, 15, 23] = value
        with pytest.raises(UserError, match="images hold values"):
            tokenizer.encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(8, 12, dtype=torch.long), r"codes have shape \(8, 12\), expected integers \(B, h, w\)"),
        (torch.zeros(1, 8, 12, 1, dtype=torch.long), "codes have shape"),
        (torch.zeros(1, 0, 12, dtype=torch.long), "codes have shape"),
        (torch.zeros(1, 8, 12), "codes are float32, expected integers"),
        (torch.zeros(1, 8, 12, dtype=torch.bool), "codes are bool"),
        (np.zeros((1, 8, 12), dtype=np.int64), "codes are of type ndarray"),
        (torch.full((1, 8, 12), 32), "codes run from 32 to 32, but the codebook has 0 to 31; use codes of"),
        (torch.full((1, 8, 12), -1), "codes run from -1 to -1"),
        (torch.full((1, 8, 12), 255, dtype=torch.uint8), "to 255"),
        (torch.full((1, 8, 12), 60_000, dtype=torch.uint16), "to 60000"),
    ],
)
def test_codes_that_cannot_be_decoded_are_named_before_they_are_looked_up(codes, message, monkeypatch):
    """On CUDA an index that is not there ends everything that the process has on the device."""
    tokenizer = make()
    monkeypatch.setattr(tokenizer.quantizer, "decode", lambda codes: pytest.fail("looked up"))
    with pytest.raises(UserError, match=message) as caught:
        tokenizer.decode(codes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32])
def test_codes_of_any_integer_type(dtype):
    tokenizer = make().eval()
    codes = tokenizer.encode(noise(2, 3, 16, 24))
    assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))


@pytest.mark.parametrize("patch", [1, 2])
def test_nothing_at_all(patch):
    tokenizer = make(patch=patch).eval()
    codes = tokenizer.encode(torch.zeros(0, 3, 16, 24))
    assert codes.shape == (0, 8 // patch, 12 // patch) and tokenizer.decode(codes).shape == (0, 3, 16, 24)
    assert tokenizer.reconstruct(torch.zeros(0, 3, 16, 24, dtype=torch.uint8)).dtype == torch.uint8


def test_training_mode_changes_nothing_and_is_kept():
    tokenizer = make(dropout=0.5)
    x = noise(2, 3, 16, 24)
    assert not torch.equal(tokenizer.encoder(x), tokenizer.encoder(x))
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.train()
    codes, images = tokenizer.encode(x), tokenizer.reconstruct(x)
    assert all(module.training for module in tokenizer.modules())
    assert torch.equal(tokenizer.encode(x), codes) and torch.equal(tokenizer.reconstruct(x), images)
    with pytest.raises(UserError):
        tokenizer.encode(x * 9)
    assert tokenizer.training and not tokenizer.eval().training
    assert torch.equal(tokenizer.encode(x), codes) and not tokenizer.training
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_autocast_gives_float32_images_and_16_bit_weights_are_refused():
    tokenizer, x = make().eval(), noise(2, 3, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert tokenizer.reconstruct(x).dtype == tokenizer.decode(tokenizer.encode(x)).dtype == torch.float32
    with pytest.raises(UserError, match=r"weights are bfloat16, .* torch\.autocast"):
        tokenizer.to(torch.bfloat16).encode(x)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_output_that_is_not_finite_is_named(part):
    tokenizer, x = make().eval(), noise(2, 3, 16, 24)
    codes = tokenizer.encode(x)
    hook = tokenizer.get_submodule(part).register_forward_hook(lambda _module, _given, found: found / 0)
    with pytest.raises(UserError, match=f"--precision: the {part}"):
        tokenizer.encode(x) if part == "encoder" else tokenizer.decode(codes)
    hook.remove()
    assert torch.equal(tokenizer.encode(x), codes)
    tokenizer._finite[part] = torch.tensor(False)  # as an accelerator, which is not waited for, leaves it
    with pytest.raises(UserError, match=f"--precision: the {part}"):
        tokenizer.check_finite()
    tokenizer.check_finite()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_output_that_is_not_finite_is_told_where_it_is_no_error(part):
    tokenizer, x = make().eval(), noise(2, 3, 16, 24)
    assert tokenizer.take_finite()
    hook = tokenizer.get_submodule(part).register_forward_hook(lambda _module, _given, found: found / 0)
    assert tokenizer.decode(tokenizer.encode(x, at_once=False), at_once=False).shape == x.shape
    hook.remove()
    assert not tokenizer.take_finite() and tokenizer.take_finite()
    tokenizer.reconstruct(x)


def test_outputs_are_noted_while_another_thread_checks_them():
    """`vqgen-tokenize` checks in the thread that writes, while the next images are encoded."""

    class Cleared(dict):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            self.clear()  # just then
            return found

    tokenizer = make().eval()
    tokenizer._finite = Cleared(encoder=torch.tensor(True))
    tokenizer._note_finite("encoder", torch.zeros(1), at_once=False)
    assert tokenizer.take_finite()


def test_training_pays_for_no_checks(monkeypatch):
    """Looking at values waits for the device; `forward` looks at none."""
    monkeypatch.setattr(Tokenizer, "_checked_images", lambda *_: pytest.fail("checked"))
    monkeypatch.setattr(Tokenizer, "_checked_codes", lambda *_: pytest.fail("checked"))
    assert make()(3 * noise(2, 3, 16, 24)).images.shape == (2, 3, 16, 24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_and_codes_come_from_any_device_on_cuda(tmp_path):
    make().save(tmp_path)
    tokenizer, x = Tokenizer.load(tmp_path, "cuda"), noise(2, 3, 16, 24)
    codes = tokenizer.encode(x)
    assert codes.device.type == "cuda" and torch.equal(codes, tokenizer.encode(x.cuda()))
    assert torch.equal(tokenizer.decode(codes.cpu()), tokenizer.decode(codes)) and tokenizer.decode(codes).is_cuda
    assert tokenizer.reconstruct(x).device == x.device and tokenizer.reconstruct(x.cuda()).is_cuda
    with pytest.raises(UserError, match="codes run from"):
        tokenizer.decode(codes + 99)
    tokenizer.decode(codes).cpu()  # the device is as well as before


# ---- the model's folder ----


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
    learning = {f"quantizer.codebook.{name}" for name in ("idle", *(("weights",) if codebook == "ema" else ()))}
    assert names == set(tokenizer.state_dict()) - learning and "quantizer.codebook.codes" in names
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
