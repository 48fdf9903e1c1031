"""Reconstructions against their originals, in one pass over a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vqgen.artifact import fingerprint
from vqgen.devices import find_device, precision_of, processes
from vqgen.errors import UsageError
from vqgen.options import at_least
from vqgen.progress import progress
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.data.dataset import open_images, ordered_batches
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.metrics import ReconstructionMetrics
from vqgen.tokenizer.model import Tokenizer

from .distances import frechet, statistics
from .extractors import Network, PixelHash, extractor_for
from .measurement import Collected, Measured, check_weights_are_used, everywhere, many, warn
from .receipt import environment


@dataclass
class ReconstructionConfig:
    """What is reconstructed, and by what it is judged."""

    tokenizer: Path
    """Run or model folder of the tokenizer."""
    data: str
    """Images: as for vqgen-train-tokenizer."""
    split: Literal["heldout", "train"] = "heldout"
    """Which of them."""
    n: int = 0
    """Images to measure, the same ones from all over the set; 0 = all."""
    output: Path = Path("receipt.json")
    """The receipt; one that is there is replaced."""
    perceptual_net: Literal["vgg", "alex"] = "vgg"
    """Backbone of LPIPS."""
    perceptual_weights: str | None = None
    """Its convolutions: a safetensors file, or torchvision to download them; none = LPIPS is not measured."""
    extractor: Literal["none"] | Network = "none"
    """Network of the distance between originals and reconstructions (rFID with inception); none = not measured."""
    weights: str | None = None
    """Weights of --extractor: a local file, or download."""
    holdout: float = 0.05
    """Share of the images held out where the source has no held-out split of its own."""
    batch_size: int = 64
    """Images at once."""
    workers: int = 0
    """Processes that decode images; -1 takes one per free core."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the tokenizer; all else is computed in float32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        at_least(self, n=0, batch_size=1)
        check_weights_are_used(self.extractor, self.weights)
        if self.perceptual_net != "vgg" and not self.perceptual_weights:
            raise UsageError(f"--perceptual-net: found {self.perceptual_net} and no --perceptual-weights; name them")


def measure_reconstruction(config: ReconstructionConfig) -> Measured:
    """Encode and decode images, and measure what comes back. Raises `UserError`."""
    device = find_device(config.device)
    state = processes(cpu=device.type == "cpu")
    device = torch.device(state.device or device) if state.num_processes > 1 else device
    tokenizer = Tokenizer.load(config.tokenizer, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    about = tokenizer.config
    images = ImageConfig(list(about.image_size), about.channels, about.fit, holdout=config.holdout)
    images.workers, images.cache_mb = config.workers, 0
    dataset = open_images(config.data, config.split, images)
    count = many(config.n, len(dataset), "--n", f"the {config.split} split of {config.data}")
    perceptual = None
    if config.perceptual_weights:
        perceptual = PerceptualDistance(config.perceptual_net, config.perceptual_weights).to(device)
    network = None if config.extractor == "none" else extractor_for(config.extractor, config.weights, device)
    if network and count < 2:
        raise UsageError(f"--extractor: a distance needs at least 2 images, found {count}; use none")
    precision = precision_of(config.precision, device)
    metrics, pixels = ReconstructionMetrics(tokenizer, perceptual, device, precision), PixelHash()
    sides = [Collected(network, device) for _ in range(2)] if network else []
    mine = fixed_subset(count, len(dataset))[state.process_index :: state.num_processes]
    dataset.broken.report = warn
    with progress(count, "reconstructing", "img", state.is_main_process) as bar, torch.inference_mode():
        for batch in ordered_batches(dataset, mine, config.batch_size, images):
            results, _ = metrics.reconstruct(batch.images)
            pixels.add(batch.images, batch.labels)
            for side, shown in zip(sides, (batch.images.to(device), results)):
                side.add(batch.indices, shown)
            bar.update(len(results) * state.num_processes)
    found: dict[str, Any] = metrics.compute()
    if network:
        real, ours = (statistics(side.joined()["features"]) for side in sides)
        found["r" + network.name] = frechet(ours, real)
    whole = pixels.join(everywhere(pixels))
    return Measured(
        {
            "tokenizer": tokenizer.fingerprint,
            "data": whole.hexdigest(),
            "extractor": network.fingerprint if network else None,
            "perceptual": fingerprint(perceptual.distance.state_dict()) if perceptual else None,
        },
        {"images": whole.count},
        found,
        environment(device, precision.replace("no", "fp32"), state.num_processes),
    )
