"""Captions of images: a column of a table, of a folder's metadata, or text files beside the images.

A folder has metadata as the library `datasets` reads it: `metadata.jsonl` or `metadata.csv`, above or beside the
images, with a column `file_name`, relative to the metadata file. An image without a caption has "".
"""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from vqgen.errors import UserError
from vqgen.files import is_file, parse_json, read_text

from .options import BESIDE, MAX_CAPTION

METADATA = ("metadata.jsonl", "metadata.csv")
_ADVICE = "give one of them by --text-column"


def as_caption(value: Any, where: str) -> str:
    """A caption on one line, "" for None. Raises `UserError`, beginning with `where`, for what is no text, or too long.

    Line breaks, tabs and control characters become spaces, and of several spaces one is kept.
    """
    if value is None:
        return ""
    if isinstance(value, list):
        raise UserError(f"--text-column: {where} has a list; several captions an image are not supported, keep one")
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise UserError(f"--text-column: {where} has {str(value)[:80]!r}, expected text")
    found = " ".join(re.sub("[\0-\x1f\x7f-\x9f]", " ", value).split())
    if (size := len(found.encode())) > MAX_CAPTION:
        raise UserError(f"--text-column: {where} has a caption of {size} bytes, at most {MAX_CAPTION} are possible")
    return found


def check_text_column(schema: pa.Schema, column: str, where: object) -> None:
    """Raise `UserError` where a table has no such column, or one that is no text."""
    if schema.get_field_index(column) < 0:
        found = [field.name for field in schema if _is_text(field.type)]
        text = f"{where} has no column {column}, or several; its columns of text are {', '.join(found)[:500] or 'none'}"
        raise UserError(f"--text-column: {text}; {_ADVICE}")
    if not _is_text(kind := schema.field(column).type):
        several = "; several captions an image are not supported" if pa.types.is_nested(kind) else ""
        raise UserError(f"--text-column: {where}: column {column} is of type {kind}, expected text{several}")


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def of_column(column: pa.ChunkedArray, where: str, count: int) -> list[str]:
    """The captions of `count` rows in a column of text. Raises `UserError`, and errors of pyarrow for damaged data."""
    if len(column) != count:
        raise UserError(f"--data: {where} has {len(column)} captions for {count} rows; restore it")
    column.validate(full=True)  # offsets, and UTF-8
    return [as_caption(value, f"{where} row {row}") for row, value in enumerate(column.to_pylist())]


def of_folder(root: Path, names: Sequence[str], column: str) -> list[str]:
    """The captions of image files below `root`, named by their relative paths. Raises `UserError`.

    `column` is `BESIDE` for NAME.txt beside each image, else that of metadata files.
    """
    if column == BESIDE:
        found = [_beside((root / name).with_suffix(".txt")) for name in names]
    else:
        captions = _metadata(root, names, column)
        found = [captions.get(name, "") for name in names]
    if not any(found):
        state = "no NAME.txt is beside an image" if column == BESIDE else "its metadata names none of these images"
        raise UserError(f"--text-column {column}: {root} has no captions, {state}; correct it, or leave the option out")
    return found


def _beside(path: Path) -> str:
    if not is_file(path):
        return ""
    return as_caption(read_text(path, 8 * MAX_CAPTION).removeprefix("\ufeff"), str(path))


def _metadata(root: Path, names: Sequence[str], column: str) -> dict[str, str]:
    """Captions by image, from all metadata files above or beside the images. Raises `UserError`."""
    folders = {parent: None for name in names for parent in reversed(PurePosixPath(name).parents)}
    known, found = set(names), dict[str, str]()
    files = [(folder, root / folder / name) for folder in folders for name in METADATA]
    files = [(folder, path) for folder, path in files if is_file(path)]
    if not files:
        text = f"{root} has no {' or '.join(METADATA)} beside or above its images"
        raise UserError(f"--text-column: {text}; add one, or give {BESIDE} for text files beside the images")
    for folder, path in files:
        for where, row in _rows(path):
            name = row.get("file_name")
            path_of = PurePosixPath(name if isinstance(name, str) and "\\" not in name else "")
            if not path_of.name or path_of.is_absolute() or ".." in path_of.parts:
                text = f"{where} has file_name {str(name)[:80]!r}, expected a path inside of its folder"
                raise UserError(f"--text-column: {text}")
            if column not in row:
                columns = ", ".join(key for key in row if isinstance(key, str) and key != "file_name")[:500]
                raise UserError(f"--text-column: {where} has no {column}; found {columns or 'no column'}, {_ADVICE}")
            image = (folder / path_of).as_posix()
            if image in found:
                text = f"{where} names {image} again; several captions an image are not supported, keep one"
                raise UserError(f"--text-column: {text}")
            if image in known:  # else it was removed, or is of another split
                found[image] = as_caption(row[column], where)
    return found


def _rows(path: Path) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The rows of a metadata file, each with its place for errors. Raises `UserError`."""
    text = read_text(path).removeprefix("\ufeff")
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                yield f"{path} line {reader.line_num}", row
        except csv.Error as error:
            raise UserError(
                f"--text-column: {path} is no CSV after line {reader.line_num} ({error}); correct it"
            ) from error
        return
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path} line {number}"
        try:
            row = parse_json(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise UserError(f"--text-column: {where} is no JSON ({str(error)[:150]}); correct it") from error
        if isinstance(row, dict):
            yield where, row
        elif row is not None or line.strip():
            raise UserError(f"--text-column: {where} holds no JSON object; correct it")
