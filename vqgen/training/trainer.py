"""Interface between a stage (tokenizer or prior) and the training loop."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from vqgen.errors import DataError, UserError

from .health import Finding, Row

B = TypeVar("B")


def next_batch(batches: Iterator[B]) -> B:
    """The batch of a step. Raises `DataError` where it cannot be read."""
    try:
        return next(batches)
    except UserError as error:
        raise DataError(str(error)) from error


class Trainer(Protocol):
    """A stage as the training loop sees it."""

    modules: dict[str, nn.Module]
    """Unwrapped modules whose weights and buffers a checkpoint holds, by file name."""
    optimizers: dict[str, Any]
    """Optimizers and schedules; at least one `LambdaLR` made by `optimizer_for`."""
    extra: dict[str, Any]
    """Small JSON-serialisable state of checkpoints, e.g. the best held-out loss."""
    examples: int
    """Training images: an epoch; 0 where their number is not known."""
    position: Any
    """Where this process is in its data, JSON-serialisable, for `extra["positions"]`; None where the step says it."""
    validated: int
    """Held-out images that a validation measures."""

    # What is trained on what, by name of the line, for the beginning of a run.
    def summary(self) -> dict[str, str]: ...
    # Compare the data with the `extra` of a checkpoint, before its weights are loaded. May raise `UserError`.
    def check(self, extra: Mapping[str, Any]) -> None: ...
    # Prepare training from step `first_step` (0 is the first); called once, after a checkpoint is restored.
    def begin(self, first_step: int) -> None: ...
    # Seconds by which an image takes longer the first time it is read, measured on a few; 0 where all times are alike.
    def loading(self) -> float: ...
    # Take one optimizer step; returns scalars to log. May raise `NonFinite`, see `FiniteCheck`.
    def step(self, step: int) -> dict[str, Tensor]: ...
    # Throughput metrics to log, from the examples per second.
    def rates(self, per_second: float) -> dict[str, float]: ...
    # Metrics on held-out data, to log.
    def validate(self, step: int) -> dict[str, float]: ...
    # Problems found in the rows logged so far.
    def diagnose(self, rows: list[Row]) -> list[Finding]: ...
    # Where a non-finite number of the last step began, for the error message.
    def origin(self) -> str: ...
    # The reason for early stopping, or None.
    def finished(self) -> str | None: ...
    # Write the model folder into the run folder.
    def save(self) -> None: ...
