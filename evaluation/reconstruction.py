"""Metrics of a tokenizer's reconstructions, with the distance between originals and reconstructions."""

from collections import ChainMap
from typing import Any

import torch

from vqgen.artifact import fingerprint
from vqgen.devices import on_main, precision_of, rank_and_world
from vqgen.errors import UsageError
from vqgen.progress import progress
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.data.dataset import open_images, ordered_batches
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.metrics import RECONSTRUCTION, ReconstructionMetrics
from vqgen.tokenizer.model import Tokenizer

from .distances import RECONSTRUCTION_DISTANCES, Comparison
from .extractors import extract, extractor_for
from .features import FeatureSets
from .measurement import Measurement, SetHash, check_count, reading, start_processes, warn
from .options import ReconstructionConfig
from .receipt import environment

METRICS = ChainMap({metric.name: metric for metric in RECONSTRUCTION_DISTANCES.values()}, RECONSTRUCTION)


def measure_reconstruction(config: ReconstructionConfig) -> Measurement:
    """Encode and decode images, and compare the reconstructions with them. Raises `UserError`."""
    device, (rank, world) = start_processes(config.device), rank_and_world()
    tokenizer = Tokenizer.load(config.tokenizer, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    about = tokenizer.config
    images = reading(config, about.image_size, about.channels, about.fit)
    dataset = open_images(config.data, config.split, images)
    count = check_count(config.n, len(dataset), "--n", f"the {config.split} split of {config.data}")
    backbone, weights = config.perceptual_net, config.perceptual_weights
    perceptual = PerceptualDistance(backbone, weights).to(device) if weights else None
    network = config.extractor
    extractor = None if network == "none" else extractor_for(network, config.weights, device)
    if extractor and count < 2:
        raise UsageError(f"--extractor: a distance needs at least 2 images, found {count}; use none")
    precision = precision_of(config.precision, device)
    metrics, pixels = ReconstructionMetrics(tokenizer, perceptual, device, precision), SetHash()
    sets = [FeatureSets(extractor.size, device, [count]) for _ in range(2)] if extractor else []
    chosen = fixed_subset(count, len(dataset))
    positions = torch.as_tensor(chosen)
    dataset.broken.report = warn
    with progress(count, "reconstructing", "img", rank == 0) as bar, torch.inference_mode():
        for batch in ordered_batches(dataset, chosen[rank::world], config.batch_size):
            results, _ = metrics.reconstruct(batch.images)
            pixels.add_images(batch.images, batch.labels)
            for features, shown in zip(sets, (batch.images, results)):
                assert extractor is not None
                features.add(torch.searchsorted(positions, batch.indices), extract(extractor, shown, device)[0])
            bar.update(len(results) * world)
    found: dict[str, Any] = metrics.compute()
    if network != "none":
        real, ours = (features.reduce(rank == 0).get(count) for features in sets)
        metric = RECONSTRUCTION_DISTANCES[network]
        found[metric.name] = on_main(lambda: metric.function(Comparison(ours, real)))  # type: ignore[misc,arg-type]
    pixels = pixels.over_processes()
    return Measurement(
        {
            "tokenizer": tokenizer.fingerprint,
            "data": pixels.hexdigest(),
            "extractor": extractor.fingerprint if extractor else None,
            "perceptual": fingerprint(perceptual.distance.state_dict()) if perceptual else None,
        },
        {"images": pixels.count},
        found,
        environment(device, precision, world),
    )
