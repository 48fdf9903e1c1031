"""Runs of vqgen-tokenize on real garments, and deaths in the middle of them."""

import os
from pathlib import Path

import pyarrow.parquet as pq
import torch

from vqgen.config import values_of
from vqgen.tokenizer.data.sources import DEMO
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig

SIZE = 16
"""Height and width in pixels."""

DIE = """
import os, signal, sys
replace = os.replace
def dying(source, target):
    if os.path.basename(target) == sys.argv[1]:
        assert os.path.getsize(source) > 0
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    replace(source, target)
os.replace = dying
from vqgen.tokenizer.encode import main
sys.exit(main(sys.argv[3:]))
"""
"""A program that dies by a signal of its own just before it gives a file its final name."""


def save_garments(folder: Path, count: int) -> Path:
    """Save real garments as PNG files in a folder a class."""
    table = pq.read_table(DEMO / "train.parquet").slice(0, count)
    for number, (image, label) in enumerate(zip(table["image"].to_pylist(), table["label"].to_pylist())):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        (folder / f"class{label}" / f"{number:03d}.png").write_bytes(image["bytes"])
    return folder


def make_tokenizer(folder: Path, seed: int = 0, channels: int = 1) -> Path:
    """An untrained tokenizer of 8x8 codes."""
    torch.manual_seed(seed)
    model = VQGANConfig(width=8, multipliers=[1, 2], blocks=1, groups=4, latent_dim=8, attention=False)
    Tokenizer(TokenizerConfig([SIZE, SIZE], channels, model, VQConfig(codebook_size=300))).save(folder)
    return folder


def words(config: TokenizeConfig) -> list[str]:
    """The command line of a configuration; the tokenizer decides size, channels and fit."""
    found = []
    for name, value in values_of(config).items():
        if name in ("size", "channels", "fit"):
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found += [flag] if value else []
        elif value is not None:
            found += [flag, *map(str, value if isinstance(value, list) else [value])]
    return found


def content(folder: Path) -> dict[str, bytes]:
    """The files that must be the same however a folder came about."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".safetensors", ".json")}


def environment() -> dict[str, str]:
    """Of processes that compute with one thread, so that their bytes can be compared."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
