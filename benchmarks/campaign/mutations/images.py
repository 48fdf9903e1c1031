"""Images: chunks and checksums of PNG, sizes in headers, EXIF, and files that only look like images."""

import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from random import Random

from PIL import Image

from ..place import Place
from . import Change, NotApplicable, mutation


@cache
def packed_zeros(count: int) -> bytes:
    """A stream of zlib that expands a thousandfold."""
    return zlib.compress(bytes(count))


Chunk = tuple[bytes, bytes]
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunks(path: Path) -> list[Chunk]:
    data, found, at = path.read_bytes(), [], 8
    if not data.startswith(_SIGNATURE):
        raise NotApplicable
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def chunk(name: bytes, data: bytes, wrong: int = 0) -> bytes:
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", (zlib.crc32(name + data) ^ wrong) & 0xFFFFFFFF)
    )


def write_png(path: Path, chunks: list[Chunk], damaged: bytes = b"", wrong: int = 0) -> None:
    parts = [chunk(name, data, wrong if name == damaged else 0) for name, data in chunks]
    path.write_bytes(_SIGNATURE + b"".join(parts))


@mutation("png")
@mutation("png")
def wrong_checksum(path: Path, random: Random, place: Place) -> str:
    """The flipped bit of a checksum that ends libpng's caller."""
    chunks = png_chunks(path)
    name = random.choice([b"IDAT", b"IDAT", random.choice(chunks)[0]])
    write_png(path, chunks, name, 1 << random.randrange(32))
    return f"wrong CRC of {name.decode('latin-1')}"


@mutation("png")
def header(path: Path, random: Random, place: Place) -> str:
    """Sizes that would need more memory than there is, and modes that do not exist, under a correct checksum."""
    chunks = png_chunks(path)
    fields = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    which = random.randrange(7)
    extreme = [0, 1, 16_000, 50_000, 2**31 - 1, 2**32 - 1]
    fields[which] = random.choice(extreme) if which < 2 else random.choice([0, 1, 2, 3, 4, 6, 8, 16, 255])
    if which < 2 and random.random() < 0.5:
        fields[1 - which] = random.choice(extreme)
    chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *fields))
    write_png(path, chunks)
    return f"IHDR is {fields}"


@mutation("png")
def pixel_stream(path: Path, random: Random, place: Place) -> str:
    """Compressed pixels that are cut, damaged, too long or empty, under correct checksums."""
    chunks = png_chunks(path)
    pixels = b"".join(data for name, data in chunks if name == b"IDAT")
    if len(pixels) < 8:
        raise NotApplicable
    what = random.choice(["cut", "flip", "long", "empty", "filter", "bomb"])
    if what == "cut":
        pixels = pixels[: random.randrange(len(pixels))]
    elif what == "flip":
        position = random.randrange(len(pixels))
        pixels = pixels[:position] + bytes([pixels[position] ^ 1 << random.randrange(8)]) + pixels[position + 1 :]
    elif what == "long":
        pixels = zlib.compress(zlib.decompress(pixels) * 3)
    elif what == "empty":
        pixels = zlib.compress(b"")
    elif what == "filter":
        pixels = zlib.compress(b"\x09" + zlib.decompress(pixels)[1:])
    else:
        pixels = packed_zeros(50_000_000)
    kept = [(name, data) for name, data in chunks if name != b"IDAT"]
    write_png(path, [*kept[:-1], (b"IDAT", pixels), kept[-1]])
    return f"pixels: {what}"


@mutation("png")
def extra_chunk(path: Path, random: Random, place: Place) -> str:
    """Chunks before the pixels: text with the word IDAT, profiles that blow up, unknown and repeated ones."""
    chunks = png_chunks(path)
    bomb = packed_zeros(50_000_000)
    found = random.choice(
        [
            (b"tEXt", b"Comment\0IDAT tRNS IEND"),
            (b"zTXt", b"Comment\0\0" + bomb),
            (b"iCCP", b"profile\0\0" + bomb),
            (b"iTXt", b"a\0\1\0\0\0" + bomb),
            (b"IHDR", chunks[0][1]),
            (b"PLTE", b"\1\2"),
            (b"tRNS", b"\0" * 300),
            (b"CRIT", b"x"),
            (b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
            (b"acTL", struct.pack(">II", 2**31 - 1, 0)),
            (b"gAMA", b""),
            (b"sBIT", b"\xff" * 4),
            (b"IEND", b""),
        ]
    )
    write_png(path, [chunks[0], found, *chunks[1:]])
    return f"a chunk {found[0].decode()} of {len(found[1])} bytes after IHDR"


@mutation("png")
def lost_chunk(path: Path, random: Random, place: Place) -> str:
    chunks = png_chunks(path)
    name, _ = chunks.pop(random.randrange(len(chunks)))
    if random.random() < 0.3:
        random.shuffle(chunks)
    write_png(path, chunks)
    return f"{name.decode('latin-1')} is missing"


@mutation("jpeg")
@mutation("jpeg")
def jpeg_size(path: Path, random: Random, place: Place) -> str:
    data = bytearray(path.read_bytes())
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if at < 0:
        raise NotApplicable
    height, width = (random.choice([0, 1, 30_000, 65_500, 65_535]) for _ in range(2))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    path.write_bytes(data)
    return f"the header says {height}x{width}"


@mutation("jpeg")
def jpeg_marker(path: Path, random: Random, place: Place) -> str:
    data = bytearray(path.read_bytes())
    places = [at for at in range(len(data) - 4) if data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xFE]
    if not places:
        raise NotApplicable
    at = random.choice(places)
    field = random.choice([1, 2, 3, 4])
    data[at + field] = random.choice([0, 1, 0x7F, 0xFF, 0xD9, 0xDA])
    path.write_bytes(data)
    return f"byte {field} of the marker at {at} is {data[at + field]:#x}"


@mutation("jpeg", "png", "image")
def exif(path: Path, random: Random, place: Place) -> str:
    """An orientation that does not exist, or EXIF data that points nowhere or at itself."""
    pointers = [
        b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0" + bytes([random.choice([0, 6, 8, 9, 99])]) + b"\0\0\0\0\0\0",
        b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\x08",
        b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1\3\0\1\0\0\0\6\0\0\0" * 3,
        b"II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0",
        b"MM\0*\xff\xff\xff\xff",
        b"",
        b"MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\1a\0\0\0\0\0\0\0",
    ]
    found = random.choice(pointers)
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tiff": "TIFF"}
    if path.suffix not in formats or path.suffix == ".tiff":
        raise NotApplicable
    buffer = BytesIO()
    try:
        with Image.open(path) as image:
            image.save(buffer, format=formats[path.suffix], exif=b"Exif\0\0" + found)
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        raise NotApplicable from error
    path.write_bytes(buffer.getvalue())
    return f"EXIF data {found[:16]!r}"


@mutation("image")
@mutation("image")
def sizes(path: Path, random: Random, place: Place) -> str:
    """Sizes in the headers of BMP, GIF, TIFF and WebP."""
    data = bytearray(path.read_bytes())
    extreme = random.choice([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])
    if path.suffix == ".bmp":
        at, form = random.choice([10, 14, 18, 22, 34, 46]), "<I"
    elif path.suffix == ".gif":
        at, form = random.choice([6, 8]), "<H"
    elif path.suffix == ".webp":
        at, form = random.choice([4, 16, 26]), "<I"
    else:  # a value, count or offset of a TIFF directory
        (start,) = struct.unpack("<I", data[4:8])
        at, form = start + 2 + 12 * random.randrange(8) + random.choice([4, 8]), "<I"
    if at + 4 > len(data):
        raise NotApplicable
    struct.pack_into(form, data, at, extreme & (0xFFFF if form == "<H" else 0xFFFFFFFF))
    path.write_bytes(data)
    return f"{extreme:#x} at byte {at}"


@mutation("png", "jpeg", "image")
def odd_image(path: Path, random: Random, place: Place) -> Change:
    """A valid image of an unusual shape or mode."""
    shapes = [("RGB", (1, 1)), ("L", (1, 3000)), ("RGB", (3000, 1)), ("1", (17, 5)), ("LA", (9, 9)), ("RGBA", (2, 30))]
    mode, size = random.choice(shapes)
    Image.new(mode, size).save(path, format="PNG")
    return Change(f"a valid PNG, {mode} {size}", honest=True)


@mutation("png", "jpeg", "image")
def no_image(path: Path, random: Random, place: Place) -> Change:
    """What some decoders hand to other programs, or draw forever."""
    samples = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(pwned) (w) file closefile\nshowpage\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><image href="/etc/passwd"/></svg>',
        "PPM of 10^10 pixels": b"P6 100000 100000 255\n" + b"\0" * 100,
        "PPM of negative size": b"P6 -1 5 255\n",
        "PPM of no value range": b"P6 5 5 0\n" + b"\0" * 75,
        "WMF": b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
        "PSD": b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, 30_000, 30_000, 8, 3) + b"\0" * 20,
        "FITS": b"SIMPLE  =                    T" + b" " * 50 + b"END" + b" " * 77,
        "XBM": b"#define a_width 100000\n#define a_height 100000\nstatic char a_bits[] = {\n0x00",
        "ICO": b"\0\0\1\0\xff\xff" + b"\0" * 100,
        "DDS": b"DDS |\0\0\0" + b"\xff" * 120,
    }
    name = random.choice(sorted(samples))
    path.write_bytes(samples[name])
    return Change(f"{name} in its place", honest=name in ("PSD", "FITS", "XBM", "ICO", "DDS", "WMF"))
