"""On every device the same: quantizers, losses and drawing as on the CPU, and both stages by their programs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake import without_values
from helpers.models import SIZE, make_prior, write_codes
from helpers.quantizers import latents, quantizer_options
from helpers.tokenizing import save_garments
from processes import rows, steps
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vqgen.evaluation.codebook import code_vectors, nearest_codes, tiles
from vqgen.prior import train as prior_program
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.sampling import sample as sample_program
from vqgen.sampling.decoding.generate import decode_one, image_uniforms
from vqgen.sampling.drawing import Samples
from vqgen.sampling.generator import DEFAULT, Generator
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer import encode as tokenize_program
from vqgen.tokenizer import train as tokenizer_program
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.losses.adversarial import adaptive_ratio, discriminator_loss
from vqgen.tokenizer.losses.lpips_kernels import difference
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.discriminator import PatchDiscriminator
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers import QUANTIZERS, quantizer_for

PRECISIONS = {"cpu": ["fp32", "bf16"], "cuda": ["fp32", "bf16", "fp16"]}


def quantized(kind: str, device: str) -> dict[str, Tensor]:
    """Codes, result and gradient of three training steps, and the state after them; on the CPU."""
    torch.manual_seed(0)
    options = {} if kind in ("fsq", "lfq", "gumbel", "simvq") else {"revive_after": 0}
    quantizer = quantizer_for(6, quantizer_options(kind, code_dim=4, **options)).to(device)
    found: dict[str, Tensor] = {}
    for step in range(3):
        z = latents(8, seed=step).to(device).requires_grad_()
        torch.manual_seed(step)
        out = quantizer(z)
        (out.loss + out.z_q.square().mean()).backward()
        assert out.codes.device.type == device and z.grad is not None
        found |= {f"codes {step}": out.codes, f"z_q {step}": out.z_q.detach(), f"gradient {step}": z.grad}
    return {name: value.cpu() for name, value in [*found.items(), *quantizer.state_dict().items()]}


@pytest.mark.parametrize("kind", sorted(set(QUANTIZERS) - {"gumbel"}))  # each device draws other noise
def test_quantizers_on_cuda(cuda: str, kind: str) -> None:
    found, expected = quantized(kind, cuda), quantized(kind, "cpu")
    for name, value in expected.items():
        # On CUDA the projection of the result, a convolution, rounds to 10 bits; codes are compared exactly.
        assert torch.allclose(found[name], value, rtol=1e-2, atol=5e-3), name


def test_losses(device: str) -> None:
    """Against float64 on the CPU."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, [16, 16], 8, 2).double()
    real, fake = torch.rand(2, 4, 3, 16, 16, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(3, 1, 1, dtype=torch.float64))

    def losses(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor, weight: nn.Parameter) -> list[Tensor]:
        made = fake * weight
        on_real, on_fake = discriminator(real), discriminator(made)
        pixels = (made - real).abs().mean()
        ratio = adaptive_ratio(pixels, -on_fake.mean(), weight, 1e4)
        maps = difference(made, real, torch.ones(3, dtype=real.dtype, device=real.device))
        return [discriminator_loss("hinge", on_real, on_fake), ratio, maps.sum()]

    expected = losses(discriminator, real, fake, weight)
    on_device = [each.float().to(device) for each in (real, fake)]
    parameter = nn.Parameter(weight.detach().float().to(device))
    found = losses(discriminator.float().to(device), *on_device, parameter)
    for ours, exact in zip(found, expected):
        torch.testing.assert_close(ours.double().cpu(), exact.double(), rtol=1e-2, atol=1e-3)  # TF32


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}]
)
def test_tokens_are_chosen_as_in_float64(device: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits, uniforms = 3 * torch.randn(64, 500), image_uniforms(0, range(64), 1)[:, 0]
    chosen, nats = decode_one(logits.to(device), 7, uniforms.to(device), SamplingSettings(**settings))
    exact, exact_nats = decode_one(logits.double(), 7, uniforms, SamplingSettings(**settings))
    assert chosen.device.type == device and (chosen.cpu() == exact).float().mean() > 0.98
    same = chosen.cpu() == exact
    torch.testing.assert_close(nats.cpu()[same].double(), exact_nats[same], rtol=1e-4, atol=1e-4)


PHOTOS = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HOLE = torch.zeros(4, 6, dtype=torch.bool)
HOLE[:2, :2] = True
TEXTS = ["a small shoe", "a bag"]
USES: dict[str, Callable[[Generator], Samples]] = {
    "fill": lambda generator: generator.inpaint(PHOTOS, HOLE, n=12, source_guidance_scale=3.0),
    "vary": lambda generator: generator.vary(PHOTOS, 0.5, n=12),
    "extend": lambda generator: generator.extend(PHOTOS, 2, 0, 4, 2, n=6),
    "larger": lambda generator: generator.sample(6, size=(8, 10), prompts=TEXTS),
    "complete": lambda generator: generator.complete(PHOTOS, 1, n=12, classes="bag"),
    "text": lambda generator: generator.sample(12, prompts=TEXTS, guidance_scale=2.0, top_p=0.9),
    "translate": lambda generator: generator.translate(
        PHOTOS, n=12, classes="bag", guidance_scale=2.0, source_guidance_scale=1.5, guidance_schedule="cosine"
    ),  # three rows an image
}


@pytest.fixture(scope="module")
def with_every_part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random prior with text, a source that is degraded or has holes, and classes."""
    folder = tmp_path_factory.mktemp("uses")
    make_prior(folder / "of")
    write_codes(folder / "codes", size=SIZE, source=True, captions=[TEXTS[i % 2] for i in range(9)])
    files = CodeFiles(folder / "codes", "train")
    conditioning = Conditioning.for_files(files, ObjectiveConfig(inpainting=0.3))
    mark = str(Tokenizer.load(folder / "of" / "tokenizer").fingerprint)
    torch.manual_seed(1)
    prior = Prior(PriorConfig(dim=16, layers=2, heads=2), conditioning, (3, 4, 6), mark)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)
    prior.save(folder / "prior", folder / "of" / "tokenizer")
    return folder / "prior"


@pytest.mark.parametrize("use", USES)
def test_every_use_draws_various_codes(with_every_part: Path, use: str) -> None:
    drawn = USES[use](Generator.load(with_every_part, "cpu", "fp32"))
    assert len(drawn.codes.unique()) > 3 and drawn.nats.isfinite().all()


@pytest.mark.parametrize("use", USES)
def test_every_use_draws_on_cuda_what_the_cpu_draws(cuda: str, with_every_part: Path, use: str) -> None:
    """In float32: almost all codes, as the rounding of a logit may choose another, and the image of those."""
    found, expected = (USES[use](Generator.load(with_every_part, each, "fp32")) for each in (cuda, "cpu"))
    assert found.images.device.type == "cpu" and found.images.shape == expected.images.shape
    assert (found.codes == expected.codes).float().mean() > 0.9
    same = (found.codes == expected.codes).flatten(1).all(1)
    assert (found.images[same].int() - expected.images[same].int()).abs().float().mean() < 1
    torch.testing.assert_close(found.nats[same], expected.nats[same], rtol=1e-3, atol=1e-2)


def test_both_stages_by_their_programs(trained_on: str, tmp_path: Path, cli: Any) -> None:
    """Train, tokenize, train and draw in each precision; runs are lengthened, with the scale of fp16 restored."""
    images = save_garments(tmp_path / "images", 48)
    small = "--channels 1 --size 16 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 --codebook-size 64"
    gan = "--gan-weight 0.5 --gan-start 1 --gan-warmup 0 --gan-ramp 0 --gan-width 8 --gan-layers 2 --gan-augment color"
    common = "--batch-size 8 --lr-warmup 1 --log-every 1 --validate-every 4 --checkpoint-every 2".split()
    one = [*small.split(), *gan.split(), *common, "--data", images, "--validation-images", 8]
    two = ["--codes", tmp_path / "codes", "--dim", 16, "--layers", 1, "--heads", 2, *common, "--preview-images", 4]
    for precision in PRECISIONS[trained_on]:
        tokenizer, prior = tmp_path / f"tokenizer-{precision}", tmp_path / f"prior-{precision}"
        for count in (4, 6):
            words = [*one, "--steps", count, "--precision", precision, "--output", tokenizer]
            assert cli(tokenizer_program.main, *words).code == 0
        again = ["--tokenizer", tokenizer, "--data", images, "--output", tmp_path / "codes", "--overwrite"]
        again += ["--holdout", 0.25, "--device", trained_on, "--precision", precision]
        assert cli(tokenize_program.main, *again).code == 0
        for count in (4, 6):
            words = [*two, "--steps", count, "--precision", precision, "--output", prior]
            assert cli(prior_program.main, *words).code == 0
        for folder in (tokenizer, prior):
            losses = [row["train/loss"] for row in rows(folder) if "train/loss" in row]
            assert len(losses) == 6 and steps(folder)[-1] == 6
        drawn, output = ["--model", prior, "--n", 3], tmp_path / f"drawn-{precision}"
        drawn += ["--device", trained_on, "--precision", precision, "--output", output]
        assert cli(sample_program.main, *drawn).code == 0
        assert len(list(output.rglob("0000?.png"))) == 3


def test_codes_on_cuda_are_those_of_the_cpu(cuda: str, tmp_path: Path, cli: Any) -> None:
    """By the tokenizer in the package in float32: almost all of them, as convolutions round to 10 bits on CUDA."""
    images, found = save_garments(tmp_path / "images", 40), []
    for number, device in enumerate(("cpu", cuda)):
        output = tmp_path / str(number)
        words = ["--tokenizer", DEFAULT / "tokenizer", "--data", images, "--holdout", 0.25, "--output", output]
        assert cli(tokenize_program.main, *words, "--device", device, "--precision", "fp32").code == 0
        files = CodeFiles(output, "train")
        found.append(files.gather(range(len(files)), [0] * len(files)))
    assert (found[0] == found[1]).float().mean() > 0.95


def small_tokenizer(kind: str) -> Tokenizer:
    torch.manual_seed(0)
    model = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    return Tokenizer(TokenizerConfig([8, 8], 3, model, quantizer_options(kind, code_dim=4))).eval()


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_codes_are_compared_and_shown_on_every_device(device: str, kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    expected, common = code_vectors(tokenizer), torch.zeros(tokenizer.depth, dtype=torch.long)
    found = code_vectors(tokenizer.to(device))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-3)
    assert len(nearest_codes(found, 1, 3)) == 3 and tiles(tokenizer, torch.arange(3), common, 2).device.type == "cpu"


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_codes_are_compared_beside_the_cpu(kind: str) -> None:
    """On a device without values."""
    tokenizer = small_tokenizer(kind)
    shape = code_vectors(tokenizer).shape
    with FakeTensorMode():
        found = code_vectors(without_values(tokenizer))
    assert found.shape == shape and found.device.type == "cpu"


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_latents_are_projected_without_a_convolution_beside_the_cpu(kind: str) -> None:
    """Which would round to 10 bits on CUDA; shown on a device without values, by the same vectors and operators."""
    quantizer = quantizer_for(6, quantizer_options(kind, code_dim=4))
    z, layer = latents(), quantizer.project_in
    expected = quantizer.vectors(z)
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(nn.functional.linear(flat, layer.weight.flatten(1), layer.bias), expected)
    with FakeTensorMode(), Operators() as used:
        found = without_values(quantizer).vectors(torch.empty(z.shape, device="cuda"))
    assert found.shape == expected.shape and found.device.type == "cuda"
    assert "convolution" not in used.names and "addmm" in used.names


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
