"""Sources, decoding, fitting, augmentation and batches, on the demo images and odd files made from them."""

import datetime
import decimal
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vqgen import seeding as order
from vqgen.errors import UsageError, UserError
from vqgen.tokenizer import train
from vqgen.tokenizer.data import sources, tables
from vqgen.tokenizer.data.broken import BrokenImages
from vqgen.tokenizer.data.dataset import ImageDataset, open_images, ordered_batches, training_batches
from vqgen.tokenizer.data.decoding import BrokenImage, decode
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import fit, to_float, to_uint8
from vqgen.tokenizer.encode import main as tokenize

DEMO = sources.DEMO
SMALL = ImageConfig(size=[16, 16], channels=1)


@pytest.fixture(scope="module")
def rows():
    """The first 60 held-out demo images: encoded bytes and labels, and the class names."""
    table = pq.read_table(DEMO / "heldout.parquet").slice(0, 60)
    return [row["bytes"] for row in table["image"].to_pylist()], table["label"].to_pylist()


@pytest.fixture(scope="module")
def photo():
    """An upright colour picture, 24 high and 40 wide, without symmetry, made of real garments."""
    column = pq.read_table(DEMO / "heldout.parquet")["image"].slice(0, 3).to_pylist()
    planes = [Image.open(io.BytesIO(row["bytes"])).resize((40, 24)) for row in column]
    return Image.merge("RGB", planes)


def encode(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def write_files(names, encoded, folder: Path) -> Path:
    """A folder of image files."""
    for name, data in zip(names, encoded):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def flat(rows, folder: Path, count: int = 20) -> Path:
    return write_files([f"{i:03}.png" for i in range(count)], rows[0], folder)


def write_table(path: Path, rows, names=("image", "label"), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": data, "path": None} for data in rows[0]], kind)
    pq.write_table(pa.table(dict(zip(names, [images, pa.array(rows[1])]))), path, **options)
    return path


def everything(dataset, config):
    batches = list(ordered_batches(dataset, range(len(dataset)), 7))
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


# Range and configuration


def test_range_round_trip_is_exact_on_all_values():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "--channels: found 2, expected 1 or 3"),
        ({"size": [32, 0]}, "--size"),
        ({"size": [1, 2, 3]}, "--size"),
        ({"size": []}, "--size"),
        ({"fit": "stretch"}, "--fit"),
        ({"random_crop": -0.1}, "--random-crop"),
        ({"holdout": 1.0}, "--holdout"),
        ({"holdout": float("nan")}, "--holdout"),
        ({"broken": "ignore"}, "--broken"),
        ({"max_broken": 2.0}, "--max-broken"),
        ({"workers": -2}, "--workers"),
        ({"cache_mb": -1}, "--cache-mb"),
    ],
)
def test_wrong_configuration_names_the_option(options, message):
    with pytest.raises(UsageError, match=message):
        ImageConfig(**options)


def test_one_number_is_a_square():
    assert ImageConfig(size=[28]).size == [28, 28]


# Decoding


def test_every_mode_gives_the_same_picture(photo):
    grey = photo.convert("L")
    colour, plain = pixels(photo), pixels(grey)
    for kind in ("png", "bmp", "tiff", "ppm"):
        assert torch.equal(decode(encode(photo, kind), 3), colour)
        assert torch.equal(decode(encode(grey, kind if kind != "ppm" else "png"), 1), plain)
    assert torch.equal(decode(encode(photo, "webp", lossless=True), 3), colour)
    assert torch.equal(decode(encode(grey), 3), plain.expand(3, -1, -1))
    assert torch.equal(decode(encode(photo), 1), plain)  # the luma of Pillow, exactly
    assert torch.equal(decode(encode(grey.convert("RGB")), 1), plain)
    assert torch.equal(decode(encode(grey.convert("1")), 1), pixels(grey.convert("1").convert("L")))


def test_palette_gif_and_cmyk_show_colours_not_indices(photo):
    for colours in (2, 16, 200):  # 1, 4 and 8 bits
        palette = photo.quantize(colours)
        expected = pixels(palette.convert("RGB"))
        assert torch.equal(decode(encode(palette), 3), expected), colours
    assert torch.equal(decode(encode(palette, "gif"), 3), expected)
    animated = encode(palette, "gif", save_all=True, append_images=[palette.rotate(180)])
    assert torch.equal(decode(animated, 3), expected)
    smooth = photo.resize((80, 48))
    for ink in (encode(smooth.convert("CMYK"), "jpeg", quality=98), encode(smooth.convert("CMYK"), "tiff")):
        error = (decode(ink, 3).int() - pixels(smooth).int()).abs().float().mean()
        assert error < 4


def test_transparency_shows_white(photo):
    clear = photo.copy()
    clear.putalpha(0)
    assert decode(encode(clear), 3).min() == 255
    assert decode(encode(photo.convert("L").convert("LA")), 1).equal(pixels(photo.convert("L")))
    half = Image.merge("LA", [Image.new("L", (4, 4), 55), Image.new("L", (4, 4), 51)])
    assert decode(encode(half), 1).unique().tolist() == [215]  # 255 - 200 * 51 / 255
    assert decode(encode(clear, "webp", lossless=True), 3).min() == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    for kind in ("png", "gif"):
        shown = decode(encode(palette, kind, transparency=0), 3)
        assert shown[:, 0, 0].tolist() == [255] * 3 and shown[:, 1, 1].tolist() == [40, 50, 60]
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert decode(encode(keyed, transparency=(1, 2, 3)), 3).min() == 255


def test_sixteen_bits_keep_their_brightness(photo):
    grey = np.array(photo.convert("L"))
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(decode(encode(wide), 1), torch.from_numpy(grey)[None])
    assert torch.equal(decode(encode(wide, "tiff"), 3), torch.from_numpy(grey).expand(3, -1, -1))
    with pytest.raises(BrokenImage, match="float"):
        decode(encode(Image.fromarray(grey.astype(np.float32)), "tiff"), 1)
    for kind in (np.int32, np.int16):  # white could be any value
        with pytest.raises(BrokenImage, match="32 bits, or with a sign"):
            decode(encode(Image.fromarray(grey.astype(kind)), "tiff"), 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo, orientation):
    # The stored picture that a viewer turns upright, by EXIF's definition of the eight orientations.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo.transpose(undo[orientation]) if orientation > 1 else photo
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "tiff"):
        assert torch.equal(decode(encode(stored, kind, exif=exif), 3), pixels(photo)), kind
    assert torch.equal(decode(encode(stored, "webp", lossless=True, exif=exif), 3), pixels(photo))
    jpeg = decode(encode(stored, "jpeg", quality=98, subsampling=0, exif=exif), 3)
    assert (jpeg.int() - pixels(photo).int()).abs().float().mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_damaged_bytes_are_broken_images(photo, kind):
    whole = encode(photo, kind)
    for data in (b"", whole[: len(whole) // 2], whole[:9], b"no image at all"):
        with pytest.raises(BrokenImage) as caught:
            decode(data, 3)
        assert str(caught.value) and "\n" not in str(caught.value)


# Fitting


@pytest.mark.parametrize("size", [(28, 28), (32, 48), (48, 32), (64, 512)])
@pytest.mark.parametrize("shape", [(28, 28), (24, 40), (40, 24), (1, 900), (700, 500)])
def test_fit_gives_the_size_for_any_aspect_ratio(size, shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    assert fit(image, size, "pad").shape == (3, *size)
    cropped = fit(image, size, "crop")
    assert cropped.shape[1] >= size[0] and cropped.shape[2] >= size[1]
    assert cropped.shape[1] == size[0] or cropped.shape[2] == size[1]
    assert torch.equal(fit(image, shape, "crop"), image) and torch.equal(fit(image, shape, "pad"), image)


def test_crop_takes_the_centre_and_pad_adds_black(tmp_path):
    stripes = np.zeros((20, 60), np.uint8)
    stripes[:, 20:40] = 200
    for name in ("a", "b"):
        Image.fromarray(stripes).save(tmp_path / f"{name}.png")
    middle = open_images(str(tmp_path), "train", ImageConfig(size=[20, 20], channels=1))[0].image
    assert middle.unique().tolist() == [200]
    padded = open_images(str(tmp_path), "train", ImageConfig(size=[60, 60], channels=1, fit="pad"))[0].image
    assert padded[:, :20].max() == 0 and padded[:, 40:].max() == 0
    assert torch.equal(padded[0, 20:40], torch.from_numpy(stripes))


def test_shrinking_is_antialiased():
    noise = torch.randint(0, 256, (1, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    # The mean of k x k pixels has a k-th of their spread; plain bilinear sampling would keep about half.
    assert fit(noise, (16, 16), "crop").float().std() < noise.float().std() / 8


# Sources


def test_demo_counts_size_and_licence():
    train, held = (open_images("demo", split, SMALL) for split in ("train", "heldout"))
    assert (len(train), len(held)) == (9000, 1000)
    assert train.labels.bincount().tolist() == [900] * 10 and held.labels.bincount().tolist() == [100] * 10
    assert train.class_names == held.class_names and (train.class_names or [])[9] == "Ankle boot"
    assert train[0].image.shape == (1, 16, 16)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 6_000_000
    assert "Copyright (c) 2017 Zalando SE" in (DEMO / "LICENSE").read_text()
    seen = [
        set(pq.read_table(DEMO / f"{s}.parquet")["image"].combine_chunks().field("bytes").to_pylist())
        for s in ("train", "heldout")
    ]
    assert not seen[0] & seen[1]


def test_every_kind_of_source_gives_the_same_images(rows, tmp_path):
    import datasets

    names = ["bag", "coat", "hat"]
    labels = [i % 3 for i in range(30)]
    halves = {"train": slice(0, 20), "val": slice(20, 30)}
    for split, part in halves.items():
        inside = [f"{split}/{names[k]}/{i:03}.png" for i, k in enumerate(labels)]
        write_files(inside[part], rows[0][part], tmp_path / "folder")
        some = (rows[0][part], labels[part])
        write_table(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet", some)
        write_table(tmp_path / "nested" / split / "0000.parquet", ([*some[0]], [names[k] for k in some[1]]))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    saved = datasets.DatasetDict(
        {
            s: datasets.Dataset.from_dict(
                {"image": [{"bytes": b, "path": None} for b in rows[0][p]], "label": labels[p]}, features=features
            )
            for s, p in halves.items()
        }
    )
    saved.save_to_disk(str(tmp_path / "disk"))
    saved["train"].to_parquet(str(tmp_path / "hf" / "train.parquet"))
    saved["val"].to_parquet(str(tmp_path / "hf" / "validation.parquet"))
    kinds = ["folder", "parquet", "nested", "disk", "hf"]
    marks = set()
    for split, part in halves.items():
        order = sorted(range(30)[part], key=lambda i: (labels[i], i))  # a folder is read in order of name
        expected = torch.stack([fit(decode(rows[0][i], 1), (16, 16), "crop") for i in range(30)])
        for kind in kinds:
            dataset = open_images(str(tmp_path / kind), "train" if split == "train" else "heldout", SMALL)
            images, found = everything(dataset, SMALL)
            at = order if kind == "folder" else list(range(30)[part])
            assert torch.equal(images, expected[at]), kind
            assert found.tolist() == [labels[i] for i in at], kind
            assert dataset.class_names == (["0", "1", "2"] if kind == "parquet" else names), kind
            marks.add(dataset.fingerprint)
    assert len(marks) == 10


def test_large_parquet_is_mapped_and_gives_the_same(rows, tmp_path, monkeypatch):
    import datasets

    path = write_table(tmp_path / "all.parquet", rows)
    expected = everything(open_images(str(path), "train", SMALL), SMALL)
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = everything(open_images(str(path), "train", SMALL), SMALL)
    assert (tmp_path / "cache").is_dir()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_name_goes_to_datasets_and_fails_in_one_line(rows, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    asked = []

    def load(name):
        asked.append(name)
        if name == "nobody/nothing":
            raise ConnectionError("no\nroute")
        images = [{"bytes": data, "path": None} for data in rows[0]]
        features = datasets.Features(img=datasets.Image(), fine_label=datasets.Value("int64"))
        return datasets.DatasetDict(
            train=datasets.Dataset.from_dict({"img": images, "fine_label": rows[1]}, features=features)
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    dataset = open_images("somebody/things", "train", SMALL)
    assert asked == ["somebody/things"] and len(dataset) == 57 and dataset[0].image.shape == (1, 16, 16)
    with pytest.raises(UserError) as caught:
        open_images("nobody/nothing", "train", SMALL)
    assert "nobody/nothing" in str(caught.value) and "no route" in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        open_images(str(tmp_path / "typo"), "train", SMALL)
    assert asked == ["somebody/things", "nobody/nothing"]


def test_split_is_fixed_and_disjoint(rows, tmp_path):
    folder = flat(rows, tmp_path / "a", 60)

    def names(where, split, holdout=0.2):
        source = sources.open_source(str(where), split, holdout)
        return {Path(source.item_name(i)).name for i in range(len(source))}

    train, held = names(folder, "train"), names(folder, "heldout")
    assert len(held) == 12 and not train & held and len(train | held) == 60
    assert names(shutil.copytree(folder, tmp_path / "b"), "heldout") == held
    assert len(names(folder, "heldout", 0.001)) == 1 and len(names(folder, "train", 0.999)) == 1
    (folder / f"{min(train)}").unlink()
    assert len(names(folder, "heldout") - held) <= 1  # the others stay where they were
    # Fixed for ever: a change of the hash would move images from one split to the other.
    assert order.hash64("split", "000.png") == 0x4C848E724FA39966


def names_of(source) -> list[str]:
    return [Path(source.item_name(i)).name for i in range(len(source))]


def test_a_test_split_is_never_validated_on(rows, tmp_path):
    """Where a source has only train and test, heldout is divided off train, by the rule for sources without splits."""
    for part, images in (("train", range(40)), ("test", range(40, 60))):
        names = [f"{part}/{'ab'[i % 2]}/{i:03}.png" for i in images]
        write_files(names, [rows[0][i] for i in images], tmp_path / "folder")
        write_table(tmp_path / "tables" / f"{part}.parquet", ([rows[0][i] for i in images], [i % 2 for i in images]))
    for source in ("folder", "tables"):
        data = str(tmp_path / source)
        train, held, test = (sources.open_source(data, split, 0.25) for split in ("train", "heldout", "test"))
        assert (len(train), len(held), len(test)) == (30, 10, 20) and train.test_images == held.test_images == 20
        assert len({train.fingerprint, held.fingerprint, test.fingerprint}) == 3
        alone = str(tmp_path / source / ("train" if source == "folder" else "train.parquet"))
        for split, found in (("train", train), ("heldout", held)):
            expected = sources.open_source(alone, split, 0.25)
            assert (found.rows == expected.rows).all() and (found.labels == expected.labels).all()
        # All of the test split in order, whatever the share: what version 0.1 called heldout.
        assert (test.rows == range(20)).all() and test.fingerprint == sources.open_source(data, "test", 0.5).fingerprint
    folder = str(tmp_path / "folder")
    assert names_of(sources.open_source(folder, "test", 0.25)) == [
        f"{i:03}.png" for i in [*range(40, 60, 2), *range(41, 60, 2)]
    ]


def test_training_says_that_a_test_split_is_left_for_evaluation(rows, tmp_path, cli):
    for part, start, count in (("train", 0, 12), ("test", 12, 5)):
        write_files([f"{part}/{i}.png" for i in range(count)], rows[0][start:], tmp_path / "images")
    words = "--size 16 --channels 1 --width 8 --multipliers 1 2 --blocks 1 --groups 4 --latent-dim 8 --steps 1".split()
    words += "--batch-size 4 --holdout 0.25 --precision fp32 --codebook-size 16".split()
    result = cli(train.main, "--data", tmp_path / "images", "--output", tmp_path / "run", *words)
    said = [line for line in (result.out + result.err).splitlines() if line.startswith("images ")]
    assert result.code == 0 and len(said) == 1 and "5 left for tests" in said[0], result.err


def test_three_splits_are_kept_and_a_missing_one_is_an_error(rows, tmp_path):
    parts = {"train": 6, "val": 4, "test": 5}
    for number, (part, count) in enumerate(parts.items()):
        write_files([f"{part}/{number}{i}.png" for i in range(count)], rows[0][10 * number :], tmp_path)
    for split, part in (("train", "train"), ("heldout", "val"), ("test", "test")):
        found = sources.open_source(str(tmp_path), split, 0.5)
        assert len(found) == parts[part] and found.test_images == 5
        assert all(f"{part}/" in found.item_name(i) for i in range(len(found)))
    before = sources.open_source(str(tmp_path), "train", 0.5).fingerprint
    shutil.rmtree(tmp_path / "test")
    assert sources.open_source(str(tmp_path), "train", 0.1).fingerprint == before, "the splits it had are the same"
    for data in (str(tmp_path), str(tmp_path / "val"), "demo"):
        with pytest.raises(UserError, match="--split: found test"):
            sources.open_source(data, "test", 0.5)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_a_source_that_is_for_tests_alone_is_never_trained_on(rows, tmp_path, kind):
    for part, other in (("test", "heldout"), ("val", "test")):
        folder = tmp_path / part
        if kind == "folder":
            write_files([f"{part}/{c}/{i}.png" for c in "ab" for i in range(3)], rows[0], folder)
        else:
            folder.mkdir()
            columns = {"image": rows[0][:6], "label": [0, 1] * 3}
            pq.write_table(pa.table(columns), folder / f"{part}-00000-of-00001.parquet")
        found = sources.open_source(str(folder), "test" if part == "test" else "heldout", 0.5)
        assert len(found) == 6 and found.class_names in (["a", "b"], ["0", "1"])
        with pytest.raises(UserError, match="and none of train"):
            sources.open_source(str(folder), "train", 0.5)
        with pytest.raises(UserError, match=f"--split: found {other}"):
            sources.open_source(str(folder), other, 0.5)
    if kind == "folder":
        shutil.copytree(tmp_path / "val" / "val", tmp_path / "test" / "val")
        with pytest.raises(UserError, match="test, val and no train"):
            sources.open_source(str(tmp_path / "test"), "test", 0.5)


def test_what_is_in_no_split_of_a_table_is_said(rows, tmp_path):
    for number, part in enumerate(("train", "validation", "val")):
        pq.write_table(pa.table({"image": rows[0][10 * number : 10 * number + 10]}), tmp_path / f"{part}.parquet")
    write_files(["cat/a.png", "dog/b.png"], rows[0], tmp_path)
    source = sources.open_source(str(tmp_path), "train", 0.5)
    assert len(source) == 10 and source.note == "left out: image files beside tables (2, as cat/a.png); the split val"
    for part in ("train", "validation", "val"):
        (tmp_path / f"{part}.parquet").unlink()
    pq.write_table(pa.table({"file_name": ["cat/a.png"]}), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match=r"metadata.parquet is beside images, and is not read; write it as metadata"):
        sources.open_source(str(tmp_path), "train", 0.5)


def test_images_of_kinds_that_are_not_read_are_counted(rows, tmp_path):
    write_files([f"{i}.png" for i in range(4)], rows[0], tmp_path)
    write_files(["phone/IMG_1.HEIC", "phone/IMG_2.heic", ".hidden.heic", "notes.txt"], [b"?"] * 4, tmp_path)
    found = sources.open_source(str(tmp_path), "train", 0.5)
    assert found.note == "left out: images that are not read (2, as phone/IMG_1.HEIC); convert them"


def test_one_large_image_does_not_make_others_slow_to_read(rows, tmp_path, monkeypatch):
    dataset = open_images(str(flat(rows, tmp_path, 20)), "train", SMALL)
    slow, clock = list[int](), 0.0

    def read(keys: list[tuple[int, int]]) -> None:
        nonlocal clock
        new = [index for index, _ in keys if index not in slow]
        clock += sum(5.0 if index == 9 else 0.01 for index in new) + 0.001
        slow.extend(new)

    monkeypatch.setattr(dataset, "__getitems__", read)
    monkeypatch.setattr("vqgen.tokenizer.data.dataset.time", SimpleNamespace(perf_counter=lambda: clock))
    assert 9 in np.linspace(0, len(dataset) - 1, 17).astype(int) and dataset.first_read() == pytest.approx(0.01)


def test_a_folder_of_tar_files_is_a_stream(tmp_path):
    (tmp_path / "00000.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match=f"give stream:{tmp_path}"):
        sources.open_source(str(tmp_path), "train", 0.5)


def test_errors_of_datasets_are_one_line(monkeypatch, rows, tmp_path):
    from datasets.exceptions import DatasetGenerationError

    from vqgen.tokenizer.data import tables

    folder = tmp_path / "br[1]"  # a pattern of `datasets`, if it is not escaped
    folder.mkdir()
    pq.write_table(pa.table({"image": rows[0][:6]}), folder / "train.parquet")
    monkeypatch.setattr(tables, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = sources.open_source(str(folder), "train", 0.5)
    assert source.read(0) in rows[0][:6] and "converted once into the cache" in source.note

    def failing(*_: object, **__: object) -> None:
        raise DatasetGenerationError("generating failed") from OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.Dataset.from_parquet", failing)
    with pytest.raises(UserError, match=r"^--data: .* \(OSError: .*No space left on device\); restore it"):
        sources.open_source(str(folder), "train", 0.5).read(0)


def test_folder_layouts(rows, tmp_path):
    some = rows[0][:6]
    cat = write_files([f"cat/{i}.png" for i in range(3)], some, tmp_path / "classes")
    write_files([f"train/deep/{i}.PNG" for i in range(3)], some[3:], cat)
    write_files([".hidden/x.png", "__MACOSX/y.png", ".z.png"], some, cat)
    dataset = open_images(str(cat), "train", SMALL)  # "train" is a class here: no held-out folder stands beside it
    assert dataset.class_names == ["cat", "train"] and len(dataset) == 5
    lone = write_files([f"train/{c}/{i}.png" for c in "ab" for i in range(3)], some, tmp_path / "lone")
    assert open_images(str(lone), "train", SMALL).class_names == ["a", "b"]
    write_files(["preview.png"], some, lone)  # beside train/, and so of no class
    dataset = open_images(str(lone), "train", SMALL)
    assert dataset.class_names == ["a", "b"] and len(dataset) == 5 and "preview.png" in dataset.source.note
    plain = open_images(str(flat(rows, tmp_path / "flat", 5)), "train", SMALL)
    assert plain.class_names is None and plain.labels.tolist() == [-1] * 4
    (cat / "loop").symlink_to(cat)
    assert len(open_images(str(cat), "train", SMALL)) == 5


def test_a_few_images_in_train_are_no_split(rows, tmp_path):
    """As where train/ holds pictures of trains beside all others."""
    write_files([*(f"train/{i}.png" for i in range(6)), *(f"{i}.png" for i in range(6, 12))], rows[0], tmp_path)
    assert list(sources.find_splits(str(tmp_path))) == ["all"]
    source = sources.open_source(str(tmp_path), "all", 0.25)
    assert len(source) == 12 and not source.note and source.class_names is None
    (tmp_path / "11.png").unlink()
    source = sources.open_source(str(tmp_path), "all", 0.25)
    assert len(source) == 6 and "5 images" in source.note


def test_images_beside_splits_are_named(rows, tmp_path, cli):
    for number, part in enumerate(("train", "test", "extra", "")):
        write_files(
            [f"{part}/{number}{i}.png".strip("/") for i in range(6)], rows[0][10 * number :], tmp_path / "images"
        )
    source = sources.open_source(str(tmp_path / "images"), "train", 0.25)
    assert len(source) == 4 or len(source) == 5
    assert "12 images" in source.note and "30.png" in source.note and "train/" in source.note
    words = "--size 16 --channels 1 --width 8 --multipliers 1 2 --blocks 1 --groups 4 --latent-dim 8 --steps 1".split()
    words += "--batch-size 4 --holdout 0.25 --precision fp32 --codebook-size 16".split()
    result = cli(train.main, "--data", tmp_path / "images", "--output", tmp_path / "run", *words)
    assert result.code == 0 and source.note in result.err
    codes = cli(tokenize, "--data", tmp_path / "images", "--tokenizer", tmp_path / "run", "--output", tmp_path / "c")
    assert codes.code == 0 and source.note in codes.out
    for part in ("extra", "30.png", "31.png", "32.png", "33.png", "34.png", "35.png"):
        path = tmp_path / "images" / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not sources.open_source(str(tmp_path / "images"), "train", 0.25).note


def test_a_folder_called_demo_is_named(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not sources.open_source("demo", "train", 0.25).note
    flat(rows, tmp_path / "demo")
    assert "./demo" in sources.open_source("demo", "train", 0.25).note
    own = sources.open_source("./demo", "train", 0.25)
    assert len(own) == 15 and not own.note


def test_several_links_to_a_folder_are_all_read(rows, tmp_path):
    write_files([f"real/{c}/{i}.png" for c in "ab" for i in range(3)], rows[0], tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "val"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "real")
    (tmp_path / "real" / "a" / "up").symlink_to(tmp_path / "real")  # and none without end
    for split, part in (("train", "train"), ("heldout", "val")):
        found = sources.open_source(str(tmp_path / "data"), split, 0.25)
        assert len(found) == 6 and all(f"data/{part}/" in found.item_name(i) for i in range(6))


def test_fingerprint_follows_content_and_split_not_place(rows, tmp_path):
    folder = flat(rows, tmp_path / "a")
    mark = open_images(str(folder), "train", SMALL).fingerprint
    assert len(mark) == 64 and mark != open_images(str(folder), "heldout", SMALL).fingerprint
    assert mark == open_images(str(shutil.copytree(folder, tmp_path / "b")), "train", SMALL).fingerprint
    (folder / "000.png").write_bytes(rows[0][0] + b"0")
    assert mark != open_images(str(folder), "train", SMALL).fingerprint


def test_bad_sources_are_one_line(rows, tmp_path):
    (tmp_path / "empty").mkdir()
    flat(rows, tmp_path / "single", 1)
    whole = write_table(tmp_path / "whole.parquet", rows).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    middle = bytearray(whole)
    middle[8 : len(whole) // 2] = bytes(len(whole) // 2 - 8)
    (tmp_path / "holes.parquet").write_bytes(middle)
    write_table(tmp_path / "none.parquet", ([], []))
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    for split in ("test", "validation"):
        write_table(tmp_path / "noname" / f"{split}.parquet", rows)
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "state.json").write_text("{")
    found = {}
    for name, words in {
        "empty": "holds no images",
        "single": "at least 2",
        "cut.parquet": "cannot be read",
        "holes.parquet": "cannot be read",
        "none.parquet": "holds no images",
        "text.parquet": "no columns of encoded images",
        "two.parquet": "2 columns of encoded images",
        "noname": "no train",
        "note.txt": "single file",
        "disk": "JSON",
        "missing/folder": "does not exist",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            open_images(str(tmp_path / name), "train", SMALL)[0]
        found[name] = str(caught.value)
        assert name.split("/")[0] in found[name] and "\n" not in found[name]
    with pytest.raises(UserError, match="found nothing"):
        open_images("", "train", SMALL)


# Augmentation and batches


def augmenting(rows, folder):
    """A colour dataset with flips and random crops."""
    config = ImageConfig(size=[24, 20], flip=True, random_crop=0.3)
    return open_images(str(flat(rows, folder)), "train", config, augment=True, replace_broken=True), config


def test_augmentation_depends_on_the_key_alone(rows, tmp_path):
    dataset, config = augmenting(rows, tmp_path)
    views = torch.stack([dataset[(3, seed)].image for seed in range(40)])
    assert torch.equal(views, torch.stack([dataset[(3, seed)].image for seed in range(40)]))
    assert len(views.flatten(1).unique(dim=0)) > 20
    fresh = open_images(str(tmp_path), "train", replace(config, cache_mb=0), augment=True)
    assert not fresh.cached() and torch.equal(fresh[(3, 7)].image, views[7])
    plain = open_images(str(tmp_path), "train", config)
    assert torch.equal(plain[(3, 7)].image, plain[3].image) and torch.equal(dataset[3].image, plain[3].image)


def test_flip_mirrors_half_and_crop_cuts_from_the_enlarged(rows, tmp_path):
    folder = str(flat(rows, tmp_path))
    flips = open_images(folder, "train", replace(SMALL, flip=True), augment=True)
    plain = flips[0].image
    views = [flips[(0, seed)].image for seed in range(200)]
    mirrored = sum(torch.equal(view, plain.flip(-1)) for view in views)
    assert mirrored + sum(torch.equal(view, plain) for view in views) == 200 and 70 < mirrored < 130
    config = replace(SMALL, random_crop=0.5)
    crops = open_images(folder, "train", config, augment=True)
    large = open_images(folder, "train", replace(SMALL, size=[24, 24]))[0].image
    windows = large.unfold(1, 16, 1).unfold(2, 16, 1).reshape(-1, 16, 16)
    views = [crops[(0, seed)].image for seed in range(400)]
    assert all((windows == view).all((1, 2)).any() for view in views)
    assert len(torch.stack(views).flatten(1).unique(dim=0)) > 70  # of 81 places


def test_random_shifts_mirror_at_the_edges(rows, tmp_path):
    folder = str(flat(rows, tmp_path))
    config = replace(SMALL, random_shift=2)
    shifted = open_images(folder, "train", config, augment=True)
    image = open_images(folder, "train", SMALL)[0].image
    mirrored = torch.cat([image[:, :2].flip(1), image, image[:, -2:].flip(1)], dim=1)
    mirrored = torch.cat([mirrored[:, :, :2].flip(2), mirrored, mirrored[:, :, -2:].flip(2)], dim=2)
    windows = mirrored.unfold(1, 16, 1).unfold(2, 16, 1).reshape(-1, 16, 16)
    views = torch.stack([shifted[(0, seed)].image for seed in range(200)])
    assert len(views.flatten(1).unique(dim=0)) == 25
    assert all((windows == view).all((1, 2)).any() for view in views)


def test_a_random_crop_of_nothing_is_refused(rows, tmp_path):
    folder = str(flat(rows, tmp_path))
    with pytest.raises(UsageError, match=r"--random-crop: found 0\.02, which adds no pixel to 16x16.*0\.062"):
        open_images(folder, "train", replace(SMALL, random_crop=0.02), augment=True)
    for size, crop in (([16, 16], 0.062), ([16, 64], 0.02)):
        assert open_images(folder, "train", replace(SMALL, size=size, random_crop=crop), augment=True)[(0, 1)]


def test_random_crop_reaches_along_the_long_side(photo, tmp_path):
    for i in range(3):
        photo.rotate(90 * (i == 2), expand=True).save(tmp_path / f"{i}.png")
    config = ImageConfig(size=[24, 24], random_crop=0.25)
    dataset = open_images(str(tmp_path), "train", config, augment=True)
    for index in range(len(dataset)):
        views = {dataset[(index, seed)].image.numpy().tobytes() for seed in range(300)}
        assert len(views) > 7 * 7  # more places than the square of the shorter side offers


def test_training_batches_resume_slice_and_cover(rows, tmp_path):
    dataset, _ = augmenting(rows, tmp_path)

    def take(count, first=0, rank=0, world=1, size=4, seed=5):
        return list(itertools.islice(training_batches(dataset, size, seed, first, rank, world), count))

    def equal(a, b):
        return torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices)

    whole = take(12)
    assert all(equal(a, b) for a, b in zip(whole[7:], take(5, first=7)))
    slices = [take(6, rank=r, world=2, size=2) for r in (0, 1)]
    for step in range(6):
        assert torch.equal(torch.cat([slices[r][step].images for r in (0, 1)]), whole[step].images)
    order = torch.cat([b.indices for b in whole])
    assert len(dataset) == 19 and order[:19].sort().values.equal(torch.arange(19))
    assert order[19:38].sort().values.equal(torch.arange(19)) and not order[:19].equal(order[19:38])
    assert not equal(whole[0], take(1, seed=6)[0])
    assert take(1, size=50)[0].indices.bincount().max() == 3  # more images asked than there are: epochs wrap


def test_workers_change_nothing_and_draw_no_random_numbers(rows, tmp_path):
    flat(rows, tmp_path)
    (tmp_path / "003.png").write_bytes(b"broken")
    results = []
    state = torch.get_rng_state()
    for workers in (0, 2):
        config = ImageConfig(size=[24, 20], flip=True, max_broken=0.2, workers=workers)
        dataset = open_images(str(tmp_path), "train", config, augment=True, replace_broken=True)
        found = list(ordered_batches(dataset, [5, 1, 1, 9, 0], 2))
        # The same workers serve the next reading, also after one that was left in the middle.
        stopped = ordered_batches(dataset, range(len(dataset)), 4)
        found.append(next(stopped))
        stopped.close()
        # Four epochs: on the way everything is in memory, and the workers are no longer asked.
        found += itertools.islice(training_batches(dataset, 8, 1, 2, 0, 1), 9)
        assert dataset.cached()
        results.append((found, list(dataset.broken.names)))
    assert torch.equal(state, torch.get_rng_state())
    assert results[0][1] == results[1][1] and len(results[0][1]) == 1
    for one, two in zip(*(found for found, _ in results), strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels) and one.broken == two.broken


def test_cache_spares_the_second_reading(rows, tmp_path, monkeypatch):
    dataset = open_images(str(flat(rows, tmp_path)), "train", SMALL)
    first = everything(dataset, SMALL)[0]
    assert dataset.cached()
    monkeypatch.setattr(sources.Files, "read", lambda *_: pytest.fail("read again"))
    assert torch.equal(everything(dataset, SMALL)[0], first)


# Broken images


@pytest.fixture
def damaged(rows, tmp_path):
    """20 training images of which two are broken: one empty, one cut."""
    write_files([f"train/{i:03}.png" for i in range(20)], rows[0], tmp_path)
    write_files([f"val/{i:03}.png" for i in range(4)], rows[0][20:], tmp_path)
    (tmp_path / "train/004.png").write_bytes(b"")
    (tmp_path / "train/009.png").write_bytes(rows[0][9][:100])
    return str(tmp_path)


def test_broken_images_are_left_out_and_named_once(damaged):
    config = replace(SMALL, max_broken=0.1)
    dataset = open_images(damaged, "train", config)
    for _ in range(2):
        indices = torch.cat([b.indices for b in ordered_batches(dataset, range(20), 6)])
        assert indices.tolist() == [i for i in range(20) if i not in (4, 9)]
    assert [name.split(" ")[0][-7:] for name in dataset.broken.names] == ["004.png", "009.png"]
    assert "empty" in next(iter(dataset.broken.names))
    assert [b.indices.tolist() for b in ordered_batches(dataset, [4, 9, 5], 2)] == [[5]]
    with pytest.raises(UserError, match=r"004\.png"):
        dataset[4]


def test_broken_images_are_replaced_in_training(damaged):
    config = replace(SMALL, max_broken=0.1)
    dataset = open_images(damaged, "train", config, replace_broken=True)
    said: list[str] = []
    dataset.broken.report = said.append
    runs = [list(itertools.islice(training_batches(dataset, 5, 0, 0, 0, 1), 8)) for _ in range(2)]
    for a, b in zip(*runs):
        assert len(a.indices) == 5 and a.indices.equal(b.indices) and a.images.equal(b.images)
        assert not {4, 9} & set(a.indices.tolist())
    assert len(dataset.broken.names) == 2
    assert sorted(line.split(" (")[0][-7:] for line in said) == ["004.png", "009.png"]


def test_labels_of_one_split_survive_another_without_any(tmp_path, rows):
    images = [{"bytes": data, "path": None} for data in rows[0][:6]]
    table = {"image": images[:4], "label": [1, 0, 1, 1]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": images[4:]}), tmp_path / "valid.parquet")
    assert open_images(str(tmp_path), "train", SMALL).labels.tolist() == [1, 0, 1, 1]
    assert open_images(str(tmp_path), "heldout", SMALL).labels.tolist() == [-1, -1]
    pq.write_table(pa.table({"image": images[4:], "label": ["a", "b"]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="numbers in one split and as text"):
        open_images(str(tmp_path), "train", SMALL)


def test_broken_images_beyond_those_whose_names_are_kept_count_once(monkeypatch):
    monkeypatch.setattr("vqgen.tokenizer.data.broken.MOST_NAMED", 3)
    broken, said = BrokenImages("photos", replace(SMALL, max_broken=0.06), 100), list[str]()
    broken.report = said.append
    for _ in range(3):
        for number in range(6):
            broken.add([f"{number}.png"])
    assert broken.count == 6 and len(said) == len(broken.names) == 3
    with pytest.raises(UserError, match=r"7 broken images, the last 7\.png"):
        broken.add(["7.png"])


def test_broken_images_of_other_processes_count_once(monkeypatch):
    said: list[str] = []
    two = [BrokenImages("photos", replace(SMALL, max_broken=0.03), None) for _ in range(2)]
    two[0].report = said.append
    for each in two:
        each.shared = True
    found: list = [None, None]
    monkeypatch.setattr("vqgen.tokenizer.data.broken.gather_objects", lambda _: list(found))

    def exchange(rank):
        monkeypatch.setattr("vqgen.tokenizer.data.broken.rank_and_world", lambda: (rank, 2))
        two[rank].exchange()

    def meet():
        found[:] = [each.untold for each in two]
        return [exchange(rank) for rank in range(2)]

    two[0].add(["a", "b"], 600)
    two[1].add(["b", "c"], 700)
    meet()
    assert [(each.count, each.seen, each.images) for each in two] == [(3, 1300, 1300)] * 2
    assert said == ["skipped, broken: a", "skipped, broken: b", "skipped, broken: c"]
    two[1].add(["a", "d"], 100)
    meet()
    assert [(each.count, each.seen) for each in two] == [(4, 1400)] * 2 and len(said) == 4
    for rank, each in enumerate(two):  # 22 and 22 are too many together
        each.add((f"{rank} {number}" for number in range(22)), 0)
    found[:] = [each.untold for each in two]
    for rank in range(2):
        with pytest.raises(UserError, match="photos has 48 broken images"):
            exchange(rank)


def test_broken_images_end_the_run_where_configured(damaged):
    strict = replace(SMALL, broken="error", max_broken=1.0)
    with pytest.raises(UserError, match=r"004\.png"):
        list(ordered_batches(open_images(damaged, "train", strict), range(20), 4))
    few = replace(SMALL, max_broken=0.05)  # of 24 images
    with pytest.raises(UserError, match=r"--max-broken 0\.05: .* has 2 broken images.* 1 of 24"):
        list(ordered_batches(open_images(damaged, "train", few), range(20), 4))
    with pytest.raises(UserError, match=r"--max-broken 0\.05: .* has 2 broken images.* 1 of 24"):
        dataset = open_images(damaged, "train", few, replace_broken=True)
        list(itertools.islice(training_batches(dataset, 5, 0, 0, 0, 1), 8))


def test_the_share_of_broken_images_is_one_of_all_splits(rows, tmp_path):
    """Else one broken image among the few that are held out would end a run at its first validation."""
    config = replace(SMALL, max_broken=0.02, cache_mb=0)
    heldout = open_images(str(flat(rows, tmp_path, 60)), "heldout", config)
    names = [heldout.source.item_name(index) for index in range(len(heldout))]
    assert len(names) == 3
    Path(names[0]).write_bytes(b"x")
    assert [batch.indices.tolist() for batch in ordered_batches(heldout, range(3), 3)] == [[1, 2]]
    Path(names[1]).write_bytes(b"x")
    with pytest.raises(UserError, match="--max-broken"):
        list(ordered_batches(heldout, range(3), 3))


def test_a_split_needs_an_intact_image(rows, tmp_path):
    config = replace(SMALL, max_broken=0.1, cache_mb=0, holdout=0.02)
    heldout = open_images(str(flat(rows, tmp_path, 40)), "heldout", config)
    assert len(heldout) == 1
    Path(heldout.source.item_name(0)).write_bytes(b"x")
    with pytest.raises(UserError, match="--max-broken"):
        list(ordered_batches(heldout, range(1), 1))


def test_nothing_but_broken_images(tmp_path):
    write_files([f"{i}.png" for i in range(4)], [b"x"] * 4, tmp_path)
    config = replace(SMALL, max_broken=1.0)
    dataset = open_images(str(tmp_path), "train", config, replace_broken=True)
    with pytest.raises(UserError, match="too few intact images"):
        next(training_batches(dataset, 2, 0, 0, 0, 1))


def test_a_file_that_vanishes_is_broken_and_a_row_is_named(rows, tmp_path):
    config = replace(SMALL, max_broken=1.0)
    folder = flat(rows, tmp_path / "files", 6)
    dataset = open_images(str(folder), "train", config)
    for path in folder.iterdir():
        path.unlink()
    assert list(ordered_batches(dataset, range(5), 2)) == [] and len(dataset.broken.names) == 5
    table = write_table(tmp_path / "train.parquet", ([rows[0][0], b"", None], [0, 1, 1]))
    dataset = open_images(str(table), "train", replace(config, holdout=0.01))
    list(ordered_batches(dataset, range(2), 2))
    assert all("train.parquet row " in name and "(empty)" in name for name in dataset.broken.names)
    assert dataset.broken.names


# Hostile sources


def image_column(values, kind=None):
    kind = kind or pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": None, **value} if isinstance(value, dict) else value for value in values], kind)


def label_error(folder: Path, labels: pa.Array, name: str = "label") -> str:
    images = image_column([{"bytes": b"x", "path": None}] * len(labels))
    path = folder / "train.parquet"
    pq.write_table(pa.table({"image": images, name: labels}), path)
    with pytest.raises(UserError) as caught:
        open_images(str(path), "train", SMALL)
    assert str(path) in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("double", [0.0, 1.0, 2.0]),
        ("bool", [True, False, True]),
        ("date32[day]", [datetime.date(2020, 1, day) for day in (1, 2, 3)]),
        ("decimal128(2, 1)", [decimal.Decimal("1.0")] * 3),
        ("list<element: int64>", [[1], [2], [1, 2]]),
    ],
)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_a_label_of_another_type_is_refused(tmp_path, kind, values, name):
    assert kind in label_error(tmp_path, pa.array(values), name)


@pytest.mark.parametrize("value", [10**9, 2**16, -2, 2**63])
def test_a_number_that_is_no_class_is_refused(tmp_path, value):
    kind = pa.uint64() if value > 0 else pa.int64()
    assert str(value) in label_error(tmp_path, pa.array([0, 1, value], kind))


def test_a_caption_is_no_label(tmp_path):
    assert "5000" in label_error(tmp_path, pa.array(["a", "b", "c" * 5000]))


def test_integers_and_text_of_any_width_are_labels(tmp_path, rows):
    images = image_column([{"bytes": data, "path": None} for data in rows[0][:4]])
    labels = [2, None, -1, 1]
    text = pa.array(["c", None, "", "b"])
    columns = [pa.array(labels, kind) for kind in (pa.int8(), pa.int32(), pa.int64())]
    columns += [pa.array([2, None, None, 1], kind) for kind in (pa.uint8(), pa.uint64())]
    columns += [text, text.cast(pa.large_string()), text.dictionary_encode(), columns[0].dictionary_encode()]
    for column in columns:
        pq.write_table(pa.table({"image": images, "label": column}), tmp_path / "all.parquet")
        found = sources.find_splits(str(tmp_path / "all.parquet"))["all"].raw_labels
        assert found is not None and found.tolist() in ([2, -1, -1, 1], ["c", "", "", "b"]), column.type
    pq.write_table(pa.table({"image": images, "label": pa.nulls(4)}), tmp_path / "all.parquet")
    assert sources.find_splits(str(tmp_path / "all.parquet"))["all"].raw_labels is None


def test_paths_in_a_table_stay_in_its_folder(rows, tmp_path):
    inside, outside = tmp_path / "data", tmp_path / "secret.png"
    write_files(["images/0.png"], rows[0], inside)
    outside.write_bytes(rows[0][1])
    (inside / "link.png").symlink_to(outside)
    (inside / "good.png").symlink_to(inside / "images/0.png")
    os.mkfifo(inside / "fifo.png")
    paths = ["images/0.png", "good.png", str(outside), "../secret.png", "link.png", "fifo.png", "a\0b", "missing.png"]
    column = image_column([{"path": path} for path in paths])
    kind = pa.struct({"bytes": pa.binary(), "path": pa.binary()})
    odd = pa.array([{"bytes": None, "path": b"\xff.png"}, None], kind).cast(column.type, safe=False)
    pq.write_table(pa.table({"image": pa.concat_arrays([column, odd])}), inside / "all.parquet")
    config = replace(SMALL, max_broken=1.0)
    dataset = ImageDataset(sources.open_source(str(inside / "all.parquet"), "all", 0.1), config)
    kept = torch.cat([batch.indices for batch in ordered_batches(dataset, range(len(dataset)), 3)])
    assert kept.tolist() == [0, 1] and len(dataset.broken.names) == 8
    assert sum("outside" in name for name in dataset.broken.names) == 3


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.struct({"bytes": pa.large_binary(), "path": pa.string()})])
def test_tables_of_one_split_have_the_same_columns(rows, tmp_path, kind):
    write_table(tmp_path / "a.parquet", rows)
    data = rows[0][0] if pa.types.is_large_binary(kind) else {"bytes": rows[0][0], "path": None}
    other = {"image": pa.array([data] * 3, kind), "label": pa.array([1, 2, 3])}
    pq.write_table(pa.table(other), tmp_path / "b.parquet")
    with pytest.raises(UserError) as caught:
        open_images(str(tmp_path), "train", SMALL)
    assert all(word in str(caught.value) for word in ("a.parquet", "b.parquet", "large_binary"))


def test_a_table_that_claims_too_many_rows_is_refused(tmp_path):
    nulls = pa.array([None] * 10**6, pa.binary())
    pq.write_table(pa.table({"image": nulls}), tmp_path / "all.parquet")
    with pytest.raises(UserError, match=r"all\.parquet.*1000000 rows"):
        open_images(str(tmp_path), "train", SMALL)


@pytest.mark.parametrize("kind", [pa.string(), pa.list_(pa.uint8()), pa.struct({"bytes": pa.string()})])
def test_images_that_are_no_bytes_are_refused(tmp_path, kind):
    values = {pa.string(): ["x"], pa.list_(pa.uint8()): [[1]]}.get(kind, [{"bytes": "x"}])
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    table = pa.table({"image": pa.array(values * 3, kind)}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    pq.write_table(table, tmp_path / "all.parquet")
    with pytest.raises(UserError, match=r"all\.parquet.*image"):
        open_images(str(tmp_path), "train", SMALL)


@pytest.mark.parametrize(
    "info",
    [[], {"features": []}, {"features": {"label": 3, "image": {"_type": ["Image"]}}}, {"features": {"label": {}}}],
)
def test_metadata_of_another_shape_is_ignored(rows, tmp_path, info):
    path = write_table(tmp_path / "all.parquet", rows)
    table = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps({"info": info})})
    pq.write_table(table, path)
    assert len(open_images(str(path), "train", SMALL)) == 57


def write_named(path: Path, rows, part: slice, names: list[str], labels: list[int]) -> None:
    """A parquet file whose features declare the names of classes."""
    write_table(path, (rows[0][part], labels))
    features = {"label": {"_type": "ClassLabel", "names": names}}
    info = json.dumps({"info": {"features": features}})
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": info}), path)


def test_splits_may_name_their_classes_in_another_order(rows, tmp_path):
    write_named(tmp_path / "train.parquet", rows, slice(0, 4), ["bag", "coat", "hat"], [0, 1, 2, 1])
    write_named(tmp_path / "val.parquet", rows, slice(4, 8), ["hat", "bag", "coat"], [0, 1, 2, -1])
    for split, labels in ("train", [0, 1, 2, 1]), ("heldout", [2, 0, 1, -1]):
        found = open_images(str(tmp_path), split, SMALL)
        assert found.class_names == ["bag", "coat", "hat"] and found.labels.tolist() == labels


@pytest.mark.parametrize("names", [["bag", "scarf", "hat"], ["bag", "coat"], ["bag", "coat", "hat", "scarf"]])
def test_splits_with_other_names_of_classes_are_refused(rows, tmp_path, names):
    write_named(tmp_path / "train.parquet", rows, slice(0, 4), ["bag", "coat", "hat"], [0, 1, 2, 1])
    write_named(tmp_path / "test.parquet", rows, slice(4, 6), names, [0, 1])
    with pytest.raises(UserError, match=r"--data.* train .*test .*(coat and scarf|3 and [24])"):
        open_images(str(tmp_path), "train", SMALL)


def test_a_table_of_no_split_beside_others_is_refused(rows, tmp_path):
    for name in ("train-0", "extra", "test-0"):
        write_table(tmp_path / f"{name}.parquet", (rows[0][:4], [0, 1, 0, 1]))
        if name == "extra":
            with pytest.raises(UserError, match=r"--data: .*extra\.parquet.*train-0"):
                open_images(str(tmp_path), "train", SMALL)
    with pytest.raises(UserError, match=r"--data: .*extra\.parquet.*t-0\.parquet"):
        open_images(str(tmp_path), "train", SMALL)
    (tmp_path / "extra.parquet").unlink()
    assert len(open_images(str(tmp_path), "test", SMALL)) == 4


def test_paths_in_a_table_begin_in_its_own_folder(rows, tmp_path):
    """And lead no further up; a file that is not there is looked for below the data."""
    write_files(["a.png", "train/images/a.png", "test/b.png"], [b"x", *rows[0][:2]], tmp_path)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    train = ["images/a.png", "../a.png", "../test/b.png", "test/b.png", "none.png"]
    for split, paths in ("train", train), ("test", ["b.png"]):
        images = pa.array([{"bytes": None, "path": path} for path in paths], kind)
        pq.write_table(pa.table({"image": images}), tmp_path / split / "0.parquet")
    test = open_images(str(tmp_path), "test", SMALL)
    assert torch.equal(test[0].image, fit(decode(rows[0][1], 1), (16, 16), "crop"))
    items = sources.find_splits(str(tmp_path))["train"].items
    assert items.read(0) == rows[0][0] and items.read(3) == rows[0][1]
    for item in (1, 2):
        with pytest.raises(OSError, match="outside"):
            items.read(item)
    with pytest.raises(FileNotFoundError):
        items.read(4)


def test_class_names_must_be_text(rows, tmp_path):
    path = write_table(tmp_path / "all.parquet", rows)
    features = {"label": {"_type": "ClassLabel", "names": [1, 2]}}
    info = json.dumps({"info": {"features": features}})
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": info}), path)
    with pytest.raises(UserError, match=r"all\.parquet.*label"):
        open_images(str(path), "train", SMALL)


@pytest.mark.parametrize("count", [2, 3, 20])
def test_what_only_the_first_image_takes_is_not_counted_for_all(rows, tmp_path, monkeypatch, count):
    """As the import of what decodes, which takes seconds: a plan would have no time left for a step."""
    write_files([f"{i:03}.png" for i in range(count)], rows[0], tmp_path)
    dataset = open_images(str(tmp_path), "train", ImageConfig(holdout=1e-9))
    clock, decode = [0.0], dataset._decode

    def decoded(*arguments):
        clock[0] += 100.0 if not clock[0] else 1.0
        return decode(*arguments)

    monkeypatch.setattr(dataset, "_decode", decoded)
    monkeypatch.setattr("vqgen.tokenizer.data.dataset.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert dataset.first_read() == (1.0 if count > 2 else 0.0)


@pytest.fixture
def saved(rows, tmp_path) -> Path:
    """A `save_to_disk` folder."""
    import datasets

    features = datasets.Features(image=datasets.Image())
    images = [{"bytes": data, "path": None} for data in rows[0][:6]]
    datasets.Dataset.from_dict({"image": images}, features=features).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "change",
    [
        {"_data_files": [{"filename": "../other.arrow"}]},
        {"_data_files": [{"filename": "/etc/passwd"}]},
        {"_data_files": [{"filename": 3}]},
        {"_data_files": 3},
        {"_data_files": []},
        {"_split": 7},
        {"_format_type": "nothing"},
        {"_format_columns": ["missing"]},
    ],
)
def test_a_saved_folder_with_a_wrong_state_is_one_line(saved, change):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | change))
    shutil.copy(saved / "data-00000-of-00001.arrow", saved.parent / "other.arrow")
    with pytest.raises(UserError) as caught:
        open_images(str(saved), "train", SMALL)
        if "_split" in change:
            raise UserError(str(saved))  # the name of a split means nothing here
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_a_saved_folder_stays_in_itself(saved, rows):
    data = next(saved.glob("*.arrow"))
    data.rename(saved.parent / "outside.arrow")
    data.symlink_to(saved.parent / "outside.arrow")
    with pytest.raises(UserError, match="outside"):
        open_images(str(saved), "train", SMALL)
    (saved / "dataset_dict.json").write_text(json.dumps({"splits": ["../other"]}))
    with pytest.raises(UserError, match="other"):
        open_images(str(saved), "train", SMALL)


def test_damaged_offsets_of_a_saved_folder_do_not_reach_memory(saved):
    """Arrow trusts the offsets of a memory-mapped file, which a damaged one sends anywhere."""
    path = next(saved.glob("*.arrow"))
    data = bytearray(path.read_bytes())
    first = len(open_images(str(saved), "train", SMALL).source.items.read(0))
    at = data.index(struct.pack("<ii", 0, first))
    data[at + 4 : at + 8] = struct.pack("<i", 2**30)
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read"):
        open_images(str(saved), "train", SMALL)[0]


@pytest.mark.parametrize("name", ["x" * 300, "fifo", "loop", "~nobody/such", "fifo.parquet", "tables"])
def test_what_is_no_source_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    os.mkfifo("fifo.parquet")
    Path("loop").symlink_to("loop")
    Path("tables").mkdir()
    Path("tables/train.parquet").symlink_to("nowhere")
    for data in (name, str(tmp_path / name)):
        if data == "x" * 300:
            continue  # the name of a dataset
        with pytest.raises(UserError):
            open_images(data, "train", SMALL)


def test_odd_files_in_a_folder_are_broken_images(rows, tmp_path, monkeypatch):
    folder = flat(rows, tmp_path / "images", 6)
    os.mkfifo(folder / "fifo.png")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "cycle.png").symlink_to("cycle.png")
    monkeypatch.chdir(folder)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    config = replace(SMALL, max_broken=1.0)
    dataset = ImageDataset(sources.open_source(str(folder), "all", 0.1), config)
    assert len(dataset) == 10
    assert sum(len(batch.indices) for batch in ordered_batches(dataset, range(10), 4)) == 6
    assert len(dataset.broken.names) == 4


def test_names_that_are_not_utf8_are_classes(rows, tmp_path):
    root = os.fsencode(tmp_path)
    for place, name in enumerate([b"\xff", b"line\nbreak", "ä".encode()]):
        os.mkdir(root + b"/" + name)
        for i in range(3):
            with open(root + b"/" + name + b"/\xfe%d.png" % i, "wb") as file:
                file.write(rows[0][3 * place + i])
    dataset = open_images(str(tmp_path), "train", SMALL)
    assert dataset.class_names == ["line\\nbreak", "ä", "\\udcff"] and dataset[0].image.shape == (1, 16, 16)


def test_errors_and_death_of_a_worker_are_one_line(rows, tmp_path):
    path = write_table(tmp_path / "all.parquet", (rows[0] * 10, rows[1] * 10))
    config = replace(SMALL, workers=1, cache_mb=0)
    dataset = open_images(str(path), "train", config)
    handler, before = signal.getsignal(signal.SIGCHLD), {child.pid for child in multiprocessing.active_children()}
    path.rename(tmp_path / "away")
    with pytest.raises(UserError) as caught:
        next(ordered_batches(dataset, range(4), 1))
    assert "all.parquet" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "away").rename(path)
    batches = ordered_batches(dataset, range(len(dataset)), 1)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler, "torch's would raise in the middle of a step"
    (worker,) = (child.pid for child in multiprocessing.active_children() if child.pid not in before)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="--workers"):
        list(batches)
