"""Where images come from: a folder, parquet files, a dataset on disk or by name, or the demo images.

`open_source` turns the string a user gives into the encoded images of one split: bytes, labels and a fingerprint.
Nothing is decoded here, and nothing reaches for the network unless the string is neither "demo" nor a path.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqgen.errors import UserError
from vqgen.seeding import hash64

Split = Literal["train", "heldout", "test"]
T = TypeVar("T")

DEMO = Path(__file__).parent / "demo"
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
# A source with several held-out splits is judged on its validation split; the test split stays untouched.
HELD_OUT = ("heldout", "validation", "valid", "val", "test")
SPLIT_WORD = re.compile(r"(?<![a-z])(train|heldout|validation|valid|val|test)(?![a-z])")
LABEL_COLUMNS = ("label", "labels", "fine_label")
# Parquet files up to this size together are held in memory by each process that reads them; larger ones are mapped.
IN_MEMORY_BYTES = 1 << 30


class Files:
    """Image files below a folder, named by their path relative to it."""

    def __init__(self, root: Path, names: Sequence[str]):
        self.root, self.names = root, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def key(self, item: int) -> str:
        """What the split hashes: the relative path, so that a new file moves no other."""
        return self.names[item]

    def name(self, item: int) -> str:
        return str(self.root / self.names[item])

    def read(self, item: int) -> bytes:
        return (self.root / self.names[item]).read_bytes()


class Rows:
    """Images in one table column, as bytes or as {bytes, path}. `load` gives the column; each process calls it once."""

    def __init__(self, load: Callable[[], pa.ChunkedArray], counts: Sequence[tuple[str, int]]):
        self.load, self.files = load, [name for name, _ in counts]
        self.starts = np.cumsum([0, *(count for _, count in counts)])
        self._column: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_column": None}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def key(self, item: int) -> str:
        return str(item)

    def name(self, item: int) -> str:
        file = int(np.searchsorted(self.starts, item, side="right")) - 1
        return f"{self.files[file]} row {item - int(self.starts[file])}"

    def read(self, item: int) -> bytes:
        if self._column is None:
            self._column = self.load()
        value: Any = self._column[item].as_py()
        if isinstance(value, dict) and value["bytes"] is None and value.get("path"):
            return Path(value["path"]).read_bytes()
        return (value["bytes"] if isinstance(value, dict) else value) or b""


@dataclass(frozen=True)
class Part:
    """One split as found. `raw` labels are class names ("" for none) or integers (negative for none)."""

    items: Files | Rows
    listing: list[str]
    raw: np.ndarray | None
    names: list[str] | None = None


@dataclass(frozen=True)
class Source:
    """The encoded images of one split; position i of n is item `rows[i]` of the files or tables behind it."""

    name: str
    items: Files | Rows = field(repr=False)
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    class_names: list[str] | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    def item_name(self, index: int) -> str:
        """The file, or the table file and row, of image `index`."""
        return self.items.name(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`; empty where the source holds none. Raises `OSError`."""
        return self.items.read(int(self.rows[index]))


def open_source(data: str, split: Split | Literal["all"], holdout: float) -> Source:
    """Find the images that `data` names and choose one split.

    A source with both splits keeps its own. Any other is divided by a hash of each image's relative path (or row
    number): round(holdout * n) images, at least one, are held out, always the same; "all" takes it whole. Raises
    `UserError` where there is nothing to read, too little to divide, or a file that is damaged.
    """
    parts = find_parts(data)
    if split == "all" and split not in parts:
        raise UserError(f"--data: {data} has the splits {' and '.join(parts)}; name the folder or file of one")
    names, labels = _number_labels(data, parts)
    own = split in parts
    part = parts[split if own else "all"]
    if not (count := len(part.items)):
        raise UserError(f"--data: {data} holds no {split if own else ''} images; add some".replace("  ", " "))
    rows = np.arange(count)
    if not own:
        if count < 2:
            raise UserError(f"--data: {data} holds 1 image; a training and a held-out split need at least 2")
        hashes = np.array([hash64("split", part.items.key(i)) for i in range(count)], dtype=np.uint64)
        held = np.zeros(count, dtype=bool)
        held[np.argsort(hashes, kind="stable")[: min(max(round(holdout * count), 1), count - 1)]] = True
        rows = np.flatnonzero(held == (split == "heldout"))
    chosen = json.dumps([split, names, None if own else holdout, len(rows)])
    mark = hashlib.sha256("\n".join([chosen, *part.listing]).encode("utf-8", "surrogateescape")).hexdigest()
    return Source(data, part.items, rows, labels[split if own else "all"][rows], names, mark)


def find_parts(data: str) -> dict[str, Part]:
    """The parts of a source: {"train", "heldout"} where it has both, else {"all"}."""
    if not data.strip():
        raise UserError("--data: found nothing; give a folder, a parquet file, a dataset's name or demo")
    path = DEMO if data == "demo" else Path(data).expanduser()
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return {"all": _parquet(path.parent, [path])}
        raise UserError(f"--data: {data} is a single file and not parquet; give the folder that holds the images")
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved(data, lambda datasets: datasets.load_from_disk(str(path)), "restore or save it again")
        files = _listing(path)
        tables = [path / name for name in files if name.lower().endswith(".parquet")]
        return _tables(path, tables) if tables else _images(path, files)
    if data.startswith((".", "~", "/")) or "\\" in data or data.count("/") > 1 or path.suffix == ".parquet":
        raise UserError(f"--data: {data} does not exist; give a folder, a parquet file, a dataset's name or demo")
    advice = "no such path exists either; check the name, or the network"
    return _saved(data, lambda datasets: datasets.load_dataset(data), advice)


def _choose(groups: Mapping[str, T], where: object) -> dict[str, T]:
    """{"train", "heldout"} from what the splits are called, or {"all"} where a source has but one."""
    held = next((groups[word] for word in HELD_OUT if word in groups), None)
    if "train" in groups:
        return {"all": groups["train"]} if held is None else {"train": groups["train"], "heldout": held}
    if len(groups) == 1:
        return {"all": next(iter(groups.values()))}
    found = ", ".join(sorted(word or "unnamed" for word in groups))
    raise UserError(f"--data: {where} has the splits {found} and no train; name one of them train")


def _listing(root: Path) -> dict[str, int]:
    """Relative path -> size of the image and parquet files below `root`, in order of name, hidden ones left out."""

    def fail(error: OSError) -> None:
        raise UserError(f"--data: {error.filename} cannot be read: {error.strerror}; check its permissions") from error

    files: dict[str, int] = {}
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        if real in seen:
            continue  # a link back to a folder already seen would never end
        seen.add(real)
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES | {".parquet"}:
                full = os.path.join(folder, name)
                files[Path(full).relative_to(root).as_posix()] = os.path.getsize(full) if os.path.exists(full) else -1
    return dict(sorted(files.items()))


def _images(root: Path, files: Mapping[str, int]) -> dict[str, Part]:
    """A folder of images: its own train and held-out subfolders, or one whole."""
    if not files:
        kinds = " ".join(sorted(suffix[1:] for suffix in SUFFIXES))
        raise UserError(f"--data: {root} holds no images and no parquet files; image files end in {kinds}")
    folders = {name.split("/")[0].lower(): name.split("/")[0] if "/" in name else "" for name in files}
    # A train/ without a held-out folder is the source itself when alone; beside other folders it may be a class.
    own = folders.get("train") and (list(folders) == ["train"] or any(folders.get(word) for word in HELD_OUT))
    chosen = _choose(folders, root) if own else {"all": ""}

    def part(folder: str) -> Part:
        start = folder + "/" if folder else ""
        inside = {name.removeprefix(start): size for name, size in files.items() if name.startswith(start)}
        # Images beside the class folders have no class.
        labels = np.array([name.split("/")[0] if "/" in name else "" for name in inside], dtype=str)
        return Part(Files(root / folder, list(inside)), [f"{n}\t{s}" for n, s in inside.items()], labels)

    return {split: part(folder) for split, folder in chosen.items()}


def _tables(root: Path, paths: Sequence[Path]) -> dict[str, Part]:
    """A folder of parquet files, whose names, or else whose folders' names, tell the splits."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        words = [SPLIT_WORD.search(part.lower()) for part in reversed(path.relative_to(root).parts)]
        groups.setdefault(next((word[1] for word in words if word), ""), []).append(path)
    return {split: _parquet(root, chosen) for split, chosen in _choose(groups, root).items()}


def _parquet(root: Path, paths: Sequence[Path]) -> Part:
    """One split in parquet files."""
    labels, counts, listing, columns = [], [], [], []
    for path in paths:
        with _reading(path), pq.ParquetFile(path, memory_map=True) as file:
            columns.append(_columns(file.schema_arrow, path))
            if columns[-1] != columns[0]:
                raise UserError(f"--data: {path} has other columns than {paths[0].name}; give each its own folder")
            label = columns[0][1]
            counts.append((str(path), file.metadata.num_rows))
            listing.append(f"{path.relative_to(root).as_posix()}\t{path.stat().st_size}\t{file.metadata.num_rows}")
            if label is not None:
                labels.append(_raw_labels(file.read([label]).column(0)))
    small = sum(path.stat().st_size for path in paths) <= IN_MEMORY_BYTES
    load = partial(_read_column if small else _map_column, list(paths), columns[0][0])
    return Part(Rows(load, counts), listing, np.concatenate(labels) if labels else None, columns[0][2])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a reader of tables raises into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"--data: {path} cannot be read ({reason}); restore it or download it again") from error


def _read_column(paths: Sequence[Path], column: str) -> pa.ChunkedArray:
    chunks: list[pa.Array] = []
    for path in paths:
        with _reading(path), pq.ParquetFile(path, memory_map=True) as file:
            chunks += file.read([column]).column(0).chunks
    return pa.chunked_array(chunks)


def _map_column(paths: Sequence[Path], column: str) -> pa.ChunkedArray:
    """A column too large for memory: `datasets` writes it to its cache once as Arrow, which is then memory-mapped."""
    import datasets

    with _reading(paths[0].parent):
        return datasets.Dataset.from_parquet([str(path) for path in paths], columns=[column]).data.column(column)


def _saved(data: str, load: Callable[[Any], Any], advice: str) -> dict[str, Part]:
    """What `datasets` gives for a folder of `save_to_disk` or for a name."""
    import datasets

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its retries are a page of warnings; the failure itself is told below
    try:
        found = load(datasets)
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"--data: {data} gave no dataset ({type(error).__name__}: {reason}); {advice}") from error
    finally:
        log.setLevel(level)
    groups = {"": found} if isinstance(found, datasets.Dataset) else {k.lower(): v for k, v in found.items()}

    def part(dataset: Any) -> Part:
        image, label, names = _columns(dataset.features.arrow_schema, data)
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        listing = [f"{len(dataset)} {dataset.features}", *(f"{file.name}\t{file.stat().st_size}" for file in files)]
        raw = None if label is None else _raw_labels(dataset.data.column(label))
        return Part(Rows(partial(dataset.data.column, image), [(data, len(dataset))]), listing, raw, names)

    return {split: part(dataset) for split, dataset in _choose(groups, data).items()}


def _columns(schema: pa.Schema, where: object) -> tuple[str, str | None, list[str] | None]:
    """The image column, the label column and the class names, by the features of `datasets`, then type, then name."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        features = {}
    kinds = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict) and n in schema.names}
    declared = [name for name, kind in kinds.items() if kind == "Image"]
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    plain = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    images = declared or structs or plain
    image = next((n for n in ("image", "img") if n in images), images[0] if len(images) == 1 else None)
    if image is None:
        found = f"{len(images) or 'no'} columns of encoded images among {', '.join(schema.names)}"
        raise UserError(f"--data: {where} has {found}; call the one with the images image")
    declared = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    usable = [f.name for f in schema if pa.types.is_integer(f.type) or f.type in (pa.string(), pa.large_string())]
    label = next((name for name in (*LABEL_COLUMNS, *declared) if name in usable), None)
    names = features[label].get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    return image, label, list(names) if names else None


def _raw_labels(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_integer(column.type):
        return column.fill_null(-1).to_numpy().astype(np.int64)
    return np.array([value or "" for value in column.to_pylist()], dtype=str)


def _number_labels(data: str, parts: Mapping[str, Part]) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """Class names and each part's labels (n,) int64, -1 for none; the classes are those of all parts together."""
    nothing = {split: np.full(len(part.items), -1, dtype=np.int64) for split, part in parts.items()}
    raws = {split: part.raw for split, part in parts.items() if part.raw is not None}
    if len({raw.dtype.kind for raw in raws.values()}) > 1:
        raise UserError(f"--data: {data} has labels as numbers in one split and as text in another; make them alike")

    def given(raw: np.ndarray) -> np.ndarray:
        return raw != "" if raw.dtype.kind == "U" else raw >= 0

    present = np.unique(np.concatenate([raw[given(raw)] for raw in raws.values()])) if raws else np.empty(0)
    names = next((part.names for part in parts.values() if part.names and present.dtype.kind != "U"), None)
    values = present if names is None else np.arange(len(names))
    names = names or [str(value) for value in present]
    if len(present) and present[-1] not in values:
        raise UserError(f"--data: {data} has label {present[-1]} but names {len(names)} classes; mend its features")
    if len(names) < 2 or not len(present):
        return None, nothing
    return names, nothing | {s: np.where(given(raw), np.searchsorted(values, raw), -1) for s, raw in raws.items()}
