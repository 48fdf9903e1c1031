"""The static step of decoding: what `feed` computes, captured once for each bucket and range of ids.

On a CPU a graph is the step itself, called again; that it is captured is tested where there is a CUDA device.
"""

from collections.abc import Callable

import pytest
import torch
from helpers.fake import without_values
from helpers.waiting import watched
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM

from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior, backbone_config
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding import graphs
from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.sampling.decoding.generate import Contrast, decode_n, generate, image_uniforms, prefill
from vqgen.sampling.generator import DEFAULT, Generator
from vqgen.sampling.settings import SamplingSettings

backbones = pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Recorder:
    """Stands for the capture: counts what is captured, and repeats it by calling it."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], object]:
        self.captured += 1
        step()  # as a capture's warm-up does, before the first replay
        return step


class Static(CachedTransformer):
    """A decoder whose single tokens go through static steps, on any device."""

    def __init__(self, prior: Prior, recorder: graphs.Record) -> None:
        super().__init__(prior.backbone, prior.conditioning.length + prior.vocabulary.length - 1)
        self.graphs, self.recorder = True, recorder

    def start(self, rows: int) -> None:
        super().start(rows)
        assert self._batch.steps
        self._batch.steps.record = self.recorder


def prior_of(backbone: str, depth: int = 1, side: int = 12) -> Prior:
    """A random prior of side x side codes of 20, with sharp logits."""
    torch.manual_seed(0)
    conditioning = Conditioning(Vocabulary(20, depth, (side, side)), [Classes(3)])
    prior = Prior(PriorConfig(backbone, dim=32, layers=2, heads=2, dropout=0), conditioning, (3, 24, 24), "f" * 64)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(20)  # type: ignore[operator, union-attr]
    return prior.eval()


def allowed_of(prior: Prior) -> list[tuple[int, int]]:
    return [prior.vocabulary.allowed(position) for position in range(prior.vocabulary.length)]


def draw(decoder: CachedTransformer, prior: Prior, indices: range, settings: SamplingSettings | None = None) -> Tensor:
    conditioning = prior.conditioning
    prefix = conditioning.prefixes(conditioning.conditions(), indices)
    uniforms, settings = image_uniforms(0, indices, prior.vocabulary.length), settings or SamplingSettings()
    scale = settings.guidance_scale
    contrasts = [Contrast(torch.full_like(prefix, conditioning.null), scale)] if scale != 1 else []
    return generate(decoder, prefix, allowed_of(prior), uniforms, settings, contrasts, rows=len(indices)).tokens


@backbones
@pytest.mark.parametrize("depth", [1, 2])
def test_static_steps_are_those_of_feed(device: str, backbone: str, depth: int) -> None:
    """Logits at every position, through all buckets, and again in a second batch of the same cache."""
    prior, recorder = prior_of(backbone, depth).to(device), Recorder()
    plain = CachedTransformer(prior.backbone, prior.vocabulary.length, graphs=False)
    static = Static(prior, recorder)
    legal = allowed_of(prior)
    with torch.inference_mode():
        for seed in (1, 2):
            tokens = torch.cat(
                [torch.randint(*ids, (3, 1), generator=torch.Generator().manual_seed(seed)) for ids in legal], 1
            )
            tokens = tokens.to(device)
            for decoder in (plain, static):
                decoder.start(3)
            for position, ids in enumerate(legal):
                fed = tokens[:, position, None]
                torch.testing.assert_close(static.feed(fed, ids), plain.feed(fed, ids), rtol=1e-4, atol=1e-3)
    buckets = -(-prior.vocabulary.length // graphs.BUCKET)
    assert buckets > 2 and recorder.captured == buckets * depth, "captured more than once each"


@backbones
def test_images_are_those_of_feed(device: str, backbone: str) -> None:
    prior = prior_of(backbone).to(device)
    plain = CachedTransformer(prior.backbone, prior.vocabulary.length, graphs=False)
    static = Static(prior, Recorder())
    for settings in (SamplingSettings(), SamplingSettings(guidance_scale=2.0, guidance_schedule="linear", top_p=0.9)):
        expected = draw(plain, prior, range(5), settings)
        assert torch.equal(draw(static, prior, range(5), settings), expected) and expected.unique().numel() > 10
    # Another number of rows has another cache; images stay those of (seed, i).
    assert torch.equal(draw(static, prior, range(2), settings), expected[:2])
    assert torch.equal(draw(static, prior, range(5), settings), expected)


def test_a_step_reads_nothing(device: str) -> None:
    prior = prior_of("llama", side=4).to(device)
    static, tokens = Static(prior, Recorder()), torch.zeros(2, 1, dtype=torch.long, device=device)
    with torch.inference_mode():
        static.start(2)
        static.feed(tokens)
        with watched(device) as found:
            static.feed(tokens)
    assert found == []


def test_what_an_earlier_batch_left_does_not_count(device: str) -> None:
    """A cache that holds NaN behind the mask would give NaN."""
    prior = prior_of("llama", side=4).to(device)
    static = Static(prior, Recorder())
    expected = draw(static, prior, range(2))
    for attention in static._batch.attentions:
        with torch.inference_mode():
            attention.kept.fill_(torch.nan)
    assert torch.equal(draw(static, prior, range(2)), expected)


def test_a_capture_that_fails_is_said_and_drawing_goes_on(device: str) -> None:
    prior = prior_of("llama", side=4).to(device)

    def failing(step: Callable[[], None], device: torch.device) -> Callable[[], object]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    expected = draw(CachedTransformer(prior.backbone, 16, graphs=False), prior, range(2))
    decoder = Static(prior, failing)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs.*not permitted when stream is capturing") as told:
        assert torch.equal(draw(decoder, prior, range(2)), expected)
    assert len(told) == 1


def test_graphs_are_for_cuda_alone() -> None:
    decoder = CachedTransformer(prior_of("llama", side=4).backbone, 16)
    with torch.inference_mode():
        decoder.start(2)
    assert decoder._batch.steps is None


@pytest.mark.parametrize("static", [False, True])
@backbones
def test_all_that_drawing_computes_lies_on_the_device(backbone: str, static: bool) -> None:
    """On tensors of CUDA that have no values, which refuse to be mixed with those of the host and to be read."""
    conditioning = Conditioning(Vocabulary(20, 2, (6, 6)), [Classes(3)])
    config = backbone_config(PriorConfig(backbone, dim=32, layers=2, heads=2), conditioning)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        model = without_values(model)
        assert model.device.type == "cuda"
        decoder = CachedTransformer(model, 72, graphs=static)
        legal = [conditioning.vocabulary.allowed(position) for position in range(72)]
        decoder.start(6)
        if static:
            assert decoder._batch.steps
            decoder._batch.steps.record = Recorder()
        settings = SamplingSettings(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, guidance_scale=2.0)
        logits = prefill(decoder, torch.zeros(6, 1, dtype=torch.long, device="cuda"), legal[0])
        uniforms = torch.zeros(3, 72, dtype=torch.float64, device="cuda")
        known = torch.full((3, 72), -1, device="cuda")
        drawn: list[torch.Tensor] = []
        with pytest.raises(DataDependentOutputException):  # the one look at the logits, after all tokens
            decode_n(decoder, logits, legal, uniforms, settings, [2.0], known, on_token=drawn.append)
        assert not static or (decoder._batch.steps and decoder._batch.steps.usable)
        assert len(drawn) == 72 and {tokens.device.type for tokens in drawn} == {"cuda"}


@NEEDS_CUDA
@backbones
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_captured_steps_are_static_steps_on_cuda(backbone: str, dtype: torch.dtype) -> None:
    """Bit for bit: the same kernels on the same shapes."""
    prior = prior_of(backbone).to("cuda")
    for parameter in prior.parameters():
        parameter.data = parameter.data.to(dtype)
    captured = CachedTransformer(prior.backbone, prior.vocabulary.length)
    called = Static(prior, Recorder())
    tokens = torch.randint(20, (4, prior.vocabulary.length), device="cuda")
    with torch.inference_mode():
        for decoder in (captured, called):
            decoder.start(4)
        for position in range(prior.vocabulary.length):
            fed = tokens[:, position, None]
            assert torch.equal(captured.feed(fed).clone(), called.feed(fed))
    assert captured._batch.steps and captured._batch.steps.usable


@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_images_of_the_package_do_not_depend_on_neighbours_on_cuda(precision: str) -> None:
    """At one batch size; in float32 without graphs, too, but for a code in many hundred that rounding turns."""
    generator = Generator.load(DEFAULT, "cuda", precision)
    whole = generator.draw(range(32), seed=3, batch_size=16)
    part = generator.draw([5, 30, 2], seed=3, batch_size=16)
    assert torch.equal(part.codes, whole.codes[[5, 30, 2]])
    assert torch.equal(generator.draw(range(32), seed=3, batch_size=16).codes, whole.codes)
    assert generator.decoder._batch.steps and generator.decoder._batch.steps.usable
    generator.decoder = CachedTransformer(generator.prior.backbone, generator.decoder.positions, graphs=False)
    plain = generator.draw(range(32), seed=3, batch_size=16)
    if precision == "fp32":
        assert (plain.codes == whole.codes).all((1, 2)).float().mean() > 0.9
    torch.testing.assert_close(plain.nats.mean(), whole.nats.mean(), rtol=0.02, atol=0)
    cpu = Generator.load(DEFAULT, "cpu", "fp32").draw(range(4), seed=3)
    if precision == "fp32":
        assert (cpu.codes == whole.codes[:4]).float().mean() > 0.75
