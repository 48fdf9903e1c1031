"""The baselines in docs/benchmarks.md: every preset that two cores can train, each metric with its receipt.

    python benchmarks/baselines.py run cifar10/fsq fashion-mnist/demo --data DATA --vgg16 VGG16 --output baselines
    python benchmarks/baselines.py table

`run` trains the tokenizer of each row, makes code files, trains a prior, and measures all three with `vqgen-eval`; what
is there already is kept, so an interrupted call goes on. DATA is a folder with cifar10/ and fashion_mnist/, each of a
train.parquet and a test.parquet; VGG16 a file of its convolutions. The receipts land in `OUTPUT/receipts/DATA/ROW`;
the table is printed from those in `benchmarks/results/receipts`. Give paths that are relative: receipts keep them.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from vqgen.evaluation.measurement import metrics_of
from vqgen.evaluation.receipt import read_receipt
from vqgen.evaluation.report.run_folder import open_folder
from vqgen.files import read_json, write_json

RECEIPTS = Path(__file__).parent / "results" / "receipts"
QUANTIZERS = ("vq", "rotation", "gradient", "entropy", "simvq", "fsq", "lfq", "residual", "product", "gumbel")
SAMPLES = 2000
GUIDED = ["--guidance-scale", "3", "--min-p", "0.1"]
PRIOR = (
    "--patience 0 --validation-images 500 --dim 256 --layers 4 --heads 4 --dropout 0 --lr 4e-3 --lr-warmup 20 "
    "--beta2 0.99 --ema-decay 0.99 --steps 450 --batch-size 64 --validate-every 225 --checkpoint-every 100"
).split()
"""As the preset demo-prior of version 0.1, so that all rows can be compared."""


def stack(*presets: str) -> list[str]:
    return [word for preset in presets for word in ("--config", preset)]


# Row -> the words of vqgen-train-tokenizer, without data and output. FROM stands for the tokenizer of another row.
ROWS: dict[str, dict[str, list[str]]] = {
    "cifar10": {
        **{name: [*stack("vqvae", f"quantizer-{name}"), "--steps", "600"] for name in QUANTIZERS},
        "vqvae": stack("vqvae"),
        "vqgan-cifar10": stack("vqgan-cifar10"),
        "cifar10-512": stack("cifar10-512"),
        "cifar10-512-even": [*stack("cifar10-512", "cifar10-512-even"), "--init", "FROM cifar10-512"],
        "cifar10-512-lpips": [*stack("cifar10-512", "cifar10-512-lpips"), "--init", "FROM cifar10-512-even"],
        "cifar10-8192": stack("cifar10-512", "cifar10-8192"),
    },
    "fashion-mnist": {
        "demo": stack("demo-tokenizer"),
        **{name: stack("demo-tokenizer", f"quantizer-{name}") for name in QUANTIZERS if name != "vq"},
    },
}
TOKENIZERS_ALONE = {name for name in ROWS["cifar10"] if name not in QUANTIZERS}
"""Rows without a prior: that of the package, which began as `cifar10-prior`, goes with the best of them."""
CHANNELS = {"cifar10": 3, "fashion-mnist": 1}
CLASSIFIER = {"cifar10": ["--steps", "4000", "--width", "48"], "fashion-mnist": ["--steps", "1200"]}


def call(module: str, *words: Any) -> None:
    print("+", module, *words, flush=True)
    subprocess.run([sys.executable, "-m", f"vqgen.{module}", *map(str, words)], check=True)


def training_cost(run: Path) -> dict[str, Any]:
    """Steps, examples and seconds of a finished run; the seconds of a run that did not record its sessions are from the
    rates it logged."""
    (found,) = open_folder(run).runs
    return {
        "steps": found.steps,
        "seen": found.steps * found.options["run.batch_size"],
        "seconds": round(found.wall or found.computed or 0.0, 1),
        "from": "machine.json" if found.wall else "logged rates",
    }


def run(data: str, row: str, images: Path, vgg16: Path, output: Path) -> None:
    """Make one row, or what is missing of it."""
    source, here, receipts = images / data.replace("-", "_"), output / data / row, output / "receipts" / data / row
    tokenizer, codes, prior = (here / name for name in ("tokenizer", "codes", "prior"))
    classifier = output / data / "classifier"

    def receipt(program: str, *words: Any, name: str = "") -> None:
        path = receipts / f"{name or program}.json"
        if not path.is_file():
            call("evaluation.program", program, *words, "--output", path)

    lpips, extractor = ["--perceptual-weights", vgg16], ["--extractor", "fd-vgg16", "--weights", vgg16]
    if not classifier.exists():
        size = ["--size", 32, "--channels", CHANNELS[data]]
        call("evaluation.program", "classifier", "--data", source, *size, *CLASSIFIER[data], "--output", classifier)
    if not (tokenizer / "finished.json").is_file():
        words = [str(output / data / w[5:] / "tokenizer") if w.startswith("FROM ") else w for w in ROWS[data][row]]
        needs = lpips if {"vqgan-cifar10", "cifar10-512-lpips"} & set(words) else []
        call("tokenizer.train", *words, *needs, "--data", source, "--output", tokenizer)
    receipt("reconstruction", "--tokenizer", tokenizer, "--data", source, "--split", "test", *lpips, *extractor)
    made = [tokenizer]
    if row not in TOKENIZERS_ALONE:
        made.append(prior)
        if not (prior / "finished.json").is_file():
            call("tokenizer.encode", "--tokenizer", tokenizer, "--data", source, "--output", codes)
            call("prior.train", *PRIOR, "--codes", codes, "--output", prior)
        receipt("likelihood", "--model", prior, "--codes", codes, "--split", "test")
        measured = [*extractor, "--split", "test", "--classifier", classifier, "--n", SAMPLES]
        measured += ["--cache", output / "cache"]
        receipt("samples", "--model", prior, "--data", source, *measured)
        guided = ["--extractor", "none", "--classifier", classifier, "--n", SAMPLES // 2, *GUIDED]
        receipt("samples", "--model", prior, *guided, name="samples-guided")
    write_json(receipts / "training.json", {folder.name: training_cost(folder) for folder in made})
    for folder in made:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


# Receipt, command of vqgen-eval, metric, format of the table.
COLUMNS = (
    ("reconstruction", "reconstruction", "psnr", "{:.2f}"),
    ("reconstruction", "reconstruction", "ssim", "{:.3f}"),
    ("reconstruction", "reconstruction", "lpips", "{:.3f}"),
    ("reconstruction", "reconstruction", "rfd-vgg16", "{:.1f}"),
    ("reconstruction", "reconstruction", "usage", "{:.1%}"),
    ("reconstruction", "reconstruction", "perplexity", "{:.0f}"),
    ("likelihood", "likelihood", "bits_per_dimension", "{:.3f}"),
    ("samples", "samples", "fd-vgg16", "{:.1f}"),
    ("samples-guided", "samples", "classifier_accuracy", "{:.1%}"),
)


def line(folder: Path) -> str:
    """A row of the table, from the receipts in a folder."""
    found = {path.stem: read_receipt(path)["metrics"] for path in folder.glob("*.json") if path.stem != "training"}
    cells = [f"[`{folder.name}`](../benchmarks/results/receipts/{folder.parent.name}/{folder.name})"]
    for receipt, _, name, shape in COLUMNS:
        metrics = found.get(receipt, {})
        value = metrics.get("at", {}).get(str(SAMPLES), metrics).get(name)  # of as many samples as in the other rows
        cells.append("" if value is None else shape.format(value).replace("%", " %"))
    trained = read_json(folder / "training.json").values()
    cells.append(" + ".join(f"{part['seconds'] / 60:.0f}" for part in trained) + " min")
    return "| " + " | ".join(cells) + " |"


def table(data: str) -> list[str]:
    """The Markdown table of a data set, the best reconstructions first."""
    folders = [path.parent for path in (RECEIPTS / data).glob("*/training.json")]
    order = sorted(folders, key=lambda f: -read_receipt(f / "reconstruction.json")["metrics"]["psnr"])
    titles = ["row", *(metrics_of(program)[name].title for _, program, name, _ in COLUMNS), "training"]
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles), *map(line, order)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    every = [f"{data}/{row}" for data, rows in ROWS.items() for row in rows]
    runs.add_argument("rows", nargs="+", choices=every, metavar="DATA/ROW", help=", ".join(every))
    for name in ("data", "vgg16", "output"):
        runs.add_argument(f"--{name}", type=Path, required=True)
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print("\n\n".join("\n".join([f"**{data}**", "", *table(data)]) for data in ROWS))
        return
    for name in arguments.rows:
        data, row = name.split("/")
        run(data, row, arguments.data, arguments.vgg16, arguments.output)


if __name__ == "__main__":
    main()
