"""`manifest.json` of a folder of code files: what the folder holds, and the checksums of its shards."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval, Len

from vqgen.errors import UserError
from vqgen.files import checksum, is_file, read_json, read_record, write_json
from vqgen.tokenizer.data.options import Split

MANIFEST = "manifest.json"
FORMAT = 1
REPAIR = "restore it, or delete it and run vqgen-tokenize again"

Side = Annotated[int, Interval(ge=1, le=2**16)]
Grid = Annotated[list[Side], Len(2, 2)]
_Count = Annotated[int, Interval(ge=0, le=2**40)]
_Text = Annotated[str, Len(0, 1000)]


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest: its file name, its images and the sha256 of the file."""

    file: str
    count: _Count
    sha256: str

    def __post_init__(self) -> None:
        # No folder part: a manifest cannot point outside its folder.
        if not re.fullmatch(r"[^./\\][^/\\]*", self.file) or len(self.file.encode()) > 255:
            raise ValueError(f"{self.file[:80]!r} is no file name")


@dataclass(frozen=True)
class SplitEntry:
    """One split in the manifest: views of each image, images, and the shards in order."""

    views: Annotated[int, Interval(ge=1, le=1000)]
    count: _Count
    shards: list[ShardEntry]

    def __post_init__(self) -> None:
        if sum(shard.count for shard in self.shards) != self.count:
            raise ValueError(f"the shards do not add up to the count {self.count}")


@dataclass(frozen=True)
class SourceRecord:
    """What the source codes beside each image's codes are: of the degraded image, or of its partner in other data."""

    kind: Literal["degraded", "paired"]
    grid: Grid
    """Rows and columns of source codes; the tokenizer is the same."""
    data_fingerprint: str
    """Of the images that the source codes were made from."""
    degradations: Annotated[list[_Text], Len(0, 100)] = field(default_factory=list)
    """As given, in the order in which they were applied; empty where the source is paired."""
    description: _Text = ""
    """Which data was paired, and by what; empty where the source is degraded."""

    def __post_init__(self) -> None:
        if bool(self.degradations) != (self.kind == "degraded"):
            raise ValueError(f"a source of kind {self.kind} has {len(self.degradations)} degradations")


@dataclass(frozen=True)
class Manifest:
    """Content of `manifest.json`; `grid` in codes and `image_size` in pixels, [height, width]."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    codebook_size: Annotated[int, Interval(ge=1, le=2**24)]
    grid: Grid
    depth: Annotated[int, Interval(ge=1, le=256)]
    image_size: Grid
    channels: Annotated[int, Interval(ge=1, le=1000)]
    class_names: Annotated[list[str], Len(0, 2**24)] | None
    tokenizer_fingerprint: str
    data_fingerprint: str
    precision: str
    version: str
    splits: dict[Split, SplitEntry]
    format: int = FORMAT
    source: SourceRecord | None = None
    """Of the source codes that every shard holds; None where there are none."""
    captions: bool = False
    """Whether every shard holds captions."""

    def __post_init__(self) -> None:
        factors = {divmod(pixels, codes) for pixels, codes in zip(self.image_size, self.grid)}
        if len(factors) > 1 or any(rest for _, rest in factors):
            raise ValueError(f"image_size {self.image_size} is no multiple of grid {self.grid}")

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, which makes the folder complete; what it has no source or captions of is left out."""
        values = {k: v for k, v in asdict(self).items() if v or k not in ("source", "captions")}
        write_json(folder / MANIFEST, {"format": FORMAT, **values})

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check `manifest.json`. Raises `UserError` where it is missing, malformed or of another format."""
        path = folder / MANIFEST
        if not is_file(path):
            state = f"holds no {MANIFEST}" if folder.is_dir() else "does not exist"
            raise UserError(f"{folder} is no folder of code files: it {state}; run vqgen-tokenize to the end")
        found = read_json(path).get("format")
        if found != FORMAT:
            raise UserError(f"{path}: found format {found!r}, this version of vqgen reads {FORMAT}; tokenize again")
        return read_record(path, cls)


def verify_checksum(folder: Path, entry: ShardEntry) -> None:
    """Compare a shard's file with its sha256 in the manifest. Raises `UserError` where they differ."""
    path = folder / entry.file
    found = checksum(path)
    if found != entry.sha256:
        expected = str(entry.sha256)[:12]
        raise UserError(f"{path} was changed: found sha256 {found[:12]}, {MANIFEST} has {expected}; {REPAIR}")


def verify_checksums(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` where a shard is not the one that was written."""
    for split in manifest.splits.values():
        for entry in split.shards:
            verify_checksum(folder, entry)
