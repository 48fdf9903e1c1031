"""A plan and its outcome as text."""

import shlex
from collections.abc import Mapping, Sequence

from .plan import OPTIONAL, Plan, Row
from .stages import STAGES


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def text_of(plan: Plan, words: Mapping[str, Sequence[str]]) -> str:
    """The choices with their reasons, what each stage is expected to take, and its command line."""
    width = max(len(row.name) for row in plan.rows) + 2
    left_out = Row(OPTIONAL, "not searched", plan.unsearched)
    rows = [left_out if plan.unsearched and row.name == OPTIONAL else row for row in plan.rows]
    lines = [f"{row.name:<{width}}{row.choice}{f'  ({row.why})' * bool(row.why)}" for row in rows]
    lines += ["", f"{'stage':<{width}}{'time':>10}{'steps':>10}{'memory':>10}"]
    for name, found in plan.stages.items():
        steps, memory = f"{found.steps:,}" * (found.steps > 0), f"{found.memory / 1e9:.1f} GB" * (found.memory > 0)
        lines.append(f"{name:<{width}}{_time(found.seconds):>10}{steps:>10}{memory:>10}".rstrip())
    total = sum(found.seconds for found in plan.stages.values()) + plan.spent.get("plan", 0.0)
    most = max(found.memory for found in plan.stages.values()) / 1e9  # the stages run one after another
    lines += [f"{'all':<{width}}{_time(total):>10}{f'{most:.1f} GB':>20}", ""]
    lines += [f"{STAGES[name].program} {shlex.join(given)}" for name, given in words.items()]
    return "\n".join(lines)


def outcome(plan: Plan) -> str:
    """The times of the stages beside those that were expected."""
    found = [
        f"{name} {_time(plan.spent[name])} ({_time(expected.seconds)} planned)"
        for name, expected in plan.expected.items()
        if name in plan.spent
    ]
    return f"{_time(sum(plan.spent.values()))} of {plan.minutes:g} min: {', '.join(found)}"
