"""Held-out images of a stream: a fixed set that is read once, and kept encoded."""

import dataclasses
import math
from itertools import islice

import numpy as np

from vqgen.config import shown
from vqgen.devices import on_main
from vqgen.errors import UserError
from vqgen.seeding import hash64
from vqgen.tokenizer.data.broken import LEAST_SEEN
from vqgen.tokenizer.data.dataset import ImageDataset
from vqgen.tokenizer.data.items import Kept
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import Source

from .records import Record
from .shards import Shards

FILES = 16
"""The images are taken from so many files, and from more where these hold too few."""


def read_heldout(shards: Shards, config: ImageConfig, count: int) -> ImageDataset:
    """Read at most `count` held-out images; the main process reads, and all get them. Raises `UserError`."""
    records = on_main(lambda: _records(shards, count))
    if not records:
        raise UserError(f"--holdout {config.holdout}: {shards.data} has no held-out image; hold out more, or add some")
    labels = np.array([record.label for record in records], dtype=np.int64)
    kept = Kept([record.name for record in records], [(record.data, record.problem) for record in records])
    rows, images = np.arange(len(records)), max(LEAST_SEEN, len(records))  # the number of all is not known
    source = Source(shards.data, kept, rows, labels, shards.class_names, "", all_images=images)
    # Workers would each hold a copy; once decoded, images are in the cache of this process.
    return ImageDataset(source, dataclasses.replace(config, workers=0))


def _records(shards: Shards, count: int) -> list[Record]:
    """The first held-out images of several files in a fixed order, as many of each; where all files together then hold
    too few, the rest is from those that hold more."""
    files = sorted(shards.files, key=lambda file: hash64("heldout", shown(file).rpartition("/")[2]))
    share, found, larger = math.ceil(count / min(FILES, len(files))), list[Record](), list[str]()
    for file in files:
        taken = list(islice(shards.read([file]), min(share, count - len(found))))
        found += taken
        if len(found) == count:
            return found
        if len(taken) == share:
            larger.append(file)
    for file in larger:  # read again, as files are not kept open
        found += islice(shards.read([file]), share, share + count - len(found))
        if len(found) == count:
            break
    return found
