"""Training of both stages by their programs, compiled and not."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vqgen.devices import release_memory
from vqgen.prior import train as prior_program
from vqgen.sampling.generator import DEFAULT
from vqgen.tokenizer import encode as tokenize_program
from vqgen.tokenizer import train as tokenizer_program

from .parts import Setup


def _trained(main: Callable[[Sequence[str]], int], words: list[Any], output: Path) -> dict[str, Any]:
    """Train by a program; the last training metrics, the first and the last loss. Raises `RuntimeError`."""
    if torch.cuda.is_available():
        release_memory()  # of the run before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if code := main([str(word) for word in [*words, "--output", output]]):
        raise RuntimeError(f"the program ended with {code}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    kept = ("per_second", "mfu", "tokens_per_second", "peak_memory_gb")
    found = {name: rows[-1][f"train/{name}"] for name in kept if f"train/{name}" in rows[-1]}
    return {**found, "first_loss": rows[0]["train/loss"], "last_loss": rows[-1]["train/loss"]}


def _both(setup: Setup, main: Callable[[Sequence[str]], int], words: list[Any], precision: str) -> dict[str, Any]:
    """Train uncompiled, then compiled; in the rehearsal uncompiled and in bf16, as a CPU has no fp16."""
    words += ["--precision", "bf16" if setup.tiny else precision]
    for flag in ["--no-compile"] if setup.tiny else ["--no-compile", "--compile"]:
        setup.report({flag.removeprefix("--"): _trained(main, [*words, flag], setup.folder / flag.strip("-"))})
    return {}


def codes(setup: Setup) -> Path:
    """Code files of the demo's images, by the tokenizer in the package."""
    folder, device = setup.folder / "codes", setup.device
    data = few_images(setup.folder / "images") if setup.tiny else "demo"
    words = [
        "--data",
        data,
        "--tokenizer",
        DEFAULT / "tokenizer",
        "--output",
        folder,
        "--holdout",
        0.1,
        "--device",
        device,
    ]
    if code := tokenize_program.main([str(word) for word in words]):
        raise RuntimeError(f"vqgen-tokenize ended with {code}")
    return folder


def few_images(folder: Path, count: int = 60) -> Path:
    """A folder of some of the demo's images, for the rehearsal."""
    from torchvision.io import write_png

    from vqgen.tokenizer.data.dataset import open_images
    from vqgen.tokenizer.data.options import ImageConfig

    folder.mkdir()
    images = open_images("demo", "train", ImageConfig(size=[32, 32]))
    for index in range(count):
        write_png(images[index].image, str(folder / f"{index}.png"))
    return folder


def intervals(steps: int) -> list[Any]:
    """A run of some steps whose last rate is that of its second half; no validation but the last."""
    return [
        "--steps",
        steps,
        "--log-every",
        steps // 2,
        "--validate-every",
        steps,
        "--checkpoint-every",
        steps,
        "--lr-warmup",
        5,
    ]


def options_of_prior(setup: Setup, steps: int) -> list[Any]:
    """Options of a prior of the width and depth of prior-base, or of a tiny one."""
    size = ["--dim", 32, "--layers", 1, "--heads", 2] if setup.tiny else ["--dim", 768, "--layers", 12, "--heads", 12]
    batch = 8 if setup.tiny else 256
    return ["--codes", codes(setup), *size, "--batch-size", batch, *intervals(4 if setup.tiny else steps)]


def prior(setup: Setup, precision: str) -> dict[str, Any]:
    """Width and depth of prior-base over 512 codes (86 M parameters), 64 codes an image, 256 images a step."""
    words = options_of_prior(setup, 100)
    return _both(setup, prior_program.main, [*words, "--preview-images", 0], precision)


def tokenizer(setup: Setup, precision: str) -> dict[str, Any]:
    """vqgan-64 with a discriminator from the first step, without LPIPS, whose weights are not in the package."""
    gan = [
        "--perceptual-weights",
        "null",
        "--perceptual-weight",
        0,
        "--gan-start",
        1,
        "--gan-warmup",
        1,
        "--gan-ramp",
        1,
    ]
    small = ["--width", 8, "--groups", 4, "--size", 16, "--gan-width", 8, "--validation-images", 8]
    size = small if setup.tiny else ["--validation-images", 128, "--workers", 4]
    steps = intervals(4 if setup.tiny else 60)
    words = [
        "--config",
        "vqgan-64",
        "--data",
        few_images(setup.folder / "images") if setup.tiny else "demo",
        *gan,
        *size,
        *steps,
    ]
    return _both(setup, tokenizer_program.main, [*words, "--batch-size", 4 if setup.tiny else 64], precision)
