"""The plan of a tokenizing run: which shard holds which images, and which files of an output folder are its own.

`plan.json` is written before the first shard and kept. It names everything that decides the bytes of a shard, so that
resuming with other options, another tokenizer or other images is refused.
"""

import dataclasses
import hashlib
import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from vqgen.config import shown, values_of
from vqgen.devices import find_device, on_main, precision_of
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION, WEIGHTS, read_json, write_json
from vqgen.files.output_folder import OutputFolder
from vqgen.options import changed
from vqgen.tokenizer.data.dataset import ImageDataset
from vqgen.tokenizer.data.options import ImageConfig, Split, is_stream
from vqgen.tokenizer.data.sources import Source, open_source
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.streams.dataset import StreamImages
from vqgen.tokenizer.streams.shards import open_shards, sizes_of

from .degrade import Degradations, check_channels, parse_degradations
from .format import MANIFEST, Manifest, Shard, SourceRecord, code_shape, open_shard, shard_name, verify_checksum
from .pairs import Pairs, pair

PLAN = "plan.json"
CONFIG = "config.yaml"
# A copy of the tokenizer, so that the folder is all that training a prior needs.
TOKENIZER = "tokenizer"
_TEST = "data_test"  # fingerprint of the test images; plans of version 0.1 have none
_SIZES = "sizes"  # of the files of a stream, by shard
_ADDED = {"random_shift": 0}  # options that plans of earlier versions lack, and what these did
# Files of a folder but for the plan, in order of removal: without its manifest it is not complete.
_OWN = (r"manifest\.json", r"codes-[0-9]{5,}\.safetensors", rf"{TOKENIZER}/(vqgen\.json|model\.safetensors)")
_OWN += (r"config\.yaml",)
# Options that do not change what is written, so that they may differ when a run resumes.
_PAIRED = {"source_data", "pair_by", "unpaired"}  # like `source`, only in the plan of what has such a source
_OPERATIONAL = {"output", "overwrite", "verify", "batch_size", "device", "broken", "max_broken", "workers", "cache_mb"}


@dataclass(frozen=True)
class ShardRange:
    """Shard `number` and the images [start, stop) of its split that it covers."""

    number: int
    split: Split
    start: int
    stop: int
    views: int
    file: str = ""
    """Of a stream: the shard covers the images of its split in this file, `start` and `stop` are 0."""

    @property
    def group(self) -> str | int:
        """The shards of one group are read together, by one process."""
        return self.file or self.number


def shard_ranges(counts: dict[Split, int], views: int, size: int) -> list[ShardRange]:
    """List the shards of all splits, `size` images each; only training images have more than one view."""
    number = itertools.count()
    return [
        ShardRange(next(number), split, start, min(start + size, count), views if split == "train" else 1)
        for split, count in counts.items()
        for start in range(0, count, size)
    ]


def open_streams(
    data: str, config: TokenizeConfig
) -> tuple[dict[Split, StreamImages], list[ShardRange], list[int | None]]:
    """Open the splits of a stream; each of its files becomes one shard for each split that it has images of.

    Also returns the bytes of the file of each shard, None where its server does not say.
    """
    if config.source_data is not None:
        raise UsageError("--source-data: a stream has no index to find partners by; give a folder or a table as --data")
    if config.shard_size != TokenizeConfig.shard_size:
        raise UsageError("--shard-size: each file of a stream becomes a shard for each split; leave the option out")
    shards = open_shards(data, config.images.holdout, config.text_column)
    augment = config.views > 1
    streams: dict[Split, StreamImages] = {s: StreamImages(each, config.images, augment) for s, each in shards.items()}
    sizes = on_main(lambda: sizes_of(file for each in shards.values() for file in each.files))
    for split, each in shards.items():
        streams[split].fingerprint = each.fingerprint(sizes)
    number, found = itertools.count(), dict[tuple[Split, str], ShardRange]()
    for split, each in shards.items():
        for file in each.files:
            views = config.views if split == "train" else 1
            found[split, file] = ShardRange(next(number), split, 0, 0, views, file)
    return streams, list(found.values()), [sizes[shard.file] for shard in found.values()]


@dataclass
class Job:
    """Everything a process needs; the same in all processes."""

    config: TokenizeConfig
    tokenizer: Tokenizer
    device: torch.device
    precision: str  # fp32, bf16 or fp16
    datasets: dict[Split, ImageDataset] | dict[Split, StreamImages]
    """train, heldout and, where the source has one, test."""
    shards: list[ShardRange]
    degradations: Degradations = field(default_factory=Degradations)
    """Of the source images; empty where there are none, or they are paired."""
    pairs: Pairs | None = None
    sizes: list[int | None] = field(default_factory=list)
    """Of a stream: the bytes of the file of each shard."""

    @property
    def streams(self) -> dict[Split, StreamImages]:
        """The datasets where they are streams, else none."""
        return {split: each for split, each in self.datasets.items() if isinstance(each, StreamImages)}

    @property
    def indexed(self) -> dict[Split, ImageDataset]:
        """The datasets where they are no streams, else none."""
        return {split: each for split, each in self.datasets.items() if isinstance(each, ImageDataset)}

    @property
    def has_source(self) -> bool:
        return bool(self.degradations) or self.pairs is not None

    def path(self, shard: ShardRange) -> Path:
        return self.config.output / shard_name(shard.number)

    def row_shape(self, shard: ShardRange) -> tuple[int, ...]:
        """Shape of one image's codes in a shard."""
        return (shard.views, *code_shape(self.tokenizer.grid, self.tokenizer.depth))

    def open(self, shard: ShardRange) -> Shard:
        """Memory-map a shard that is written. Raises `UserError` where it does not fit the plan."""
        row = self.row_shape(shard)
        parts = {"source": row if self.has_source else None, "captions": self.config.text_column is not None}
        return open_shard(self.path(shard), self.tokenizer.codebook_size, row, **parts)

    @property
    def data_fingerprint(self) -> str:
        """Fingerprint of the training and held-out images."""
        return _joined({split: each.fingerprint for split, each in self.datasets.items()})

    def source_record(self) -> SourceRecord | None:
        """What the source codes are; None where there are none."""
        grid, config = list(self.tokenizer.grid), self.config
        if self.pairs:
            about = f"{Path(str(config.source_data)).name[:500]} by {config.pair_by[:400]}"
            return SourceRecord("paired", grid, self.pairs.fingerprint, description=about)
        return SourceRecord("degraded", grid, self.data_fingerprint, config.source or []) if self.has_source else None

    def plan(self) -> dict[str, Any]:
        """Return what decides the bytes of every shard: option -> plain value, files by their fingerprints."""
        given = _PAIRED if self.pairs else {"source"} if self.degradations else set[str]()
        left_out = _OPERATIONAL | (_PAIRED | {"source"}) - given
        values = {k: v for k, v in values_of(self.config).items() if k not in left_out}
        marks: dict[Split, str] = {split: each.fingerprint for split, each in self.indexed.items()}
        marks |= {split: each.shards.fingerprint({}) for split, each in self.streams.items()}  # see `check_sizes`
        values |= {"precision": self.precision, "tokenizer": self.tokenizer.fingerprint, "data": _joined(marks)}
        if self.pairs:
            values["source_data"] = self.pairs.fingerprint
        if "test" in marks:
            values[_TEST] = marks["test"]
        if self.sizes:
            values[_SIZES] = self.sizes
        return values


def _joined(marks: dict[Split, str]) -> str:
    """Fingerprint of the training and held-out images from that of each split."""
    return hashlib.sha256((marks["train"] + marks["heldout"]).encode()).hexdigest()


def _with_image_size(config: TokenizeConfig, tokenizer: Tokenizer) -> TokenizeConfig:
    """Set the tokenizer's image size, channels and fit. Raises `UsageError` where the options ask for others."""
    default, trained = ImageConfig(), tokenizer.config
    required = {"size": list(trained.image_size), "channels": trained.channels, "fit": trained.fit}
    for name, value in required.items():
        asked = getattr(config.images, name)
        given = asked != getattr(default, name) if config.stated is None else name in config.stated
        if given and asked != value:
            raise UsageError(f"--{name}: found {asked}, but {config.tokenizer} takes {value}; leave the option out")
    return changed(config, images=changed(config.images, **required))


def build_job(config: TokenizeConfig, default_device: torch.device) -> Job:
    """Load the tokenizer and open the images; `--device auto` means `default_device`. Raises `UserError`."""
    if config.tokenizer is None or (data := config.data) is None:
        raise UsageError(f"--{'data' if config.tokenizer else 'tokenizer'} is needed; --help lists all options")
    find_device(config.device)  # raises where CUDA is asked for and missing
    device = torch.device("cpu") if config.device == "cpu" else default_device
    precision = precision_of(config.precision, device).replace("no", "fp32")
    tokenizer = Tokenizer.load(config.tokenizer, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = _with_image_size(config, tokenizer)
    degradations = parse_degradations(config.source) if config.source else Degradations()
    check_channels(degradations, tokenizer.config.channels)
    if is_stream(data):
        streams, shards, sizes = open_streams(data, config)
        return Job(config, tokenizer, device, precision, streams, shards, degradations, sizes=sizes)
    # Decoded images are cached only where they are read again.
    once = dataclasses.replace(config.images, cache_mb=0)
    often = config.images if config.views > 1 else once
    holdout, text = config.images.holdout, config.text_column
    sources: dict[Split, Source] = {"train": (train := open_source(data, "train", holdout, text))}
    for split in cast(tuple[Split, ...], ("heldout", "test") if train.test_images else ("heldout",)):
        sources[split] = open_source(data, split, holdout, text)
    pairs = None
    if config.source_data is not None:
        pairs, sources = pair(sources, config.source_data, config.pair_by, config.unpaired, often, config.views > 1)
        if not often.augments and config.views > pairs.most:
            text = f"found {config.views}, but no image has more than {pairs.most} partners"
            raise UsageError(f"--views: {text}, and equal views are of no use; add --flip or --random-shift")
    datasets: dict[Split, ImageDataset] = {
        split: ImageDataset(source, often, augment=config.views > 1) if split == "train" else ImageDataset(source, once)
        for split, source in sources.items()
    }
    counts: dict[Split, int] = {split: len(dataset) for split, dataset in datasets.items()}
    shards = shard_ranges(counts, config.views, config.shard_size)
    return Job(config, tokenizer, device, precision, datasets, shards, degradations, pairs)


def _is_plan(path: Path) -> bool:
    """Whether a plan.json is one of vqgen-tokenize. Raises `UserError` where it cannot be read."""
    return path.is_file() and {"tokenizer", "views", "shard_size"} <= read_json(path).keys()


def codes_folder(folder: Path) -> OutputFolder:
    """The output folder of vqgen-tokenize."""
    return OutputFolder(folder, (PLAN,), _OWN, is_mark=_is_plan)


def begin(folder: Path, plan: dict[str, Any], overwrite: bool, tokenizer: Path | None = None) -> None:
    """Check that an output folder is empty or was written by the same plan, and write the plan.

    Args:
        plan: option -> plain value, tokenizer and data by their fingerprints.
        overwrite: remove the files of an earlier run of vqgen-tokenize; other files are never touched.
        tokenizer: the tokenizer's folder, which is kept where it is the one in `folder`.

    Temporary files of a killed run are removed. Raises `UserError` where the folder cannot be used.
    """
    output = codes_folder(folder)
    output.refuse_foreign()
    if overwrite or not output.recognised:
        own = tokenizer is not None and os.path.realpath(tokenizer) == os.path.realpath(folder / TOKENIZER)
        kept = [f"{TOKENIZER}/{name}" for name in (WEIGHTS, DESCRIPTION)] if own else []
        output.clear(keep=[PLAN, *kept])  # the plan is that by which a removal that was killed is recognised
        write_json(folder / PLAN, plan)
        return
    before = {**_ADDED, **read_json(folder / PLAN)}
    # Options first: one of them may be why the fingerprint of the data is another.
    for name in sorted((plan.keys() | before.keys()) - {_SIZES}, key=lambda name: (name in ("data", _TEST), name)):
        old, new = (
            value[:12] if isinstance(value, str) and len(value) == 64 else value  # a fingerprint by its first digits
            for value in (before.get(name), plan.get(name))
        )
        if before.get(name) != plan.get(name) and not (name == _TEST and old is None):
            raise UserError(
                f"{folder} was begun with --{'data' if name == _TEST else name.replace('_', '-')} {old}, now {new}: "
                "give the same options to finish it, --overwrite to start anew, or another --output"
            )
    output.remove_leftovers()


def check_sizes(job: Job) -> None:
    """Raise `UserError` where a file of a stream has another size than when its codes were written.

    A file without codes may change, as one that was damaged is replaced: the plan gets its size.
    """
    path = job.config.output / PLAN
    before = read_json(path).get(_SIZES, [])
    if before == job.sizes:
        return
    before = before if isinstance(before, list) and len(before) == len(job.sizes) else ["unknown"] * len(job.sizes)
    written = {shard.file for shard in job.shards if job.path(shard).exists()}
    for shard, old, new in zip(job.shards, before, job.sizes):
        if old != new and shard.file in written:
            raise UserError(
                f"--data: {job.config.output} has codes of {shown(shard.file)} when its bytes were {old}, now {new}: "
                "restore it, or give --overwrite to start anew, or another --output"
            )
    write_json(path, job.plan())


def reopen(folder: Path) -> None:
    """Remove the manifest of a folder that lost a shard, so that the shard is written again.

    Raises `UserError` where another shard has changed: it would get a new checksum.
    """
    entries = [entry for split in Manifest.read(folder).splits.values() for entry in split.shards]
    for entry in entries:
        if (folder / entry.file).exists():
            verify_checksum(folder, entry)
    OutputFolder(folder).remove([folder / MANIFEST])
