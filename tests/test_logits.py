"""From logits to tokens: every filter against a plain numpy one, and the settings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vqgen.errors import UsageError
from vqgen.sampling.decoding.generate import decode_one
from vqgen.sampling.decoding.logits import apply_temperature, choose, draw, guide, keep_min_p, keep_top_k, keep_top_p
from vqgen.sampling.settings import SamplingSettings

LARGEST_UNIFORM = 1 - 2.0**-53
shapes = st.tuples(st.integers(1, 4), st.integers(1, 12))
# Steps of 1/8, so that ties occur and nothing hangs on the last bit.
rows = arrays(np.float32, shapes, elements=st.integers(-64, 64).map(lambda i: i / 8))
uniforms = st.one_of(st.just(0.0), st.just(LARGEST_UNIFORM), st.floats(0, LARGEST_UNIFORM))


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


def kept(logits: torch.Tensor) -> np.ndarray:
    return logits.isfinite().numpy()


@given(rows, st.integers(0, 15))
def test_top_k_keeps_the_k_largest_and_what_equals_the_last_of_them(logits, k):
    result = keep_top_k(torch.from_numpy(logits), k)
    for row, mask in zip(logits, kept(result)):
        border = -np.inf if k == 0 or k >= len(row) else np.sort(row)[-k]
        np.testing.assert_array_equal(mask, row >= border)
    assert torch.equal(result[result.isfinite()], torch.from_numpy(logits)[result.isfinite()])


@given(rows, st.floats(1e-9, 1))
def test_top_p_keeps_the_fewest_that_reach_p(logits, p):
    for row, mask in zip(logits, kept(keep_top_p(torch.from_numpy(logits), p))):
        probabilities = softmax(row)
        order = np.argsort(-row, kind="stable")
        count = int(mask.sum())
        assert count >= 1
        assert set(np.flatnonzero(mask)) == set(order[:count])  # the likeliest, of equals the first
        assert probabilities[order[:count]].sum() >= p - 1e-9
        assert count == 1 or probabilities[order[: count - 1]].sum() < p + 1e-9


def test_top_p_at_its_ends():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert torch.equal(keep_top_p(logits, 1.0), logits)
    assert kept(keep_top_p(logits, 1e-12)).tolist() == [[False, True, False]]
    assert kept(keep_top_p(torch.zeros(1, 4), 0.5)).tolist() == [[True, True, False, False]]


@given(rows, st.floats(0, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(logits, p):
    for row, mask in zip(logits, kept(keep_min_p(torch.from_numpy(logits), p))):
        share = softmax(row) / softmax(row).max()
        clear = np.abs(share - p) > 1e-5
        np.testing.assert_array_equal(mask[clear], (share >= p)[clear])
        assert mask[row.argmax()]


@given(rows, st.floats(0.05, 20))
def test_temperature_divides_the_logits(logits, temperature):
    result = apply_temperature(torch.from_numpy(logits), temperature).double().softmax(-1)
    for row, found in zip(logits, result.numpy()):
        np.testing.assert_allclose(found, softmax(row.astype(np.float64) / temperature), rtol=1e-3, atol=1e-7)


def test_a_temperature_near_zero_overflows_nothing():
    logits = torch.tensor([[5.0, 80.0, -3.0]])
    for temperature in (1e-40, 1e-50, 1e-300):
        assert apply_temperature(logits, temperature).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]


def test_guidance_is_the_line_through_both():
    rows = torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 1.0]])
    assert guide(rows, [1.0]).tolist() == rows[0].tolist()
    assert guide(rows, [0.0]).tolist() == rows[1].tolist()
    # (1 + w) conditional - w unconditional with w = 2
    assert guide(rows, [3.0]).tolist() == [[3 * 1 - 2 * 2, 3 * 4 - 2 * 1]]
    assert guide(rows[:1], []) is rows[0]


@given(rows, st.data())
def test_draw_inverts_the_cumulative_distribution(logits, data):
    given_uniforms = data.draw(st.lists(uniforms, min_size=len(logits), max_size=len(logits)))
    tokens = draw(torch.from_numpy(logits), torch.tensor(given_uniforms, dtype=torch.float64)).tolist()
    for row, uniform, token in zip(logits, given_uniforms, tokens):
        cumulative = np.cumsum(softmax(row))
        assert (cumulative[token - 1] if token else 0.0) <= uniform + 1e-9
        assert uniform < cumulative[token] + 1e-9


@given(rows, st.integers(1, 6), uniforms)
def test_a_filtered_token_is_never_drawn(logits, k, uniform):
    filtered = keep_top_k(torch.from_numpy(logits), k)
    tokens = draw(filtered, torch.full((len(logits),), uniform, dtype=torch.float64))
    assert filtered.gather(1, tokens[:, None]).isfinite().all()


def test_a_filtered_token_at_either_end_is_passed_over():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf], [-math.inf, 0.0, -math.inf]])
    assert draw(logits, torch.tensor([0.0, LARGEST_UNIFORM], dtype=torch.float64)).tolist() == [1, 1]


@given(rows, st.data())
def test_a_row_depends_on_nothing_but_itself(logits, data):
    settings = SamplingSettings(
        temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        top_k=data.draw(st.integers(0, 5)),
        top_p=data.draw(st.sampled_from([0.3, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.2])),
    )
    tensor = torch.from_numpy(logits)
    given_uniforms = torch.linspace(0.1, 0.9, len(logits), dtype=torch.float64)
    together = choose(tensor, given_uniforms, settings)
    for i in range(len(logits)):
        one = slice(i, i + 1)
        assert choose(tensor[one], given_uniforms[one], settings) == together[i]


def test_the_order_is_top_k_top_p_after_temperature():
    # Probabilities after top-k 2 are 0.73 and 0.27; without it the first holds 0.49 and top-p 0.6 would keep two.
    logits, half = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0.99], dtype=torch.float64)
    assert choose(torch.tensor([[1.0, 0.0, -0.1, -0.2]]), half, SamplingSettings(top_k=2, top_p=0.6)).item() == 0
    assert choose(logits, half, SamplingSettings(top_p=0.6)).item() != 0
    # Top-p sees the sharpened distribution: at temperature 0.1 the first holds nearly all.
    assert choose(logits, half, SamplingSettings(temperature=0.1, top_p=0.6)).item() == 0


def test_guidance_comes_before_all():
    """It turns the order around, and greedy follows; the nats are the prior's own."""
    logits, half = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]), torch.tensor([0.99]).double()
    greedy = SamplingSettings(temperature=0, guidance_scale=2)
    token, nats = decode_one(logits, 5, half, greedy, [2.0])
    assert token.item() != 5
    torch.testing.assert_close(nats, -logits[:1].log_softmax(-1)[:, token.item() - 5])
    assert decode_one(logits[:1], 5, half, greedy)[0].item() == 5


def test_guidance_schedules():
    def scales(schedule, length=5, **more):
        settings = SamplingSettings(guidance_scale=3.0, guidance_schedule=schedule, **more)
        return [round(settings.guidance_at(3.0, i, length), 6) for i in range(length)]

    assert scales("constant") == [3.0] * 5
    assert scales("linear") == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert scales("cosine") == [1.0, 1.292893, 2.0, 2.707107, 3.0]
    assert scales("power-cosine", guidance_exponent=1) == scales("cosine")
    assert scales("power-cosine", guidance_exponent=2) == [
        1.0,
        *(round(2 - math.cos(math.pi * x), 6) for x in (1 / 16, 1 / 4, 9 / 16)),
        3.0,
    ]
    # As RAR has it: (1 - cos(pi * share^2.75)) / 2 * (scale - 1) + 1.
    assert scales("power-cosine")[2] == round((1 - math.cos(math.pi * 0.5**2.75)) / 2 * (3 - 1) + 1, 6)
    assert scales("interval", guidance_interval=[0.2, 0.6]) == [1.0, 3.0, 3.0, 1.0, 1.0]
    assert scales("interval") == [3.0] * 5
    assert scales("linear", length=1) == [1.0]


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals():
    logits = torch.tensor([[1.0, 5.0, 5.0], [2.0, 0.0, 1.0]])
    assert choose(logits, torch.tensor([0.9, 0.9]), SamplingSettings(temperature=0)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("guidance_scale", -1.0),
        ("guidance_scale", math.nan),
        ("oversample", 0.5),
        ("oversample", math.inf),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')}: found {value:g}, expected"):
        SamplingSettings(**{name: value})


@pytest.mark.parametrize("value", [[0.5, 0.5], [0.5], [0.0, 1.1], [-0.1, 1.0], 0.3])
def test_an_interval_is_two_shares(value):
    with pytest.raises(UsageError, match=r"--guidance-interval: found"):
        SamplingSettings(guidance_interval=value, guidance_schedule="interval", guidance_scale=2.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"guidance_interval": [0.2, 0.8], "guidance_scale": 2.0},
            "--guidance-interval: .* --guidance-schedule interval",
        ),
        ({"guidance_schedule": "linear"}, "--guidance-schedule: .* a --guidance-scale .* other than 1"),
        ({"guidance_exponent": 2.0, "guidance_scale": 2.0}, "--guidance-exponent: .* power-cosine"),
        ({"guidance_schedule": "cosin", "guidance_scale": 2.0}, "--guidance-schedule: found cosin"),
    ],
)
def test_guidance_that_would_do_nothing_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        SamplingSettings(**options)
