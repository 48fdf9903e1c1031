"""The plan of a tokenizing run: which shard holds which images, and whose files an output folder holds.

`plan.json` is written before the first shard and stays. It names everything that decides the bytes of a shard, so a
run that resumes under other options, another tokenizer or other images is refused instead of mixing the two.
"""

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from vqgen.config import values_of
from vqgen.devices import precision_of
from vqgen.errors import UsageError, UserError
from vqgen.files import read_json, write_json
from vqgen.options import at_least
from vqgen.output_folder import remove
from vqgen.tokenizer.data.dataset import ImageDataset, open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.sources import Split
from vqgen.tokenizer.model import Tokenizer

from .format import MANIFEST, Manifest, code_shape, shard_name, verify_checksum

PLAN = "plan.json"
CONFIG = "config.yaml"
# A copy of the tokenizer: whoever trains a prior on the codes needs nothing but their folder.
TOKENIZER = "tokenizer"
SPLITS: tuple[Split, Split] = ("train", "heldout")
# Options that do not change what is written, so that they may differ when a run resumes.
_OPERATIONAL = {"output", "overwrite", "verify", "batch_size", "device", "broken", "max_broken", "workers", "cache_mb"}


@dataclass
class TokenizeConfig:
    """What is encoded, with what, and where to."""

    tokenizer: Path | None = None
    """Run or model folder of the tokenizer. Needed."""
    data: str | None = None
    """Images: demo, a folder, parquet files, a save_to_disk folder, or a name that `datasets` knows. Needed."""
    output: Path = Path("runs/codes")
    """Folder of the code files; one that was begun with the same options is finished."""
    overwrite: bool = False
    """Remove code files begun or finished in --output and start anew; after an interruption leave it out."""
    verify: bool = False
    """Only check the code files in --output: every checksum, every code, every label."""
    batch_size: int = 64
    """Images encoded at once by each process."""
    views: int = 1
    """Grids of codes per training image: one of the image as it is, further ones of augmented copies."""
    shard_size: int = 8192
    """Images per file; a killed run loses at most the files it was writing."""
    seed: int = 0
    """Seed of the augmented views."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast; auto takes bf16 where the hardware has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode; auto takes what Accelerate finds."""
    images: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, views=1, shard_size=1)
        augmented = self.images.flip or self.images.random_crop > 0
        if self.views > 1 and not augmented:
            raise UsageError(f"--views: {self.views} views need an augmentation; add --flip or --random-crop")
        if self.views > 2 and self.images.random_crop == 0:
            raise UsageError(f"--views: flips alone make 2 views, found {self.views}; add --random-crop for more")
        if self.views == 1 and augmented:
            option = "--flip" if self.images.flip else "--random-crop"
            raise UsageError(f"{option}: --views 1 is of the image as it is; ask for --views 2 or leave {option} out")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device: found cuda, but torch sees no CUDA device; use auto or cpu")


@dataclass(frozen=True)
class ShardRange:
    """Shard `number` and the images [start, stop) of its split that it covers."""

    number: int
    split: Split
    start: int
    stop: int
    views: int


def shard_ranges(counts: dict[Split, int], views: int, size: int) -> list[ShardRange]:
    """Every shard of both splits; held-out images have one view."""
    found: list[ShardRange] = []
    for split, count in counts.items():
        for start in range(0, count, size):
            stop = min(start + size, count)
            found.append(ShardRange(len(found), split, start, stop, views if split == "train" else 1))
    return found


@dataclass
class Job:
    """Everything one process needs; the same in all of them."""

    config: TokenizeConfig
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    """fp32, bf16 or fp16: what `auto` came to."""
    datasets: dict[Split, ImageDataset]
    shards: list[ShardRange]

    def path(self, shard: ShardRange) -> Path:
        return self.config.output / shard_name(shard.number)

    def row(self, shard: ShardRange) -> tuple[int, ...]:
        """Shape of one image's codes in a shard."""
        return (shard.views, *code_shape(self.tokenizer.grid, self.tokenizer.depth))

    @property
    def data_fingerprint(self) -> str:
        marks = "".join(dataset.fingerprint for dataset in self.datasets.values())
        return hashlib.sha256(marks.encode()).hexdigest()

    def plan(self) -> dict[str, Any]:
        """What decides the bytes of every shard: option -> plain value, files by their fingerprints."""
        values = {k: v for k, v in values_of(self.config).items() if k not in _OPERATIONAL}
        values["precision"] = self.precision
        return {**values, "tokenizer": self.tokenizer.fingerprint, "data": self.data_fingerprint}


def _fitted(config: TokenizeConfig, tokenizer: Tokenizer) -> TokenizeConfig:
    """The configuration with the tokenizer's image size and channels; others that were asked for are refused."""
    default, images = ImageConfig(), config.images
    made_for = tokenizer.config
    needs = {"size": list(made_for.image_size), "channels": made_for.channels, "fit": made_for.fit}
    for name, needed in needs.items():
        asked = getattr(images, name)
        if asked not in (needed, getattr(default, name)):
            raise UsageError(f"--{name}: found {asked}, but {config.tokenizer} takes {needed}; leave the option out")
        images = dataclasses.replace(images, **{name: needed})
    return dataclasses.replace(config, images=images)


def build_job(config: TokenizeConfig, found: torch.device) -> Job:
    """Load the tokenizer and open the images; `found` is the device that `auto` takes. Raises `UserError`."""
    data = config.data
    if config.tokenizer is None or data is None:
        raise UsageError(f"--{'data' if config.tokenizer else 'tokenizer'} is needed; --help lists all options")
    device = torch.device("cpu") if config.device == "cpu" else found
    tokenizer = Tokenizer.load(config.tokenizer, device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = _fitted(config, tokenizer)
    # Decoded images are kept in memory only where they are asked for again.
    once = dataclasses.replace(config.images, cache_mb=0)
    datasets: dict[Split, ImageDataset] = {}
    for split in SPLITS:
        augment = split == "train" and config.views > 1
        datasets[split] = open_images(data, split, config.images if augment else once, augment=augment)
    counts: dict[Split, int] = {split: len(datasets[split]) for split in SPLITS}
    shards = shard_ranges(counts, config.views, config.shard_size)
    precision = precision_of(config.precision, device).replace("no", "fp32")
    return Job(config, tokenizer, device, precision, datasets, shards)


def begin(folder: Path, plan: dict[str, Any], overwrite: bool) -> None:
    """See that an output folder holds nothing, or the beginning or end of this very plan, and write the plan.

    Args:
        plan: option -> plain value, tokenizer and data by their fingerprints.
        overwrite: remove what an earlier run of vqgen-tokenize left there; files of anything else are never touched.

    Half-written files of a killed run are removed. Raises `UserError` where the folder cannot be used.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output: {folder} is a file; name a folder")
    planned = (folder / PLAN).is_file()
    strangers = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if strangers and not planned:
        raise UserError(f"--output: {folder} holds files of something else; choose another folder")
    if planned and not overwrite:
        _compare(folder, plan)
        remove(_own_files(folder, temporary=True))
    else:
        remove([*_own_files(folder, temporary=True), *_own_files(folder, temporary=False)])
        write_json(folder / PLAN, plan)


def _own_files(folder: Path, temporary: bool) -> list[Path]:
    """What vqgen-tokenize writes, the plan last: as long as anything else is there, the plan says whose it is."""
    names = (MANIFEST, "codes-[0-9]*.safetensors", TOKENIZER, CONFIG, PLAN)
    patterns = [f".{name}.*.part" for name in names] if temporary else names
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _compare(folder: Path, plan: dict[str, Any]) -> None:
    before = read_json(folder / PLAN)
    for name in sorted(plan.keys() | before.keys()):
        old, new = before.get(name), plan.get(name)
        if old != new:
            raise UserError(
                f"{folder} was begun with --{name.replace('_', '-')} {_short(old)}, now {_short(new)}: give the same "
                "options to finish it, --overwrite to start anew, or another --output"
            )


def _short(value: Any) -> str:
    """A value of the plan for people: fingerprints by their first digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def reopen(folder: Path) -> None:
    """Take the manifest away from a folder that lost a shard, so that the shard is made again.

    Raises `UserError` where one of the other shards was changed: it must not get a fresh checksum.
    """
    entries = [entry for split in Manifest.read(folder).splits.values() for entry in split.shards]
    for entry in entries:
        if (folder / entry.file).exists():
            verify_checksum(folder, entry)
    remove([folder / MANIFEST])
