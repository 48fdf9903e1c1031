"""The work of vqgen-tokenize: encode the images of every planned shard, and write shards and manifest.

The content of a shard is a function of the plan alone, whichever process writes it and after how many kills: its range
of images is fixed, batches do not cross shards, and every augmented view has its own seed.
"""

import dataclasses
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from vqgen import __version__
from vqgen.artifact import copy_artifact, load_artifact
from vqgen.config import one_line, save, shown
from vqgen.devices import locked_by_main, on_main, processes
from vqgen.errors import UserError
from vqgen.files import DESCRIPTION
from vqgen.progress import progress
from vqgen.tokenizer.data.broken import LEAST_SEEN
from vqgen.tokenizer.data.holdout import is_same_data, reading_of
from vqgen.tokenizer.data.loader import prefetch
from vqgen.tokenizer.data.options import Split
from vqgen.tokenizer.data.sources import find_splits
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.shipped import find_tokenizer
from vqgen.tokenizer.train import TokenizerTraining

from .format import (
    MANIFEST,
    CodeFiles,
    Manifest,
    Shard,
    ShardEntry,
    SplitEntry,
    checksum,
    code_dtype,
    code_shape,
    used_codes,
    verify_checksums,
    write_shard,
)
from .plan import CONFIG, TOKENIZER, Job, ShardRange, begin, build_job, check_sizes, reopen
from .reading import read_views

# Batches decoded in advance, and unfinished ones on a CUDA device: they keep it busy and bound pinned memory.
_AHEAD = _IN_FLIGHT = 4


def encode_batch(tokenizer: Tokenizer, images: Tensor, device: torch.device, precision: str) -> Tensor:
    """Encode uint8 images (B, C, H, W) -> int32 codes (B, h, w[, depth]) on `device`, without waiting for it."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=precision != "fp32"):
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return tokenizer.encode(images).to(torch.int32)


@dataclass(frozen=True)
class _Encoded:
    """Codes (B, h, w[, depth]) of one view of some images and, where there are any, of their sources; on the device."""

    view: int
    indices: Tensor
    labels: Tensor
    codes: Tensor
    source: Tensor | None
    captions: list[str] | None


def _write(job: Job, shard: ShardRange, parts: list[_Encoded], broken: int) -> None:
    """Assemble and write a shard; images of which a view is missing (broken ones) are left out."""
    indices = np.concatenate([np.zeros(0, np.int64), *(part.indices.numpy() for part in parts)])
    found, rows, views_found = np.unique(indices, return_inverse=True, return_counts=True)
    size = len(found)
    codes = np.zeros((size, *job.row_shape(shard)), dtype=code_dtype(job.tokenizer.codebook_size))
    source = np.zeros_like(codes) if job.has_source else None
    labels, captions = np.zeros(size, dtype=np.int64), None if job.config.text_column is None else [""] * size
    if parts:
        views = np.repeat([part.view for part in parts], [len(part.indices) for part in parts])
        codes[rows, views] = torch.cat([part.codes for part in parts]).cpu().numpy()  # one copy from the device
        job.tokenizer.check_finite()
        if source is not None:
            source[rows, views] = torch.cat([cast(Tensor, part.source) for part in parts]).cpu().numpy()
        labels[rows] = torch.cat([part.labels for part in parts]).numpy()
        if captions is not None:
            for row, caption in zip(rows, chain.from_iterable(part.captions or [] for part in parts)):
                captions[row] = caption
    complete = views_found == shard.views
    source = None if source is None else source[complete]
    if captions is not None:
        captions = [captions[row] for row in np.flatnonzero(complete)]
    size, broken = job.tokenizer.codebook_size, broken if job.streams else 0
    write_shard(job.path(shard), codes[complete], labels[complete], size, source, captions, broken)


def _encode(job: Job, shards: Sequence[ShardRange]) -> None:
    """Encode shards one after another; each is written in the background while the next is encoded."""
    total = None if job.streams else sum((shard.stop - shard.start) * shard.views for shard in shards)
    stream = read_views(job, shards)
    told = set[str]()
    main = PartialState().is_main_process
    with ThreadPoolExecutor(1) as writer, progress(total, "tokenizing", "img", main) as bar:
        writing: Future[None] | None = None
        in_flight: deque[Any] = deque()
        for _, batches in groupby(prefetch(stream, _AHEAD), key=lambda batch: batch.shard.group):
            parts, broken = dict[ShardRange, list[_Encoded]](), defaultdict[ShardRange, set[str]](set)
            for batch in batches:
                of_shard = parts.setdefault(batch.shard, [])
                broken[batch.shard].update(batch.broken)
                for text in batch.broken:
                    if text not in told:
                        bar.write(one_line(f"skipped, broken: {text}"), file=sys.stderr)
                    told.add(text)
                if len(batch.indices):
                    codes, source = (
                        None if images is None else encode_batch(job.tokenizer, images, job.device, job.precision)
                        for images in (batch.images, batch.source)
                    )
                    codes = cast(Tensor, codes)
                    of_shard.append(_Encoded(batch.view, batch.indices, batch.labels, codes, source, batch.captions))
                if job.device.type == "cuda":
                    in_flight.append(torch.cuda.current_stream(job.device).record_event())
                    if len(in_flight) > _IN_FLIGHT:
                        in_flight.popleft().synchronize()
                bar.update(len(batch.indices))
            for shard, of_shard in parts.items():
                if writing:
                    writing.result()
                writing = writer.submit(_write, job, shard, of_shard, len(broken[shard]))
        if writing:
            writing.result()


def class_numbers(highest: int) -> list[str] | None:
    """The names of classes that have none: their numbers; None where there are fewer than two classes."""
    return [str(number) for number in range(highest + 1)] if highest > 0 else None


def _prepare(job: Job) -> None:
    """Open the output folder for this plan: new, begun or finished. Raises `UserError` where it is another's."""
    output = job.config.output
    begin(output, job.plan(), job.config.overwrite, job.config.tokenizer)
    if job.streams:
        check_sizes(job)
    if not (output / CONFIG).exists():
        save(dataclasses.replace(job.config, overwrite=False), output / CONFIG)
    present = [shard for shard in job.shards if job.path(shard).exists()]
    for shard in present:
        job.open(shard)
    kept = None
    with suppress(UserError):  # a damaged copy is made again
        kept = Tokenizer.load(output / TOKENIZER)
    if present and kept and kept.config != job.tokenizer.config:  # the fingerprint is of the weights alone
        raise UserError(
            f"--tokenizer: {job.config.tokenizer} has the weights of {output / TOKENIZER}, but other settings "
            f"({DESCRIPTION}): give that one to finish it, --overwrite to start anew, or another --output"
        )
    # A finished folder of version 0.1 has no shards of a test split, and needs none.
    manifest = Manifest.read(output) if (output / MANIFEST).is_file() else None
    if manifest and any(not job.path(shard).exists() for shard in job.shards if shard.split in manifest.splits):
        reopen(output)
    lost = kept is None and manifest and manifest.tokenizer_fingerprint == job.tokenizer.fingerprint
    if lost or not (output / MANIFEST).is_file():
        copy_artifact(find_tokenizer(cast(Path, job.config.tokenizer)), output / TOKENIZER)
        if load_artifact(output / TOKENIZER, "tokenizer").fingerprint != job.tokenizer.fingerprint:
            raise UserError(f"--tokenizer: {job.config.tokenizer} changed while it was read; run this again")


def _check_labels(job: Job, planned: ShardRange, shard: Shard) -> None:
    """Raise `UserError` where a shard, which may be of an earlier call, has labels or captions that its images do not
    have."""
    if job.streams:
        return  # nothing but the stream itself knows them
    dataset, images = job.indexed[planned.split], slice(planned.start, planned.stop)
    if shard.captions and dataset.captions is not None:
        found = [shard.captions.read(row) for row in range(len(shard.labels))]
        if Counter(found) - Counter(dataset.captions[images]):
            raise UserError(f"{shard.path} holds captions that its images do not have; delete it and run this again")
    wanted = dataset.labels[images].numpy()
    whole = len(wanted) == len(shard.labels)  # else some of the images were broken
    if not (np.array_equal(shard.labels, wanted) if whole else np.isin(shard.labels, wanted).all()):
        raise UserError(f"{shard.path} holds labels that its images do not have; delete it and run this again")


def _finish(job: Job) -> tuple[Manifest, float, int]:
    """Read every shard once, write the manifest, and return it with the share of the codebook in use and the number of
    broken images."""
    tokenizer, config = job.tokenizer, job.config
    used = np.zeros((tokenizer.depth, tokenizer.codebook_size), dtype=bool)
    entries: dict[str, list[ShardEntry]] = {split: [] for split in job.datasets}
    highest, captioned, broken = -1, False, 0
    for planned in job.shards:
        shard = job.open(planned)
        _check_labels(job, planned, shard)
        used |= used_codes(shard, tokenizer.codebook_size, tokenizer.depth)
        broken += shard.broken
        highest = max(highest, int(shard.labels.max(initial=-1)))
        captioned |= shard.captions is not None and len(shard.captions.data) > 0
        entries[planned.split].append(ShardEntry(shard.path.name, len(shard.labels), checksum(shard.path)))
    if config.text_column is not None and not captioned:
        found = f"{shown(str(config.data))} has no captions, all of them are empty"
        advice = "correct them, or leave the option out, and give --overwrite"
        raise UserError(f"--text-column {config.text_column}: {found}; {advice}")
    skip, splits = config.images.broken == "skip", dict[Split, SplitEntry]()
    for split in job.datasets:
        found = sum(shard.count for shard in entries[split])
        splits[split] = SplitEntry(config.views if split == "train" else 1, found, entries[split])
        if job.streams and not found and split != "test":
            raise UserError(f"--data: {shown(str(config.data))} has no {split} image; add some, or change --holdout")
    option = f"--max-broken {config.images.max_broken}" if skip else "--broken error"
    images = broken + sum(split.count for split in splits.values())
    if job.streams and broken > (config.images.max_broken * max(images, LEAST_SEEN) if skip else 0):
        raise UserError(f"{option}: {broken} of {images} images are broken; replace or remove them")
    for split, dataset in job.indexed.items():
        total, found = len(dataset), splits[split].count
        broken += total - found
        if total - found > (dataset.broken.most if skip else 0):
            text = f"{total - found} of {total} {split} images are broken"
            raise UserError(f"{option}: {text}; replace or remove them")
        if not found:
            raise UserError(f"--data: none of the {total} {split} images of {dataset.name} is intact; replace them")
    manifest = Manifest(
        codebook_size=tokenizer.codebook_size,
        grid=list(tokenizer.grid),
        depth=tokenizer.depth,
        image_size=list(tokenizer.config.image_size),
        channels=tokenizer.config.channels,
        class_names=job.datasets["train"].class_names or (class_numbers(highest) if job.streams else None),
        tokenizer_fingerprint=str(tokenizer.fingerprint),
        data_fingerprint=job.data_fingerprint,
        precision=job.precision,
        version=__version__,
        splits=splits,
        source=job.source_record(),
        captions=config.text_column is not None,
    )
    manifest.write(config.output)
    return manifest, float(used.mean()), broken


def tokenize(config: TokenizeConfig) -> Manifest:
    """Turn all splits of a dataset into code files with a trained tokenizer.

    Under several processes each writes its share of the shards and all return the manifest. A folder that was begun
    with the same options is resumed; a finished one is left as it is. Raises `UserError`.
    """
    state = processes(cpu=config.device == "cpu", timeout=timedelta(days=7))  # for one with a larger share
    job = build_job(config, torch.device(state.device or "cpu"))
    with locked_by_main(config.output):
        return _tokenize(job, state)


def _tokenize(job: Job, state: PartialState) -> Manifest:
    """Encode the shards that are missing, this process its share of them, and finish the folder."""
    main, config, output = state.is_main_process, job.config, job.config.output
    if main and job.pairs:
        print(f"--source-data {config.source_data}: {job.pairs}")
    if main and (note := next((each.source.note for each in job.indexed.values()), "")):
        print(f"--data: {note}")
    if main and (note := _other_holdout(job)):
        print(note)
    on_main(lambda: _prepare(job))
    if (output / MANIFEST).is_file():
        finished = Manifest.read(output)
        on_main(lambda: verify_checksums(output, finished))
        on_main(lambda: _verify_tokenizer(output, finished))
        if main:
            print(f"{output} is finished; --overwrite starts anew")
        return finished
    missing = [shard for shard in job.shards if not job.path(shard).exists()]
    if main and len(missing) < len(job.shards):
        print(f"resuming {output}: {len(job.shards) - len(missing)} of {len(job.shards)} shards are there")
    state.wait_for_everyone()  # every process lists the missing shards before any of them is written
    start = time.perf_counter()
    try:
        groups = list(dict.fromkeys(shard.group for shard in missing))[state.process_index :: state.num_processes]
        _encode(job, [shard for shard in missing if shard.group in set(groups)])
    except torch.OutOfMemoryError as error:
        found = f"{config.batch_size} images do not fit into the memory of {job.device}"
        raise UserError(f"--batch-size: {found}; use fewer") from error
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    manifest, usage, broken = on_main(lambda: _finish(job))
    if main:
        counts = {shard.file: shard.count for split in manifest.splits.values() for shard in split.shards}
        done = sum(counts[job.path(shard).name] * shard.views for shard in missing)
        _print_summary(job, manifest, usage, broken, done / seconds)
    state.wait_for_everyone()
    return Manifest.read(output)


def _other_holdout(job: Job) -> str:
    """A line where the tokenizer's run held out a smaller share of the same images, which are among those held out
    here; "" otherwise."""
    data, share = str(job.config.data), job.config.images.holdout
    run = reading_of(cast(Path, job.config.tokenizer), TokenizerTraining)
    if run is None or run["holdout"] >= share or not is_same_data(shown(data), shown(str(run["data"]))):
        return ""
    own = job.streams["heldout"].shards.holdout is None if job.streams else "heldout" in find_splits(data)
    text = f"found {share:g}, but the tokenizer's run held out {run['holdout']:g} of these images"
    return "" if own else f"--holdout: {text}; it was trained on some that validate the prior"


def _print_summary(job: Job, manifest: Manifest, usage: float, broken: int, rate: float) -> None:
    train, counts = manifest.splits["train"], {name: split.count for name, split in manifest.splits.items()}
    codes = int(np.prod(code_shape(manifest.grid, manifest.depth)))
    classes = f"{len(manifest.class_names)} classes" if manifest.class_names else "no classes"
    test = f" and {counts['test']} test images" if "test" in counts else ""
    if job.config.text_column is not None and job.indexed:
        found = {split: sum(map(bool, each.captions or [])) for split, each in job.indexed.items()}
        text = ", ".join(f"{found[split]} of {len(each)} {split} images" for split, each in job.indexed.items())
        print(f"--text-column {job.config.text_column}: captions for {text}")
    print(
        f"{job.config.output}: {train.count} training images in {train.views} view{'s' * (train.views > 1)}, "
        f"{counts['heldout']} held-out images{test}, {classes}, {codes} codes each; {rate:.0f} images/s; "
        f"{usage:.1%} of {manifest.codebook_size} codes in use; {broken} broken images skipped"
    )


def _verify_tokenizer(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` where the tokenizer in a folder of code files is not the one that made the codes."""
    found, wanted = load_artifact(folder / TOKENIZER, "tokenizer").fingerprint, manifest.tokenizer_fingerprint
    if found != wanted:
        text = f"has fingerprint {found[:12]}, {folder / MANIFEST} has {wanted[:12]}"
        raise UserError(f"{folder / TOKENIZER} {text}; replace it by the tokenizer that made the codes")


def verify(folder: Path) -> None:
    """Check every checksum, code and label of a folder of code files, and its tokenizer. Raises `UserError` naming the
    first bad file."""
    manifest = Manifest.read(folder)
    _verify_tokenizer(folder, manifest)
    for split in manifest.splits:
        files = CodeFiles(folder, cast(Split, split))
        files.verify()
        print(f"{folder}: {split} is complete, {len(files)} images")
