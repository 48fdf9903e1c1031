"""Finished tokenizer runs side by side, as a Markdown table: `python benchmarks/table.py runs/quantizers/*`.

Each row is a run folder: its name, codes a position and bits a position, the last held-out figures of its
`metrics.jsonl`, and the median of its logged training rates. Rates compare only between runs of one quiet machine.
"""

import math
import sys
from pathlib import Path
from statistics import median

import yaml

from vqgen.artifact import read_json
from vqgen.tracking import read_history

FIGURES = {
    "psnr": ("PSNR (dB)", "{:.2f}"),
    "ssim": ("SSIM", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "usage": ("usage", "{:.1%}"),
    "perplexity": ("perplexity", "{:.0f}"),
}


def row(folder: Path) -> list[str]:
    """The cells of one run: name, bits a position, steps, images, its figures, images a second."""
    about, config = read_json(folder / "vqgen.json"), yaml.safe_load((folder / "config.yaml").read_text())
    steps = read_json(folder / "finished.json")["steps"]
    history = read_history(folder / "metrics.jsonl", steps)
    last = next(found for found in reversed(history) if "heldout/psnr" in found)
    depth, size = about["depth"], about["codebook_size"]
    codes = f"{depth} x {size}" if depth > 1 else str(size)
    cells = [folder.name, codes, f"{depth * math.log2(size):.1f}", f"{steps * config['run']['batch_size']:,}"]
    for name, (_, shape) in FIGURES.items():
        value = last.get(f"heldout/{name}")
        cells.append("" if value is None else shape.format(value))
    rates = [found["train/per_second"] for found in history if "train/per_second" in found]
    return [*cells, f"{median(rates[1:] or rates):.0f}"]


def main() -> None:
    titles = ["run", "codes K", "bits a position", "images seen", *(title for title, _ in FIGURES.values()), "images/s"]
    rows = [titles, ["---"] * len(titles), *(row(Path(folder)) for folder in sys.argv[1:])]
    print("\n".join("| " + " | ".join(cells) + " |" for cells in rows))


if __name__ == "__main__":
    main()
