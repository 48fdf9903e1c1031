"""Interface between a stage (tokenizer or prior) and the training loop."""

from typing import Any, Protocol

from torch import Tensor, nn

from .health import Finding, Row


class Trainer(Protocol):
    """A stage as the training loop sees it."""

    modules: dict[str, nn.Module]
    """Unwrapped modules whose weights and buffers a checkpoint holds, by file name."""
    optimizers: dict[str, Any]
    """Optimizers and schedules; at least one `LambdaLR` made by `optimizer_for`."""
    extra: dict[str, Any]
    """Small JSON-serialisable state of checkpoints, e.g. the best held-out loss."""

    def begin(self, first_step: int) -> None:
        """Prepare training from step `first_step` (0 is the first); called once, after a checkpoint is restored."""
        ...

    def step(self, step: int) -> dict[str, Tensor]:
        """Take one optimizer step; returns scalars to log.

        May raise `NonFinite`, on one CPU process before the weights are updated.
        """
        ...

    def rates(self, per_second: float) -> dict[str, float]:
        """Throughput metrics to log, from the examples per second."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Metrics on held-out data, to log."""
        ...

    def diagnose(self, rows: list[Row]) -> list[Finding]:
        """Problems found in the rows logged so far."""
        ...

    def origin(self) -> str:
        """Where a non-finite number of the last step began, for the error message."""
        ...

    def finished(self) -> str | None:
        """The reason for early stopping, or None."""
        ...

    def save(self) -> None:
        """Write the model folder into the run folder."""
        ...
