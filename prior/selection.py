"""Which validation of a run its weights are of: that of the lowest held-out NLL."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

NATS, NATS_OF_HOLES = "nats_per_token", "inpainting_nats_per_token"
"""Names of the NLL of plain images and of codes that are filled in, as validations log them."""
BEST = "best"
"""Key in rows of `metrics.jsonl` of the NLL with which a validation became the best: a run saves its weights."""


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number, small enough for arithmetic."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def selected_by(nats: float, of_holes: float | None, share: float) -> float:
    """What selects weights: both NLLs by their shares of the training steps; `share` is that of `--inpainting`."""
    return nats if of_holes is None else nats + share * (of_holes - nats)


def best_validation(rows: Iterable[Mapping[str, Any]], share: float) -> Mapping[str, Any] | None:
    """The row of `metrics.jsonl` of the validation whose weights a run saves, None where none has a finite NLL.

    The last row with `BEST` tells its step: a run that goes on with other images begins anew. Earlier versions wrote
    none; of these it is the first of the lowest NLL, with `share` as in `selected_by`.
    """
    rows = list(rows)
    validated = [row for row in rows if finite(row.get(f"heldout/{NATS}"))]
    by_step = {row.get("step"): row for row in validated}  # of one that was repeated, the last
    chosen = [by_step[row["step"]] for row in rows if finite(row.get(BEST)) and row.get("step") in by_step]

    def value(row: Mapping[str, Any]) -> float:
        of_holes = row.get(f"heldout/{NATS_OF_HOLES}")
        return selected_by(row[f"heldout/{NATS}"], of_holes if finite(of_holes) else None, share)

    return chosen[-1] if chosen else min(validated, key=value, default=None)
