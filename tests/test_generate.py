"""Cached decoding: equal to the full forward, independent of its batch, and drawing what the model says."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from vqgen.errors import UserError
from vqgen.prior.backbone.config import WRITER, plain_config
from vqgen.prior.backbone.stored import StoredBackbone
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior, backbone_config
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.sampling.decoding.generate import Contrast, decode_n, generate, image_uniforms, prefill
from vqgen.sampling.decoding.linear import Linear
from vqgen.sampling.settings import SamplingSettings

backbones = pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt2"])


def layout(codebook_size: int, depth: int, grid: tuple[int, int], classes: int) -> Conditioning:
    return Conditioning(Vocabulary(codebook_size, depth, grid), [Classes(classes)])


def model_of(conditioning: Conditioning, backbone="llama", dim=32, heads=2, hidden=None, sharp=1.0) -> PreTrainedModel:
    """A random causal LM; `sharp` multiplies its logits."""
    torch.manual_seed(0)
    shape = PriorConfig(backbone=backbone, dim=dim, layers=2, heads=heads, hidden_dim=hidden)
    config = backbone_config(shape, conditioning)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


def allowed_of(conditioning: Conditioning) -> list[tuple[int, int]]:
    vocabulary = conditioning.vocabulary
    return [vocabulary.allowed(position) for position in range(vocabulary.length)]


def conditions(conditioning: Conditioning, count: int) -> torch.Tensor:
    return conditioning.prefixes(conditioning.conditions(), range(count))


class Recorder(CachedTransformer):
    """A decoder that keeps every logit it gave."""

    def start(self, rows):
        super().start(rows)
        self.given: list[torch.Tensor] = []

    def feed(self, tokens, allowed=None):
        self.given.append(super().feed(tokens, allowed))
        return self.given[-1]


@backbones
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("depth", [1, 2])
def test_cached_decoding_equals_the_full_forward(backbone, rows, depth):
    spec = layout(codebook_size=20, depth=depth, grid=(3, 4), classes=3)
    model = model_of(spec, backbone, sharp=20)
    decoder, prompt = Recorder(model, spec.vocabulary.length), conditions(spec, rows)
    uniforms = image_uniforms(0, range(rows), spec.vocabulary.length)
    greedy = SamplingSettings(temperature=0)
    tokens = generate(decoder, prompt, allowed_of(spec), uniforms, greedy).tokens
    with torch.inference_mode():
        full = model(input_ids=torch.cat([prompt, tokens], 1), use_cache=False).logits[:, :-1]
    for position, (start, end) in enumerate(allowed_of(spec)):
        torch.testing.assert_close(decoder.given[position][:rows], full[:, position, start:end], rtol=1e-4, atol=1e-4)
        assert torch.equal(tokens[:, position], full[:, position, start:end].argmax(-1) + start)
    assert tokens.unique().numel() > 4  # a constant would prove little


@backbones
def test_future_tokens_change_no_earlier_logit(backbone):
    spec = layout(codebook_size=20, depth=1, grid=(3, 4), classes=0)
    decoder = Recorder(model_of(spec, backbone, sharp=20), spec.vocabulary.length)
    first, second = torch.randint(20, (2, 1, spec.vocabulary.length), generator=torch.Generator().manual_seed(0))
    second[:, :6] = first[:, :6]
    seen = []
    with torch.inference_mode():
        for tokens in (first, second):
            decoder.start(1)
            for position in range(spec.vocabulary.length):
                decoder.feed(tokens[:, position, None])
            seen.append(torch.cat(decoder.given))
    assert torch.equal(seen[0][:6], seen[1][:6])
    assert not torch.isclose(seen[0][6:], seen[1][6:]).all(-1).any()


@backbones
def test_known_codes_go_in_at_once(backbone):
    spec = layout(codebook_size=20, depth=1, grid=(3, 4), classes=3)
    decoder = CachedTransformer(model_of(spec, backbone, sharp=20), spec.vocabulary.length)
    uniforms, legal, prefix = image_uniforms(0, range(3), 12), allowed_of(spec), conditions(spec, 3)
    # Guidance that grows is as strong as it would have been.
    growing = SamplingSettings(guidance_scale=6.0, guidance_schedule="linear")
    for settings in (SamplingSettings(), growing):
        contrasts = [Contrast(spec.without(prefix), settings.guidance_scale)]
        full = generate(decoder, prefix, legal, uniforms, settings, contrasts)
        known = torch.where(torch.arange(12) < 5, full.tokens, -1)
        seen: list[torch.Tensor] = []
        rest = generate(
            decoder, prefix, legal, uniforms, settings, contrasts, known, range(5, 12), on_token=seen.append
        )
        assert torch.equal(rest.tokens, full.tokens) and len(seen) == 7
        assert (rest.nats < full.nats).all(), "known codes cost nothing"
        # What follows the last unknown code is not computed at all.
        known[:, 9:], steps = full.tokens[:, 9:], len(seen)
        part = generate(decoder, prefix, legal, uniforms, settings, contrasts, known, range(5, 9), on_token=seen.append)
        assert torch.equal(part.tokens, full.tokens) and len(seen) - steps == 4
        assert (part.nats < rest.nats).all()


@backbones
def test_known_codes_later_in_the_sequence_are_forced(backbone):
    spec = layout(codebook_size=20, depth=1, grid=(3, 4), classes=3)
    decoder = CachedTransformer(model_of(spec, backbone, sharp=20), spec.vocabulary.length)
    uniforms, legal, prefix = image_uniforms(0, range(3), 12), allowed_of(spec), conditions(spec, 3)
    full = generate(decoder, prefix, legal, uniforms, SamplingSettings())
    known = torch.full((3, 12), -1)
    known[:, 4] = (full.tokens[:, 4] + 7) % 20
    known[0, 9] = full.tokens[0, 9]
    found = generate(decoder, prefix, legal, uniforms, SamplingSettings(), known=known)
    assert torch.equal(found.tokens[:, :4], full.tokens[:, :4])
    assert torch.equal(torch.where(known < 0, -1, found.tokens), known)
    assert not torch.equal(found.tokens[:, 5:], full.tokens[:, 5:]), "what follows depends on what was forced"
    # The NLL is that of the drawn codes alone, given all codes before them.
    with torch.no_grad():
        logits = decoder.model(input_ids=torch.cat([prefix, found.tokens[:, :-1]], 1)).logits[..., :20]
    nats = -logits.log_softmax(-1).gather(2, found.tokens[..., None])[..., 0].masked_fill(known >= 0, 0)
    torch.testing.assert_close(found.nats, nats.double().sum(1), rtol=1e-4, atol=1e-4)
    # With everything known nothing is computed.
    assert torch.equal(
        generate(decoder, prefix, legal, uniforms, SamplingSettings(), known=full.tokens, span=range(0)).tokens,
        full.tokens,
    )


@backbones
def test_a_prompt_may_come_in_pieces(backbone):
    """A piece sees what came before it, and of itself what is not ahead."""
    spec = layout(codebook_size=20, depth=1, grid=(3, 4), classes=3)
    decoder = CachedTransformer(model_of(spec, backbone, sharp=20), spec.vocabulary.length)
    tokens = torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.inference_mode():
        for pieces in ([12], [5, 7], [1, 1, 4, 6], [1] * 12):
            decoder.start(3)
            seen.append([decoder.feed(piece) for piece in tokens.split(pieces, 1)][-1])
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=1e-4, atol=1e-4)


@backbones
def test_joined_projections_are_the_models_own(backbone):
    """Nothing is held twice, and the model is the one it was."""
    spec = layout(codebook_size=20, depth=1, grid=(3, 4), classes=3)
    model, tokens = model_of(spec, backbone), torch.arange(8)[None]
    with torch.inference_mode():
        before = model(input_ids=tokens, use_cache=False).logits
        names = {name: value.clone() for name, value in model.state_dict().items()}
        decoder = CachedTransformer(model, spec.vocabulary.length)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)
        assert all(torch.equal(value, names[name]) for name, value in model.state_dict().items())
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for block in decoder._blocks:
        for linear in (block.qkv, block.out, block.up, block.down):
            assert linear.weight.untyped_storage().data_ptr() in held


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_give_the_plain_products_bits(rows, bias):
    torch.manual_seed(0)
    linear = Linear(torch.randn(48, 96, dtype=torch.bfloat16), torch.randn(48, dtype=torch.bfloat16) if bias else None)
    if linear.packed is None:
        pytest.skip("this torch packs no weights")
    x, y = torch.randn(rows, 48, dtype=torch.bfloat16), torch.randn(rows, 96, dtype=torch.bfloat16)
    packed, added, linear.packed = linear(y), linear.added(x, y), None
    assert torch.equal(packed, linear(y))
    product = y.double() @ linear.weight.double().T + (0 if linear.bias is None else linear.bias.double())
    # A rounding to bfloat16 is off by at most 2^-9 of the value: of the product, of it with the bias, of the sum.
    bound = 2**-9 * (3 * product.abs() + (x.double() + product).abs() + 4)
    for found in (added, linear.added(x, y)):
        assert ((found.double() - (x.double() + product)).abs() <= bound).all()


def test_other_models_are_refused():
    from transformers import LlamaConfig, MistralConfig

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 8}
    for config, words in (
        (MistralConfig(**shape, num_attention_heads=2, num_key_value_heads=2), "no decoder for a mistral"),
        (LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2), "grouped heads"),
    ):
        with pytest.raises(ValueError, match=words):
            CachedTransformer(AutoModelForCausalLM.from_config(config), 4)


def test_the_cache_is_exact_and_used_again():
    spec = layout(codebook_size=20, depth=1, grid=(3, 4), classes=3)
    decoder = CachedTransformer(model_of(spec, sharp=20), spec.vocabulary.length)
    legal, settings = allowed_of(spec), SamplingSettings()

    def drawn(seed, count=4):
        uniforms = image_uniforms(seed, range(count), spec.vocabulary.length)
        return generate(decoder, conditions(spec, count), legal, uniforms, settings).tokens

    first = drawn(0)
    places = [attention.kept.data_ptr() for attention in decoder._batch.attentions]
    assert len(places) == 2 and decoder._batch.attentions[0].kept.shape[2] == spec.vocabulary.length
    second = drawn(1)
    assert [attention.kept.data_ptr() for attention in decoder._batch.attentions] == places
    assert not torch.equal(first, second)
    drawn(2, count=2)
    assert torch.equal(drawn(0), first)
    with pytest.raises(ValueError, match="13 tokens fed to a cache of 12"):
        generate(decoder, first.new_zeros(1, 2), legal, image_uniforms(0, [0], 12), settings)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_logits_do_not_depend_on_the_batch(scale):
    """Bit for bit, not only in the tokens: a last bit would turn a token once in many thousand images."""
    spec = layout(codebook_size=64, depth=1, grid=(1, 3), classes=3)
    # 17 rows of a feed-forward width of 688 do not fill the last vector of the activation, 16 and 32 rows do.
    decoder = Recorder(model_of(spec, dim=256, heads=4, hidden=688, sharp=5), spec.vocabulary.length)
    prompt, null = conditions(spec, 64), torch.full((64, 1), spec.null)
    uniforms = image_uniforms(3, range(64), spec.vocabulary.length)
    settings = SamplingSettings(guidance_scale=scale)

    def drawn(part):
        legal = allowed_of(spec)
        contrasts = [Contrast(null[part], scale)] if scale != 1 else []
        tokens = generate(decoder, prompt[part], legal, uniforms[part], settings, contrasts).tokens
        return tokens, torch.stack(decoder.given, 1)[: len(tokens)]

    tokens, logits = drawn(slice(64))
    for part in (slice(0, 1), slice(9, 10), slice(7, 14), slice(17), slice(33, 64)):
        other_tokens, other_logits = drawn(part)
        assert torch.equal(other_tokens, tokens[part])
        assert torch.equal(other_logits, logits[part])


def test_bfloat16_does_not_depend_on_the_batch():
    spec = layout(codebook_size=64, depth=1, grid=(1, 3), classes=3)
    # Sums over 1024 are ordered by the number of rows, unless something is done about it.
    model = model_of(spec, dim=384, heads=6, hidden=1024, sharp=5).to(torch.bfloat16)
    decoder = Recorder(model, spec.vocabulary.length)
    prompt, uniforms = conditions(spec, 64), image_uniforms(3, range(64), spec.vocabulary.length)

    def drawn(part):
        tokens = generate(decoder, prompt[part], allowed_of(spec), uniforms[part], SamplingSettings()).tokens
        return tokens, torch.stack(decoder.given, 1)[: len(tokens)]

    tokens, logits = drawn(slice(64))
    for part in (slice(0, 1), slice(9, 10), slice(7, 14), slice(17), slice(31, 64)):
        other_tokens, other_logits = drawn(part)
        assert torch.equal(other_tokens, tokens[part])
        assert torch.equal(other_logits, logits[part])


def test_uniforms_are_a_function_of_seed_and_index():
    whole = image_uniforms(5, range(100), 64)
    assert whole.dtype == torch.float64 and whole.shape == (100, 64)
    assert whole.min() >= 0 and whole.max() < 1
    assert torch.equal(image_uniforms(5, [7, 99], 64), whole[[7, 99]])
    assert torch.equal(image_uniforms(5, [7], 16), whole[[7], :16])
    assert whole.unique().numel() == whole.numel()
    assert not torch.isin(image_uniforms(6, range(100), 64), whole).any()
    assert not torch.isin(image_uniforms(0, [1], 64), image_uniforms(1, [0], 64)).any()
    assert image_uniforms(2**64 - 1, [2**64 - 1], 3).shape == (1, 3)
    assert image_uniforms(0, [], 3).shape == (0, 3)
    # Fixed for ever: a samples.json names a seed, and must still name the same images.
    assert image_uniforms(0, [0], 2)[0].tolist() == pytest.approx(FIRST_UNIFORMS, abs=0)
    histogram = torch.histc(whole, 16, 0, 1)
    assert ((histogram - 400) ** 2 / 400).sum() < critical(15)


FIRST_UNIFORMS = [0.011546754286331562, 0.24154919656271812]


def critical(freedom: int) -> float:
    """The chi-square value exceeded once in 10,000 (Wilson & Hilferty 1931)."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + 3.719 * share**0.5) ** 3


def filtered(logits: np.ndarray, unconditional: np.ndarray, settings: SamplingSettings, scale: float) -> np.ndarray:
    """The distribution that the settings ask for, in plain numpy."""
    logits = unconditional + scale * (logits - unconditional)
    weights = np.exp((logits - logits.max()) / settings.temperature)
    if settings.top_k:
        weights[weights < np.sort(weights)[-settings.top_k]] = 0
    order = np.argsort(-weights)
    total = np.cumsum(weights[order]) / weights.sum()
    weights[order[int((total < settings.top_p).sum()) + 1 :]] = 0
    weights[weights < settings.min_p * weights.max()] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(temperature=0.5),
        SamplingSettings(temperature=2.0),
        SamplingSettings(top_k=3),
        SamplingSettings(top_p=0.8),
        SamplingSettings(min_p=0.4),
        SamplingSettings(guidance_scale=3.0),
        SamplingSettings(guidance_scale=3.0, guidance_schedule="linear"),
        SamplingSettings(guidance_scale=3.0, guidance_schedule="interval", guidance_interval=[0.0, 0.4]),
        SamplingSettings(temperature=1.5, top_k=4, top_p=0.9, guidance_scale=1.7),
    ],
    ids=str,
)
def test_samples_follow_the_distribution(settings):
    """Pairs of codes against the products of the model's own conditional probabilities."""
    spec, count = layout(codebook_size=5, depth=1, grid=(1, 2), classes=2), 5_000
    model = model_of(spec, dim=16, sharp=40)
    prompt = spec.prefixes({"class": [1]}, range(count))
    contrasts = [Contrast(torch.full_like(prompt, spec.null), settings.guidance_scale)]
    uniforms = image_uniforms(1, range(count), 2)
    drawn = generate(CachedTransformer(model, 2), prompt, allowed_of(spec), uniforms, settings, contrasts)
    tokens = drawn.tokens
    with torch.no_grad():  # whatever the settings, the nats are those of the model itself
        own = model(input_ids=torch.cat([prompt, tokens[:, :1]], 1)).logits[..., :5].log_softmax(-1)
    torch.testing.assert_close(drawn.nats, -own.gather(2, tokens[..., None]).sum((1, 2)).double(), rtol=1e-4, atol=1e-4)
    counted = torch.bincount(tokens[:, 0] * 5 + tokens[:, 1], minlength=25).numpy()

    def logits(*prefix: int) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prefix])).logits[0, -1, :5].double().numpy()

    condition = int(prompt[0])
    begin, end = (settings.guidance_at(settings.guidance_scale, position, 2) for position in range(2))
    first = filtered(logits(condition), logits(spec.null), settings, begin)
    second = [filtered(logits(condition, a), logits(spec.null, a), settings, end) for a in range(5)]
    expected = count * (first[:, None] * np.stack(second)).reshape(-1)
    assert counted[expected == 0].sum() == 0
    frequent = expected > 5
    assert frequent.sum() >= 2
    statistic = ((counted - expected)[frequent] ** 2 / expected[frequent]).sum()
    assert statistic < critical(int(frequent.sum()))


def test_only_legal_codes_are_drawn():
    spec = layout(codebook_size=4, depth=3, grid=(2, 2), classes=2)
    model = model_of(spec)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every id, classes and null too, is as likely as any other
    uniforms = image_uniforms(0, range(200), spec.vocabulary.length)
    tokens = generate(
        CachedTransformer(model, spec.vocabulary.length),
        conditions(spec, 200),
        allowed_of(spec),
        uniforms,
        SamplingSettings(),
    ).tokens
    for position, (start, end) in enumerate(allowed_of(spec)):
        assert tokens[:, position].unique().tolist() == list(range(start, end))


def test_every_token_is_shown_as_it_is_drawn():
    spec = layout(codebook_size=8, depth=1, grid=(2, 2), classes=2)
    decoder, seen = CachedTransformer(model_of(spec), spec.vocabulary.length), []
    uniforms = image_uniforms(0, range(3), spec.vocabulary.length)
    legal, prompt = allowed_of(spec), conditions(spec, 3)
    drawn = generate(decoder, prompt, legal, uniforms, SamplingSettings(), on_token=seen.append)
    assert torch.equal(torch.stack(seen, 1), drawn.tokens)


def test_steps_compose_to_the_whole():
    spec = layout(codebook_size=8, depth=1, grid=(2, 2), classes=2)
    decoder = CachedTransformer(model_of(spec, sharp=20), spec.vocabulary.length)
    uniforms, legal = image_uniforms(0, range(3), spec.vocabulary.length), allowed_of(spec)
    with torch.inference_mode():
        logits = prefill(decoder, conditions(spec, 3), legal[0])
        drawn = decode_n(decoder, logits, legal, uniforms, SamplingSettings())
    whole = generate(decoder, conditions(spec, 3), legal, uniforms, SamplingSettings())
    assert torch.equal(drawn.tokens, whole.tokens)
    torch.testing.assert_close(drawn.nats, whole.nats, rtol=1e-5, atol=1e-5)  # of another number of rows


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_p": 0.9}], ids=str)
def test_a_contrast_that_is_not_finite_is_an_error(settings: dict[str, float]):
    """The NLL is that of the row with all conditions, which is finite."""
    spec = layout(codebook_size=8, depth=1, grid=(2, 2), classes=2)
    model = model_of(spec)
    absent = torch.full((2, 1), spec.null)
    with torch.no_grad():
        model.get_input_embeddings().weight[spec.null] = torch.nan
    given = CachedTransformer(model, 4), conditions(spec, 2), allowed_of(spec), image_uniforms(0, range(2), 4)
    assert generate(*given, SamplingSettings(**settings)).nats.isfinite().all()  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not finite"):
        generate(*given, SamplingSettings(**settings), [Contrast(absent, 2.0)])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {}, {"temperature": 0.9}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str
)
def test_logits_that_are_not_finite_are_an_error(settings: dict[str, float], value: float):
    spec = layout(codebook_size=8, depth=1, grid=(2, 2), classes=2)
    model = model_of(spec)
    with torch.no_grad():
        model.lm_head.weight[3, 0] = value
    uniforms = image_uniforms(0, range(2), spec.vocabulary.length)
    with pytest.raises(UserError, match="not finite"):
        generate(
            CachedTransformer(model, 4),
            conditions(spec, 2),
            allowed_of(spec),
            uniforms,
            SamplingSettings(**settings),  # type: ignore[arg-type]
        )


def test_a_model_in_training_mode_is_refused():
    spec = layout(codebook_size=8, depth=1, grid=(2, 2), classes=2)
    decoder = CachedTransformer(model_of(spec).train(), spec.vocabulary.length)
    with pytest.raises(ValueError, match="training mode"):
        generate(
            decoder,
            conditions(spec, 2),
            allowed_of(spec),
            image_uniforms(0, range(2), 4),
            SamplingSettings(),
        )


def test_nothing_to_draw_is_nothing():
    spec = layout(codebook_size=8, depth=1, grid=(2, 2), classes=2)
    decoder = CachedTransformer(model_of(spec), spec.vocabulary.length)
    none = conditions(spec, 0)
    drawn = generate(decoder, none, allowed_of(spec), image_uniforms(0, [], 4), SamplingSettings())
    assert drawn.tokens.shape == (0, 4) and drawn.nats.shape == (0,)


@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
def test_stored_weights_decode_as_the_network_does(backbone):
    """Their configuration, names, shapes and logits are those of the network, which is built when it is called."""
    spec, shape = layout(codebook_size=20, depth=1, grid=(3, 4), classes=3), PriorConfig(backbone, 32, 11, 2)
    whole, stored = (Prior(shape, spec, (3, 8, 8), "", stored) for stored in (False, True))
    written = {k: v for k, v in whole.backbone.config.to_diff_dict().items() if k not in WRITER}
    assert written == plain_config(shape, spec)
    weights = whole.backbone.state_dict()
    assert {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in stored.backbone.state_dict().items()}
    stored.backbone.load_state_dict(weights)
    assert isinstance(stored.backbone, StoredBackbone) and whole.eval() and stored.eval()
    tokens, logits = torch.randint(20, (3, 12), generator=torch.Generator().manual_seed(0)), []
    with torch.inference_mode():
        for prior in (whole, stored):
            decoder = CachedTransformer(prior.backbone, spec.vocabulary.length)
            decoder.start(3)
            logits.append(torch.stack([decoder.feed(column[:, None]) for column in tokens.unbind(1)], 1))
            logits.append(prior(tokens))
    assert type(stored.backbone) is type(whole.backbone)
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])


def test_drawing_imports_nothing_slow():
    """Each of these takes a second, more than the images."""
    program = """
import sys
import vqgen.sampling.write_samples
from vqgen.sampling.generator import DEFAULT, Generator
Generator.load(DEFAULT, "cpu").sample(1)
print(*({"transformers", "torchvision", "torchmetrics", "scipy", "sympy", "torch._dynamo"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
