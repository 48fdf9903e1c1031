"""The rules by which a run names its own faults: each fires on a history with the fault, and on no healthy one."""

import math

import pytest
import torch
from torch import Tensor, nn

from vqgen.health import Finding, codebook_collapse, non_finite_origin, overfitting, pinned_discriminator

# ---- codebook collapse ----


def validations(*figures: tuple[float, float]) -> list[dict]:
    """Codes used and perplexity at each validation, among rows of training figures."""
    rows = []
    for used, perplexity in figures:
        rows += [{"step": 1, "train/loss": 0.1}, {"heldout/codes_used": used, "heldout/perplexity": perplexity}]
    return rows


def test_collapse_by_few_codes_and_by_uneven_use():
    few = codebook_collapse(validations((100, 60), (90, 50)), 512)
    assert few is not None and few.name == "codebook collapse"
    assert "90 of 512" in few.measured and "perplexity 50" in few.measured
    assert "--codebook ema" in few.remedy and "--codebook-size" in few.remedy
    uneven = codebook_collapse(validations((400, 20), (410, 21)), 512)
    assert uneven is not None


@pytest.mark.parametrize(
    "figures",
    [
        [(100, 60)],  # once is the start of training
        [(100, 60), (400, 300)],  # it recovers
        [(400, 300), (100, 60)],  # not twice yet
        [(505, 470), (500, 460)],  # healthy
        [(130, 60), (129, 60)],  # a quarter
        [],
    ],
)
def test_no_collapse(figures):
    assert codebook_collapse(validations(*figures), 512) is None


def test_collapse_counts_the_codes_that_could_occur():
    """1000 held-out positions cannot use 16384 codes."""
    rows = validations((700, 500), (700, 500))
    assert codebook_collapse(rows, 1000) is None and codebook_collapse(rows, 16_384) is not None


# ---- a pinned discriminator ----


def judged(*losses: float) -> list[dict]:
    return [row for loss in losses for row in ({"train/discriminator": loss}, {"heldout/psnr": 20.0})]


def test_discriminator_that_always_wins():
    found = pinned_discriminator(judged(0.4, 0.01, 0.005, 0.0, 0.001, 0.002))
    assert found is not None and "0.002" in found.measured and "--gan-start" in found.remedy


def test_discriminator_that_says_nothing():
    found = pinned_discriminator(judged(0.9, 1.0, 1.001, 0.999, 1.0, 1.0))
    assert found is not None and "raise --gan-lr" in found.remedy


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
    assert "3.100" in found.measured and "2.900" in found.measured and "--dropout" in found.remedy


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
