"""Images in tables: parquet files, and datasets that the `datasets` library loads."""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vqgen.errors import UserError

from .items import FoundSplit, Rows

_SPLIT_WORD = re.compile(r"(?<![a-z])(train|heldout|validation|valid|val|test)(?![a-z])")
# Parquet files up to this size together are held in memory by each process that reads them; larger ones are mapped.
IN_MEMORY_BYTES = 1 << 30


def group_by_split(root: Path, paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Group parquet files by the split word in their names, or else in their folders' names; "" for none."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        words = [_SPLIT_WORD.search(part.lower()) for part in reversed(path.relative_to(root).parts)]
        groups.setdefault(next((word[1] for word in words if word), ""), []).append(path)
    return groups


def read_parquet(root: Path, paths: Sequence[Path]) -> FoundSplit:
    """Open parquet files as one split: labels are read, images are not."""
    labels, counts, listing, columns = [], [], [], []
    for path in paths:
        with _reading(f"{path} cannot be read"), pq.ParquetFile(path, memory_map=True) as file:
            columns.append(_find_columns(file.schema_arrow, path))
            if columns[-1] != columns[0]:
                raise UserError(f"--data: {path} has other columns than {paths[0].name}; give each its own folder")
            label = columns[0][1]
            counts.append((str(path), file.metadata.num_rows))
            listing.append(f"{path.relative_to(root).as_posix()}\t{path.stat().st_size}\t{file.metadata.num_rows}")
            if label is not None:
                labels.append(_raw_labels(file.read([label]).column(0)))
    small = sum(path.stat().st_size for path in paths) <= IN_MEMORY_BYTES
    load = partial(_read_column if small else _map_column, list(paths), columns[0][0])
    return FoundSplit(Rows(load, counts), listing, np.concatenate(labels) if labels else None, columns[0][2])


def load_datasets(data: str, load: Callable[[Any], Any], advice: str) -> dict[str, Any]:
    """Split name in lower case ("" for none) -> dataset; `load` calls the library `datasets`, which it is given.

    `advice` is the end of the error message: what to do about a failure.
    """
    import datasets

    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # retries would print a page of warnings; the error says what failed
    try:
        with _reading(f"{data} gave no dataset", advice):
            found = load(datasets)
    finally:
        log.setLevel(level)
    return {"": found} if isinstance(found, datasets.Dataset) else {k.lower(): v for k, v in found.items()}


def read_dataset(data: str, dataset: Any) -> FoundSplit:
    """One dataset of `load_datasets` as a split."""
    image, label, names = _find_columns(dataset.features.arrow_schema, data)
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    listing = [f"{len(dataset)} {dataset.features}", *(f"{file.name}\t{file.stat().st_size}" for file in files)]
    raw = None if label is None else _raw_labels(dataset.data.column(label))
    return FoundSplit(Rows(partial(dataset.data.column, image), [(data, len(dataset))]), listing, raw, names)


@contextmanager
def _reading(problem: str, advice: str = "restore it or download it again") -> Iterator[None]:
    """Turn any error of a table reader into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        raise UserError(f"--data: {problem} ({reason}); {advice}") from error


def _read_column(paths: Sequence[Path], column: str) -> pa.ChunkedArray:
    chunks: list[pa.Array] = []
    for path in paths:
        with _reading(f"{path} cannot be read"), pq.ParquetFile(path, memory_map=True) as file:
            chunks += file.read([column]).column(0).chunks
    return pa.chunked_array(chunks)


def _map_column(paths: Sequence[Path], column: str) -> pa.ChunkedArray:
    """Memory-map a column: `datasets` converts it to Arrow in its cache once."""
    import datasets

    with _reading(f"{paths[0].parent} cannot be read"):
        return datasets.Dataset.from_parquet([str(path) for path in paths], columns=[column]).data.column(column)


def _find_columns(schema: pa.Schema, where: object) -> tuple[str, str | None, list[str] | None]:
    """Return the image column, the label column and the class names: by the features of `datasets`, type, then name."""
    try:
        features: Mapping[str, Any] = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
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
        raise UserError(f"--data: {where} has {found}; name the image column image")
    declared = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    usable = [f.name for f in schema if pa.types.is_integer(f.type) or f.type in (pa.string(), pa.large_string())]
    label = next((name for name in ("label", "labels", "fine_label", *declared) if name in usable), None)
    names = features[label].get("names") if label is not None and kinds.get(label) == "ClassLabel" else None
    return image, label, list(names) if names else None


def _raw_labels(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_integer(column.type):
        return column.fill_null(-1).to_numpy().astype(np.int64)
    return np.array([value or "" for value in column.to_pylist()], dtype=str)
