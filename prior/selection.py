"""Which validation of a run its weights are of: that of the lowest held-out NLL."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

NATS, NATS_OF_HOLES = "nats_per_token", "inpainting_nats_per_token"
"""Names of the NLL of plain images and of codes that are filled in, as validations log them."""


def selected_by(nats: float, of_holes: float | None, share: float) -> float:
    """What selects weights: both NLLs by their shares of the training steps; `share` is that of `--inpainting`."""
    return nats if of_holes is None else nats + share * (of_holes - nats)


def best_validation(rows: Iterable[Mapping[str, Any]], share: float) -> Mapping[str, Any] | None:
    """The row of `metrics.jsonl` of the first best validation, None where none has a finite NLL."""

    def number(row: Mapping[str, Any], name: str) -> float | None:
        value = row.get(f"heldout/{name}")
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    validated = [(row, nats) for row in rows if (nats := number(row, NATS)) is not None]
    found = min(validated, key=lambda each: selected_by(each[1], number(each[0], NATS_OF_HOLES), share), default=None)
    return found and found[0]
