"""Images in tables: parquet files, and datasets that the `datasets` library loads."""

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vqgen.errors import UsageError, UserError
from vqgen.files import open_regular, read_json

from .captions import check_text_column, of_column
from .items import FoundSplit, Rows

T = TypeVar("T")

_SPLIT_WORD = re.compile(r"(?<![a-z])(train|heldout|validation|valid|val|test)(?![a-z])")
# Parquet files up to this size together are held in memory by each process that reads them; larger ones are mapped.
IN_MEMORY_BYTES = 1 << 30
MAX_CLASSES = 2**16
"""Labels are below this number; larger ones are keys of another kind, not classes."""
MAX_NAME = 1000
"""Longest text that is a label, in bytes."""


def group_by_split(paths: Mapping[str, T]) -> dict[str, list[T]]:
    """Group files, by relative path, by the split word in their names, or else in their folders' names; "" for none."""
    groups: dict[str, list[T]] = {}
    for path, file in paths.items():
        words = [_SPLIT_WORD.search(part.lower()) for part in reversed(path.split("/"))]
        groups.setdefault(next((word[1] for word in words if word), ""), []).append(file)
    return groups


def read_parquet(root: Path, paths: Sequence[Path], text_column: str | None = None) -> FoundSplit:
    """Open parquet files as one split: labels and captions are read, images are not."""
    labels, counts, listing, columns, names, captions, total = [], [], [], [], list[str](), list[str](), 0
    for path in paths:
        with _open_parquet(path) as file:
            total += (size := path.stat().st_size)
            rows = file.metadata.num_rows
            if not 0 <= rows <= 1000 + size:  # an image takes a byte at least, but a few may be repeated
                raise UserError(f"--data: {path} claims {rows} rows in {size} bytes; restore it or download it again")
            columns.append(find_columns(file.schema_arrow, path))
            if columns[-1] != columns[0]:
                found = f"{path} has {columns[-1]}, but {paths[0]} {columns[0]}"
                raise UserError(f"--data: {found}; make them alike, or give each its own folder")
            counts.append((str(path), rows))
            listing.append(f"{path.relative_to(root).as_posix()}\t{size}\t{rows}")
            if (label := columns[0].label) is not None:
                labels.append(raw_labels(file.read([label]).column(0), f"{path}: column {label}"))
                if len(labels[-1]) != rows:
                    raise UserError(f"--data: {path} has {len(labels[-1])} labels for {rows} rows; restore it")
            if text_column is not None:
                check_text_column(file.schema_arrow, text_column, path)
                captions += of_column(file.read([text_column]).column(0), str(path), rows)
            names = file.schema_arrow.names
    load = partial(_read_column if total <= IN_MEMORY_BYTES else _map_column, list(paths))
    raw = np.concatenate(labels) if labels else None
    found = None if text_column is None else captions
    items = Rows(load, columns[0].image, names, counts, [root], [path.parent for path in paths])
    note = f"tables of {total / 1e9:.1f} GB, converted once into the cache of `datasets`"
    note *= total > IN_MEMORY_BYTES
    return FoundSplit(items, listing, raw, columns[0].class_names, found, note)


def load_datasets(data: str, load: Callable[[Any], Any], advice: str) -> dict[str, Any]:
    """Split name in lower case ("" for none) -> dataset; `load` calls the library `datasets`, which it is given.

    `advice` is the end of the error message: what to do about a failure.
    """
    import datasets

    with quiet_hub(), reading(f"{data} gave no dataset", advice):
        found = load(datasets)
    return {"": found} if isinstance(found, datasets.Dataset) else {k.lower(): v for k, v in found.items()}


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the warnings of the hub's client: a page for retries, where the error says what failed."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def load_folder(folder: Path) -> dict[str, Any]:
    """`load_datasets` of a `save_to_disk` folder, whose JSON files may name no file outside. Raises `UserError`."""
    path = folder / "dataset_dict.json"
    splits = read_json(path).get("splits") if path.is_file() else [""]
    for part in [folder / name for name in _plain_names(splits, path, "splits")]:
        path = part / "state.json"
        files = read_json(path).get("_data_files")
        if isinstance(files, list):
            files = [each.get("filename") if isinstance(each, dict) else each for each in files]
        for name in ("dataset_info.json", *_plain_names(files, path, "_data_files")):
            with reading(f"{part / name} cannot be read"):
                open_regular(part / name).close()
            if not Path(os.path.realpath(part / name)).is_relative_to(os.path.realpath(folder)):
                raise UserError(f"--data: {part / name} is a link that leads outside of {folder}; put the file there")
    return load_datasets(str(folder), lambda library: library.load_from_disk(str(folder)), "restore or save it again")


def _plain_names(names: Any, path: Path, key: str) -> list[str]:
    """`names` as a list of names without a folder. Raises `UserError`."""
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name in (".", "..") or re.search(r"[/\\\0:]", name):
            raise UserError(f"--data: {path}: found {str(name)[:80]!r} in {key}, expected names of this folder")
    return list(names)


def download_folders() -> list[Path]:
    """Folders that the library `datasets` keeps downloaded files in."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    return [Path(config.DOWNLOADED_DATASETS_PATH), Path(HF_HUB_CACHE)]


def read_dataset(data: str, dataset: Any, roots: Sequence[Path], text_column: str | None = None) -> FoundSplit:
    """One dataset of `load_datasets` as a split; files that rows name lie in one of `roots`."""
    with reading(f"{data} cannot be read"):
        columns = find_columns(dataset.features.arrow_schema, data)
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        listing = [f"{len(dataset)} {dataset.features}", *(f"{file.name}\t{file.stat().st_size}" for file in files)]
        label = columns.label
        raw = None if label is None else raw_labels(dataset.data.column(label), f"{data}: column {label}")
        captions = None
        if text_column is not None:
            check_text_column(dataset.features.arrow_schema, text_column, data)
            captions = of_column(dataset.data.column(text_column), data, len(dataset))
    load = partial(_dataset_column, dataset, data)
    rows = Rows(load, columns.image, dataset.column_names, [(data, len(dataset))], roots)
    return FoundSplit(rows, listing, raw, columns.class_names, captions)


def _dataset_column(dataset: Any, data: str, column: str) -> pa.ChunkedArray:
    with reading(f"{data} cannot be read"):
        found = dataset.data.column(column)
        found.validate(full=True)  # offsets in a damaged file point anywhere in memory
    return found


def read_keys(rows: Rows, column: str) -> list[str | None]:
    """Values of a column of text or integers, as text; None where a row has none. Raises `UserError`."""
    where = f"{rows.files[0]}: column {column[:80]}"
    if rows.columns.count(column) != 1:
        found = ", ".join(rows.columns)[:500]
        raise UsageError(f"--pair-by: {rows.files[0]} has no column {column[:80]}, or several; it has {found}")
    with reading(f"{where} cannot be read"):
        values = rows.load(column)
        kind = value_type(values.type)
        if pa.types.is_integer(kind) or is_text(kind):
            values.validate(full=True)
            keys = [None if value is None else str(value) for value in values.cast(kind).to_pylist()]
        else:
            raise UsageError(f"--pair-by: {where} is of type {str(kind)[:80]}, expected text or integers")
    if len(keys) != len(rows):
        raise UserError(f"--data: {where} has {len(keys)} values for {len(rows)} rows; restore it")
    return keys


# What pyarrow and `datasets` raise; pyarrow's own exceptions are also among these.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, MemoryError)
_DAMAGED += (ImportError, EOFError, AssertionError, pa.ArrowException)


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a parquet file; errors of reading inside raise `UserError`."""
    with reading(f"{path} cannot be read"):
        open_regular(path).close()
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file


@contextmanager
def reading(problem: str, advice: str = "restore it or download it again") -> Iterator[None]:
    """Turn the errors of table readers into a `UserError` of one line."""
    try:
        yield
    except Exception as error:
        of_datasets = type(error).__module__.partition(".")[0] == "datasets"  # has exceptions of its own
        if not isinstance(error, _DAMAGED) and not of_datasets:
            raise
        cause = error.__cause__ if of_datasets and error.__cause__ else error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:150]}"
        raise UserError(f"--data: {problem} ({reason}); {advice}") from error


def _read_column(paths: Sequence[Path], column: str) -> pa.ChunkedArray:
    chunks: list[pa.Array] = []
    for path in paths:
        with _open_parquet(path) as file:
            chunks += file.read([column]).column(0).chunks
    return pa.chunked_array(chunks)


def _map_column(paths: Sequence[Path], column: str) -> pa.ChunkedArray:
    """Memory-map a column: `datasets` converts it to Arrow in its cache once."""
    import datasets

    with reading(f"{paths[0].parent} cannot be read"):
        files = datasets.Dataset.from_parquet([glob.escape(str(path)) for path in paths], columns=[column])
        return files.data.column(column)


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are used; all files of a split have the same."""

    image: str
    image_type: pa.DataType
    label: str | None
    label_is_text: bool
    class_names: list[str] | None

    def __str__(self) -> str:
        kind = "text" if self.label_is_text else "integers"
        labels = f"labels in {self.label} ({kind})" if self.label else "no labels"
        return f"images in {self.image} ({self.image_type}), {labels}, {len(self.class_names or [])} names of classes"


def find_columns(schema: pa.Schema, where: object) -> Columns:
    """Find the columns of images and labels: by the features of `datasets`, type, then name. Raises `UserError`."""
    try:
        features = dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, RecursionError):
        features = {}
    kinds = {n: f.get("_type") for n, f in features.items() if isinstance(f, dict) and n in schema.names}
    declared = [name for name, kind in kinds.items() if kind == "Image"]
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    plain = [f.name for f in schema if _is_binary(f.type)]
    images = declared or structs or plain
    image = next((n for n in ("image", "img") if n in images), images[0] if len(images) == 1 else None)
    if image is None or schema.get_field_index(image) < 0:  # also where two columns have that name
        found = f"{len(images) or 'no'} columns of encoded images among {', '.join(schema.names)[:500]}"
        raise UserError(f"--data: {where} has {found}; name the image column image")
    image_type = schema.field(image).type
    if not _is_binary(image_type.field("bytes").type if image in structs else image_type):
        raise UserError(f"--data: {where}: column {image} is of type {image_type}, expected encoded images as bytes")
    declared = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    present = [n for n in ("label", "labels", "fine_label", *declared) if schema.get_field_index(n) >= 0]
    types = {name: value_type(schema.field(name).type) for name in present}
    label = next((n for n, t in types.items() if pa.types.is_integer(t) or is_text(t)), None)
    for name, other in types.items() if label is None else ():
        if not pa.types.is_null(other):
            advice = "cast it to integers or text, or rename it"
            raise UserError(f"--data: {where}: column {name} is of type {other}, which is no class; {advice}")
    names = features[label].get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"--data: {where}: the names of the classes in {label} are no list of text; correct them")
    return Columns(image, image_type, label, label is not None and is_text(types[label]), names or None)


def value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def raw_labels(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Labels as integers, -1 for none, or as text, "" for none. Raises `UserError` where they cannot be classes."""
    column.validate(full=True)
    column = column.cast(value_type(column.type))
    if pa.types.is_integer(column.type):
        bounds = pc.call_function("min_max", [column]).as_py()  # None where all are null
        for value in bounds.values():
            if value is not None and not -1 <= value < MAX_CLASSES:
                expected = f"classes from 0 to {MAX_CLASSES - 1}, or -1 for none"
                raise UserError(f"--data: {where} holds {value}, expected {expected}; rename it if it is no class")
        return column.cast(pa.int64()).fill_null(-1).to_numpy()
    longest = pc.call_function("max", [pc.call_function("binary_length", [column])]).as_py() or 0
    if longest > MAX_NAME:
        found = f"a text of {longest} bytes, and names of classes have at most {MAX_NAME}"
        raise UserError(f"--data: {where} holds {found}; rename it if it is no class")
    return np.array([value or "" for value in column.to_pylist()], dtype=str)
