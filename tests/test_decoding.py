"""Decoding of damaged, hostile and unusual image files."""

import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vqgen.errors import UserError
from vqgen.tokenizer.data.decoding import FORMATS, MAX_SCANS, BrokenImage, decode, read_size

# Whether they reach the terminal is tested in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:PIL")
GRADIENT = Image.fromarray(np.add.outer(np.arange(0, 120, 5), np.arange(0, 120, 3)).astype(np.uint8))  # 24 x 40
COLOUR = Image.merge("RGB", [GRADIENT, GRADIENT.rotate(180), GRADIENT.transpose(Image.Transpose.FLIP_TOP_BOTTOM)])


def encode(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, colour_type: int, before: bytes = b"", size: tuple[int, int] | None = None) -> bytes:
    """A PNG of 8 or 16 bits from (h, w, channels), with chunks `before` its pixels."""
    height, width = size or pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(pixels.dtype.newbyteorder(">")).tobytes() for row in pixels)
    chunks = chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("place", [-13, -20, 20, 29])
def test_a_wrong_checksum_is_a_broken_image(place):
    """Of the pixels (torchvision's decoder ends the process there), and of the header."""
    data = bytearray(encode(COLOUR))
    assert decode(bytes(data), 3).shape == (3, 24, 40)
    data[place] ^= 1
    with pytest.raises(BrokenImage):
        decode(bytes(data), 3)


def test_a_wrong_checksum_of_text_is_a_broken_image():
    text = chunk(b"tEXt", b"Comment\0hello")
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert decode(png(pixels, 2, text), 3).max() == 0
    with pytest.raises(BrokenImage):
        decode(png(pixels, 2, text[:-1] + b"\0"), 3)


def test_the_word_idat_in_a_text_leaves_transparency():
    pixels = np.full((4, 4, 3), 9, np.uint8)
    before = chunk(b"tEXt", b"Comment\0IDAT") + chunk(b"tRNS", struct.pack(">3H", 9, 9, 9))
    assert decode(png(pixels, 2, before), 3).min() == 255


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_rounded(colour_type, channels):
    wide = np.random.default_rng(0).integers(0, 65536, (5, 7, channels)).astype(np.uint16)
    expected = (wide.astype(np.int64) * 255 + 32767) // 65535
    if channels in (2, 4):
        alpha = expected[..., -1:]
        expected = (expected[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255
    found = decode(png(wide, colour_type), 3).permute(1, 2, 0).numpy()
    assert (found == np.broadcast_to(expected, found.shape)).all()


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_sixteen_bits_have_a_transparent_colour(colour_type, channels):
    wide = np.full((2, 2, channels), 300, np.uint16)
    wide[0, 0] = 299
    found = decode(png(wide, colour_type, chunk(b"tRNS", struct.pack(f">{channels}H", *[300] * channels))), 1)
    assert found[0].tolist() == [[1, 255], [255, 255]]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_size_is_that_of_the_upright_image(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(COLOUR, kind, exif=exif)
    height, width, grey = read_size(data)
    assert decode(data, 3).shape == (3, height, width) and not grey
    assert (height, width) == ((24, 40) if orientation == 1 else (40, 24))
    assert read_size(encode(GRADIENT))[2]


@pytest.mark.parametrize("kind", ["png", "gif", "webp", "tiff"])
def test_an_animation_shows_its_first_frame(kind):
    frames = {"save_all": True, "append_images": [COLOUR.rotate(180), COLOUR.rotate(90)]}
    options = {"lossless": True} if kind == "webp" else {}
    first = COLOUR.quantize(256) if kind == "gif" else COLOUR
    assert torch.equal(decode(encode(first, kind, **frames, **options), 3), decode(encode(first, kind, **options), 3))


def test_more_pixels_than_pillow_allows_are_a_broken_image(monkeypatch):
    data = encode(COLOUR)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40)
    assert decode(data, 3).shape == (3, 24, 40)
    for limit in (24 * 40 - 1, 24 * 40 // 2, 24 * 40 // 2 - 1, 1):  # Pillow warns up to twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for read in (lambda: decode(data, 3), lambda: read_size(data)):
            with pytest.raises(BrokenImage, match="pixels"):
                read()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(data, 3).shape == (3, 24, 40)


def test_a_huge_claim_is_refused_before_memory_is_taken():
    for size in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (0, 5)):
        with pytest.raises(BrokenImage):
            decode(png(np.zeros((1, 1, 3), np.uint8), 2, size=size), 3)


def test_a_jpeg_of_very_many_scans_is_a_broken_image(monkeypatch):
    data = encode(COLOUR, "jpeg", progressive=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 40)
    assert 1 < data.count(b"\xff\xda") <= MAX_SCANS and decode(data, 3).shape == (3, 24, 40)
    at = data.rindex(b"\xff\xda")
    with pytest.raises(BrokenImage, match="scans"):
        decode(data[:at] + data[at:-2] * MAX_SCANS + data[-2:], 3)


@pytest.mark.parametrize("kind", ["eps", "pcx", "tga", "ico", "sgi"])
def test_other_formats_are_not_tried(kind):
    with pytest.raises(BrokenImage, match="no known image format"):
        decode(encode(COLOUR, kind), 3)


def test_tolerant_pillow_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES"):
        decode(encode(COLOUR), 3)


def test_damaged_metadata_leaves_pixels_and_terminal_alone():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 1, "somebody"
    data = encode(COLOUR, "jpeg", exif=exif)
    at = data.index(b"Exif\0\0") + 14
    damaged = data[:at] + b"\xff\xff" + data[at + 2 :]
    assert torch.equal(decode(damaged, 3), decode(data, 3))
    tiff, packed = encode(COLOUR, "tiff"), bytearray(encode(COLOUR, "tiff", compression="tiff_adobe_deflate"))
    packed[60] ^= 255  # libtiff prints an error
    program = (
        "import sys\nfrom vqgen.tokenizer.data.decoding import BrokenImage, decode\n"
        f"for data in ({damaged!r}, {tiff[:-30]!r}, {tiff[:200]!r}, {bytes(packed)!r}):\n"
        "    try: decode(data, 3)\n    except BrokenImage: pass"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and found.stderr == ""


def hostile(data: bytes, choice: random.Random) -> bytes:
    """Change, remove or repeat bytes, more often near the start; checksums of PNG are corrected half of the time."""
    changed = bytearray(data)
    for _ in range(choice.choice([1, 1, 2, 8])):
        at = choice.randrange(len(changed) if choice.random() < 0.5 else min(len(changed), 100))
        match choice.randrange(4):
            case 0:
                changed[at] ^= 1 << choice.randrange(8)
            case 1:
                changed[at : at + 4] = choice.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\x01"])
            case 2:
                del changed[at : at + choice.randrange(1, 30)]
            case _:
                changed[at:at] = changed[:30]
    if changed[:4] != b"\x89PNG" or choice.random() < 0.5:
        return bytes(changed)
    fixed, at = bytes(changed[:8]), 8
    while at + 12 <= len(changed):
        length = int.from_bytes(changed[at : at + 4], "big")
        fixed += chunk(bytes(changed[at + 4 : at + 8]), bytes(changed[at + 8 : at + 8 + length]))
        at += 12 + length
    return fixed


@pytest.mark.parametrize("kind", FORMATS)
def test_mutations_give_an_image_or_a_reason(kind):
    choice = random.Random(kind)
    several = COLOUR if kind == "WEBP" else COLOUR.quantize(30)
    frames = {"save_all": True, "append_images": [several.rotate(180)]}
    wholes = [encode(COLOUR, kind), encode(GRADIENT, kind), encode(COLOUR.quantize(30).convert("RGB"), kind)]
    if kind in ("GIF", "PNG", "WEBP", "TIFF"):
        wholes.append(encode(several, kind, **frames))
    if kind == "PNG":
        wholes.append(png(np.full((5, 7, 4), 999, np.uint16), 6))
    if kind == "TIFF":
        wholes += [encode(COLOUR, kind, compression=name) for name in ("tiff_lzw", "jpeg", "packbits")]
    outcomes = {"image": 0, "broken": 0}
    for _ in range(250):
        try:
            image = decode(hostile(choice.choice(wholes), choice), 3)
            assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
            outcomes["image"] += 1
        except BrokenImage as error:
            assert str(error) and "\n" not in str(error)
            outcomes["broken"] += 1
    assert min(outcomes.values()) > 0
