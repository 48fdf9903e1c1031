"""Parquet files: labels of other types, paths to other people's files, columns that do not belong together."""

import datetime
import decimal
from pathlib import Path
from random import Random
from typing import Any

from ..place import Place
from . import Change, NotApplicable, mutation


def _read(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise NotApplicable from error


def _write(path: Path, table: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path)


@mutation("parquet")
@mutation("parquet")
def label_type(path: Path, random: Random, place: Place) -> Change:
    """Labels that are no classes: they must be refused, not left out without a word."""
    import pyarrow as pa

    table = _read(path)
    n = table.num_rows
    kinds = {
        "float": pa.array([i % 2 + 0.5 for i in range(n)]),
        "bool": pa.array([i % 2 == 0 for i in range(n)]),
        "date": pa.array([datetime.date(2024, 1, 1 + i % 2) for i in range(n)]),
        "decimal": pa.array([decimal.Decimal(i % 2) for i in range(n)]),
        "list": pa.array([[i % 2] for i in range(n)]),
        "binary": pa.array([b"\xff", b"\xfe"] * (n // 2) + [b"a"] * (n % 2)),
        "10^9": pa.array([10**9 if i == 1 else i % 2 for i in range(n)]),
        "2^63": pa.array([2**63 if i == 1 else i % 2 for i in range(n)], pa.uint64()),
    }
    kind = random.choice(sorted(kinds))
    place_of = table.schema.get_field_index("label")
    if place_of < 0:
        raise NotApplicable
    _write(path, table.set_column(place_of, "label", kinds[kind]))
    return Change(f"labels: {kind}", honest=kind in ("bool", "10^9"))


@mutation("parquet")
def label_values(path: Path, random: Random, place: Place) -> Change:
    import pyarrow as pa

    table = _read(path)
    n, place_of = table.num_rows, table.schema.get_field_index("label")
    if place_of < 0:
        raise NotApplicable
    kinds = {
        "negative": pa.array([-5 if i == 1 else i % 2 for i in range(n)]),
        "null": pa.array([None if i == 1 else i % 2 for i in range(n)], pa.int64()),
        "text": pa.array(["../../elsewhere" if i % 2 else "cat\0\n" for i in range(n)]),
        "long text": pa.array([("x" if i % 2 else "y") * 300 for i in range(n)]),
        "empty text": pa.array(["" for _ in range(n)]),
        "of every row": pa.array(list(range(n))),
        "all null": pa.nulls(n),
    }
    kind = random.choice(sorted(kinds))
    _write(path, table.set_column(place_of, "label", kinds[kind]))
    return Change(f"labels: {kind}", honest=True)


@mutation("parquet")
@mutation("parquet")
def image_path(path: Path, random: Random, place: Place) -> Change:
    """Rows that name a file instead of holding an image: files of somebody else must not be read."""
    import pyarrow as pa

    table = _read(path)
    secret = place.elsewhere / "secret.png"
    images = sorted(place.work.rglob("*.png"))
    secret.write_bytes(images[0].read_bytes() if images else table["image"][0].as_py()["bytes"] or b"")
    found = random.choice(
        [str(secret), "../../elsewhere/secret.png", "/dev/zero", "/etc/hostname", "a\0b", "x" * 5000, "", ".", "pipe"]
    )
    rows = table["image"].to_pylist()
    if not isinstance(rows[0], dict):
        raise NotApplicable
    if found == "pipe":
        import os

        os.mkfifo(path.parent / "pipe")
    rows[1] = {"bytes": None, "path": found}
    _write(path, pa.table({"image": rows, "label": table["label"]}))
    return Change(f"a row names the file {found[:40]!r}")


@mutation("parquet")
def image_column(path: Path, random: Random, place: Place) -> Change:
    import pyarrow as pa

    table = _read(path)
    n = table.num_rows
    kinds = {
        "text": pa.array(["x"] * n),
        "numbers": pa.array(list(range(n))),
        "nulls": pa.nulls(n),
        "lists": pa.array([[1, 2]] * n),
        "empty": pa.array([b""] * n),
        "large binary": pa.array([b"\x89PNG"] * n, pa.large_binary()),
        "struct without bytes": pa.array([{"path": "a.png"}] * n),
        "struct of numbers": pa.array([{"bytes": 1, "path": 2}] * n),
        "dictionary": pa.array([b"a"] * n).dictionary_encode(),
    }
    kind = random.choice(sorted(kinds))
    _write(path, table.set_column(table.schema.get_field_index("image"), "image", kinds[kind]))
    return Change(f"images: {kind}", honest=True)


@mutation("parquet")
def columns(path: Path, random: Random, place: Place) -> Change:
    import pyarrow as pa

    table = _read(path)
    what = random.choice(["renamed", "twice", "none", "no rows", "second image column", "metadata", "no label"])
    if what == "renamed":
        table = table.rename_columns(["Bild", "Klasse"])
    elif what == "twice":
        table = pa.Table.from_arrays(
            [table["image"], table["image"], table["label"]], names=["image", "image", "label"]
        )
    elif what == "none":
        table = pa.table({})
    elif what == "no rows":
        table = table.slice(0, 0)
    elif what == "second image column":
        table = table.append_column("thumbnail", table["image"])
    elif what == "metadata":
        hostile = random.choice(
            [
                b"[]",
                b"{",
                b'{"info": 3}',
                b"\xff",
                b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 3}}}}',
            ]
        )
        table = table.replace_schema_metadata({b"huggingface": hostile})
    else:
        table = table.select(["image"])
    _write(path, table)
    return Change(f"columns: {what}", honest=True)


@mutation("parquet")
def one_file_differs(path: Path, random: Random, place: Place) -> Change:
    """A second file whose images are of another type."""
    import pyarrow as pa

    table = _read(path)
    rows = [
        row["bytes"] if isinstance(row, dict) else {"bytes": row, "path": None} for row in table["image"].to_pylist()
    ]
    _write(path.with_name(f"{path.stem}-2.parquet"), pa.table({"image": rows, "label": table["label"]}))
    return Change("a second file with images of another type", honest=True)
