"""How well a prior predicts code files, as a figure with a receipt; `vqgen-likelihood` gives the whole picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vqgen.devices import processes
from vqgen.options import at_least
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Sequences
from vqgen.prior.measure import LikelihoodConfig, measure
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.codes.format import CodeFiles

from .extractors import PixelHash
from .measurement import Measured
from .receipt import environment


@dataclass
class PredictionConfig:
    """Which prior, and on which codes."""

    model: Path
    """Run or model folder of the prior."""
    codes: Path
    """Folder of code files, of the tokenizer that the prior was trained with."""
    split: Literal["heldout", "train"] = "heldout"
    """Which images of the code files."""
    n: int = 0
    """Images to measure, the same ones from all over the set; 0 = all."""
    unconditional: bool = False
    """Leave the classes out, as guidance does."""
    output: Path = Path("receipt.json")
    """The receipt; one that is there is replaced."""
    batch_size: int = 64
    """Images at once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Autocast; auto takes 16 bits where the hardware has them."""

    def __post_init__(self) -> None:
        at_least(self, n=0, batch_size=1)


def measure_prediction(config: PredictionConfig) -> Measured:
    """Nats a token and bits a dimension. Raises `UserError`."""
    found = measure(
        LikelihoodConfig(
            config.model,
            config.codes,
            split=config.split,
            n=config.n,
            unconditional=config.unconditional,
            batch_size=config.batch_size,
            precision=config.precision,
        )
    )
    codes, seen = CodeFiles(config.codes, config.split), PixelHash()
    chosen = fixed_subset(found["images"], len(codes))
    conditioning = Conditioning.for_files(codes)
    for sequences in Sequences(codes, conditioning).ordered(chosen, 1000):
        seen.add(conditioning.split(sequences)[1], conditioning.part(sequences, "class")[:, 0])
    state = processes()
    return Measured(
        {
            "prior": found["prior_fingerprint"],
            "tokenizer": found["tokenizer_fingerprint"],
            "data": found["data_fingerprint"],
            "codes": seen.hexdigest(),
        },
        {"images": found["images"]},
        {
            **{name: found[name] for name in ("nats_per_token", "perplexity", "bits_per_dimension")},
            "nats_by_class": {name: each["nats_per_token"] for name, each in found["by_class"].items()},
        },
        environment(torch.device(state.device or "cpu"), found["precision"], state.num_processes),
    )
