"""Declaration of a metric: name, title, unit, and the function that computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One metric, registered once; logs, receipts, reports and tables take everything from here."""

    name: str
    """Key in metrics.jsonl, receipts and JSON files."""
    title: str
    """Heading in reports and tables."""
    unit: str = ""
    """E.g. dB; empty for a plain number."""
    better: Literal["higher", "lower", ""] = ""
    """Which values are better; empty where neither is."""
    function: Callable[..., Any] | None = None
    """Computes it; its arguments depend on the registry. None where it is derived from sums of others."""
