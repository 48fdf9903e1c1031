"""Two processes: the prior trained by DDP and by FSDP, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .parts import Setup
from .training import options_of_prior

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def two(setup: Setup) -> dict[str, Any]:
    """Rates, and whether the losses are those of one process but for the order of sums."""
    if not setup.tiny and torch.cuda.device_count() < 2:
        return {"not_run": f"{torch.cuda.device_count()} CUDA device, two are needed"}
    words = options_of_prior(setup, 40)
    words += ["--dropout", 0, "--label-dropout", 0, "--preview-images", 0, "--precision", "fp32", "--no-compile"]
    losses: dict[str, list[float]] = {}
    for name, count, environ in (("one", 1, {}), ("ddp", 2, {}), ("fsdp", 2, FSDP)):
        output = setup.folder / name
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"]
        command = [*launcher, "vqgen.prior.train", *words, "--output", output]
        subprocess.run([str(word) for word in command], check=True, env={**os.environ, **environ})
        rows = _rows(output)
        losses[name] = [row["train/loss"] for row in rows]
        setup.report({name: {"per_second": rows[-1]["train/per_second"], "losses": losses[name]}})
    worst = max(abs(a / b - 1) for name in ("ddp", "fsdp") for a, b in zip(losses[name], losses["one"], strict=True))
    if worst > 1e-3:
        raise RuntimeError(f"losses differ by {worst:.2e}")
    return {"largest_difference": worst}


def _rows(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]
