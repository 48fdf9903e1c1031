"""What vqgen-sample is given as images: --init-image, of which a part is kept (--keep-rows, --mask, --box, --vary,
--extend), or an empty --size, and --source-image, which is translated."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vqgen.errors import UsageError, UserError
from vqgen.files import read_bytes
from vqgen.tokenizer.codes.degrade import Degradations, degrade, parse_degradations, source_seed
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.data.sources import SUFFIXES

from .filling import Filling, box_mask
from .generator import Generator
from .known import Sources
from .output import path_word
from .sample import SampleConfig


def read_image(path: Path, channels: int, option: str = "--init-image") -> Tensor:
    """Read an image file as uint8 (channels, h, w). Raises `UserError`."""
    try:
        return decode(read_bytes(path), channels)
    except (OSError, BrokenImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{option}: {path} cannot be read ({reason}); name others, or remove it") from error


def image_files(paths: list[Path], option: str = "--init-image") -> list[Path]:
    """Image files as given, and those in folders that are given. Raises `UserError`."""
    found: list[Path] = []
    for path in paths:
        folder = os.path.isdir(path)
        inside = sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in SUFFIXES) if folder else [path]
        if not inside:
            below = "; its subfolders are not searched" if folder and any(map(os.path.isdir, path.glob("*"))) else ""
            raise UserError(f"{option}: {path} holds no images{below}; name image files or a folder of them")
        found += inside
    return found


def given_files(config: SampleConfig) -> dict[str, list[Path]]:
    """The image files that are read, by the option that gives them. Raises `UserError`."""
    given = {"--init-image": config.init_image, "--source-image": config.source_image}
    found = {option: image_files(paths, option) for option, paths in given.items() if paths}
    return {**found, "--mask": config.mask} if config.mask else found


def pixel_mask(config: SampleConfig, index: int, path: Path, image: Tensor) -> Tensor:
    """The pixels of an image (C, H, W) that are drawn, bool (H, W), by --mask and --box. Raises `UserError`."""
    height, width = image.shape[1:]
    mask = torch.zeros(height, width, dtype=torch.bool)
    if config.mask:
        file = config.mask[index % len(config.mask)]
        white = read_image(file, 1, "--mask")[0] > 127
        if white.shape != mask.shape:
            found = f"{file} is {white.shape[1]}x{white.shape[0]} pixels, {path} is {width}x{height}"
            raise UserError(f"--mask: {found}; give a mask of the same size")
        mask |= white
    mask |= box_mask(config.box or [], height, width, str(path))
    if not mask.any():
        raise UserError(f"--mask: {config.mask[index % len(config.mask)] if config.mask else ''} has no white pixel")
    return mask


def chosen_filling(config: SampleConfig, generator: Generator, n: int) -> Filling | None:
    """What is drawn anew of --init-image, or around it, or a --size of its own, for `n` images; None for plain drawing.

    One image at a time is in memory as it is in its file. Raises `UserError`, `UsageError`.
    """
    if not config.init_image:
        return generator.canvas(config.size) if config.size else None
    paths, channels = image_files(config.init_image), generator.tokenizer.config.channels
    if len(config.mask or []) > len(paths):
        text = f"found {len(config.mask or [])} masks for {len(paths)} images; give one, or one an image"
        raise UsageError(f"--mask: {text}")

    def filling(index: int, path: Path) -> Filling:
        image = read_image(path, channels)
        if config.extend:
            return generator.extension(image, config.extend, config.paste)
        marked = f"--box: {' '.join(map(str, config.box or []))}"
        if config.mask:
            marked = f"--mask: what is white in {config.mask[index % len(config.mask)]}"
        return generator.filling(image, pixel_mask(config, index, path, image), config.paste, (marked, str(path)))

    if config.mask or config.box or config.extend:
        return Filling.joined([filling(index, path) for index, path in enumerate(paths)])
    fitted = torch.cat([generator.fitted(read_image(path, channels)[None]) for path in paths])
    if config.vary is not None:
        return generator.variation(fitted, config.vary, n, config.seed)
    rows = generator.tokenizer.grid[0]
    kept = rows // 2 if config.keep_rows is None else config.keep_rows
    if not 0 < kept < rows:
        raise UsageError(f"--keep-rows: found {kept}, but an image has {rows} rows of codes; keep 1 to {rows - 1}")
    codes = generator.encode(fitted)
    cells = torch.zeros(codes.shape[:3], dtype=torch.bool)
    cells[:, kept:] = True
    return Filling(codes, cells, generator.vocabulary, sourced=False)


@dataclass(frozen=True)
class SourceImages:
    """Files of images that are translated in turn."""

    paths: list[Path]
    read: Sources

    def __len__(self) -> int:
        """Number of images m."""
        return len(self.paths)

    def stems(self) -> list[str]:
        """Names of the files without suffixes and what file systems forbid. Raises `UsageError` for equal ones."""
        found: dict[str, Path] = {}
        stems = [path_word(path.stem, f"{number:05d}") for number, path in enumerate(self.paths)]
        for stem, path in zip(stems, self.paths, strict=True):
            if (other := found.setdefault(stem.casefold(), path)) is not path:
                text = f"{other} and {path} would have the same file, {stem}.png"
                raise UsageError(f"--source-image: {text}; rename one of them")
        return stems


def chosen_sources(config: SampleConfig, generator: Generator) -> SourceImages | None:
    """The images of --source-image, degraded by --source. Raises `UserError`, `UsageError`."""
    if not config.source_image:
        return None
    generator.check_translation()
    degradations = Degradations() if config.source is None else parse_degradations(config.source)
    paths, channels = image_files(config.source_image, "--source-image"), generator.tokenizer.config.channels
    size, images = generator.source_size, []
    for number, path in enumerate(paths):
        image = generator.fitted(read_image(path, channels, "--source-image")[None], size)
        images.append(degrade(image, degradations, [source_seed(config.seed, number)]))
    return SourceImages(paths, generator.sources(torch.cat(images), config.paste, config.source))
