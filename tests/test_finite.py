"""The check for NaN and infinity: what it names, and that it reads the device only where it must."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vqgen.training.finite import FiniteCheck, NonFinite, non_finite

GOOD = {"reconstruction": torch.tensor(1.0), "norm": torch.tensor(2.0, dtype=torch.bfloat16)}
BAD = {**GOOD, "adversarial": torch.tensor(math.nan), "total": torch.tensor(-math.inf)}


@pytest.fixture
def deferred() -> FiniteCheck:
    """A check as on an accelerator."""
    check = FiniteCheck(Accelerator(cpu=True))
    check.immediate = False
    return check


def test_one_process_on_the_cpu_raises_at_once():
    check = FiniteCheck(Accelerator(cpu=True))
    check.record(1, GOOD)
    with pytest.raises(NonFinite, match=r"^adversarial, total at step 2$"):
        check.record(2, BAD)


def test_the_first_non_finite_step_is_named(deferred):
    deferred.record(4, GOOD)
    deferred.record(6, BAD)
    deferred.record(6, {"gradient norm": torch.tensor(math.nan)})
    deferred.record(7, {name: torch.tensor(math.nan) for name in BAD})
    with pytest.raises(NonFinite, match=r"^adversarial, total, gradient norm at step 6$"):
        deferred.check()


def test_every_check_starts_a_new_record(deferred):
    deferred.check()
    deferred.record(1, GOOD)
    deferred.check()
    deferred.record(2, {"a": torch.tensor(math.inf)})
    with pytest.raises(NonFinite, match="a at step 2"):
        deferred.check()
    deferred.check()


def test_recording_reads_nothing_from_the_device(deferred):
    """Tensors on the meta device have no values: reading one raises."""
    deferred.record(1, {name: value.to("meta") for name, value in GOOD.items()})
    deferred.record(2, {name: value.to("meta") for name, value in GOOD.items()})
    with pytest.raises((RuntimeError, NotImplementedError)):
        deferred.check()


def test_the_first_non_finite_tensor_is_named():
    one, two = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    assert non_finite({"one": one, "two": two}) is None
    two.running_var[1] = math.inf  # type: ignore[index]
    assert non_finite({"one": one, "two": two}) == "two.running_var"
    one.bias.data[0] = math.nan
    assert non_finite({"one": one, "two": two}) == "one.bias"
