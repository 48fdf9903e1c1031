"""Input files: regular ones only, bounded, with checked types."""

import os
import socket
import struct
import tracemalloc
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
from annotated_types import Ge
from torchvision.io import encode_png

from vqgen.errors import UserError
from vqgen.files import is_file, open_regular, read_bytes, read_json, read_record, read_text, write_json
from vqgen.files.png import png_state


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("count", [1, 3, 20_000])
def test_pixels_of_a_png_may_be_in_many_chunks(tmp_path: Path, count: int) -> None:
    height, width = (6000, 6600) if count > 3 else (4, 5)
    stream = zlib.compress(bytes(height * (1 + width)), 0)
    step = -(-len(stream) // count)
    pixels = [chunk(b"IDAT", stream[first : first + step]) for first in range(0, len(stream), step)]
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    path = tmp_path / "a.png"
    path.write_bytes(b"".join([b"\x89PNG\r\n\x1a\n", header, *pixels, chunk(b"IEND")]))
    assert png_state(path, None, (width, height)) == "ours"
    assert png_state(path, None, (width, height + 1)) == "other"
    path.write_bytes(b"".join([b"\x89PNG\r\n\x1a\n", header, *pixels[1:], chunk(b"IEND")]))
    assert png_state(path, None, None) == "damaged"


@pytest.mark.parametrize("kind", [b"eXIf", b"tEXt", b"gAMA"])
def test_a_png_with_chunks_that_are_not_ours_is_anothers(tmp_path: Path, kind: bytes) -> None:
    """EXIF turns an image, and so would change the grid of a drawing that goes on."""
    encoded = encode_png(torch.randint(256, (3, 4, 5), dtype=torch.uint8)).numpy().tobytes()
    path = tmp_path / "a.png"
    path.write_bytes(encoded)
    assert png_state(path, None, (5, 4)) == "ours"
    path.write_bytes(encoded[:33] + chunk(kind, b"II*\0\x08\0\0\0\0\0") + encoded[33:])
    assert png_state(path, None, (5, 4)) == "other"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
    for name in ("fifo", "socket", "dangling", "nothing", "nul\0", "x" * 300, "."):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    with pytest.raises(OSError, match="regular"):
        read_bytes("/dev/zero")
    assert read_bytes(tmp_path / "link") == b"content"
    with pytest.raises(OSError, match="7 bytes"):
        read_bytes(tmp_path / "file", limit=6)


def test_reading_takes_the_memory_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    tracemalloc.start()
    assert read_bytes(tmp_path / "file") == b"content"
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 2**20


def test_names_that_are_not_utf8_are_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": os.fsdecode(b"\xff\xc3\xa4.png")})
    assert read_record(tmp_path / "a.json", dict) == {"name": "?ä.png"}
    assert read_json(tmp_path / "a.json") == {"name": os.fsdecode(b"\xff\xc3\xa4.png")}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"\xff{}", b'{"a":' * 20_000 + b"1" + b"}" * 20_000, b'{"a": ' + b"9" * 5000 + b"}", b"\0"],
    ids=["empty", "truncated", "list", "no UTF-8", "deep", "digits", "NUL"],
)
def test_malformed_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"a\.json"):
        read_record(tmp_path / "a.json", dict)


def test_text_must_be_utf_8(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("a\r\né".encode())
    assert read_text(tmp_path / "text") == "a\né"
    (tmp_path / "text").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="text"):
        read_text(tmp_path / "text")


@dataclass(frozen=True)
class Part:
    count: Annotated[int, Ge(0)]


@dataclass(frozen=True)
class Whole:
    parts: dict[str, Part]
    side: tuple[int, int]
    rate: float = 1.0


def test_a_record_has_exactly_the_types_of_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"parts": {"a": {"count": 2}}, "side": [1, 2], "rate": 1, "later": null}')
    assert read_record(path, Whole) == Whole({"a": Part(2)}, (1, 2))
    for text, key in [
        ('{"parts": {"a": {"count": -1}}, "side": [1, 2]}', "parts.a.count"),
        ('{"parts": {"a": {"count": true}}, "side": [1, 2]}', "parts.a.count"),
        ('{"parts": {"a": {"count": "2"}}, "side": [1, 2]}', "parts.a.count"),
        ('{"parts": {"a": {"count": 2.5}}, "side": [1, 2]}', "parts.a.count"),
        ('{"parts": [], "side": [1, 2]}', "parts"),
        ('{"parts": {}, "side": [1, 2, 3]}', "side"),
        ('{"parts": {}}', "side"),
        ('{"parts": {}, "side": [1, 2], "rate": null}', "rate"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=rf"record\.json.*{key}"):
            read_record(path, Whole)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        (r'{"a": "x\u0000y"}', "is no text"),
        (r'{"a": ["\ud800"]}', "is no text"),
        (r'{"\udfff": 1}', "is no text"),
    ],
)
def test_what_readers_of_json_disagree_about_is_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for read in (read_json, lambda path: read_record(path, dict)):
        with pytest.raises(UserError, match=r"a\.json") as refused:
            read(path)
        assert found in str(refused.value)
    path.write_text(r'{"a": "\ud83d\ude00 \\u0000 \\ud800"}')  # a pair of surrogates, and backslashes
    assert read_json(path) == {"a": "\U0001f600 \\u0000 \\ud800"} == read_record(path, dict)


def test_a_name_that_no_file_can_have_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    assert is_file(tmp_path / "file") and is_file(str(tmp_path / "file"))
    assert not any(is_file(tmp_path / name) for name in ("nothing", "fifo", "x" * 300, "nul\0", ".", "\ud800"))
