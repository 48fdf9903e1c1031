"""Curves of several runs in one picture, from their metrics.jsonl.

    python benchmarks/curves.py --metrics heldout/psnr heldout/lpips --output curves.png runs/a runs/b

A run is a run folder or a metrics.jsonl; its name is the label. Those behind docs/benchmarks.md lie in
`benchmarks/results`.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from vqgen.training.trackers import read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--metrics", nargs="+", default=["heldout/psnr"], help="one panel each")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    files = [run / "metrics.jsonl" if run.is_dir() else run for run in arguments.runs]
    histories = [read_rows(path)[0] for path in files]
    names = [run.name if run.is_dir() else run.stem for run in arguments.runs]

    figure, panels = plt.subplots(1, len(arguments.metrics), figsize=(4.4 * len(arguments.metrics), 3.2), squeeze=False)
    for panel, name in zip(panels[0], arguments.metrics, strict=True):
        for called, history in zip(names, histories, strict=True):
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=called, marker="o" if len(points) < 20 else None, ms=3)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)
    print(f"look at {arguments.output}")


if __name__ == "__main__":
    main()
