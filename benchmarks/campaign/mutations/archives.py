"""Archives of vqgen-compress: bits of the codes and values of the header, with a CRC of the file that agrees."""

import json
import zlib
from pathlib import Path
from random import Random
from typing import Any

from ..place import Place
from . import Change, NotApplicable, mutation
from .records import changed


def _split(path: Path) -> tuple[bytes, Any, bytearray]:
    """Magic, header and codes of an archive."""
    data = path.read_bytes()
    end = 12 + int.from_bytes(data[8:12], "little")
    try:
        return data[:8], json.loads(zlib.decompress(data[12:end])), bytearray(data[end:-4])
    except (ValueError, zlib.error) as error:
        raise NotApplicable from error


def _join(path: Path, magic: bytes, text: bytes, codes: bytes | bytearray) -> None:
    data = magic + len(text).to_bytes(4, "little") + text + codes
    path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))


@mutation("archive")
def agreeing_codes(path: Path, random: Random, place: Place) -> Change:
    magic, header, codes = _split(path)
    if not codes:
        raise NotApplicable
    where, bit = random.randrange(len(codes)), 1 << random.randrange(8)
    codes[where] ^= bit
    _join(path, magic, zlib.compress(json.dumps(header).encode()), codes)
    return Change(f"byte {where} of the codes ^ {bit}, with its CRC")


@mutation("archive")
def agreeing_header(path: Path, random: Random, place: Place) -> Change:
    magic, header, codes = _split(path)
    what = changed(header, random, place)
    _join(path, magic, zlib.compress(json.dumps(header).encode()), codes)
    return Change(f"header: {what}, with its CRC", honest=True)


@mutation("archive")
def inflating_header(path: Path, random: Random, place: Place) -> Change:
    magic, _, codes = _split(path)
    size = random.choice([2**20, 2**26, 2**27])
    _join(path, magic, zlib.compress(random.choice([b" ", b"[", b"{}"]) * size), codes)
    return Change(f"the header inflates to {size} bytes or more", invalid=True)
