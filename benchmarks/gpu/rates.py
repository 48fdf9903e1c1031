"""Rates of the quantizer and of vqgen-tokenize."""

from typing import Any

import torch

from vqgen.devices import find_device
from vqgen.sampling.generator import DEFAULT
from vqgen.threads import available_cpus

from .. import encode
from .. import quantizer as codebooks
from .parts import Setup
from .training import few_images


def quantizer(setup: Setup) -> dict[str, Any]:
    """A training step of the codebook against vector-quantize-pytorch, on 4,096 vectors."""
    device = find_device(setup.device)
    rows: list[dict[str, Any]] = []
    for size in [64] if setup.tiny else [1024, 16384, 65536]:
        for dim in [8] if setup.tiny else [8, 256]:
            found = codebooks.compared(size, dim, 256 if setup.tiny else 4096, True, device, 3 if setup.tiny else 11)
            rows.append({"codes": size, "dim": dim, **vars(found)})
            setup.report({"sizes": rows})
    return {}


def tokenizing(setup: Setup) -> dict[str, Any]:
    """vqgen-tokenize from image files against the bare encoder, with the tokenizer in the package."""
    workers = 0 if setup.tiny else min(available_cpus() - 1, 8)
    data = str(few_images(setup.folder / "images")) if setup.tiny else "demo"
    found = encode.compared(
        DEFAULT / "tokenizer", data, setup.folder, 8 if setup.tiny else 256, "auto", setup.device, workers, 1
    )
    return {**found, "workers": workers, "threads": torch.get_num_threads()}
