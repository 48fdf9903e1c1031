"""Feature statistics of real images, kept on disk for later evaluations."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vqgen.artifact import load_artifact, save_artifact
from vqgen.devices import gather_objects, on_main, rank_and_world
from vqgen.errors import UsageError, UserError
from vqgen.files import read_json, write_json
from vqgen.progress import progress
from vqgen.seeding import fixed_subset
from vqgen.tokenizer.data.dataset import open_images, ordered_batches
from vqgen.tokenizer.data.items import Rows
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import Source

from .extractors import Extractor, extract
from .features import FeatureSets, Statistics
from .measurement import SetHash, check_count, warn
from .options import SamplesConfig

SETTLED_SECONDS = 2.0
"""Age of a file from which a change of its content must change its time stamp, on every common file system."""


@dataclass
class Reference:
    """Real images: the fingerprint of their pixels and labels; statistics are None except in the main process."""

    count: int
    pixels: str
    statistics: Statistics | None


def measure_reference(
    config: SamplesConfig, images: ImageConfig, extractor: Extractor, device: torch.device
) -> Reference:
    """Statistics of the real images at the size of the samples, from --cache if they are there. Raises `UserError`."""
    dataset = open_images(config.data, config.split, images)
    count = check_count(config.reference_n, len(dataset), "--reference-n", f"the {config.split} split of {config.data}")
    if count < 2:
        raise UsageError(f"--data: {config.data} holds {count} {config.split} image; a distance needs at least 2")
    dataset.broken.report = warn
    chosen, shape = fixed_subset(count, len(dataset)), [images.size, images.channels, images.fit]
    cache = config.cache.expanduser()
    content = content_hash(dataset.source, chosen, cache)
    key = json.dumps(["reference 2", content, shape, extractor.name, extractor.fingerprint])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    rank, world = rank_and_world()
    kept = _load(folder) if rank == 0 else None
    known = on_main(lambda: kept and (kept.count, kept.pixels))
    if known:
        return kept or Reference(*known, None)
    sets, pixels = FeatureSets(extractor.size, device, [count], extractor.classes), SetHash()
    positions = torch.as_tensor(chosen)
    with progress(count, "real images", "img", rank == 0) as bar:
        for batch in ordered_batches(dataset, chosen[rank::world], config.batch_size):
            features, logits = extract(extractor, batch.images, device)
            sets.add(torch.searchsorted(positions, batch.indices), features, logits)
            pixels.add_images(batch.images, batch.labels)
            bar.update(len(batch.images) * world)
    statistics, pixels = sets.reduce(rank == 0).get(count), pixels.over_processes()
    made = Reference(pixels.count, pixels.hexdigest(), statistics)
    on_main(lambda: _save(made, folder))
    return made


def _load(folder: Path) -> Reference | None:
    """Read a kept reference; None if there is none, or if it is damaged, which is reported."""
    if not folder.is_dir():
        return None
    try:
        kept = load_artifact(folder, "reference")
        count, tensors = int(kept.description["count"]), kept.tensors
        statistics = Statistics(count, tensors["mean"], tensors["covariance"], tensors["features"])
        (size,) = statistics.mean.shape
        if statistics.covariance.shape != (size, size) or statistics.features.shape[1:] != (size,):
            raise ValueError("its tensors do not fit each other")
        return Reference(count, str(kept.description["pixels"]), statistics)
    except (UserError, KeyError, ValueError, TypeError) as error:
        warn(f"{folder} is damaged and made again ({error})")
        return None


def _save(reference: Reference, folder: Path) -> None:
    tensors = {name: getattr(reference.statistics, name) for name in ("mean", "covariance", "features")}
    save_artifact(folder, "reference", {"count": reference.count, "pixels": reference.pixels}, tensors)


def content_hash(source: Source, chosen: Sequence[int], cache: Path) -> str:
    """Fingerprint of the encoded bytes and labels of the chosen images.

    Reading them takes long, so `cache` keeps it by path, size, inode, mtime and ctime of every file they are in. A
    changed file has another of these on every file system, unless it is younger than `SETTLED_SECONDS`: read again.
    """
    stamp = on_main(lambda: _stamp(source, chosen))
    remembered = cache / "contents" / f"{stamp}.json"
    known = on_main(lambda: read_json(remembered).get("content") if stamp and remembered.is_file() else None)
    if isinstance(known, str):
        return known
    rank, world = rank_and_world()
    found = SetHash()
    for index in chosen[rank::world]:
        try:
            data = source.read(index)
        except OSError:  # a broken image; decoding reports it
            data = b""
        found.add(b"%d\n" % source.labels[index] + data)
    content = found.over_processes().hexdigest()
    # The stamp does not cover files that a table names.
    outside = any(gather_objects(isinstance(source.items, Rows) and source.items.outside))
    if stamp and not outside:
        on_main(lambda: write_json(remembered, {"content": content}))
    return content


def _stamp(source: Source, chosen: Sequence[int]) -> str | None:
    """Fingerprint of which images of which files these are; None if the files are not known, or too young."""
    items, rows = source.items, source.rows[np.asarray(chosen)]
    names = items.files if isinstance(items, Rows) else [items.name(int(row)) for row in rows]
    digest = hashlib.sha256(b"".join((type(items).__name__.encode(), rows.tobytes(), source.labels[chosen].tobytes())))
    now = time.time()
    for name in names:
        try:
            found = os.stat(name)
        except OSError:
            return None
        if not os.path.isfile(name) or now - max(found.st_mtime, found.st_ctime) < SETTLED_SECONDS:
            return None
        times = (found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns)
        digest.update(f"{os.path.abspath(name)}\0{times}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
