"""The rate of vqgen-compress against the prior's NLL, and its images against those of JPEG, WebP and PNG.

    python benchmarks/compression.py round-trip --data cifar10/test.parquet --output R.json
    python benchmarks/compression.py quality --data cifar10/test.parquet --first 1000 --vgg16 VGG16 --output Q.json
    python benchmarks/compression.py quality --data clothes/test.parquet --largest 24 --vgg16 VGG16 --output C.json
    python benchmarks/compression.py table

`round-trip` stores the codes of images of the training size, reads them in another process and compares; it flips bits,
too. `quality` compresses and restores images of any size by the two programs, each in a process of its own, and gives
JPEG, WebP and PNG as many bytes: of all qualities the lowest whose files have on average at least as many. Both are by
default the shipped model's. `table` prints what docs/compression.md shows, from `benchmarks/results/compression`.

Of 32-pixel images most of a JPEG is its tables. Bytes without headers are therefore compared besides: of vqgen-compress
those of its streams; of JPEG those of the scan, with the tables of the standard; of WebP those after the frame header;
of PNG the palette and the compressed pixels. All of that a reader would have to know.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqgen import __version__
from vqgen.files import read_json, write_json
from vqgen.prior.likelihood import token_nats
from vqgen.prior.parts.part import ABSENT
from vqgen.sampling.compression.archive import ROWS, Header, Picture, Stream, crc_of, read_archive, write_archive
from vqgen.sampling.compression.coding import Coder
from vqgen.sampling.decoding.threads import on_threads
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.losses.lpips import PerceptualDistance
from vqgen.tokenizer.metrics import psnr, ssim
from vqgen.tokenizer.reconstruction import write_png_atomic

RESULTS = Path(__file__).parent / "results" / "compression"
KINDS = ("exact", "rounded", "histogram")


def images_of(path: Path, first: int | None, largest: int | None) -> list[Tensor]:
    """Images uint8 (3, H, W) of a parquet file: the first ones, or those of most pixels (of equal ones the first)."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path, columns=["image"]).column("image").to_pylist()
    images = [decode(row["bytes"] if isinstance(row, dict) else row, 3) for row in rows[:first]]
    return sorted(images, key=lambda image: -image.shape[1] * image.shape[2])[:largest]


def call(module: str, *words: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of vqgen in a process of its own."""
    command = [sys.executable, "-m", f"vqgen.sampling.compression.{module}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


# Round trip.


def store(generator: Generator, blocks: Iterable[Tensor], kind: Any, path: Path) -> tuple[int, int]:
    """Write an archive of blocks of windows (n, length); returns its bytes and those of its streams."""
    blocks, coder = list(blocks), Coder(generator, kind)
    streams = [coder.encode(block) for block in blocks] if coder.in_order else on_threads(coder.encode, blocks)
    entries = [Stream(len(words), crc_of(block.numpy())) for words, block in zip(streams, blocks, strict=True)]
    height, width = generator.tokenizer.config.image_size
    pictures = [Picture(f"{number:05d}.png", height, width) for number in range(sum(map(len, blocks)))]
    prior, tokenizer = str(generator.prior.fingerprint), str(generator.tokenizer.fingerprint)
    header = Header(__version__, prior, tokenizer, kind, ROWS, f"torch {torch.__version__}", pictures, entries)
    return write_archive(path, header, streams), 4 * sum(map(len, streams))


def restore(model: Path | None, archive: Path, output: Path) -> None:
    """Decode the tokens of an archive to a file of numpy: what the other process does."""
    generator = Generator.load(model, "cpu", "fp32")
    header, streams = read_archive(archive)
    coder, total = Coder(generator, header.probabilities), len(header.pictures)
    counts = [min(header.rows, total - first) for first in range(0, total, header.rows)]
    pairs = list(zip(streams, counts, strict=True))

    def read(pair: tuple[Any, int]) -> Tensor:
        return coder.decode(*pair)

    blocks = [read(pair) for pair in pairs] if coder.in_order else on_threads(read, pairs)
    np.save(output, torch.cat(blocks).numpy())


@torch.inference_mode()
def nats_per_code(generator: Generator, tokens: Tensor) -> float:
    """Mean NLL of codes without a class, by the prior's parallel forward pass in float32."""
    layout, nats = generator.conditioning.plain, 0.0
    for part in tokens.split(ROWS):
        prefixes = layout.prefixes({part.name: [ABSENT] for part in layout.parts}, range(len(part)))
        logits = generator.prior(torch.cat([prefixes, part], 1)[:, :-1])
        nats += token_nats(layout.of_codes(logits), part).double().sum().item()
    return nats / tokens.numel()


def flip_bits(model: list[str], path: Path, folder: Path) -> dict[str, str]:
    """What vqgen-decompress says of a flipped bit, and of one in the codes where the CRC of the file agrees."""
    header, streams = read_archive(path)
    found = {}

    def refused(what: str, damaged: Path) -> None:
        ended = call("decompress", damaged, *model, "--output", folder / "restored")
        if ended.returncode != 1 or ended.stderr.count("\n") != 1 or (folder / "restored").exists():
            raise AssertionError(f"{what}: exit code {ended.returncode}, {ended.stderr}")
        found[what] = ended.stderr.strip().replace(f"{folder}/", "")

    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    (folder / "file.vqc").write_bytes(data)
    refused("a bit of the file", folder / "file.vqc")
    words = streams[0].copy()
    words[len(words) // 2] ^= np.uint32(1 << 12)
    write_archive(folder / "codes.vqc", header, [words, *streams[1:]])
    refused("a bit of the codes, and the CRC of the file made to agree", folder / "codes.vqc")
    return found


def round_trip(arguments: argparse.Namespace) -> dict[str, Any]:
    """Store codes, read them in another process, compare them and the rate."""
    generator = Generator.load(arguments.model, "cpu", "fp32")
    images = torch.stack(images_of(arguments.data, arguments.first, None))
    codes = torch.cat([generator.tokenizer.encode(part) for part in images.split(ROWS)])
    tokens, model = generator.vocabulary.to_tokens(codes), ["--model", str(arguments.model)] if arguments.model else []
    found: dict[str, Any] = {"images": len(images), "codes": tokens.numel(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind in arguments.probabilities:
            start = time.perf_counter()
            size, streams = store(generator, tokens.split(ROWS), kind, folder / f"{kind}.vqc")
            middle = time.perf_counter()
            words = ["restore", folder / f"{kind}.vqc", folder / f"{kind}.npy", *model]
            subprocess.run([sys.executable, __file__, *map(str, words)], check=True)
            equal = np.array_equal(np.load(folder / f"{kind}.npy"), tokens.numpy())
            nats = 8 * streams * math.log(2) / tokens.numel()
            found[kind] = {"equal": equal, "bytes": size, "stream_bytes": streams, "nats_per_code": nats}
            found[kind]["seconds"] = {"encode": middle - start, "decode": time.perf_counter() - middle}
            print(kind, found[kind], flush=True)
        found["nll"] = nats_per_code(generator, tokens)
        print("NLL", found["nll"], flush=True)
        store(generator, [tokens[:ROWS]], "exact", folder / "one.vqc")
        found["flipped"] = flip_bits(model, folder / "one.vqc", folder)
    return found


# Quality at equal bytes.

Encoded = tuple[bytes, int]
"""A file, and its bytes without headers."""


def jpeg(image: Image.Image, quality: int) -> Encoded:
    """Baseline JPEG, colours at half the resolution; the file has tables of its own (optimize), the scan counted alone
    those of the standard."""
    plain, small = BytesIO(), BytesIO()
    image.save(plain, "JPEG", quality=quality)
    image.save(small, "JPEG", quality=quality, optimize=True)
    data = plain.getvalue()
    scan = data.index(b"\xff\xda")
    return small.getvalue(), len(data) - scan - 2 - int.from_bytes(data[scan + 2 : scan + 4], "big") - 2


def webp(image: Image.Image, quality: int) -> Encoded:
    """Lossy WebP at the most thorough search; 20 bytes of RIFF and 10 of the frame's header are no content."""
    file = BytesIO()
    image.save(file, "WEBP", quality=quality, method=6)
    return file.getvalue(), len(file.getvalue()) - 30


def png(image: Image.Image, colours: int) -> Encoded:
    """PNG with a palette of so many colours; with 257 all of them, without loss."""
    file = BytesIO()
    (image if colours > 256 else image.quantize(colours)).save(file, "PNG", optimize=True)
    data, place, content = file.getvalue(), 8, 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        content += size if data[place + 4 : place + 8] in (b"IDAT", b"PLTE") else 0
        place += 12 + size
    return data, content


CODECS: dict[str, tuple[Callable[[Image.Image, int], Encoded], range, str]] = {
    "JPEG": (jpeg, range(1, 96), "quality"),
    "WebP": (webp, range(101), "quality"),
    "PNG": (png, range(2, 258), "colours"),
}


def lowest(codec: str, pictures: list[Image.Image], target: float, whole: bool) -> tuple[int, list[Encoded]]:
    """The lowest setting at which files (or their content, without `whole`) have on average `target` bytes or more."""
    encode, settings, _ = CODECS[codec]
    low, high = settings[0], settings[-1]
    while low < high:
        middle = (low + high) // 2
        found = [encode(picture, middle) for picture in pictures]
        mean = sum(len(data) if whole else content for data, content in found) / len(found)
        low, high = (low, middle) if mean >= target else (middle + 1, high)
    return low, [encode(picture, low) for picture in pictures]


def measured(originals: list[Tensor], results: list[Tensor], distance: PerceptualDistance) -> dict[str, float]:
    """Mean PSNR, SSIM and LPIPS of images."""
    sums = torch.zeros(3, dtype=torch.float64)
    pairs = zip(originals, results, strict=True)
    with torch.inference_mode():
        for _, group in groupby(pairs, lambda pair: pair[0].shape):
            each = list(group)
            for part in (each[first : first + 16] for first in range(0, len(each), 16)):
                original, result = (torch.stack(side) for side in zip(*part, strict=True))
                values = psnr(result, original), ssim(result, original), distance(to_float(result), to_float(original))
                sums += torch.stack([value.flatten().double().sum() for value in values])
    return dict(zip(("psnr", "ssim", "lpips"), (sums / len(originals)).tolist(), strict=True))


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress images by the two programs, give each format as many bytes, and measure all."""
    originals = images_of(arguments.data, arguments.first, arguments.largest)
    pictures, count = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in originals], len(originals)
    distance = PerceptualDistance("vgg", str(arguments.vgg16))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, image in enumerate(originals):
            write_png_atomic(folder / "images" / f"{number:05d}.png", image)
        model = ["--model", arguments.model] if arguments.model else []
        for words in (
            ["compress", folder / "images", *model, "--output", folder / "small"],
            ["decompress", folder / "small", *model, "--output", folder / "restored"],
        ):
            ended = call(*words)
            if ended.returncode:
                raise RuntimeError(ended.stderr)
        summary = read_json(folder / "small" / "summary.json")
        restored = [decode(path.read_bytes(), 3) for path in sorted((folder / "restored").iterdir())]
    pixels = sum(image.shape[1] * image.shape[2] for image in originals) / count
    sizes = {"whole": summary["bytes"] / count, "content": summary["stream_bits"] / 8 / count}
    own = {"bytes": sizes, **measured(originals, restored, distance)}
    found = {"images": count, "pixels": pixels, "nats_per_code": summary["nats_per_code"], "vqgen-compress": own}
    shown, known = [originals, restored], dict[tuple[str, int], dict[str, float]]()
    for whole, key in ((True, "whole"), (False, "content")):
        for codec, (_, _, setting) in CODECS.items():
            value, files = lowest(codec, pictures, sizes[key], whole)
            results = [decode(data, 3) for data, _ in files]
            mean = sum(len(data) if whole else content for data, content in files) / count
            if (codec, value) not in known:
                known[codec, value] = measured(originals, results, distance)
            entry = {setting: value, "bytes": mean, **known[codec, value]}
            found.setdefault(codec, {})[key] = entry
            shown += [results] if not whole and codec != "PNG" else []
            print(codec, key, entry, flush=True)
    if arguments.picture:
        chosen = range(0, count, max(1, count // arguments.shown))[: arguments.shown]
        rows = [torch.cat([each[number] for number in chosen], 2) for each in shown]
        write_png_atomic(arguments.picture, torch.cat(rows, 2 if arguments.beside else 1))
    return found


# Tables.


def table(found: dict[str, Any]) -> list[str]:
    """Lines of Markdown with the metrics of one result of `quality`."""
    lines = ["| | bytes an image | PSNR | SSIM | LPIPS |", "|---|--:|--:|--:|--:|"]

    def row(name: str, sizes: str, entry: dict[str, float]) -> None:
        lines.append(f"| {name} | {sizes} | {entry['psnr']:.2f} dB | {entry['ssim']:.3f} | {entry['lpips']:.3f} |")

    own = found["vqgen-compress"]
    for key, title in (("whole", "whole files"), ("content", "without headers")):
        row(f"**vqgen-compress**, {title}", f"{own['bytes'][key]:.0f}", own)
        for codec, (_, settings, setting) in CODECS.items():
            entry = found[codec][key]
            value = "lossless" if (codec, entry[setting]) == ("PNG", settings[-1]) else f"{setting} {entry[setting]}"
            row(f"{codec}, {title}, {value}", f"{entry['bytes']:.0f}", entry)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("round-trip", "quality"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True, help="parquet file with a column image")
        command.add_argument("--model", type=Path, help="run or model folder of the prior; none: the shipped one")
        command.add_argument("--first", type=int, help="only so many images")
        command.add_argument("--output", type=Path, required=True)
        if name == "quality":
            command.add_argument("--largest", type=int, help="only so many images, those of most pixels")
            command.add_argument("--vgg16", type=Path, required=True, help="VGG16's convolutions, for LPIPS")
            command.add_argument("--picture", type=Path, help="PNG with rows of originals, ours, JPEG and WebP")
            command.add_argument("--beside", action="store_true", help="put these rows of --picture beside each other")
            command.add_argument("--shown", type=int, default=4, help="images in --picture")
        else:
            command.add_argument("--probabilities", nargs="+", choices=KINDS, default=["exact"])
    command = commands.add_parser("restore", help="what round-trip calls in another process")
    command.add_argument("archive", type=Path)
    command.add_argument("tokens", type=Path)
    command.add_argument("--model", type=Path)
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "restore":
        restore(arguments.model, arguments.archive, arguments.tokens)
    elif arguments.command == "table":
        for path in sorted(RESULTS.glob("quality-*.json")):
            print(f"{path.stem}\n\n" + "\n".join(table(read_json(path))) + "\n")
    else:
        result = round_trip(arguments) if arguments.command == "round-trip" else quality(arguments)
        write_json(arguments.output, result)


if __name__ == "__main__":
    main()
