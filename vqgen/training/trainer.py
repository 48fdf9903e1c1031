"""What a stage brings to the loop of a training run."""

from typing import Any, Protocol

from torch import Tensor, nn

from .health import Finding, Row


class Trainer(Protocol):
    """What a stage brings to the loop."""

    modules: dict[str, nn.Module]
    """Everything with weights or buffers that a checkpoint must hold, unwrapped."""
    optimizers: dict[str, Any]
    """Optimizers and schedules."""
    extra: dict[str, Any]
    """Small JSON-able state, e.g. the best held-out loss."""

    def begin(self, first_step: int) -> None:
        """Called once, after a restore: open the data at this step."""
        ...

    def step(self, step: int) -> dict[str, Tensor]:
        """One optimizer step; scalars to log. Raises `NonFinite` before the weights are touched."""
        ...

    def rates(self, per_second: float) -> dict[str, float]:
        """What so many examples a second are in the stage's own terms, to log."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Figures on held-out data, to log."""
        ...

    def diagnose(self, rows: list[Row]) -> list[Finding]:
        """What is wrong, by the rows logged so far."""
        ...

    def origin(self) -> str:
        """Where a non-finite number of the last step began."""
        ...

    def finished(self) -> str | None:
        """Why to stop before the last step (early stopping), or None."""
        ...

    def save(self) -> None:
        """Write the model folder at the root of the run."""
        ...
