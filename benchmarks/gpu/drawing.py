"""Drawing: codes against `transformers.generate` and what the machine allows; the model in the package."""

import subprocess
import sys
import time
from typing import Any

import torch

from vqgen.devices import find_device, peak_memory
from vqgen.prior.options import PriorConfig
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import DEFAULT, Generator

from ..sample import compared
from .parts import Setup


def sides(setup: Setup, dim: int, layers: int, codebook_size: int) -> dict[str, Any]:
    """256 codes an image, bf16, 64 and 1 at once."""
    device = find_device(setup.device)
    if setup.tiny:
        dim, layers = 128, 1
    shape, vocabulary = (
        PriorConfig("llama", dim, layers, dim // 64),
        Vocabulary(codebook_size, 1, (4, 4) if setup.tiny else (16, 16)),
    )
    rows: dict[str, Any] = {}
    for found in compared(shape, vocabulary, device, "bf16", [4, 1] if setup.tiny else [64, 1], 1 if layers > 6 else 3):
        rows[str(found.batch)] = {"seconds": found.seconds, "floor_seconds": found.floor}
        setup.report({"dim": dim, "layers": layers, "codes": vocabulary.length, "batches": rows})
    return {"peak_memory_gb": peak_memory(device) / 1e9}


def package(setup: Setup) -> dict[str, Any]:
    """Rates by precision; whether images depend on neighbours, and agree with the CPU's; a cold start."""
    count, few = (8, 2) if setup.tiny else (1024, 8)
    expected = Generator.load(DEFAULT, "cpu", "fp32").draw(range(few), seed=7)
    rows: dict[str, Any] = {}
    for precision in ["fp32", "bf16"] if setup.tiny else ["fp32", "bf16", "fp16"]:
        generator = Generator.load(DEFAULT, setup.device, precision)
        size = min(256, count)
        generator.draw(range(size), batch_size=size)  # warms up
        start = time.perf_counter()
        whole = generator.draw(range(count), seed=7, batch_size=size)
        took = time.perf_counter() - start
        again = generator.draw([few - 1, count - 1], seed=7, batch_size=size)
        steps = generator.decoder._batch.steps
        rows[precision] = {
            "images_per_second": count / took,
            "images_at_once": size,
            "graphs": steps is not None and steps.usable,
            "the_same_alone": torch.equal(again.codes, whole.codes[[few - 1, count - 1]]),
            "codes_as_on_cpu_fp32": (whole.codes[:few] == expected.codes).float().mean().item(),
            "nats": whole.nats.mean().item() / whole.codes[0].numel(),
        }
        setup.report({"precisions": rows})
    output = setup.folder / "samples"
    command = [
        sys.executable,
        "-m",
        "vqgen.sampling.sample",
        "--model",
        DEFAULT,
        "--n",
        few * 8,
        "--guidance-scale",
        1,
        "--output",
        output,
        "--device",
        setup.device,
    ]
    start = time.perf_counter()
    subprocess.run([str(word) for word in command], check=True)
    return {"cold_seconds": time.perf_counter() - start, "cold_images": few * 8}
