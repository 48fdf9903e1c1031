"""Declaration of a metric: name, title, unit, and the function that computes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


def written(value: float, unit: str, digits: int) -> str:
    """A value with its unit as a person reads it: a "share of ..." in percent."""
    if unit.startswith("share of "):
        return f"{100 * value:.{digits}g} % {unit.removeprefix('share ')}"
    return f"{value:.{digits}g} {unit}".rstrip()


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
