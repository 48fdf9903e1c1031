"""Parquet shards, read row by row: a few rows are in memory at a time, whatever the size of the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from os.path import basename

import pyarrow as pa
import pyarrow.parquet as pq

from vqgen.config import shown
from vqgen.errors import UserError
from vqgen.tokenizer.data.captions import as_caption, check_text_column
from vqgen.tokenizer.data.tables import find_columns, is_text, raw_labels, reading, value_type

from .records import MAX_IMAGE, Record
from .transport import opened

KEY = "__key__"
"""Column that decides the split, where there is one."""
_ROWS = 64  # read at once
_BUFFER = 2**20  # bytes of a column that are read at once


@contextmanager
def _open(url: str) -> Iterator[pq.ParquetFile]:
    with (
        reading(f"{shown(url)} cannot be read"),
        opened(url) as file,
        pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as table,
    ):
        yield table


def declared_classes(url: str) -> list[str] | None:
    """The names of the classes that a file declares; None where it has none. Raises `UserError`."""
    with _open(url) as table:
        return find_columns(table.schema_arrow, shown(url)).class_names


def read_parquet(url: str, text_column: str | None, class_names: list[str] | None) -> Iterator[Record]:
    """Yield the records of a parquet file. Raises `UserError` for a damaged file and for columns that do not fit.

    Args:
        class_names: those of the stream, which the file declares, too: labels are places in them.

    The key of a row is its `__key__`, else the name of the file and its number.
    """
    where = shown(url)
    with _open(url) as table:
        schema = table.schema_arrow
        columns = find_columns(schema, where)
        if columns.label_is_text:
            advice = "number the classes, as a stream does not know their names before its end"
            raise UserError(f"--data: {where}: column {columns.label} holds text; {advice}")
        if columns.class_names != class_names:
            other, first = (
                f"{len(names)} classes ({', '.join(names)[:150]})" if names else "classes without names"
                for names in (columns.class_names, class_names)
            )
            found = f"{where} has {other}, but the first file of the stream {first}"
            raise UserError(f"--data: {found}; make them alike, or read them apart")
        if text_column is not None:
            check_text_column(schema, text_column, where)
        key = KEY if schema.get_field_index(KEY) >= 0 else None
        if key and not (is_text(kind := value_type(schema.field(KEY).type)) or pa.types.is_integer(kind)):
            raise UserError(f"--data: {where}: column {KEY} is of type {kind}, expected text or integers")
        wanted = [name for name in dict.fromkeys((columns.image, columns.label, text_column, key)) if name]
        start = 0
        for batch in table.iter_batches(_ROWS, columns=wanted):
            found = pa.Table.from_batches([batch])
            found.validate(full=True)  # lengths, offsets and UTF-8 of all columns
            count = len(batch)
            labels = raw_labels(found.column(columns.label), where).tolist() if columns.label else [-1] * count
            captions = found.column(text_column).to_pylist() if text_column else [""] * count
            keys = found.column(KEY).to_pylist() if key else [None] * count
            rows = zip(found.column(columns.image), labels, captions, keys)
            for row, (image, label, caption, own) in enumerate(rows, start):
                if columns.class_names and label >= len(columns.class_names):
                    known = f"but {len(columns.class_names)} classes have names"
                    raise UserError(f"--data: {where} row {row} has label {label}, {known}; correct its features")
                data, problem = _bytes(image.as_py())
                text = f"{basename(where)} {row}" if own is None else str(own)
                place = f"{where} row {row}"
                yield Record(text, place, data, label, as_caption(caption, place), problem)
            start += count


def _bytes(value: object) -> tuple[bytes, str]:
    """The bytes of an image, and why there are none."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return b"", "it names a file, and those are not followed in streams"
        value = value.get("bytes")
    data = value if isinstance(value, bytes) else b""
    return (data, "") if len(data) <= MAX_IMAGE else (b"", f"{len(data)} bytes, at most {MAX_IMAGE} are read")
