"""Geometry of line and bar charts in a fixed frame, which the template draws as SVG.

Units are those of the SVG's view box; y grows downwards.
"""

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 388, 12, 196
BUCKETS = 240  # groups of neighbouring points of a long series, each drawn by its lowest and its highest point
MARKED = 12  # largest number of points that are drawn as dots, too

Point = tuple[float, float]


class Series(NamedTuple):
    """Points (x, y) in order of x, their label, the index of their colour, and whether the line is dashed and thin."""

    label: str
    points: Sequence[Point]
    colour: int
    faint: bool = False


class Line(NamedTuple):
    """A series as drawn: its last value, the points of an SVG polyline, and those that are drawn as dots, too."""

    label: str
    last: str
    colour: int
    faint: bool
    points: str
    dots: list[Point]


Tick = namedtuple("Tick", ["at", "text"])
Bar = namedtuple("Bar", ["x", "y", "width", "height", "label", "value"])


@dataclass(frozen=True)
class Chart:
    """A chart of lines with ticks, or of bars with their texts below (`label`) and above (`value`)."""

    title: str
    unit: str
    about: str
    """Description for screen readers."""
    x_label: str
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()


def number(value: float, digits: int = 4) -> str:
    """Text of a number: `digits` significant digits, thousands separators, powers of ten below a thousandth."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, _, power = f"{value:.{min(digits, 3) - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(power)}"
    text = f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _nice(span: float, count: int) -> float:
    """Round step that divides `span` into about `count` parts."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * 1.0001)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values in [low, high]."""
    step = _nice(high - low, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks in [low, high], both above 0: 1, 2 and 5 times powers of ten, or powers alone over two decades or more."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    many = math.log10(high / low) > 2
    every = max(1, (last - first) // 4) if many else 1
    found = [factor * 10.0**n for n in range(first, last + 1, every) for factor in ((1,) if many else (1, 2, 5))]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def _tick_text(value: float, step: float) -> str:
    if abs(value) >= 1e6 or (value and abs(value) < 1e-3):
        return f"{value:g}".replace("e+0", "e").replace("e-0", "e-")
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    decimals += bool(step) and abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6  # 2.5 and its powers
    return f"{value:,.{decimals}f}"


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most two points per bucket, so that no peak is lost."""
    if len(points) <= 2 * BUCKETS:
        return list(points)
    kept = [0, len(points) - 1]
    for bucket in range(BUCKETS):
        ends = (len(points) * bucket // BUCKETS, len(points) * (bucket + 1) // BUCKETS)
        order = sorted(range(*ends), key=lambda index: points[index][1])
        kept += [order[0], order[-1]]
    return [points[index] for index in sorted(set(kept))]


def line_chart(title: str, unit: str, series: Sequence[Series], log: bool = False, x_label: str = "step") -> Chart:
    """A chart of several lines, with at least one point among them.

    `log` asks for a log scale, which needs values above 0 that span more than a factor of 8.
    """
    values = [y for each in series for _, y in each.points]
    low, high = min(values), max(values)
    log = log and low > 0 and high / low > 8
    if log:
        low, high = low / 1.1, high * 1.1
        labels = {value: _tick_text(value, 10 ** math.floor(math.log10(value))) for value in log_ticks(low, high)}
    else:
        size = max(abs(low), abs(high))
        # At least a hundredth of the values: finer tick labels would be too long.
        margin = max(0.06 * (high - low), 0.005 * size) if high > low else 0.1 * size or 1.0
        low, high = (low - margin if low < 0 or low - margin > 0 else 0.0), high + margin
        labels = {value: _tick_text(value, _nice(high - low, 5)) for value in linear_ticks(low, high, 5)}
    end = max(x for each in series for x, _ in each.points) or 1

    def x_at(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * x / end, 1)

    def y_at(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return round(BOTTOM - (BOTTOM - TOP) * share, 1)

    lines, described = [], []
    for each in (each for each in series if each.points):
        drawn = [(x_at(x), y_at(y)) for x, y in thinned(each.points)]
        path = " ".join(f"{x:g},{y:g}" for x, y in drawn)
        dots = drawn if len(drawn) == 1 or (len(drawn) <= MARKED and not each.faint) else []
        lines.append(Line(each.label, number(each.points[-1][1]), each.colour, each.faint, path, dots))
        ends = [f"{number(y)} at {x_label} {x:,.0f}" for x, y in (each.points[0], each.points[-1])]
        described.append(f"{each.label} from {ends[0]} to {ends[1]}")
    return Chart(
        title,
        ", ".join(part for part in (unit, "log scale" if log else "") if part),
        f"{title}: {'; '.join(described)}.",
        x_label,
        [Tick(x_at(value), f"{value:,.0f}") for value in linear_ticks(0, end, 4) if abs(value - round(value)) < 1e-6],
        [Tick(y_at(value), text) for value, text in labels.items()],
        lines,
    )


def bar_chart(title: str, x_label: str, labels: Sequence[str], values: Sequence[int]) -> Chart:
    """A chart of one bar per value; every value above 0 is visible."""
    most, each, bars = max(1, *values), (RIGHT - 12) / len(values), []
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        height = max(1.5, (BOTTOM - TOP - 16) * value / most) if value else 0.0
        x, y, width, height = (round(place, 1) for place in (14 + each * index, BOTTOM - height, each - 4, height))
        bars.append(Bar(x, y, width, height, label, f"{value:,}"))
    described = ", ".join(f"{bar.label}: {bar.value}" for bar in bars)
    return Chart(title, "", f"{title}. {described}.", x_label, bars=bars)
