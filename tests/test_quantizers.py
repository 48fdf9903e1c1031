"""FSQ, LFQ and Gumbel-softmax: their contract, their papers' equations, and vector-quantize-pytorch as the oracle."""

import copy
import functools
import math
import signal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from helpers import quantizers as helper
from helpers.quantizers import Largest, pass_through, quantizer_options, same, same_under_autocast, state
from hypothesis import example, given
from hypothesis import strategies as st
from processes import TOKENIZER, at_row, rows, run, weights
from torch import Tensor
from vector_quantize_pytorch import FSQ as LibraryFSQ
from vector_quantize_pytorch import LFQ as LibraryLFQ
from vector_quantize_pytorch import lookup_free_quantization as library_lfq

from vqgen.errors import UsageError
from vqgen.tokenizer.quantizers import codebook, quantizer_for
from vqgen.tokenizer.quantizers.base import Quantizer
from vqgen.tokenizer.quantizers.fsq import FSQ
from vqgen.tokenizer.quantizers.gumbel import GumbelQuantizer
from vqgen.tokenizer.quantizers.lfq import bit_entropies
from vqgen.tokenizer.quantizers.options import FSQ_LEVELS, FSQConfig
from vqgen.training.optimizer import averaged, update_average

Kind = Literal["fsq", "lfq", "gumbel"]
KINDS: tuple[Kind, ...] = ("fsq", "lfq", "gumbel")
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind: Kind, dim: int = 6, seed: int = 0, **options: Any) -> Quantizer:
    """A quantizer of latents with `dim` channels, of about 64 codes."""
    torch.manual_seed(seed)
    if kind == "lfq":
        options = {"entropy_weight": 0.1, "entropy_temperature": 0.5, **options}
    return quantizer_for(dim, quantizer_options(kind, **{"codebook_size": 64, "code_dim": 4, **options}))


def plain(kind: Kind, **options: Any) -> Quantizer:
    """A quantizer whose linear maps are the identity (gumbel: of the logits), so that z is what it quantizes."""
    probe = make(kind, **options)
    width = probe.project_in.out_channels
    quantizer = make(kind, width, **options)
    pass_through(quantizer, width)
    return quantizer


latents = functools.partial(helper.latents, scale=2)


# ---- the contract of every kind ----


@kinds
def test_every_code_is_reached_and_comes_back(kind: Kind) -> None:
    quantizer = make(kind, codebook_size=256)
    codes = torch.arange(quantizer.codebook_size)
    vectors = quantizer.lookup(codes)
    assert len(vectors.unique(dim=0)) == len(codes) == {"fsq": 240}.get(kind, 256)
    if isinstance(quantizer, FSQ):
        vectors = latents_of(quantizer, vectors * quantizer.middle)
    if kind == "gumbel":
        vectors = 5 * torch.eye(256)
    assert torch.equal(quantizer.choose(vectors), codes)


@kinds
def test_bf16_autocast_changes_no_code(kind: Kind) -> None:
    quantizer = make(kind, codebook_size=1024)
    z = latents(8, 6, 16, 16)
    codes = quantizer.encode(z)
    low = copy.deepcopy(quantizer).bfloat16().project_in(z.bfloat16()).float().permute(0, 2, 3, 1).flatten(0, 2)
    assert (quantizer.choose(low) != codes.flatten()).float().mean() > 0.001, "these latents would not show bf16"
    same_under_autocast(quantizer, z)


@kinds
def test_nothing_learns_but_by_gradient(kind: Kind) -> None:
    """No state that processes could disagree on: it is the same after any number of steps, in either mode."""
    quantizer = make(kind)
    before = state(quantizer)
    assert quantizer.training_state == set() and before.keys() == {n for n, _ in quantizer.named_parameters()}
    for mode in (True, False):
        quantizer.train(mode)
        for seed in range(3):
            codes = quantizer(latents(seed=seed)).codes
            quantizer.initialize(latents(seed=seed))
            quantizer.encode(latents(seed=seed))
            quantizer.decode(codes)
    assert same(before, state(quantizer))


@kinds
def test_an_averaged_model_has_the_same_grid(kind: Kind) -> None:
    """Averages take buffers along; in so many steps integer ones come out smaller."""
    quantizer = make(kind, **({"levels": [3, 5, 6, 7]} if kind == "fsq" else {})).eval()
    average = averaged(quantizer)
    for step in range(200):
        update_average(average, quantizer, 0.995, step)
    z = latents()
    assert torch.equal(average.module.encode(z), quantizer.encode(z))  # type: ignore[operator]
    assert torch.equal(average.module(z).z_q, quantizer(z).z_q)  # type: ignore[operator]


@kinds
def test_compiled_it_does_the_same(kind: Kind) -> None:
    """Traced once and for all steps, though the share of the run that is done changes with each."""
    plain, traced = make(kind), make(kind)
    traced.compile(backend="eager")  # the tracing is what can fail
    graphs = []
    for step in range(6):
        plain.training_progress = traced.training_progress = step / 6
        torch.manual_seed(step)
        expected = plain(latents(seed=step))
        torch.manual_seed(step)
        out = traced(latents(seed=step))
        assert torch.equal(out.codes, expected.codes)
        torch.testing.assert_close((out.z_q, out.loss, out.stats), (expected.z_q, expected.loss, expected.stats))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[-3] == graphs[-1]


@kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_vectors_not_in_an_error(kind: Kind, bad: float) -> None:
    """The run looks for it in the loss and names where it began; a code out of range would end it before."""
    quantizer = make(kind)
    z = latents()
    z[0, 2, 1, 1] = bad
    out = quantizer(z)
    assert out.codes.min() >= 0 and out.codes.max() < quantizer.codebook_size
    bounded = kind == "fsq" and bad == math.inf
    assert (out.loss + out.z_q.mean()).isfinite() == bounded


# ---- FSQ ----


def latents_of(quantizer: FSQ, integers: Tensor) -> Tensor:
    """The latents that the bound takes to given numbers: its inverse, by its definition in the paper."""
    assert isinstance(quantizer.config, FSQConfig)
    levels = torch.tensor(quantizer.config.fsq_levels)
    half, offset = (levels - 1) * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
    return ((integers + offset) / half).atanh() - (offset / half).atanh()


@given(levels=st.lists(st.integers(3, 12), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1))
@example(levels=[1000, 3], seed=0)
@example(levels=[999, 4], seed=0)
def test_fsq_rounds_to_the_grid(levels: list[int], seed: int) -> None:
    quantizer = plain("fsq", levels=levels)
    assert isinstance(quantizer, FSQ) and quantizer.codebook_size == math.prod(levels)
    random = torch.Generator().manual_seed(seed)
    bounds = torch.tensor(levels) // 2
    digits = torch.stack([torch.randint(n, (50,), generator=random) for n in levels], 1)
    # Anywhere within half a step of an integer, it is that integer; far outside, it is the outermost.
    near = digits - bounds + 0.98 * (torch.rand(50, len(levels), generator=random) - 0.5)
    low, high = -bounds, torch.tensor(levels) - bounds - 1
    flat = latents_of(quantizer, near.clamp(low, high))
    radix = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    codes = quantizer.choose(flat)
    assert torch.equal(codes, (digits * radix).sum(1))
    torch.testing.assert_close(quantizer.lookup(codes), (digits - bounds) / bounds)
    for far, digit in ((-1e4, torch.zeros_like(bounds)), (1e4, torch.tensor(levels) - 1), (0.0, bounds)):
        assert torch.equal(quantizer.choose(torch.full((1, len(levels)), far)), (digit * radix).sum()[None])


def test_fsq_takes_the_levels_of_the_paper() -> None:
    for bits, levels in zip((8, 10, 12, 14, 16), FSQ_LEVELS):
        quantizer = make("fsq", codebook_size=2**bits)
        assert quantizer.project_in.out_channels == len(levels)
        assert quantizer.codebook_size == math.prod(levels) == len(quantizer.lookup(torch.arange(math.prod(levels))))
        assert abs(math.log2(quantizer.codebook_size) - bits) < 0.2
    assert make("fsq", codebook_size=1024, levels=[5, 3]).codebook_size == 15


def test_fsq_has_no_loss_and_passes_the_gradient_of_the_bound() -> None:
    quantizer = plain("fsq", levels=[8, 5, 6])
    z, upstream = latents(dim=3, scale=1).requires_grad_(), latents(dim=3, seed=2)
    out = quantizer(z)
    assert out.loss.item() == 0 and out.loss.device == z.device
    ((out.z_q * upstream).sum() + out.loss).backward()
    levels = torch.tensor([8.0, 5, 6]).view(3, 1, 1)
    half, shift = (levels - 1) * 1.001 / 2, ((levels % 2 == 0) * 0.5 / ((levels - 1) * 1.001 / 2)).atanh()
    slope = (1 - (z.detach() + shift).tanh().square()) * half / (levels / 2).floor()
    torch.testing.assert_close(z.grad, upstream * slope)


@pytest.mark.parametrize("levels", [*FSQ_LEVELS, [3, 4], [7], [16, 16, 9]])
def test_fsq_parity(levels: list[int]) -> None:
    """Values, order of the codes and gradient are the library's as they stand: nothing to map."""
    ours, theirs = plain("fsq", levels=levels), LibraryFSQ(levels)
    z = latents(4, len(levels), 16, 16).requires_grad_()
    copied = z.detach().clone().requires_grad_()
    out, (values, codes) = ours(z), theirs(copied)
    assert torch.equal(out.codes, codes) and len(codes.unique()) > 2 * len(levels)
    torch.testing.assert_close(out.z_q, values, rtol=0, atol=1e-6)
    upstream = latents(4, len(levels), 16, 16, seed=2)
    (out.z_q * upstream).sum().backward()
    (values * upstream).sum().backward()
    torch.testing.assert_close(z.grad, copied.grad)
    torch.testing.assert_close(ours.lookup(torch.arange(ours.codebook_size)), theirs.implicit_codebook)


@pytest.mark.parametrize(
    ("option", "options"),
    [
        ("levels", {"quantizer": "fsq", "levels": [8, 2]}),
        ("levels", {"quantizer": "fsq", "levels": [1001, 5]}),
        ("levels", {"quantizer": "fsq", "levels": [1000, 1000, 1000]}),
        ("codebook-size", {"quantizer": "lfq", "codebook_size": 2**30}),
        ("codebook-size", {"quantizer": "lfq", "codebook_size": 1000}),
        ("gumbel-temperature-end", {"quantizer": "gumbel", "gumbel_temperature_end": 0.0}),
        ("gumbel-anneal", {"quantizer": "gumbel", "gumbel_anneal": 1.5}),
    ],
)
def test_impossible_options_are_named(option: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{option}") as caught:
        quantizer_options(**options)
    assert "\n" not in str(caught.value)


# ---- LFQ ----


def test_lfq_codes_by_hand() -> None:
    quantizer = plain("lfq", codebook_size=8)
    flat = torch.tensor([[0.1, -1, -3], [-1, 2, -0.5], [-1, -1, 4], [0, 1e-9, -0.0], [5, 6, 7]])
    assert quantizer.choose(flat).tolist() == [1, 2, 4, 2, 7], "bit 0 is dimension 0, and 0 counts as -1"
    assert quantizer.lookup(torch.tensor([1, 6])).tolist() == [[1, -1, -1], [-1, 1, 1]]
    assert make("lfq", codebook_size=2**18).project_in.out_channels == 18


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.5])
def test_lfq_commitment_and_straight_through(weight: float) -> None:
    quantizer = plain("lfq", commitment_weight=weight, entropy_weight=0.0)
    z, upstream = latents(scale=30).requires_grad_(), latents(seed=2)
    out = quantizer(z)
    assert torch.equal(out.z_q, z.sign()), "to the last bit"
    torch.testing.assert_close(out.loss, weight * (z - z.sign()).square().mean())
    assert out.stats.keys() == {"perplexity", "usage"}
    (found,) = torch.autograd.grad((out.z_q * upstream).sum(), z, retain_graph=True)
    assert torch.equal(found, upstream)
    (drawn,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(drawn, weight * 2 * (z - z.sign()).detach() / z.numel())


def brute_force(flat: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Both entropies by the definition: a softmax over the squared distances to all 2^d codes."""
    bits = flat.shape[1]
    table = (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1).to(flat.dtype) * 2 - 1
    q = (-(flat[:, None] - table).square().sum(2) / temperature).softmax(1)
    each = torch.special.xlogy(q, q).sum(1).neg().mean()
    return each, torch.special.xlogy(q.mean(0), q.mean(0)).sum().neg()


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(1, 8),
    count=st.integers(1, 30),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_lfq_entropies_are_those_of_the_definition(seed: int, bits: int, count: int, temperature: float) -> None:
    flat = torch.randn(count, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours, theirs = flat.clone().requires_grad_(), flat.clone().requires_grad_()
    found, expected = bit_entropies(ours, temperature, True), brute_force(theirs, temperature)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(
            torch.autograd.grad(one, ours, retain_graph=True), torch.autograd.grad(other, theirs, retain_graph=True)
        )


def test_lfq_entropies_at_the_extremes() -> None:
    """Sure and even, sure and uneven, unsure; and far from the signs everything stays finite."""
    all_codes = make("lfq", codebook_size=256).lookup(torch.arange(256))
    for flat, each, mean in (
        (all_codes, 0.0, math.log(256)),
        (all_codes[:1].repeat(9, 1), 0.0, 0.0),
        (torch.zeros(9, 8), math.log(256), math.log(256)),
        (1e4 * all_codes, 0.0, math.log(256)),
    ):
        flat = flat.clone().requires_grad_()
        found = bit_entropies(flat, 0.01, True)
        assert found[0].item() == pytest.approx(each, abs=1e-5) and found[1].item() == pytest.approx(mean, abs=1e-5)
        (grad,) = torch.autograd.grad(found[0] - found[1], flat)
        assert grad.isfinite().all()


@pytest.mark.parametrize("diversity", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_lfq_parity(monkeypatch: pytest.MonkeyPatch, diversity: float, temperature: float) -> None:
    """The library's inverse temperature is 1 / ours; its first dimension is the highest bit, ours the lowest."""
    # It bounds its logarithms at 1e-5, which shows where most of 64 codes are that unlikely; ours is exact.
    monkeypatch.setattr(library_lfq, "log", lambda t: t.clamp(min=1e-30).log())
    weights = {"commitment_weight": 0.25, "entropy_weight": 0.1, "entropy_diversity": diversity}
    ours = plain("lfq", entropy_temperature=temperature, **weights)
    theirs = LibraryLFQ(
        dim=6, codebook_size=64, commitment_loss_weight=0.25, entropy_loss_weight=0.1, diversity_gamma=diversity
    ).train()
    z = latents(4, 6, 8, 8, scale=0.3).requires_grad_()
    copied = z.detach().flip(1).requires_grad_()  # dimensions in their order
    out = ours(z)
    (values, codes, loss), parts = theirs(copied, inv_temperature=1 / temperature, return_loss_breakdown=True)
    assert torch.equal(out.codes, codes) and len(codes.unique()) > 50
    torch.testing.assert_close(out.z_q, values.flip(1))
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(out.stats["entropy_each"], parts.per_sample_entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.stats["entropy_mean"], parts.batch_entropy)
    upstream = latents(4, 6, 8, 8, seed=2)
    (out.loss + (out.z_q * upstream).sum()).backward()
    (loss + (values * upstream.flip(1)).sum()).backward()
    assert copied.grad is not None
    torch.testing.assert_close(z.grad, copied.grad.flip(1))
    torch.testing.assert_close(ours.lookup(torch.arange(64)), theirs.get_buffer("codebook").flip(1))


def test_lfq_never_holds_vectors_times_codes() -> None:
    quantizer = make("lfq", codebook_size=2**14)
    with Largest() as seen:
        out = quantizer(latents(8, 6, 16, 16).requires_grad_())
        out.loss.backward()
    assert 2**14 <= seen.elements <= 2048 * 2**7 < 2048 * 2**14 / 100


def test_lfq_entropy_loss_spreads_the_codes() -> None:
    """Vectors that all have one code are driven apart, as far as the bits go, and to the signs."""
    random = torch.Generator().manual_seed(0)
    flat = (0.5 + 0.05 * torch.randn(256, 4, generator=random)).requires_grad_()
    quantizer = make("lfq", codebook_size=16)
    assert len(quantizer.choose(flat).unique()) == 1
    optimizer = torch.optim.Adam([flat], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        each, mean = bit_entropies(flat, 1.0, True)
        (each - mean).backward()
        optimizer.step()
    each, mean = bit_entropies(flat, 1.0, True)
    assert len(quantizer.choose(flat).unique()) == 16
    assert each < 0.05 and mean > 0.98 * math.log(16)


def test_lfq_entropy_of_two_processes_is_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with half of the latents: what they send and get is seen from here, their gradients are averaged."""
    sent: list[Tensor] = []
    whole, halves = latents(seed=7), latents(seed=7).chunk(2)
    one = make("lfq")
    expected = one(whole)
    expected.loss.backward()
    monkeypatch.setattr(codebook, "distributed", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda mean: sent.append(mean.clone()))
    for half in halves:
        make("lfq")(half)
    monkeypatch.setattr(dist, "all_reduce", lambda mean: mean.copy_(sent[0] + sent[1]))
    two = make("lfq")
    outs = [two(half) for half in halves]
    (sum(out.loss for out in outs) / 2).backward()
    for out in outs:
        torch.testing.assert_close(out.stats["entropy_mean"], expected.stats["entropy_mean"])
    torch.testing.assert_close(sum(out.loss for out in outs) / 2, expected.loss)
    torch.testing.assert_close(two.project_in.weight.grad, one.project_in.weight.grad)


def test_lfq_asks_no_other_process_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of several may look at a batch alone."""
    asked: list[int] = []
    monkeypatch.setattr(codebook, "distributed", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda total: asked.append(total.numel()))
    quantizer = make("lfq")
    trained = quantizer(latents()).stats["entropy_mean"]
    assert asked == [64]
    torch.testing.assert_close(quantizer.eval()(latents()).stats["entropy_mean"], trained)
    assert asked == [64]


# ---- Gumbel-softmax ----


def gumbel(progress: float = 1.0, seed: int = 0, **options: Any) -> GumbelQuantizer:
    """With the logits as latents, at a share of the run."""
    quantizer = plain("gumbel", seed=seed, **{"codebook_size": 8, **options})
    assert isinstance(quantizer, GumbelQuantizer)
    quantizer.training_progress = progress
    return quantizer


def test_gumbel_temperature_is_a_function_of_progress() -> None:
    quantizer = gumbel(gumbel_temperature=1.0, gumbel_temperature_end=0.1, gumbel_anneal=0.5)

    def at(progress: float) -> float:
        quantizer.training_progress = progress
        return quantizer.temperature

    assert at(0) == 1.0 and at(0.5) == at(0.7) == at(1) == 0.1
    assert at(0.25) == pytest.approx(0.55), "half-way down the cosine"
    assert at(0.125) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    falling = [at(i / 100) for i in range(51)]
    assert falling == sorted(set(falling), reverse=True)
    assert at(0.25) == pytest.approx(0.55), "and no other state"
    assert gumbel(0.0, gumbel_anneal=0.0).temperature == 0.0625
    assert gumbel(0.999, gumbel_anneal=1.0, gumbel_temperature_end=0.5).temperature > 0.5


@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_gumbel_sample_by_hand(progress: float) -> None:
    """The mixture by the definition, with the noise that the generator gives at this point, and its gradients."""
    quantizer = gumbel(progress, gumbel_kl_weight=0.0)
    z, upstream = latents(2, 8, 3, 5).requires_grad_(), latents(2, 8, 3, 5, seed=2)
    torch.manual_seed(11)
    out = quantizer(z)
    torch.manual_seed(11)
    noise = -torch.empty(30, 8).exponential_().log()
    logits = z.permute(0, 2, 3, 1).reshape(30, 8)
    y = ((logits + noise) / quantizer.temperature).double()
    y = (y - y.logsumexp(1, keepdim=True)).exp().float()
    expected = quantizer.project_out((y @ quantizer.codebook).view(2, 3, 5, 4).permute(0, 3, 1, 2))
    torch.testing.assert_close(out.z_q, expected)
    wanted = [z, quantizer.codebook]
    ours = torch.autograd.grad((out.z_q * upstream).sum(), wanted)
    theirs = torch.autograd.grad((expected * upstream).sum(), wanted)
    for one, other in zip(ours, theirs):
        assert one.any()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gumbel_as_cold_draws_codes_by_their_probabilities() -> None:
    """As the temperature goes to 0 the mixture is code k with probability softmax(logits)_k (Jang et al., eq. 1)."""
    quantizer = gumbel(gumbel_temperature_end=1e-4)
    logits = torch.tensor([1.5, 0.0, -1.0, 2.0, 0.3, 0.3, -0.5, 0.9])
    torch.manual_seed(0)
    vectors = quantizer.quantize(logits.repeat(20_000, 1)).vectors
    distances = torch.cdist(vectors.detach(), quantizer.codebook.detach())
    nearest, codes = distances.min(1)
    assert (nearest < 1e-3).float().mean() > 0.99
    expected = 20_000 * logits.softmax(0)
    chi_square = ((codes.bincount(minlength=8) - expected).square() / expected).sum()
    assert chi_square < 24.3, "beyond the 0.999 quantile of 7 degrees of freedom"
    # Warm, the mixtures lie between the codes.
    warm = gumbel(0.0, gumbel_temperature=1.0).quantize(logits.repeat(1000, 1)).vectors
    assert (torch.cdist(warm.detach(), quantizer.codebook.detach()).min(1).values > 1e-2).float().mean() > 0.9


def test_gumbel_tends_to_the_code_it_chooses_without_noise() -> None:
    """With one logit far above the noise, colder mixtures come nearer and nearer to the code of evaluation."""
    z = 30 * torch.eye(8)[torch.arange(30) % 8].view(2, 3, 5, 8).permute(0, 3, 1, 2)
    distances = []
    for temperature in (30.0, 10.0, 3.0, 1.0, 0.1):
        quantizer = gumbel(gumbel_temperature_end=temperature)
        torch.manual_seed(0)
        soft = quantizer(z).z_q
        distances.append((soft - quantizer.eval()(z).z_q).square().mean().item())
    assert distances == sorted(distances, reverse=True) and distances[-1] < 1e-3 * distances[0]


def test_gumbel_noise_is_of_the_generator_alone_and_evaluation_has_none() -> None:
    z = latents(2, 8, 3, 5)
    samples = []
    for seed in (3, 3, 4):
        quantizer = gumbel(0.0)
        torch.manual_seed(seed)
        samples.append(quantizer(z).z_q)
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])
    quantizer.eval()
    before = torch.get_rng_state()
    out = quantizer(z)
    assert torch.equal(out.z_q, quantizer(z).z_q) and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out.codes.flatten(), z.permute(0, 2, 3, 1).reshape(30, 8).argmax(1))


@pytest.mark.parametrize("weight", [0.0, 5e-4, 2.0])
def test_gumbel_kl_by_hand(weight: float) -> None:
    quantizer = gumbel(gumbel_kl_weight=weight, entropy_weight=0.0)
    z = latents(2, 8, 3, 5).requires_grad_()
    copied = z.detach().clone().requires_grad_()
    uniform = torch.distributions.Categorical(logits=torch.zeros(8))
    choices = torch.distributions.Categorical(logits=copied.permute(0, 2, 3, 1))
    kl = torch.distributions.kl_divergence(choices, uniform).mean()
    for mode in (True, False):
        out = quantizer.train(mode)(z)
        torch.testing.assert_close(out.loss, weight * kl)
        torch.testing.assert_close(out.stats["gumbel_kl"], kl.detach())
    out.loss.backward()
    (weight * kl).backward()
    torch.testing.assert_close(z.grad, copied.grad)
    extremes = (torch.zeros(1, 8, 1, 1), 0.0), (1e3 * torch.eye(8)[:1, :, None, None], math.log(8))
    for logits, expected in extremes:
        assert quantizer(logits).stats["gumbel_kl"].item() == pytest.approx(expected, abs=1e-5)


def test_gumbel_entropy_loss_by_hand() -> None:
    """Of the choices themselves, whatever the temperature of the samples."""
    quantizer = gumbel(0.3, gumbel_kl_weight=0.0, entropy_weight=0.2, entropy_diversity=1.5)
    z = latents(2, 8, 3, 5).requires_grad_()
    copied = z.detach().clone().requires_grad_()
    q = copied.permute(0, 2, 3, 1).reshape(30, 8).softmax(1)
    each = torch.distributions.Categorical(q).entropy().mean()
    mean = torch.distributions.Categorical(q.mean(0)).entropy()
    out = quantizer(z)
    torch.testing.assert_close(out.loss, 0.2 * (each - 1.5 * mean))
    torch.testing.assert_close(out.stats["entropy_each"], each.detach())
    torch.testing.assert_close(out.stats["entropy_mean"], mean.detach())
    out.loss.backward()
    (0.2 * (each - 1.5 * mean)).backward()
    torch.testing.assert_close(z.grad, copied.grad)


def test_gumbel_logits_stand_out_of_the_noise_from_the_start() -> None:
    noise = math.pi / math.sqrt(6)  # standard deviation of the Gumbel distribution
    assert make("gumbel").vectors(latents(scale=1)).std().item() > noise
    default = torch.nn.Conv2d(6, 64, 1)(latents(scale=1)).std().item()
    assert default < noise, "a layer's usual weights would not show the difference"


def test_gumbel_start_gathers_no_logits() -> None:
    quantizer, z = gumbel(), latents(2, 8, 3, 5)
    with Largest() as seen:
        quantizer.initialize(z)
    assert seen.elements == 0


# A run in which temperature and noise matter: annealed over half of it.
TRAINING = (
    "--data demo --channels 1 --size 16 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 --code-dim 4 "
    "--quantizer gumbel --codebook-size 16 --gumbel-temperature 2 --gumbel-temperature-end 0.5 --lr-warmup 1 "
    "--batch-size 8 --steps 8 --validation-images 8 --precision fp32 --log-every 1 --checkpoint-every 3"
).split()


@pytest.mark.slow
def test_gumbel_run_anneals_and_resumes_exactly(tmp_path: Path) -> None:
    run(TOKENIZER, *TRAINING, "--output", tmp_path / "whole").ok()
    found = [row["train/gumbel_temperature"] for row in rows(tmp_path / "whole") if "train/loss" in row]
    expected = [0.5 + 1.5 * (1 + math.cos(math.pi * min(1, 2 * step / 8))) / 2 for step in range(8)]
    assert found == pytest.approx(expected)
    words = [*TRAINING, "--output", tmp_path / "killed"]
    assert run(TOKENIZER, *words, hook=at_row(5)).code == -signal.SIGKILL
    assert "step-00000003" in run(TOKENIZER, *words).ok().err
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
