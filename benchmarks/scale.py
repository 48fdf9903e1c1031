"""Check that memory and rates do not depend on the size of the data.

    python benchmarks/scale.py manifest --images 1000000000
    python benchmarks/scale.py moments --images 1000000
    python benchmarks/scale.py tokenize --images 20000 --tokenizer runs/demo/tokenizer
    python benchmarks/scale.py tokenize --images 1000000 --tokenizer runs/demo/tokenizer --processes 2
    python benchmarks/scale.py sharded --tokenizer runs/demo/tokenizer

`manifest` opens code files of that many images, which are sparse and take no room on the disk, and compares the rate of
shuffled batches with that of 60,000 images; its seconds are of the processor. `moments` accumulates features and
compares the result with that of all at once. `tokenize` encodes a stream of tar files, the demo's images again and
again, each as it is and augmented (flipped and shifted at random): two views, or as many as `--views` says; 1 leaves
the augmentation out. It does so with one and with two processes, or as `--processes` says, and with a quarter of the
images, and compares the peak memory; its seconds are of the clock, from the start of the programs to their end.
`sharded` trains a prior for a step, in one process and by FSDP in two, and counts the bytes a parameter that a process
keeps.
"""

import argparse
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from vqgen.devices import peak_memory
from vqgen.evaluation.features import FeatureSets
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.seeding import WINDOW
from vqgen.tokenizer.codes.format import CodeFiles, shard_name
from vqgen.tokenizer.data.sources import DEMO

GRID, CODEBOOK, CLASSES = (16, 16), 16384, 1000  # of ImageNet at 256 pixels with LlamaGen's tokenizer
SMALL = 60_000


def taken(call: Callable[[], Any]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    call()
    return time.process_time() - start


def write_sparse(folder: Path, images: int, each: int) -> CodeFiles:
    """Code files of zeros that take no room, `each` images a shard."""
    folder.mkdir()
    counts = [min(each, images - start) for start in range(0, images, each)]
    for number, count in enumerate(counts):
        size = count * GRID[0] * GRID[1] * 2
        tensors = {
            "codes": {"dtype": "U16", "shape": [count, 1, *GRID], "data_offsets": [0, size]},
            "labels": {"dtype": "I32", "shape": [count], "data_offsets": [size, size + 4 * count]},
        }
        header = json.dumps(tensors).encode()
        header += b" " * (-len(header) % 8)
        with open(folder / shard_name(number), "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size + 4 * count)
    shards = [{"file": shard_name(n), "count": count, "sha256": "0" * 64} for n, count in enumerate(counts)]
    manifest = {
        **{"format": 1, "codebook_size": CODEBOOK, "grid": GRID, "depth": 1, "image_size": [256, 256], "channels": 3},
        **{"class_names": [str(n) for n in range(CLASSES)], "precision": "bf16", "version": "0.2.0"},
        **{"tokenizer_fingerprint": "0" * 64, "data_fingerprint": "0" * 64},
        "splits": {"train": {"views": 1, "count": images, "shards": shards}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return CodeFiles(folder, "train")  # the first time loads modules


def manifest(options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Seconds to open, and batches a second after every shard was opened, in turns with those of a small set."""
    found, batches = dict[str, float](), dict[str, Iterator[Any]]()
    for name, images, each in (("small", SMALL, 8192), ("large", options.images, 2**22)):
        write_sparse(scratch / name, images, each)
        found[f"{name}_open_seconds"] = min(
            taken(lambda name=name: CodeFiles(scratch / name, "train")) for _ in range(3)
        )
        codes = CodeFiles(scratch / name, "train")
        codes.gather_labels(np.arange(0, images, each))  # opens every shard
        # Not `Conditioning.for_files`, which reads all labels to see whether some images have none.
        layout = Conditioning(Vocabulary(CODEBOOK, 1, GRID), [Classes(CLASSES)])
        batches[name] = Sequences(codes, layout).training(256, 0, 0, 0, 1)
        next(batches[name])
    best = dict.fromkeys(batches, float("inf"))
    for _ in range(options.repeats):
        for name, endless in batches.items():  # of the large set two windows are read
            best[name] = min(best[name], taken(lambda endless=endless: deque(islice(endless, 2 * WINDOW), 0)))
    found |= {f"{name}_batches_per_second": 2 * WINDOW / seconds for name, seconds in best.items()}
    return found | {"rate_share": best["small"] / best["large"], "peak_gb": peak_memory(torch.device("cpu")) / 1e9}


def moments(options: argparse.Namespace, _scratch: Path) -> dict[str, float]:
    """Largest differences of mean and covariance from those of all features at once, and memory on the way."""
    count, size, batch = options.images, options.size, 1000
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5

    def part(start: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(start + 1)
        return torch.randn(min(batch, count - start), size, generator=generator) @ mixing + 3

    sets, memory = FeatureSets(size, torch.device("cpu"), [count]), list[int]()
    for start in range(0, count, batch):
        features = part(start)
        sets.add(torch.arange(start, start + len(features)), features)
        if start >= len(memory) * count // 10:
            memory.append(peak_memory(torch.device("cpu")))
    statistics = sets.reduce(True)[count]
    every = torch.cat([part(start) for start in range(0, count, batch)]).double()
    mean = every.mean(0)
    covariance = (every - mean).T @ (every - mean) / (count - 1)
    return {
        "mean_difference": float(((statistics.mean - mean).abs() / mean.abs()).max()),
        "covariance_difference": float((statistics.covariance - covariance).abs().max() / covariance.abs().max()),
        "peak_gb_after_a_tenth": memory[1] / 1e9,
        "peak_gb_at_the_end": memory[-1] / 1e9,
    }


def write_tars(folder: Path, images: int, each: int) -> None:
    """Tar files of the demo's images, repeated, under keys of their own."""
    folder.mkdir()
    rows = pq.read_table(DEMO / "train.parquet").to_pylist()
    for start in range(0, images, each):
        with tarfile.open(folder / f"{start // each:05d}.tar", "w") as tar:
            for number in range(start, min(start + each, images)):
                row = rows[number % len(rows)]
                for ending, data in (("png", row["image"]["bytes"]), ("cls", b"%d" % row["label"])):
                    header = tarfile.TarInfo(f"{number:09d}.{ending}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))


def launched(code: str, words: list[str], results: list[Path], environment: dict[str, str] | None = None) -> list[Any]:
    """Run Python code in a process for each of the files that it writes JSON to; returns what these hold.

    The code gets its file and the words as arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, count = [], len(results)
    for rank, result in enumerate(results):
        shared = {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(environment or {})}
        if torch.cuda.device_count() < count:  # NCCL refuses several processes on a device
            shared["ACCELERATE_USE_CPU"] = "1"
        command = [sys.executable, "-c", code, str(result), *words]
        environ = {**os.environ, **(shared if count > 1 else {})}
        started.append(subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL))
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):  # the others would wait for it
            for process in started:
                process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in started]
    assert not any(codes), codes
    return [json.loads(result.read_text()) for result in results]


TOKENIZE = """
import json, sys
import torch
from vqgen.devices import peak_memory
from vqgen.tokenizer.encode import main
code = main(sys.argv[2:])
json.dump([code, peak_memory(torch.device("cpu"))], open(sys.argv[1], "w"))
"""


NAMES = {1: "one", 2: "two"}
"""Of the results, by the number of processes."""


def tokenize(options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Peak memory of a process and seconds of the clock: of all images, and of a quarter of them."""
    found, counts = dict[str, float](), list(dict.fromkeys(options.processes))
    augmented = ["--views", str(options.views), "--flip", "--random-shift", "2"] if options.views > 1 else []
    for name, images in (("quarter", options.images // 4), ("all", options.images)):
        write_tars(scratch / f"tars-{name}", images, options.each)
    for name, processes in [("quarter", counts[0]), *((NAMES[count], count) for count in counts)]:
        data = scratch / ("tars-quarter" if name == "quarter" else "tars-all")
        words = ["--data", f"stream:{data}", "--tokenizer", str(options.tokenizer), "--output", str(scratch / name)]
        start = time.perf_counter()
        results = [scratch / f"{name}-{rank}.json" for rank in range(processes)]
        ended = launched(TOKENIZE, [*words, *augmented], results)
        assert all(code == 0 for code, _ in ended)
        found[f"{name}_peak_gb"] = max(memory for _, memory in ended) / 1e9
        found[f"{name}_clock_seconds"] = time.perf_counter() - start
    found |= {"images": options.images, "views": options.views}
    if len(counts) > 1:
        files = [sorted((scratch / NAMES[count]).glob("codes-*")) for count in counts]
        same = [a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True)]
        found |= {"shards": len(same), "equal_shards": sum(same)}
    return found


SHARDED = """
import json, sys
from vqgen.config import parse
from vqgen.devices import processes
from vqgen.prior.train import PriorTraining
from vqgen.prior.trainer import build
from vqgen.training.fsdp import local_shards

processes()
run, trainer = build(parse(PriorTraining, sys.argv[2:]))
trainer.begin(0)
trainer.optimizer.zero_grad = lambda: None  # gradients are kept
trainer.step(1)
weights = list(trainer.prior.parameters())
states = [value for state in trainer.optimizers["prior"].state.values() for value in state.values() if value.ndim]
gradients = [weight.grad for weight in weights]
kept = {"weights": weights, "gradients": gradients, "averages": trainer.average.parameters(), "moments": states}
count = sum(weight.numel() for weight in weights)
found = {name: sum(t.nbytes for t in local_shards(tensors)) / count for name, tensors in kept.items()}
json.dump({"parameters": count, **found}, open(sys.argv[1], "w"))
run.accelerator.wait_for_everyone()
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
"""What `accelerate launch --use_fsdp` sets."""


def sharded(options: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Bytes a parameter of what a process keeps between steps, and of gradients: in one process, and in each of two."""
    codes, found = scratch / "codes", dict[str, float]()
    words = ["--data", "demo", "--tokenizer", str(options.tokenizer), "--output", str(codes)]
    assert launched(TOKENIZE, words, [scratch / "tokenize.json"])[0][0] == 0
    for name, processes in (("one", 1), ("two", 2)):
        words = f"--codes {codes} --output {scratch / name} --dim 512 --layers 8 --steps 2 --batch-size 4"
        results = [scratch / f"{name}-{rank}.json" for rank in range(processes)]
        each = launched(SHARDED, words.split(), results, FSDP if processes > 1 else None)
        found["parameters"] = each[0].pop("parameters")
        found |= {f"{name}_{part}": max(rank[part] for rank in each) for part in each[0]}
    return found


PARTS = {"manifest": manifest, "moments": moments, "tokenize": tokenize, "sharded": sharded}


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(PARTS))
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=64, help="of a feature")
    parser.add_argument("--repeats", type=int, default=5, help="of the batches, of which the fastest counts")
    parser.add_argument("--each", type=int, default=2000, help="images a tar file")
    parser.add_argument("--tokenizer", type=Path, help="run or model folder")
    parser.add_argument(
        "--processes", type=int, nargs="+", choices=list(NAMES), default=list(NAMES), help="that encode"
    )
    parser.add_argument("--views", type=int, default=2, help="grids of codes an image, all but the first augmented")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = PARTS[options.what](options, Path(scratch))
    print(json.dumps({name: float(f"{value:.4g}") for name, value in result.items()}, indent=2))


if __name__ == "__main__":
    main()
