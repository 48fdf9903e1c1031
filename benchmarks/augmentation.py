"""What a generative model adds to few labelled images: accuracy of a classifier with and without its samples.

    python benchmarks/augmentation.py --data DATA --output augmentation

DATA is a folder with a train.parquet and a test.parquet of `image` and `label`. A model is trained by vqgen-train on
100 training images of each class alone, its validation images among them, and draws samples of each class. Classifiers
of the same seed and number of steps learn from the real images, and from batches that are half real and half samples;
both mirror images at random. They are tested on all images of test.parquet. What is there already is kept.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from baselines import call
from torch import Tensor

from vqgen.evaluation.classifier import ClassifierConfig, fit_classifier, shuffled_batches
from vqgen.evaluation.samples import open_samples
from vqgen.evaluation.tasks.accuracy import Labelled
from vqgen.evaluation.tasks.options import AccuracyConfig
from vqgen.files import write_json
from vqgen.tokenizer.data.dataset import ImageDataset, open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.model import Tokenizer


def write_tables(data: Path, output: Path, count: int) -> None:
    """Write train.parquet with the first `count` images of each class in DATA, and test.parquet with all."""
    output.mkdir(parents=True, exist_ok=True)
    found = pq.read_table(data / "train.parquet")
    taken, seen = [], Counter[int]()
    for row, label in enumerate(found.column("label").to_pylist()):
        if seen[label] < count:
            seen[label] += 1
            taken.append(row)
    pq.write_table(found.take(pa.array(taken)), output / "train.parquet")
    pq.write_table(pq.read_table(data / "test.parquet"), output / "test.parquet")


def read(dataset: ImageDataset, where: Path) -> Labelled:
    """All images of a dataset that have a class."""
    return Labelled.read(dataset, range(len(dataset)), str(where))


def joined(one: Labelled, other: Labelled) -> Labelled:
    """The images of both."""
    return Labelled(torch.cat([one.images, other.images]), torch.cat([one.labels, other.labels]))


def half_and_half(real: Labelled, samples: Labelled, size: int, seed: int):
    """Endless batches, half of real images, half of samples."""
    first = shuffled_batches(real.images, real.labels, size // 2, seed, flip=True)
    second = shuffled_batches(samples.images, samples.labels, size // 2, seed, flip=True)
    for (a, a_labels), (b, b_labels) in zip(first, second):
        yield torch.cat([a, b]), torch.cat([a_labels, b_labels])


def accuracies(
    names: list[str], real: Labelled, samples: Labelled, tested: Labelled, steps: int, seeds: int
) -> dict[str, list[float]]:
    """Share of the tested images that is taken for its class, by training set and seed."""
    config = ClassifierConfig(list(real.images.shape[2:]), real.images.shape[1], names)
    found: dict[str, list[float]] = {"real": [], "real and samples": []}
    for seed in range(seeds):
        batches = {
            "real": shuffled_batches(real.images, real.labels, 64, seed, flip=True),
            "real and samples": half_and_half(real, samples, 64, seed),
        }
        for name, rows in batches.items():
            model = fit_classifier(config, rows, steps, 4e-3, seed, torch.device("cpu"), name)
            chosen: list[Tensor] = [model.choose(part) for part in tested.images.split(256)]
            found[name].append((torch.cat(chosen) == tested.labels).double().mean().item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100, help="of each class")
    parser.add_argument("--samples", type=int, default=400, help="of each class")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=1000, help="of each classifier")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    output = options.output
    few, run, drawn = output / "few", output / "run", output / "samples"
    if not (few / "test.parquet").is_file():
        write_tables(options.data, few, options.images)
    call("app.train", "--data", few, "--minutes", options.minutes, "--output", run)
    words = ["--model", run / "prior", "--num-per-class", options.samples, "--layout", "folders", "--output", drawn]
    call("sampling.sample", *words)
    about = Tokenizer.load(run / "tokenizer").config
    reading = ImageConfig(list(about.image_size), about.channels, about.fit)
    data = [open_images(str(few), split, reading) for split in ("train", "heldout", "test")]
    parts = [read(each, few) for each in data]
    real, tested = joined(parts[0], parts[1]), parts[2]
    samples, names = open_samples(drawn, AccuracyConfig(samples=drawn, data=str(few)))
    if names is None or any(each.class_names != names for each in data):
        raise SystemExit(f"{drawn} has other classes than {few}: {names}")
    found = accuracies(names, real, read(samples, drawn), tested, options.steps, options.seeds)
    result = {name: value for name, value in vars(options).items() if name not in ("data", "output")}
    write_json(output / "augmentation.json", {**result, "accuracy": found})
    print(json.dumps(found))
    print("| trained on | mean accuracy | least and most of the seeds |\n|---|--:|--:|")
    for name, values in found.items():
        print(f"| {name} | {sum(values) / len(values):.1%} | {min(values):.1%}, {max(values):.1%} |")


if __name__ == "__main__":
    main()
