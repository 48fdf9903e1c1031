"""The rate of vqgen-tokenize as a share of the encoder's own rate.

    python benchmarks/encode.py              # demo images, an untrained tokenizer of the demo's size
    python benchmarks/encode.py --tokenizer runs/tokenizer --data photos --batch-size 32 --workers -1

Both encode the same number of images at the same batch size and precision, alternating, so that other load on the
machine affects both. The encoder alone gets the same batch in device memory repeatedly; vqgen-tokenize starts from
image files (decoding included) and ends with the manifest on disk.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from vqgen.devices import find_device
from vqgen.tokenizer.codes.plan import build_job
from vqgen.tokenizer.codes.writer import encode_batch, tokenize
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig


def encoder_alone(tokenizer: Tokenizer, images: torch.Tensor, count: int, precision: str) -> float:
    """Images per second of `tokenizer.encode` on a batch (B, C, H, W) in memory, `count` images in all."""
    start = time.perf_counter()
    batches = -(-count // len(images))
    codes = [encode_batch(tokenizer, images, images.device, precision) for _ in range(batches)]
    torch.cat(codes).cpu()  # waits for the device
    return batches * len(images) / (time.perf_counter() - start)


def end_to_end(config: TokenizeConfig, count: int) -> float:
    """Images per second from image files to the manifest, loading the tokenizer included."""
    start = time.perf_counter()
    with redirect_stdout(StringIO()):
        tokenize(config)
    return count / (time.perf_counter() - start)


def untrained(folder: Path) -> Path:
    """Save an untrained tokenizer of the demo's size: the rate does not depend on the weights."""
    model = VQGANConfig(width=32, multipliers=[1, 2, 4], blocks=1, groups=8)
    tokenizer = Tokenizer(TokenizerConfig([32, 32], 1, model, VQConfig()))
    tokenizer.save(folder)
    return folder


def compared(
    tokenizer: Path, data: str, scratch: Path, batch_size: int, precision: str, device: str, workers: int, rounds: int
) -> dict[str, float]:
    """Images and, of the last round, images a second; the median of the shares of the encoder's rate."""
    config = TokenizeConfig(
        tokenizer=tokenizer,
        data=data,
        output=scratch / "codes",
        overwrite=True,
        batch_size=batch_size,
        precision=precision,  # type: ignore[arg-type]
        device=device,  # type: ignore[arg-type]
        images=ImageConfig(workers=workers, max_broken=1),
    )
    job = build_job(config, find_device(device))
    count = sum(len(dataset) for dataset in job.datasets.values())
    batch = job.datasets["train"].__getitems__(range(min(batch_size, len(job.datasets["train"]))))
    images = batch.images.to(job.device)
    encoder_alone(job.tokenizer, images, 2 * len(images), job.precision)  # warms up kernels and threads
    ratios, total = [], 0.0
    print(f"{count} images, batch {batch_size}, {job.precision} on {job.device}")
    for turn in range(rounds):
        alone, total = encoder_alone(job.tokenizer, images, count, job.precision), end_to_end(config, count)
        ratios.append(total / alone)
        print(f"round {turn + 1}: encoder alone {alone:.0f} images/s, vqgen-tokenize {total:.0f}, {ratios[-1]:.1%}")
    return {"images": count, "per_second": total, "share": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="run or model folder; none: an untrained small one")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, default=0, help="decoding processes of vqgen-tokenize")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = options.tokenizer or untrained(Path(scratch) / "tokenizer")
        given = tokenizer, options.data, Path(scratch), options.batch_size, options.precision, options.device
        found = compared(*given, options.workers, options.rounds)
    print(f"median: vqgen-tokenize reaches {found['share']:.1%} of the encoder alone")


if __name__ == "__main__":
    main()
