"""What a caption tells a prior, against the class: NLL of the test codes of Fashion-MNIST given either.

    python benchmarks/text_against_class.py --data DATA --output text

DATA is a folder with a train.parquet and a test.parquet of `image` and `label`. Two priors of the same size, seed and
steps learn the same codes: one with class ids, one with captions of the class in one of a few sentences, and no class.
What is there already is kept, so an interrupted call goes on. Every NLL has its receipt in OUTPUT/receipts.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from baselines import call

from vqgen.evaluation.receipt import read_receipt
from vqgen.seeding import hash64
from vqgen.tokenizer.codes.format import CodeFiles

NAMES = "a T-shirt, a pair of trousers, a pullover, a dress, a coat, a sandal, a shirt, a sneaker, a bag, an ankle boot"
SENTENCES = "a photo of {}", "{}", "a grey picture that shows {}", "this is {}, seen from the side"
PRIOR = "--dim 192 --layers 4 --heads 6 --dropout 0.1 --lr 2e-3 --lr-warmup 50 --batch-size 64 --patience 0 --seed 1"


def write_tables(data: Path, output: Path, images: int | None) -> None:
    """Write the first images of each split twice, in one order: to classes/ with labels, to texts/ with captions."""
    names = NAMES.split(", ")
    for split in ("train", "test"):
        found = pq.read_table(data / f"{split}.parquet")
        found = found.slice(0, images or len(found))
        labels = found.column("label").to_pylist()
        captions = [SENTENCES[hash64(split, row) % len(SENTENCES)].format(names[k]) for row, k in enumerate(labels)]
        for name, column, values in ("classes", "label", labels), ("texts", "text", captions):
            (output / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(
                pa.table({"image": found.column("image"), column: values}), output / name / f"{split}.parquet"
            )


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Train what is missing; the NLL of the test codes by prior, in nats per token."""
    output = options.output
    if not (output / "texts" / "test.parquet").is_file():
        write_tables(options.data, output, options.images)
    tokenizer = output / "tokenizer"
    words = ["--config", "demo-tokenizer", "--data", output / "classes", "--size", 28]
    call("tokenizer.train", *words, "--steps", options.tokenizer_steps, "--output", tokenizer)
    steps = ["--steps", options.steps, "--validate-every", max(options.steps // 4, 1)]
    found: dict[str, float] = {}
    for name, column, dropout in (
        ("classes", [], "--label-dropout"),
        ("texts", ["--text-column", "text"], "--text-dropout"),
    ):
        codes, prior = output / f"codes-{name}", output / f"prior-{name}"
        call("tokenizer.encode", "--tokenizer", tokenizer, "--data", output / name, *column, "--output", codes)
        call("prior.train", "--codes", codes, *PRIOR.split(), *steps, dropout, 0.1, "--output", prior)
        for without in ([], ["--unconditional"]):
            receipt = output / "receipts" / f"{name}{without[0][1:] if without else ''}.json"
            if not receipt.is_file():
                words = ["--model", prior, "--codes", codes, "--split", "test", "--precision", "fp32", *without]
                call("evaluation.program", "likelihood", *words, "--output", receipt)
            found[receipt.stem] = read_receipt(receipt)["metrics"]["nats_per_token"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000, help="of each prior")
    parser.add_argument("--tokenizer-steps", type=int, default=300)
    parser.add_argument("--images", type=int, help="of each split; all by default")
    options = parser.parse_args()
    found = measure(options)
    test = [CodeFiles(options.output / f"codes-{name}", "test") for name in ("classes", "texts")]
    codes = [files.gather(range(len(files)), 0) for files in test]
    assert torch.equal(*codes), "both priors are measured on the same codes"
    print("| prior | given | nats per token |\n|---|---|---|")
    for name, nats in found.items():
        kind, _, without = name.partition("-")
        print(f"| {kind} | {'nothing' if without else 'its condition'} | {nats:.4f} |")
    print(f"text - class: {found['texts'] - found['classes']:+.4f} nats per token")


if __name__ == "__main__":
    main()
