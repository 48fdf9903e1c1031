"""vqgen-tokenize: a dataset to code files, sharded over any number of processes, resumable.

What a shard holds is a function of the plan alone: its range of images is fixed, batches never reach across shards and
every augmented view has its own seed. So it does not matter which process writes it, when, or after how many kills.
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from vqgen import __version__
from vqgen.artifact import copy_artifact
from vqgen.config import command, save
from vqgen.devices import processes
from vqgen.errors import UserError
from vqgen.progress import progress
from vqgen.seeding import hash64
from vqgen.tokenizer.codes.format import (
    MANIFEST,
    CodeFiles,
    Manifest,
    ShardEntry,
    SplitEntry,
    checksum,
    code_dtype,
    code_shape,
    open_shard,
    used_codes,
    write_shard,
)
from vqgen.tokenizer.codes.plan import (
    CONFIG,
    SPLITS,
    TOKENIZER,
    Job,
    ShardRange,
    TokenizeConfig,
    begin,
    build_job,
    reopen,
)
from vqgen.tokenizer.data.dataset import Batch, Key, mirrored
from vqgen.tokenizer.data.loader import worker_count
from vqgen.tokenizer.data.sources import Split

from .model import Tokenizer

T = TypeVar("T")

# Batches decoded before they are asked for.
_AHEAD = 4
# Batches given to a CUDA device and not finished: enough to keep it busy, few enough to bound pinned memory.
_IN_FLIGHT = 4


def encode_batch(tokenizer: Tokenizer, images: Tensor, device: torch.device, precision: str) -> Tensor:
    """uint8 images (B, C, H, W), on the CPU or there -> int32 codes (B, h, w[, depth]) on `device`, not waited for."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=precision != "fp32"):
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return tokenizer.encode(images).to(torch.int32)


def view_seed(config: TokenizeConfig, index: int, view: int) -> int:
    """The augmentation seed of a view: a function of (seed, image, view). With flips, odd views are the mirrored ones,
    so that no view repeats another by chance."""
    seeds = (hash64("view", config.seed, index, view, attempt) for attempt in count())
    return next(seed for seed in seeds if not config.images.flip or mirrored(seed) == bool(view % 2))


def _read(job: Job, split: Split, shards: Sequence[ShardRange]) -> Iterator[tuple[ShardRange, int, Batch]]:
    """The batches of some shards of a split, each with its shard and view: one stream without pauses."""
    dataset, size = job.datasets[split], job.config.batch_size
    pieces = [(s, view, at) for s in shards for view in range(s.views) for at in range(s.start, s.stop, size)]

    def plan(done: int) -> Iterator[list[Key]]:
        for shard, view, at in pieces[done:]:
            indices = range(at, min(at + size, shard.stop))
            yield [(i, view_seed(job.config, i, view)) if view else i for i in indices]

    def cached() -> bool:
        return dataset.cached(augmented=False)

    batches = dataset.read(plan, worker_count(job.config.images.workers), cached)
    for batch, (shard, view, _) in zip(batches, pieces):
        dataset.broken.add(batch.broken)
        if job.device.type == "cuda":
            batch = dataclasses.replace(batch, images=batch.images.pin_memory())
        yield shard, view, batch


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, up to `count` of them made in the background before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, items, None) for _ in range(count))
        while (item := made.popleft().result()) is not None:
            made.append(pool.submit(next, items, None))
            yield item


@dataclass(frozen=True)
class _Part:
    """Codes (B, h, w[, depth]) of one view of some images, still on the device."""

    view: int
    indices: Tensor
    labels: Tensor
    codes: Tensor


def _write(job: Job, shard: ShardRange, parts: list[_Part]) -> None:
    """Gather the parts of a shard and write it; images that any view could not show are left out."""
    size = shard.stop - shard.start
    codes = np.zeros((size, *job.row(shard)), dtype=code_dtype(job.tokenizer.codebook_size))
    labels, shown = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    if parts:
        found = torch.cat([part.codes for part in parts]).cpu().numpy()  # one copy from the device a shard
        rows = torch.cat([part.indices for part in parts]).numpy() - shard.start
        views = np.repeat([part.view for part in parts], [len(part.indices) for part in parts])
        codes[rows, views] = found
        labels[rows] = torch.cat([part.labels for part in parts]).numpy()
        np.add.at(shown, rows, 1)
    whole = shown == shard.views
    write_shard(job.path(shard), codes[whole], labels[whole], job.tokenizer.codebook_size)


def _encode(job: Job, shards: Sequence[ShardRange]) -> None:
    """Encode shards one after another; each is written in the background while the next is encoded."""
    total = sum((shard.stop - shard.start) * shard.views for shard in shards)
    stream = chain.from_iterable(_read(job, split, [s for s in shards if s.split == split]) for split in SPLITS)
    main = PartialState().is_main_process
    with ThreadPoolExecutor(1) as writer, progress(total, "tokenizing", "img", main) as bar:
        writing: Future[None] | None = None
        flying: deque[Any] = deque()
        for shard, batches in groupby(_ahead(stream, _AHEAD), key=lambda item: item[0]):
            parts: list[_Part] = []
            for _, view, batch in batches:
                for text in batch.broken if view == 0 else []:
                    bar.write(f"skipped, broken: {text}", file=sys.stderr)
                if len(batch.indices):
                    codes = encode_batch(job.tokenizer, batch.images, job.device, job.precision)
                    parts.append(_Part(view, batch.indices, batch.labels, codes))
                if job.device.type == "cuda":
                    flying.append(torch.cuda.current_stream(job.device).record_event())
                    if len(flying) > _IN_FLIGHT:
                        flying.popleft().synchronize()
                bar.update(len(batch.indices))
            if writing:
                writing.result()
            writing = writer.submit(_write, job, shard, parts)
        if writing:
            writing.result()


def _prepare(job: Job) -> None:
    """Open the output folder for this plan: new, begun or finished. Raises `UserError` where it is neither."""
    output = job.config.output
    begin(output, job.plan(), job.config.overwrite)
    if not (output / CONFIG).exists():
        save(dataclasses.replace(job.config, overwrite=False), output / CONFIG)
    present = [shard for shard in job.shards if job.path(shard).exists()]
    for shard in present:
        open_shard(job.path(shard), job.tokenizer.codebook_size, job.row(shard))
    if (output / MANIFEST).is_file() and len(present) < len(job.shards):
        reopen(output)


def _finish(job: Job) -> tuple[Manifest, float]:
    """Read every shard once, write the manifest, and return it with the share of the codebook in use."""
    tokenizer, config = job.tokenizer, job.config
    used = np.zeros((tokenizer.depth, tokenizer.codebook_size), dtype=bool)
    entries: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
    for planned in job.shards:
        shard = open_shard(job.path(planned), tokenizer.codebook_size, job.row(planned))
        used |= used_codes(shard, tokenizer.codebook_size, tokenizer.depth)
        entries[planned.split].append(ShardEntry(shard.path.name, len(shard.labels), checksum(shard.path)))
    splits = {
        split: SplitEntry(config.views if split == "train" else 1, sum(s.count for s in shards), shards)
        for split, shards in entries.items()
    }
    for split in SPLITS:
        total, entry = len(job.datasets[split]), splits[split]
        allowed = config.images.max_broken * total if config.images.broken == "skip" else 0
        if total - entry.count > allowed:
            option = "--max-broken" if config.images.broken == "skip" else "--broken"
            limit = getattr(config.images, option[2:].replace("-", "_"))
            raise UserError(f"{option} {limit}: {total - entry.count} of {total} {split} images are broken; mend them")
    manifest = Manifest(
        codebook_size=tokenizer.codebook_size,
        grid=list(tokenizer.grid),
        depth=tokenizer.depth,
        image_size=list(tokenizer.config.image_size),
        channels=tokenizer.config.channels,
        class_names=job.datasets["train"].class_names,
        tokenizer_fingerprint=str(tokenizer.fingerprint),
        data_fingerprint=job.data_fingerprint,
        precision=job.precision,
        version=__version__,
        splits=splits,
    )
    copy_artifact(cast(Path, config.tokenizer), config.output / TOKENIZER)
    manifest.write(config.output)
    return manifest, float(used.mean())


def tokenize(config: TokenizeConfig) -> Manifest:
    """Turn a dataset into code files with a trained tokenizer, both splits at once.

    Under several processes each writes its share of the shards and all return the manifest. A folder that was begun
    with the same options is finished; a finished one is left alone. Raises `UserError`.
    """
    # A process may wait long for another whose share is larger.
    state = processes(cpu=config.device == "cpu", timeout=timedelta(days=7))
    main, output = state.is_main_process, config.output
    job = build_job(config, torch.device(state.device or "cpu"))
    if main:
        _prepare(job)
    state.wait_for_everyone()
    if (output / MANIFEST).is_file():
        if main:
            print(f"{output} is finished; --overwrite starts anew")
        return Manifest.read(output)
    open_ = [shard for shard in job.shards if not job.path(shard).exists()]
    if main and len(open_) < len(job.shards):
        print(f"resuming {output}: {len(job.shards) - len(open_)} of {len(job.shards)} shards are there")
    state.wait_for_everyone()  # no shard may appear while another process still looks what is missing
    start = time.perf_counter()
    try:
        _encode(job, [shard for shard in open_ if shard.number % state.num_processes == state.process_index])
    except torch.OutOfMemoryError as error:
        text = f"{config.batch_size} images do not fit into the memory of {job.device}; use fewer"
        raise UserError(f"--batch-size: {text}") from error
    state.wait_for_everyone()
    seconds = time.perf_counter() - start
    if main:
        manifest, usage = _finish(job)
        done = sum((shard.stop - shard.start) * shard.views for shard in open_)
        _report(job, manifest, usage, done / seconds)
    state.wait_for_everyone()
    return Manifest.read(output)


def _report(job: Job, manifest: Manifest, usage: float, rate: float) -> None:
    """Say what was written."""
    train, heldout = (manifest.splits[split] for split in SPLITS)
    broken = sum(len(dataset) for dataset in job.datasets.values()) - train.count - heldout.count
    codes = int(np.prod(code_shape(manifest.grid, manifest.depth)))
    print(
        f"{job.config.output}: {train.count} training images in {train.views} view{'s' * (train.views > 1)} and "
        f"{heldout.count} held-out ones, {codes} codes each; {rate:.0f} images/s; "
        f"{usage:.1%} of {manifest.codebook_size} codes in use; {broken} broken images skipped"
    )


def verify(folder: Path) -> None:
    """Check every checksum, code and label of a folder of code files. Raises `UserError` naming the first bad file."""
    for split in Manifest.read(folder).splits:
        files = CodeFiles(folder, split)  # type: ignore[arg-type]
        files.verify()
        print(f"{folder}: {split} is whole, {len(files)} images")


def run(config: TokenizeConfig) -> None:
    """Turn a dataset into code files with a trained tokenizer: sharded, resumable, over any number of processes."""
    if config.verify:
        verify(config.output)
    else:
        tokenize(config)
        PartialState().destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-tokenize", TokenizeConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
