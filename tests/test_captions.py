"""Captions of data: columns of tables, metadata of folders, text files beside images; stored with the codes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.models import make_prior
from hypothesis import given
from hypothesis import strategies as st
from processes import write_images

from vqgen.app.survey import look
from vqgen.errors import UserError
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.data.captions import as_caption
from vqgen.tokenizer.data.options import MAX_CAPTION
from vqgen.tokenizer.data.sources import open_source
from vqgen.tokenizer.encode import main


def words(index: int) -> str:
    return f"a picture, number {index}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 images in two class folders."""
    write_images(tmp_path / "data", 20)
    return tmp_path / "data"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def captions(data: Path, column: str) -> dict[str, str]:
    """The captions of all images by the name of their item."""
    found: dict[str, str] = {}
    for split in ("train", "heldout"):
        source = open_source(str(data), split, 0.2, column)  # type: ignore[arg-type]
        assert source.captions is not None and len(source.captions) == len(source)
        found |= {source.item_name(i): text for i, text in enumerate(source.captions)}
    return found


def refused(data: Path, column: str, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(str(data), "train", 0.2, column)
    assert "\n" not in str(error.value)
    for part in ("--text-column", *parts):
        assert part in str(error.value), error.value


@given(st.text())
def test_a_caption_is_one_line(text: str) -> None:
    try:
        found = as_caption(text, "here")
    except UserError:
        assert any(0xD800 <= ord(c) < 0xE000 for c in text) or len(text.encode()) > MAX_CAPTION
        return
    assert found == " ".join(found.split()) == as_caption(found, "here")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in found)


def test_text_files_beside_the_images(folder: Path) -> None:
    listed = names(folder)
    for index, name in enumerate(listed[:-1]):
        text = f"  {words(index)}\r\n\tblue "
        (folder / name).with_suffix(".txt").write_text(text, encoding=("utf-8", "utf-8-sig")[index % 2], newline="")
    found = captions(folder, "txt")
    assert found == {str(folder / name): f"{words(i)} blue" for i, name in enumerate(listed[:-1])} | {
        str(folder / listed[-1]): ""
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("nested", [False, True])
def test_metadata_above_or_beside_the_images(folder: Path, kind: str, nested: bool) -> None:
    listed, rows = names(folder), dict[Path, list[tuple[str, str]]]()
    for index, name in enumerate(listed):
        place = (folder / name).parent if nested else folder
        rows.setdefault(place, []).append(((folder / name).relative_to(place).as_posix(), words(index)))
    for place, entries in rows.items():
        entries.append(("removed.png", "an image that is not there"))
        if kind == "jsonl":
            lines = [json.dumps({"file_name": f"./{name}", "text": text}) for name, text in entries]
        else:
            lines = ["file_name,text", *(f'{name},"{text}"' for name, text in entries)]
        (place / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    assert captions(folder, "text") == {str(folder / name): words(index) for index, name in enumerate(listed)}
    refused(folder, "prompt", "no prompt", "text")


def test_a_split_has_its_own_captions(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_images(tmp_path / "data" / split, 8)
    listed = names(tmp_path / "data")
    lines = [json.dumps({"file_name": name, "text": words(index)}) for index, name in enumerate(listed)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    found = open_source(str(tmp_path / "data"), "heldout", 0.2, "text").captions
    assert found == [words(index) for index, name in enumerate(listed) if name.startswith("validation")]


@pytest.mark.parametrize("column", ["txt", "text"])
def test_a_split_may_have_no_captions(tmp_path: Path, column: str) -> None:
    data = tmp_path / "data"
    for split in ("train", "test"):
        write_images(data / split, 8)
    refused(data, column, "no captions" if column == "txt" else "metadata")
    listed = names(data / "train")
    lines = [json.dumps({"file_name": name, "text": words(index)}) for index, name in enumerate(listed)]
    if column == "text":
        (data / "train" / "metadata.jsonl").write_text("\n".join(lines))
    for index, name in enumerate(listed if column == "txt" else []):
        (data / "train" / name).with_suffix(".txt").write_text(words(index))
    assert "" not in captions(data, column).values()
    assert open_source(str(data), "test", 0.2, column).captions == [""] * 8


def row(name: str, text: Any = "a shoe") -> str:
    return json.dumps({"file_name": name, "text": text})


@pytest.mark.parametrize(
    "lines, parts",
    [
        ("{", ("line 1", "no JSON")),
        ("[1]", ("line 1", "no JSON object")),
        ("null", ("line 1", "no JSON object")),
        (row("NAME") + "\n" + row("NAME"), ("line 2", "again")),
        (row("../NAME"), ("line 1", "../")),
        (row("/etc/passwd"), ("line 1", "/etc/passwd")),
        (row("a\\b"), ("line 1", "inside of its folder")),
        ('{"text": "x"}', ("line 1", "file_name")),
        (row("NAME", 3), ("line 1", "'3'", "expected text")),
        (row("NAME", ["a", "b"]), ("line 1", "several captions")),
        (row("NAME", "x" * (MAX_CAPTION + 1)), ("line 1", str(MAX_CAPTION + 1))),
        ('{"file_name": "NAME", "text": "\\udc80"}', ("line 1", "expected text")),
        (row("other.png"), ("no captions",)),
    ],
)
def test_damaged_metadata_is_one_line(folder: Path, lines: str, parts: tuple[str, ...]) -> None:
    (folder / "metadata.jsonl").write_text(lines.replace("NAME", names(folder)[0]))
    refused(folder, "text", *parts)


def test_metadata_that_is_no_text_or_missing(folder: Path) -> None:
    refused(folder, "text", "metadata.jsonl", "metadata.csv")
    refused(folder, "txt", "NAME.txt")
    (folder / names(folder)[0]).with_suffix(".txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"\.txt cannot be read as text"):
        open_source(str(folder), "train", 0.2, "txt")
    (folder / "metadata.csv").write_text('file_name,text\n"a')
    refused(folder, "text", "metadata.csv is no CSV")
    os.remove(folder / "metadata.csv")
    os.mkfifo(folder / "metadata.csv")  # is no file: reading it would never end
    refused(folder, "text", "metadata.jsonl")


def table(path: Path, text: pa.Array, images: int = 20) -> Path:
    write_images(path.parent / "images", images)
    data = [file.read_bytes() for file in sorted((path.parent / "images").rglob("*.png"))]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": data, "text": text}), path)
    shutil.rmtree(path.parent / "images")
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_column_of_a_table(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [None if index == 3 else f"{words(index)}\n" for index in range(20)]
    path = table(tmp_path / "data.parquet", pa.array(texts, pa.string()).cast(kind))
    found = captions(path, "text")
    assert [found[f"{path} row {index}"] for index in range(20)] == [words(i) if i != 3 else "" for i in range(20)]
    refused(path, "caption", "no column caption", "text")
    refused(path, "image", "binary")


def test_columns_that_are_no_captions(tmp_path: Path) -> None:
    lists = pa.array([["a", "b"]] * 20)
    refused(table(tmp_path / "a" / "data.parquet", lists), "text", "several captions", "list")
    long = pa.array(["a"] * 7 + ["é" * MAX_CAPTION] + ["a"] * 12)
    refused(table(tmp_path / "b" / "data.parquet", long), "text", "row 7", str(2 * MAX_CAPTION))
    broken = pa.Array.from_buffers(pa.string(), 20, pa.array([b"\xff"] * 20).buffers())
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(table(tmp_path / "c" / "data.parquet", broken)), "train", 0.2, "text")


def test_captions_that_are_all_empty_are_refused_before_any_work(cli, tmp_path: Path) -> None:
    model, empty = make_prior(tmp_path / "model"), pa.array([None, " "] * 10, pa.string())
    path = table(tmp_path / "data.parquet", empty)
    words = [
        "--tokenizer",
        model / "tokenizer",
        "--data",
        path,
        "--text-column",
        "text",
        "--output",
        tmp_path / "codes",
    ]
    found = cli(main, *words, "--device", "cpu")
    assert found.code == 1 and "--text-column text" in found.err and "data.parquet" in found.err
    assert not (tmp_path / "codes").exists()
    with pytest.raises(UserError, match="--text-column text"):  # of vqgen-train, before the tokenizer is trained
        look(str(path), "text")


def test_a_saved_dataset_has_captions(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_images(tmp_path / "images", 10)
    data = [{"bytes": path.read_bytes(), "path": None} for path in sorted((tmp_path / "images").rglob("*.png"))]
    made = datasets.Dataset.from_dict({"image": data, "text": [words(i) for i in range(10)]})
    made.save_to_disk(str(tmp_path / "saved"))
    assert sorted(captions(tmp_path / "saved", "text").values()) == sorted(words(i) for i in range(10))


def test_codes_keep_the_captions_of_their_images(cli, folder: Path, tmp_path: Path) -> None:
    model, listed = make_prior(tmp_path / "model"), names(folder)
    for index, name in enumerate(listed):
        (folder / name).with_suffix(".txt").write_text(words(index))
    (folder / listed[4]).write_bytes(b"no image")
    options = ["--tokenizer", model / "tokenizer", "--data", folder, "--holdout", 0.2, "--device", "cpu"]
    options += ["--shard-size", 7, "--max-broken", 0.5, "--text-column", "txt", "--views", 2, "--flip"]
    output = tmp_path / "codes"
    assert cli(main, *options, "--output", output).code == 0
    every: list[str] = []
    for split in ("train", "heldout"):
        files, source = CodeFiles(output, split), open_source(str(folder), split, 0.2, "txt")  # type: ignore[arg-type]
        assert files.has_captions and source.captions is not None
        whole = [text for i, text in enumerate(source.captions) if source.item_name(i) != str(folder / listed[4])]
        assert files.captions(np.arange(len(files))) == whole
        every += whole
    assert sorted(every) == sorted(words(i) for i in range(20) if i != 4)
    assert cli(main, *options, "--output", output).code == 0, "a finished folder stays"
    # Without captions, and with others, it is another folder.
    without = cli(main, *options[:-5], "--views", 2, "--flip", "--output", output)
    assert without.code == 1 and "--text-column" in without.err
    (folder / listed[0]).with_suffix(".txt").write_text("another caption")
    other = cli(main, *options, "--output", output)
    assert other.code == 1 and "--data" in other.err


def test_a_shard_with_other_captions_is_not_taken_over(cli, folder: Path, tmp_path: Path) -> None:
    model, listed = make_prior(tmp_path / "model"), names(folder)
    options = ["--tokenizer", model / "tokenizer", "--data", folder, "--holdout", 0.2, "--device", "cpu"]
    options += ["--shard-size", 7, "--text-column", "txt"]
    for index, name in enumerate(listed):
        (folder / name).with_suffix(".txt").write_text(words(index))
    assert cli(main, *options, "--output", tmp_path / "one").code == 0
    for name in listed:
        (folder / name).with_suffix(".txt").write_text("another")
    assert cli(main, *options, "--output", tmp_path / "two").code == 0
    shutil.copy(tmp_path / "one" / "codes-00001.safetensors", tmp_path / "two" / "codes-00001.safetensors")
    (tmp_path / "two" / "manifest.json").unlink()
    found = cli(main, *options, "--output", tmp_path / "two")
    assert found.code == 1 and "codes-00001.safetensors" in found.err and "captions" in found.err
