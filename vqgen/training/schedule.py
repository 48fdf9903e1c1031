"""Learning-rate schedule of a run, continuous where a run is resumed with another number of steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from .options import OptimizerConfig


@dataclass
class Plan:
    """The steps that the schedules of a run span; checkpoints keep it.

    A run resumed at step `start` with another number of steps keeps its learning rate there and moves linearly to the
    schedule over all `steps`, within `blend_steps`: after the end of a cosine that is a second warm-up. What is
    annealed over the run goes on from its progress so far and never back.
    """

    steps: int
    """Optimizer steps of the whole run."""
    start: int = 0
    """Step at which the number of steps last changed; 0 = never."""
    rate: float = 0.0
    """Learning rate at `start`, as a share of the peak."""
    progress_at_start: float = 0.0
    bounded: bool = False
    """Whether the warm-up takes at most half of the steps, as in every run that version 0.2 began."""

    def warmup(self, config: OptimizerConfig) -> int:
        """Steps of the warm-up."""
        return min(config.lr_warmup, max(1, self.steps // 2) if self.bounded else self.steps)

    def progress(self, step: int) -> float:
        """Share of the run that is done before `step` (0 is the first)."""
        done = self.progress_at_start
        return done + (1 - done) * (step - self.start) / max(1, self.steps - self.start)

    def blend_steps(self, config: OptimizerConfig) -> int:
        """Steps over which the rate reaches the new schedule: the warm-up, or a tenth of those left if that is more."""
        left = self.steps - self.start
        return min(max(self.warmup(config), left // 10, 1), left)

    def learning_rate(self, config: OptimizerConfig, step: int) -> float:
        """Learning rate at `step` (0 is the first), as a share of the peak."""
        share = scheduled(config, self.steps, step, self.warmup(config))
        if self.start <= step < self.start + self.blend_steps(config) and self.start:
            return self.rate + (share - self.rate) * (step - self.start) / self.blend_steps(config)
        return share

    def resume(self, step: int, saved: Mapping[str, Any] | None, schedule: LambdaLR) -> str | None:
        """Continue the plan of a checkpoint at `step`; returns a message where the number of steps has changed.

        Version 0.1 `saved` no plan: the learning rate of the restored `schedule` shows how it was planned.
        """
        former = Plan(**saved) if saved else None
        self.bounded = former.bounded if former else False
        if former and former.steps == self.steps:
            self.__dict__.update(vars(former))
            return None
        base, now = schedule.base_lrs[0], schedule.get_last_lr()[0]
        rate = float(now / base) if base else 0.0
        if not former and math.isclose(rate, schedule.lr_lambdas[0](step), rel_tol=1e-9, abs_tol=1e-12):
            return None
        self.progress_at_start = (former or self).progress(step)
        self.start, self.rate = step, rate
        planned = f"{former.steps} steps" if former else "another number of steps"
        effect = f"its learning rate goes on from {now:.3g} and moves to the schedule over {self.steps} steps"
        return f"--steps: this run was planned for {planned}, now for {self.steps}; {effect}"


def scheduled(config: OptimizerConfig, steps: int, step: int, warmup: int) -> float:
    """Learning rate at `step` of a run of `steps`, as a share of the peak: a linear warm-up, then `lr_schedule`."""
    if step < warmup:
        return step / warmup
    left = max(1, steps - warmup)
    if config.lr_schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left))))
    return max(0.0, (steps - step) / left) if config.lr_schedule == "linear" else 1.0
