"""The result of a campaign as Markdown and JSON."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .kills import Tried
from .verdict import Outcome

COLUMNS = ("ok", "refused", "clumsy", "crash", "hang", "unhandled", "outside", "silent")
HEADINGS = ("exit 0", "refused", "refused clumsily", "crashes", "hangs", "unhandled", "outside", "silent")


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def machine() -> dict[str, Any]:
    """Where and with what a campaign ran."""
    versions = {name: version(name) for name in ("torch", "pillow", "safetensors", "pyarrow", "vqgen")}
    return {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def markdown(outcomes: Sequence[Outcome], tried: Mapping[str, Sequence[Tried]]) -> str:
    """Tables of cases by kind, and of kills by mode."""
    lines = [_row(["input", "tried", *HEADINGS]), _row(["---", *["--:"] * (len(HEADINGS) + 1)])]
    kinds = list(dict.fromkeys(each.kind for each in outcomes))
    for kind in [*sorted(kinds), None]:
        counted = Counter(each.verdict for each in outcomes if kind in (each.kind, None))
        lines.append(_row([kind or "**all**", counted.total(), *(counted[name] for name in COLUMNS)]))
    if any(tried.values()):
        lines += ["", _row(["disturbed", "tried", "identical"]), _row(["---", "--:", "--:"])]
        lines += [_row([name, len(rows), sum(each.identical for each in rows)]) for name, rows in tried.items() if rows]
    return "\n".join(lines)


def failures(outcomes: Sequence[Outcome], tried: Mapping[str, Sequence[Tried]]) -> list[Outcome | Tried]:
    """Everything that must not happen."""
    return [each for rows in (outcomes, *tried.values()) for each in rows if each.failed]


def write(
    path: Path,
    options: dict[str, Any],
    outcomes: Sequence[Outcome],
    tried: Mapping[str, Sequence[Tried]],
    seconds: float,
) -> None:
    """Write the result as JSON, with every case that did not end well."""
    kinds = {}
    for kind in sorted({each.kind for each in outcomes}):
        counted = Counter(each.verdict for each in outcomes if each.kind == kind)
        kinds[kind] = {"tried": counted.total(), **{name: counted[name] for name in COLUMNS}}
    found = {
        "kind": "vqgen campaign",
        "options": options,
        "machine": machine(),
        "seconds": round(seconds),
        "cases": kinds,
        "disturbed": {k: {"tried": len(v), "identical": sum(e.identical for e in v)} for k, v in tried.items() if v},
        "failures": [asdict(each) for each in failures(outcomes, tried)],
        "clumsy": [asdict(each) for each in outcomes if each.verdict == "clumsy"],
    }
    path.write_text(json.dumps(found, indent=1, ensure_ascii=True) + "\n")
