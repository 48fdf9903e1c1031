"""Health rules: each finds its problem in a history that has it, and nothing in healthy ones."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from vqgen.training.health import (
    Finding,
    adversary_dominates,
    codebook_collapse,
    codebook_too_large,
    learning_rate_too_high,
    non_finite_origin,
    overfitting,
    pinned_discriminator,
)


def has(text: str, *numbers: float) -> bool:
    """Whether a message states every one of these numbers."""
    stated = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
    return all(number in stated for number in numbers)


# ---- a codebook too large ----


@pytest.mark.parametrize(
    ("codes", "vectors", "fitting"),
    [(65_536, 60_800, 1024), (512, 4095, 64), (1024, 1024, 32), (512, 0, 2), (4, 31, 2)],
)
def test_a_codebook_too_large_for_the_images(codes, vectors, fitting):
    found = codebook_too_large(codes, vectors)
    assert found is not None and found.name == "codebook too large"
    assert has(found.measured, codes, vectors) and f"--codebook-size {fitting}," in found.remedy


@pytest.mark.parametrize(
    ("codes", "vectors"),
    [
        (512, 8000 * 64),  # the demo
        (8192, 50_000 * 64),  # CIFAR-10
        (16_384, 1000 * 256),  # a thousand photographs
        (512, 4096),
    ],
)
def test_a_codebook_that_the_images_fill(codes, vectors):
    assert codebook_too_large(codes, vectors) is None


# ---- codebook collapse ----


def validations(*metrics: tuple[float, float]) -> list[dict]:
    """Codes used and perplexity at each validation, among rows of training metrics."""
    rows = []
    for used, perplexity in metrics:
        rows += [{"step": 1, "train/loss": 0.1}, {"heldout/codes_used": used, "heldout/perplexity": perplexity}]
    return rows


def test_collapse_by_few_codes_and_by_uneven_use():
    few = codebook_collapse(validations((100, 60), (90, 50)), 512, "use less")
    assert few is not None and few.name == "codebook collapse" and few.remedy == "use less"
    assert has(few.measured, 90, 512, 50)
    uneven = codebook_collapse(validations((400, 20), (410, 21)), 512, "")
    assert uneven is not None


@pytest.mark.parametrize(
    "metrics",
    [
        [(100, 60)],  # once is the start of training
        [(100, 60), (400, 300)],  # it recovers
        [(400, 300), (100, 60)],  # not twice yet
        [(505, 470), (500, 460)],  # healthy
        [(130, 60), (129, 60)],  # a quarter
        [],
    ],
)
def test_no_collapse(metrics):
    assert codebook_collapse(validations(*metrics), 512, "") is None


def test_collapse_counts_the_codes_that_could_occur():
    """1000 held-out positions cannot use 16384 codes."""
    rows = validations((700, 500), (700, 500))
    assert codebook_collapse(rows, 1000, "") is None and codebook_collapse(rows, 16_384, "") is not None


def test_collapse_waits_for_the_first_revivals():
    """The first steps of the vqvae preset on CIFAR-10: fewer and fewer codes until unused ones are revived."""
    metrics = {20: (490, 148), 40: (250, 94), 60: (240, 95), 80: (250, 99), 200: (245, 96), 220: (800, 500)}
    rows = [
        {"step": step, "heldout/codes_used": used, "heldout/perplexity": perplexity}
        for step, (used, perplexity) in metrics.items()
    ]
    assert codebook_collapse(rows[:4], 1024, "", settled=0) is not None
    for count in range(len(rows) + 1):
        assert codebook_collapse(rows[:count], 1024, "", settled=200) is None
    assert codebook_collapse([*rows[:5], {**rows[4], "step": 220}], 1024, "", settled=200) is not None


# ---- a learning rate too high ----


def logged(every: int, growth: list[float], losses: list[float], lr: float = 2e-3) -> list[dict]:
    """Training rows, one every so many steps."""
    keys = ("train/weight_growth", "train/reconstruction")
    return [
        {"step": every * (i + 1), "train/lr": lr, **dict(zip(keys, pair))} for i, pair in enumerate(zip(growth, losses))
    ]


# From real runs on the demo's images; the second and third differ from the first in their learning rate alone.
HEALTHY = (
    [1.000, 1.001, 1.002, 1.005, 1.007, 1.008, 1.009, 1.009, 1.009, 1.010, 1.010, 1.010],
    [0.5128, 0.2222, 0.1459, 0.09368, 0.07078, 0.06622, 0.05534, 0.05029, 0.04585, 0.04552, 0.04216, 0.04103],
)
THIRTYFOLD = (
    [1.034, 1.447, 2.219, 2.828, 3.222, 3.465, 3.607, 3.685, 3.726, 3.743, 3.750, 3.751],
    [0.5941, 0.3919, 0.3818, 0.2379, 0.1949, 0.1752, 0.1535, 0.1241, 0.1145, 0.1065, 0.09949, 0.1014],
)
# 30 times as high, without warm-up, a row every 10 steps.
EXPLODING = ([3.18, 5.21, 5.92], [2.94, 0.458, 0.296])
# The vqvae preset on CIFAR-10, a row every 20 steps, as it is and 30 times as high.
VQVAE = ([1.000, 1.001, 1.002], [0.2388, 0.1398, 0.1034])
VQVAE_THIRTYFOLD = ([1.059, 1.368, 1.856], [0.3028, 0.2649, 0.2065])


@pytest.mark.parametrize(
    ("every", "run", "numbers"),
    [
        (5, THIRTYFOLD, (1.4, 5, 10)),
        (10, EXPLODING, (3.2, 0, 10)),
        (20, VQVAE_THIRTYFOLD, (1.3, 20, 40)),
        (10, ([1.0] * 3, [4.41, 0.604, 0.328]), (4.41,)),
        (20, ([1.0] * 12, [0.03] * 7 + [0.2, 0.3, 0.3, 0.25, 0.28]), (0.03, 0.28)),
    ],
)
def test_a_learning_rate_too_high(every, run, numbers):
    found = learning_rate_too_high(logged(every, *run, lr=0.06))
    assert found is not None and found.name == "learning rate too high"
    assert has(found.measured, *numbers) and has(found.remedy, 0.06) and "--lr " in found.remedy


@pytest.mark.parametrize(
    ("every", "run"),
    [
        (5, HEALTHY),
        (20, VQVAE),
        (100, ([1.05, 1.1, 1.2, 1.37, 1.6, 1.9, 2.5, 3.2], [0.05] * 8)),  # weights grow in long runs, too
        (1, ([1.002, 1.004, 1.006], [1.1, 0.9, 0.7])),  # a dark image and an untrained decoder
        (20, ([1.0] * 12, [0.03] * 7 + [0.05, 0.06, 0.07, 0.05, 0.06])),  # it doubles
        (20, ([1.0] * 12, [0.03] * 11 + [0.3])),  # one bad batch
        (20, ([1.0] * 9, [0.03] * 4 + [0.3] * 5)),  # too short to tell
        (5, ([], [])),
    ],
)
def test_a_learning_rate_that_will_do(every, run):
    for count in range(len(run[0]) + 1):
        assert learning_rate_too_high(logged(every, run[0][:count], run[1][:count])) is None


def test_a_learning_rate_is_told_from_rows_of_a_resumed_run():
    """What was not finite comes back as text, and a row of a validation lies between."""
    rows = [{"step": 5, "train/weight_growth": "nan", "train/reconstruction": "inf"}, {"step": 5, "heldout/psnr": 9.0}]
    assert learning_rate_too_high(rows) is None
    found = learning_rate_too_high([*rows, {"step": 10, "train/weight_growth": 1.5}])
    assert found is not None and has(found.measured, 1.5, 0, 10)


def test_an_adversary_may_raise_the_reconstruction_loss():
    rows = logged(20, [1.0] * 12, [0.03] * 7 + [0.3] * 5)
    assert learning_rate_too_high(rows) is not None
    rows[8]["train/adversarial"] = 0.1
    assert learning_rate_too_high(rows) is None


# ---- an adversarial loss that dominates ----


def duel(real: list[float], fake: list[float]) -> list[dict]:
    """Rows of both players' mean logits."""
    return [
        {"step": i, "train/adversarial": -f, "train/discriminator_real": r, "train/discriminator_fake": f}
        for i, (r, f) in enumerate(zip(real, fake))
    ]


# Real runs: the discriminator from step 0 at full weight, and one that starts after 40 steps at a tenth of it.
RUINED = ([0.096, 0.100, 0.099, 0.094, 0.089, 0.078], [0.194, 0.345, 0.322, 0.253, 0.221, 0.186])
KEEPING_UP = ([0.110, 0.002, -0.046, -0.067, -0.068], [0.052, -0.077, -0.143, -0.163, -0.171])


def test_a_decoder_that_serves_the_discriminator():
    found = adversary_dominates(duel(*RUINED))
    assert found is not None and found.name == "adversarial loss dominates"
    assert has(found.measured, 0.19, 0.08)
    assert "--gan-start" in found.remedy and "--gan-weight" in found.remedy


@pytest.mark.parametrize(
    ("real", "fake"),
    [
        KEEPING_UP,
        ([0.025, 0.020, 0.009, 0.0003, 0.002, -0.003], [0.018, 0.013, 0.003, -0.003, 0.0004, -0.004]),  # even
        (RUINED[0][:4], RUINED[1][:4]),  # too short to tell
        ([0.1, 0.1, 0.1, 0.4, 0.1], [0.3, 0.3, 0.3, 0.3, 0.3]),  # not in every row
        ([], []),
    ],
)
def test_a_discriminator_that_keeps_up(real, fake):
    assert adversary_dominates(duel(real, fake)) is None


def test_a_discriminator_that_trains_alone_first_ruins_nothing():
    rows = [{key: value for key, value in row.items() if key != "train/adversarial"} for row in duel(*RUINED)]
    assert adversary_dominates(rows) is None
    assert adversary_dominates([*rows, *duel([0.1], [0.4])]) is None


def quality(*metrics: tuple[float, ...], adversarial_from: int = 1) -> list[dict]:
    """Validations with PSNR and, where it is measured, LPIPS; the adversarial loss starts after `adversarial_from`."""
    rows: list[dict] = []
    for i, values in enumerate(metrics):
        rows += [{"train/adversarial": 0.1}] if i >= adversarial_from else []
        rows.append(dict(zip(("heldout/psnr", "heldout/lpips"), values)))
    return rows


def test_reconstructions_that_the_discriminator_ruins():
    found = adversary_dominates(quality((15.6,), (17.2,), (14.8,), (14.4,)))
    assert found is not None and has(found.measured, 17.2, 14.4)
    worse = quality((22.0, 0.41), (22.2, 0.40), (18.4, 0.53), (14.5, 0.64))
    assert adversary_dominates(worse) is not None
    risen = [{"train/reconstruction": 0.03}] * 7 + [{"train/reconstruction": 0.2, "train/adversarial": 0.2}] * 5
    found = adversary_dominates(risen)
    assert found is not None and has(found.measured, 0.03, 0.2)


@pytest.mark.parametrize(
    "rows",
    [
        quality((22.0, 0.41), (22.2, 0.40), (20.3, 0.30), (20.1, 0.27)),  # what it is there for
        quality((22.0,), (22.2,), (20.9,), (20.8,)),  # within what it may cost
        quality((15.6,), (17.5,), (18.4,), (19.1,), (19.3,)),  # healthy
        quality((22.0,), (22.2,), (19.0,), (21.5,)),  # it recovers
        quality((22.0,), (22.2,), (19.0,)),  # not twice yet
        quality((17.2,), (14.8,), (14.4,), adversarial_from=9),  # no adversarial loss yet: another problem
        [{"train/reconstruction": 0.03}] * 7 + [{"train/reconstruction": 0.05, "train/adversarial": 0.2}] * 5,
        [],
    ],
)
def test_reconstructions_that_the_discriminator_does_not_ruin(rows):
    for count in range(len(rows) + 1):
        assert adversary_dominates(rows[:count]) is None


# ---- a pinned discriminator ----


def judged(*losses: float) -> list[dict]:
    return [row for loss in losses for row in ({"train/discriminator": loss}, {"heldout/psnr": 20.0})]


def test_discriminator_that_always_wins():
    found = pinned_discriminator(judged(0.4, 0.01, 0.005, 0.0, 0.001, 0.002))
    assert found is not None and has(found.measured, 0.002) and "--gan-start" in found.remedy


def test_discriminator_that_says_nothing():
    found = pinned_discriminator(judged(0.9, 1.0, 1.001, 0.999, 1.0, 1.0))
    assert found is not None and "--gan-lr" in found.remedy


@pytest.mark.parametrize(
    "losses",
    [
        [0.001] * 4,  # too short to tell
        [0.01, 0.01, 0.3, 0.01, 0.01],
        [1.0, 1.0, 0.97, 1.0, 1.0],
        [0.8, 0.75, 0.82, 0.7, 0.77],
        [1.3] * 5,  # worse than nothing is not pinned
        [],
    ],
)
def test_discriminator_at_work(losses):
    assert pinned_discriminator(judged(*losses)) is None


def test_rows_of_a_resumed_run_are_read():
    """Numbers that were not finite come back from metrics.jsonl as text; they are no numbers for a rule."""
    rows = [*judged(0.0, 0.0, 0.0, 0.0), {"train/discriminator": "nan"}]
    assert pinned_discriminator(rows) is None
    assert pinned_discriminator([*rows, *judged(0.0)]) is not None


# ---- overfitting ----


def history(heldout: list[float], train: list[float], noise: float = 0.0) -> list[dict]:
    """Five rows of training loss before each validation; `noise` alternates between them."""
    rows: list[dict] = []
    for after, during in zip(heldout, train):
        rows += [{"train/loss": during + (noise if i % 2 else -noise)} for i in range(5)]
        rows.append({"heldout/nats_per_token": after})
    return rows


FALLING = [3.0, 2.8, 2.6, 2.4, 2.2]


def test_overfitting():
    found = overfitting(history([3.0, 2.9, 2.95, 3.0, 3.1], FALLING))
    assert found is not None and found.name == "prior overfits"
    assert has(found.measured, 3.1, 2.9) and "--dropout" in found.remedy


@pytest.mark.parametrize(
    ("heldout", "train"),
    [
        ([3.0, 2.9, 2.8, 2.7, 2.6], FALLING),  # healthy
        ([3.0, 2.9, 2.95, 2.94, 3.1], FALLING),  # not at every validation
        ([3.0, 2.9, 2.901, 2.902, 2.903], FALLING),  # within 1 % of the best
        ([3.0, 2.9, 2.95, 3.0, 3.1], FALLING[::-1]),  # training got worse as well: another fault
        ([2.9, 2.95, 3.0], [3.0, 2.8, 2.6]),  # too short to tell
        ([], []),
    ],
)
def test_no_overfitting(heldout, train):
    assert overfitting(history(heldout, train)) is None


def test_overfitting_is_told_through_the_noise_of_the_training_loss():
    """The last rows of training loss say nothing; the means between validations do."""
    rising = [3.0, 2.9, 2.95, 3.0, 3.1]
    for noise in (0.5, -0.5):
        assert overfitting(history(rising, FALLING, noise)) is not None
        assert overfitting(history(rising, FALLING[::-1], noise)) is None


def test_overfitting_needs_no_row_of_training_in_every_interval():
    rows = [{"train/loss": 3.0}, {"heldout/nats_per_token": 3.0}, {"heldout/nats_per_token": 3.1}]
    rows += [{"heldout/nats_per_token": 3.2}, {"train/loss": 2.0}, {"heldout/nats_per_token": 3.3}]
    assert overfitting(rows) is not None
    assert overfitting([row for row in rows if "train/loss" not in row]) is None


def test_findings_are_one_line():
    text = str(Finding("a fault", "2 of 3", "use --this"))
    assert text == "a fault: 2 of 3; use --this"


# ---- where a non-finite number begins ----


class Block(nn.Module):
    """A linear layer whose output is added to the input, `scale` times."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.linear(x)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Block(), nn.BatchNorm1d(4), Block(), nn.Linear(4, 1))


X = torch.ones(3, 4)


def test_origin_in_the_weights():
    net = model().eval()
    net[3].linear.weight.data[1, 2] = math.nan
    assert non_finite_origin(net, lambda: net(X)) == "the weights 3.linear.weight"


def test_origin_in_a_buffer():
    """An EMA codebook is a buffer too."""
    net = model().eval()
    net[2].running_mean[0] = math.inf
    assert non_finite_origin(net, lambda: net(X)) == "the weights 2.running_mean"


def test_origin_in_a_forward_pass_that_overflows():
    net = model().eval()
    net[1].linear.weight.data.fill_(3e38)
    assert non_finite_origin(net, lambda: net(X)) == "the output of 1.linear"


def test_origin_in_what_a_module_does_itself():
    """Every part is finite, their sum is not: the module that adds is named, not the next one that reads it."""
    net = model().eval()
    net[1].scale = 3e38
    net[1].linear.bias.data.fill_(1e3)
    assert non_finite_origin(net, lambda: net(X)) == "the output of 1"


def test_origin_in_the_input():
    net = model().eval()
    assert non_finite_origin(net, lambda: net(X * math.nan)) == "the output of 0"


def test_origin_in_the_gradient():
    net = model().eval()
    net(X).sum().backward()
    net[3].linear.weight.grad[0, 0] = math.inf
    net[0].weight.grad.fill_(math.nan)
    # Backward runs from the end: what is nearest to the loss was first.
    assert non_finite_origin(net, lambda: net(X)) == "the gradient of 3.linear.weight"


def test_origin_in_the_loss_alone():
    net = model().eval()
    net(X).sum().backward()
    assert non_finite_origin(net, lambda: net(X)) == "the loss itself"


def test_looking_for_the_origin_leaves_no_hooks_and_no_graph():
    net = model().eval()

    def failing() -> None:
        assert not torch.is_grad_enabled()
        net(X)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        non_finite_origin(net, failing)
    assert all(not module._forward_hooks for module in net.modules())
