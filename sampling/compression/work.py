"""The work of vqgen-compress and vqgen-decompress: images to codes to streams, and back."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vqgen import __version__
from vqgen.config import one_line
from vqgen.devices import describe
from vqgen.errors import UsageError, UserError
from vqgen.files import atomic_path, write_json
from vqgen.files.output_folder import new_folder
from vqgen.progress import Progress, progress
from vqgen.sampling.decoding.threads import on_threads
from vqgen.sampling.generator import Generator
from vqgen.sampling.init_images import read_image
from vqgen.tokenizer.data.items import files_below
from vqgen.tokenizer.data.options import SUFFIXES
from vqgen.tokenizer.data.pixels import to_uint8
from vqgen.tokenizer.reconstruction import write_png_atomic

from .archive import MAX_SIDE, ROWS, Header, Picture, Stream, crc_of, file_names, read_archive, write_archive
from .coding import Coder, InvalidStream
from .compress import CompressConfig
from .decompress import DecompressConfig

SLOW = 1_000_000
"""Pixels of an image above which it is said that encoding takes long."""
ARCHIVE, SUMMARY = "images.vqc", "summary.json"


OTHERWISE = {
    "exact": "take the images there, or compress them there with --probabilities rounded",
    "rounded": "take the images there, or compress them there with --probabilities histogram",
    "histogram": "",
}
"""What to do where the machine rounds otherwise than the writer's, by the kind of the probabilities."""


def _machine() -> str:
    """What decides how probabilities are rounded, and how they are coded."""
    about = describe(torch.device("cpu"), "no", 1)
    return f"{about['cpu']}, torch {about['torch']}, float32 on one thread, constriction {version('constriction')}"


@dataclass(frozen=True)
class _Grid:
    """The windows that cover an image of `height` x `width` pixels: rows and columns of them."""

    rows: int
    columns: int

    @classmethod
    def of(cls, picture: Picture, size: tuple[int, int]) -> "_Grid":
        return cls(math.ceil(picture.height / size[0]), math.ceil(picture.width / size[1]))

    def split(self, codes: Tensor) -> Tensor:
        """Codes (1, rows*h, columns*w[, depth]) -> windows (rows*columns, h, w[, depth]), in raster order."""
        parts = [part for row in codes.chunk(self.rows, 1) for part in row.chunk(self.columns, 2)]
        return torch.cat(parts)

    def join(self, windows: Tensor) -> Tensor:
        """The inverse of `split`."""
        rows = windows.split(self.columns)
        return torch.cat([torch.cat(list(row), 1) for row in rows])[None]


def _size(generator: Generator) -> tuple[int, int]:
    height, width = generator.tokenizer.config.image_size
    return height, width


def _windows(generator: Generator, image: Tensor, grid: _Grid) -> Tensor:
    """The codes of an image uint8 (C, H, W), padded by its last row and column, as windows."""
    (height, width), (h, w) = _size(generator), image.shape[1:]
    margins = (0, grid.columns * width - w, 0, grid.rows * height - h)
    padded = F.pad(image[None].float(), margins, mode="replicate").to(torch.uint8)
    return grid.split(generator.tokenizer.encode(padded))


def _named(given: list[Path]) -> dict[str, Path]:
    """The images by their name in the archive, which is relative to the folder that was given. Raises `UserError`."""
    found: dict[str, Path] = {}
    for path in given:
        files = [(path.name, path)]
        if os.path.isdir(path):
            below = files_below(path, "IMAGES")
            files = [(file.relative_to(path).as_posix(), file) for file in below if file.suffix.lower() in SUFFIXES]
        if not files:
            raise UserError(f"IMAGES: {path} holds no images; name image files or folders of them")
        for name, file in sorted(files):
            if name in found:
                raise UsageError(f"IMAGES: {found[name]} and {file} would have the same name, {name}; rename one")
            found[name] = file
    try:
        file_names([Picture(name, 1, 1) for name in found])
    except ValueError as error:
        raise UsageError(f"IMAGES: {error}; rename the file") from error
    return found


def compress_images(config: CompressConfig) -> None:
    """Write the archive and a summary. Raises `UserError`."""
    files, generator = _named(config.images), Generator.load(config.model, "cpu", "fp32")
    if config.probabilities != "histogram":
        plain = generator.conditioning.conditions(absent=True)
        hint = "use --probabilities histogram, or a prior that knows images without"
        generator.conditioning.check_given(plain, f"--probabilities: found {config.probabilities}, but", hint)
    with new_folder(config.output):
        pictures, windows = list[Picture](), list[Tensor]()
        with progress(len(files), "encoding", "img", True) as bar:
            for name, path in files.items():
                image = read_image(path, generator.tokenizer.config.channels, "IMAGES")
                if max(image.shape[1:]) > MAX_SIDE:
                    text = f"{path} is {image.shape[2]}x{image.shape[1]} pixels, a side has at most {MAX_SIDE}"
                    raise UserError(f"IMAGES: {text}; crop or scale it")
                if (pixels := image.shape[1] * image.shape[2]) > SLOW:
                    text = (
                        f"{path} has {pixels / 1e6:.1f} million pixels; the time to encode it grows with their square"
                    )
                    print(one_line(text), file=sys.stderr)
                pictures.append(Picture(name, image.shape[1], image.shape[2]))
                windows.append(_windows(generator, image, _Grid.of(pictures[-1], _size(generator))))
                bar.update()
        blocks = generator.vocabulary.to_tokens(torch.cat(windows)).split(ROWS)
        with progress(2 * len(blocks), "compressing", "stream", True) as bar:
            streams = _encoded(generator, config, blocks, bar)
            restored = _decoded(generator, config.probabilities, streams, [len(block) for block in blocks], bar)
        for block, again in zip(blocks, restored, strict=True):
            if again is None or not torch.equal(block, again):
                raise AssertionError("a stream does not decode to what was encoded")
        entries = [Stream(len(words), crc_of(block.numpy())) for words, block in zip(streams, blocks, strict=True)]
        fingerprints = str(generator.prior.fingerprint), str(generator.tokenizer.fingerprint)
        header = Header(__version__, *fingerprints, config.probabilities, ROWS, _machine(), pictures, entries)
        with atomic_path(config.output) as folder:
            size = write_archive(folder / ARCHIVE, header, streams)
            pixels = sum(picture.height * picture.width for picture in pictures)
            found: dict[str, Any] = {
                "images": len(pictures),
                "bytes": size,
                "bits_per_pixel": 8 * size / pixels,
                "stream_bits": 32 * sum(len(words) for words in streams),
                "codes": sum(block.numel() for block in blocks),
            }
            found["nats_per_code"] = found["stream_bits"] * math.log(2) / found["codes"]
            write_json(folder / SUMMARY, found)
    print(
        f"{len(pictures)} image{'s' * (len(pictures) > 1)} in {size} bytes, {found['bits_per_pixel']:.4f} bits a pixel "
        f"({found['nats_per_code']:.3f} nats per token): {config.output / ARCHIVE}"
    )


def _encoded(
    generator: Generator, config: CompressConfig, blocks: tuple[Tensor, ...], bar: Progress
) -> list[NDArray[np.uint32]]:
    coder = Coder(generator, config.probabilities)

    def encode(block: Tensor) -> NDArray[np.uint32]:
        words = coder.encode(block)
        bar.update()
        return words

    return [encode(block) for block in blocks] if coder.in_order else on_threads(encode, blocks)


def _decoded(
    generator: Generator,
    probabilities: Any,
    streams: list[NDArray[np.uint32]],
    counts: list[int],
    bar: Progress,
) -> list[Tensor | None]:
    """The tokens of each stream; None where the words are no stream of such tokens."""
    coder = Coder(generator, probabilities)

    def decode(given: tuple[NDArray[np.uint32], int]) -> Tensor | None:
        tokens = None
        with suppress(InvalidStream):
            tokens = coder.decode(*given)
        bar.update()
        return tokens

    pairs = list(zip(streams, counts, strict=True))
    return [decode(pair) for pair in pairs] if coder.in_order else on_threads(decode, pairs)


def restore_images(config: DecompressConfig) -> None:
    """Write the images of an archive as PNG. Raises `UserError`."""
    path = config.archive[0] / ARCHIVE if os.path.isdir(config.archive[0]) else config.archive[0]
    header, streams = read_archive(path)
    generator = Generator.load(config.model, "cpu", "fp32")
    for what, found, wanted in (
        ("prior", str(generator.prior.fingerprint), header.prior),
        ("tokenizer", str(generator.tokenizer.fingerprint), header.tokenizer),
    ):
        if found != wanted:
            text = f"{path} needs the {what} {wanted[:12]}, found {found[:12]}"
            raise UserError(f"--model: {text}; give the model that compressed it")
    grids = [_Grid.of(picture, _size(generator)) for picture in header.pictures]
    total = sum(grid.rows * grid.columns for grid in grids)
    if header.rows != ROWS or len(streams) != math.ceil(total / ROWS):
        raise UserError(f"{path} has {len(streams)} streams of {header.rows} windows for {total}; restore it")
    counts = [min(ROWS, total - first) for first in range(0, total, ROWS)]
    with new_folder(config.output):
        with progress(len(streams), "restoring", "stream", True) as bar:
            found = _decoded(generator, header.probabilities, streams, counts, bar)
        blocks = list[Tensor]()
        for block, stream in zip(found, header.streams, strict=True):
            if block is not None and crc_of(block.numpy()) == stream.crc32:
                blocks.append(block)
                continue
            text = f"{path}: the codes of stream {len(blocks)} have another CRC: they are damaged"
            if remedy := OTHERWISE[header.probabilities]:
                text = f"{text}, or this machine ({_machine()}) rounds otherwise than that which wrote them"
                remedy = f" ({header.machine}): {remedy}"
            raise UserError(f"{text}{remedy}; of a damaged archive restore a copy")
        names, images = file_names(header.pictures), _images(generator, grids, blocks)
        with atomic_path(config.output) as folder:
            for picture, name, image in zip(header.pictures, names, images, strict=True):
                write_png_atomic(folder / name, image[:, : picture.height, : picture.width])
    print(f"{len(grids)} image{'s' * (len(grids) > 1)} restored to {config.output}")


def _images(generator: Generator, grids: list[_Grid], blocks: list[Tensor]) -> Iterator[Tensor]:
    """Decode the images uint8 (C, H, W) one by one, each as a whole."""
    codes, first = generator.vocabulary.to_codes(torch.cat(blocks)), 0
    for grid in grids:
        part = codes[first : first + grid.rows * grid.columns]
        first += len(part)
        yield to_uint8(generator.tokenizer.decode(grid.join(part)))[0]
