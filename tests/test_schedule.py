"""The learning-rate schedule: the curves of transformers, and no jump where the number of steps changes."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from vqgen.training.options import OptimizerConfig
from vqgen.training.schedule import Plan, scheduled

KINDS = ["cosine", "linear", "constant_with_warmup"]


def optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)


def resumed(plan: Plan, config: OptimizerConfig, step: int, steps: int, saved: bool = True) -> tuple[Plan, str | None]:
    """The plan of a run that `plan` had brought to `step` and that goes on with `steps`."""
    new = Plan(steps)
    schedule = LambdaLR(optimizer(config.lr), lambda at: new.learning_rate(config, at))
    schedule._last_lr = [config.lr * plan.learning_rate(config, step)]
    return new, new.resume(step, vars(plan) if saved else None, schedule)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 20), (100, 300), (20, 20), (5, 2)])
def test_the_curves_are_those_of_transformers(kind, warmup, steps):
    config = OptimizerConfig(lr_schedule=kind, lr_warmup=warmup)
    expected = get_scheduler(kind, optimizer(), min(warmup, steps), steps).lr_lambdas[0]
    assert [scheduled(config, steps, s, min(config.lr_warmup, steps)) for s in range(steps + 1)] == [
        expected(s) for s in range(steps + 1)
    ]
    assert [Plan(steps).learning_rate(config, s) for s in range(steps + 1)] == [expected(s) for s in range(steps + 1)]


@pytest.mark.parametrize("kind", KINDS)
@given(
    warmup=st.integers(0, 40), steps=st.integers(2, 200), share=st.floats(0, 1), other=st.integers(1, 300),
    again=st.integers(1, 300),
)  # fmt: skip
def test_a_change_of_steps_never_makes_the_rate_jump(kind, warmup, steps, share, other, again):
    """Nowhere is a change larger than a step of the warm-up, or than the new schedule has anyway."""
    config = OptimizerConfig(lr=0.5, lr_schedule=kind, lr_warmup=warmup)
    first, start = Plan(steps), max(1, round(share * steps))
    second, told = resumed(first, config, start, start + other)
    assert (told is None) == (start + other == steps)
    middle = start + max(1, other // 3)
    third, _ = resumed(second, config, middle, middle + again)
    for before, after, at in ((first, second, start), (second, third, middle)):
        if after.steps == before.steps:
            assert vars(after) == vars(before)
            continue
        assert after.learning_rate(config, at) == pytest.approx(before.learning_rate(config, at), abs=1e-12)
        curve = [after.learning_rate(config, s) for s in range(at, after.steps + 1)]
        plain = [scheduled(config, after.steps, s, after.warmup(config)) for s in range(at, after.steps + 1)]
        own = max(abs(b - a) for a, b in itertools.pairwise(plain))
        blend = after.blend_steps(config)
        assert blend >= min(warmup, after.steps - at)
        assert max(abs(b - a) for a, b in itertools.pairwise(curve)) <= own + 1 / blend + 1e-12
        assert curve[blend:] == plain[blend:]


def test_progress_never_falls():
    config = OptimizerConfig()
    plan = Plan(100)
    assert [plan.progress(s) for s in (0, 50, 99)] == [0, 0.5, 0.99]
    longer, _ = resumed(plan, config, 50, 200)
    assert longer.progress(50) == 0.5 and longer.progress(200) == 1 and 0.5 < longer.progress(51) < 0.51
    finished, _ = resumed(plan, config, 100, 200)
    assert {finished.progress(s) for s in (100, 150, 200)} == {1}


def test_a_checkpoint_without_a_plan_shows_it_by_its_rate():
    """Version 0.1 kept none: the rate of its schedule tells whether the number of steps has changed."""
    config = OptimizerConfig(lr=3e-3, lr_warmup=10)
    same, told = resumed(Plan(100), config, 60, 100, saved=False)
    assert told is None and same == Plan(100)
    longer, told = resumed(Plan(100), config, 100, 200, saved=False)
    assert told is not None and "--steps" in told and (longer.start, longer.rate) == (100, 0.0)


def test_a_change_is_stated_once():
    config = OptimizerConfig(lr=3e-3)
    longer, told = resumed(Plan(100), config, 100, 200)
    assert told is not None and "\n" not in told
    for part in ("--steps", "100 steps", "200"):
        assert part in told
    again, told = resumed(longer, config, 150, 200)
    assert told is None and again == longer


def test_a_rate_of_zero():
    longer, told = resumed(Plan(100), OptimizerConfig(lr=0), 50, 200)
    assert told is not None and longer.rate == 0
