"""Damage that knows nothing of the format: flipped bits, lost and repeated ranges, files of something else."""

from pathlib import Path
from random import Random

from ..place import Place
from . import NotApplicable, mutation


def content(path: Path) -> bytes:
    """The bytes of a file; `NotApplicable` where it has none."""
    data = path.read_bytes()
    if not data:
        raise NotApplicable
    return data


def span(data: bytes, random: Random, most: int = 4096) -> tuple[int, int]:
    """A random range of the bytes, not empty."""
    start = random.randrange(len(data))
    return start, min(len(data), start + random.randint(1, most))


@mutation("bytes")
def flip_bits(path: Path, random: Random, place: Place) -> str:
    data = bytearray(content(path))
    positions = [random.randrange(len(data)) for _ in range(random.choice([1, 1, 1, 2, 10, 100]))]
    for position in positions:
        data[position] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return f"{len(positions)} bits flipped, the first in byte {positions[0]}"


@mutation("bytes")
def flip_at_an_end(path: Path, random: Random, place: Place) -> str:
    """Headers and trailers decide most."""
    data = bytearray(content(path))
    position = random.randrange(min(64, len(data)))
    position = len(data) - 1 - position if random.random() < 0.5 else position
    data[position] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return f"one bit flipped in byte {position} of {len(data)}"


@mutation("bytes")
def truncate(path: Path, random: Random, place: Place) -> str:
    data = content(path)
    length = random.choice([random.randrange(len(data)), len(data) - 1, len(data) // 2, min(8, len(data) - 1)])
    path.write_bytes(data[:length])
    return f"cut to {length} of {len(data)} bytes"


@mutation("bytes")
def empty(path: Path, random: Random, place: Place) -> str:
    content(path)
    path.write_bytes(b"")
    return "emptied"


@mutation("bytes")
def extend(path: Path, random: Random, place: Place) -> str:
    data = content(path)
    more = random.choice([b"\0", b"\n", b"\0" * 4096, data, random.randbytes(1000)])
    path.write_bytes(data + more)
    return f"{len(more)} bytes appended"


@mutation("bytes")
def zero_range(path: Path, random: Random, place: Place) -> str:
    data = content(path)
    start, stop = span(data, random)
    path.write_bytes(data[:start] + b"\0" * (stop - start) + data[stop:])
    return f"bytes {start} to {stop} zeroed"


@mutation("bytes")
def repeat_range(path: Path, random: Random, place: Place) -> str:
    data = content(path)
    start, stop = span(data, random)
    path.write_bytes(data[:stop] + data[start:])
    return f"bytes {start} to {stop} repeated"


@mutation("bytes")
def lose_range(path: Path, random: Random, place: Place) -> str:
    data = content(path)
    start, stop = span(data, random)
    path.write_bytes(data[:start] + data[stop:])
    return f"bytes {start} to {stop} lost"


@mutation("bytes")
def overwrite_with_noise(path: Path, random: Random, place: Place) -> str:
    data = content(path)
    start, stop = span(data, random)
    path.write_bytes(data[:start] + random.randbytes(stop - start) + data[stop:])
    return f"bytes {start} to {stop} replaced by noise"


@mutation("bytes")
def splice(path: Path, random: Random, place: Place) -> str:
    """The beginning of this file, the end of another."""
    data, others = content(path), [p for p in sorted(place.work.rglob("*")) if p.is_file() and p != path]
    if not others:
        raise NotApplicable
    other = random.choice(others)
    cut = random.randrange(len(data))
    path.write_bytes(data[:cut] + other.read_bytes()[cut : cut + (1 << 24)])
    return f"from byte {cut} on as {other.relative_to(place.work)}"


@mutation("bytes")
def other_file(path: Path, random: Random, place: Place) -> str:
    """The whole content of another file, of the same kind where there is one."""
    files = [p for p in sorted(place.work.rglob("*")) if p.is_file() and p != path]
    alike = [p for p in files if p.suffix == path.suffix]
    if not files:
        raise NotApplicable
    other = random.choice(alike if alike and random.random() < 0.7 else files)
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.relative_to(place.work)}"


@mutation("bytes")
def foreign_content(path: Path, random: Random, place: Place) -> str:
    samples = {
        "a pointer of git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a web page": b"<!DOCTYPE html><html><body>404</body></html>\n",
        "zeros": b"\0" * 10_000,
        "a zip archive": b"PK\x05\x06" + b"\0" * 18,
        "a program": b"#!/bin/sh\ntouch pwned\n",
        "a byte order mark": b"\xef\xbb\xbf" + content(path),
        "UTF-16": content(path)[:10_000].decode("latin-1").encode("utf-16"),
    }
    name = random.choice(sorted(samples))
    path.write_bytes(samples[name])
    return f"replaced by {name}"
