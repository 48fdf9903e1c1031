"""vqgen-tokenize with --source and --source-data: which images are encoded beside each image, and that it is exact."""

import dataclasses
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from helpers.tokenizing import DIE, SIZE, content, environment, make_tokenizer, save_garments, words
from PIL import Image, ImageOps

from vqgen.errors import UsageError, UserError
from vqgen.files import read_json
from vqgen.tokenizer import encode
from vqgen.tokenizer.codes.degrade import degrade, parse_degradations, source_seed
from vqgen.tokenizer.codes.format import MANIFEST, CodeFiles, shard_name
from vqgen.tokenizer.codes.pairs import pair
from vqgen.tokenizer.codes.plan import PLAN
from vqgen.tokenizer.codes.reading import view_seed
from vqgen.tokenizer.codes.writer import tokenize
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig, Split
from vqgen.tokenizer.data.sources import open_source
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
Make = Callable[..., TokenizeConfig]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_garments(tmp_path_factory.mktemp("images") / "garments", 40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def make(tokenizer: Path, images: Path) -> Make:
    """A configuration; options of the image section are given by name like all others."""

    def config(output: Path, **changes: Any) -> TokenizeConfig:
        names = {field.name for field in dataclasses.fields(ImageConfig)} & set(changes)
        section = ImageConfig(**{"holdout": 0.25, **{name: changes.pop(name) for name in names}})
        options: dict[str, Any] = {"tokenizer": tokenizer, "data": str(images), "shard_size": 8, "batch_size": 5}
        options |= {"precision": "fp32", "device": "cpu", "seed": 5, **changes}
        return TokenizeConfig(output=output, images=section, **options)

    return config


RANDOM = ["downscale:2", "noise:0.05-0.4", "or", "jpeg:5-20"]
AUGMENTED: dict[str, Any] = {"views": 3, "flip": True, "random_crop": 0.25}


def batch_of(config: TokenizeConfig, data: str, split: Any, view: int, keys: list[int], seeds: list[int]) -> Any:
    """Images of one view, read past vqgen-tokenize."""
    options = dataclasses.replace(config.images, size=[SIZE, SIZE], channels=1)
    found = open_images(data, split, options, augment=True)
    return found.__getitems__(
        [(i, view_seed(config, seed, view)) if view else i for i, seed in zip(keys, seeds)]
    ).images


def agreement(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one == other).float().mean())


@pytest.fixture(scope="module")
def degraded(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("degraded") / "codes"
    tokenize(make(folder, source=RANDOM, **AUGMENTED))
    return folder


def test_source_codes_are_those_of_the_degraded_view(make: Make, degraded: Path, tokenizer: Path, images: Path) -> None:
    model = Tokenizer.load(tokenizer)
    chain = parse_degradations(RANDOM)
    config = make(degraded, **AUGMENTED)
    for split in ("train", "heldout"):
        files = CodeFiles(degraded, split)
        files.verify()
        assert (len(files), files.views) == ((30, 3) if split == "train" else (10, 1))
        for view in range(files.views):
            indices = list(range(len(files)))
            plain = batch_of(config, str(images), split, view, indices, indices)
            worse = degrade(plain, chain, [source_seed(config.seed, i, view) for i in indices])
            assert agreement(files.gather(indices, [view] * len(files)), model.encode(plain)) > 0.999
            assert agreement(files.gather_source(indices, [view] * len(files)), model.encode(worse)) > 0.999
            assert agreement(model.encode(plain), model.encode(worse)) < 0.9
    record = CodeFiles(degraded, "train").source
    assert record is not None and record.degradations == RANDOM
    assert record.kind == "degraded" and record.data_fingerprint == files.data_fingerprint and record.grid == [8, 8]


def test_the_codes_of_the_images_are_those_without_a_source(make: Make, degraded: Path, tmp_path: Path) -> None:
    tokenize(make(tmp_path / "plain", **AUGMENTED))
    for split in ("train", "heldout"):
        one, other = CodeFiles(degraded, split), CodeFiles(tmp_path / "plain", split)
        for view in range(one.views):
            rows = range(len(one)), [view] * len(one)
            assert torch.equal(one.gather(*rows), other.gather(*rows))
    plan = read_json(tmp_path / "plain" / PLAN)
    assert not {"source", "source_data", "pair_by", "unpaired"} & plan.keys()  # as earlier versions wrote it
    assert not {"source", "captions"} & read_json(tmp_path / "plain" / MANIFEST).keys()


def test_killed_and_resumed_by_two_processes_it_has_the_same_bytes(make: Make, degraded: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "codes", source=RANDOM, **AUGMENTED)
    for name in (shard_name(2), MANIFEST):
        command = [sys.executable, "-c", DIE, name, "SIGKILL", *words(config)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == -signal.SIGKILL, result.stderr
        if name != MANIFEST:
            (tmp_path / "codes" / shard_name(0)).unlink()
    tokenize(config)
    assert content(config.output) == content(degraded)


def test_each_process_degrades_its_own_shards(
    make: Make, degraded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second of two processes writes is what one alone writes."""
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    monkeypatch.setitem(PartialState._shared_state, "process_index", 1)
    with pytest.raises(UserError, match=r"codes-00000\.safetensors does not exist"):  # nobody writes the even ones
        tokenize(make(tmp_path / "codes", source=RANDOM, **AUGMENTED))
    written = {name: data for name, data in content(tmp_path / "codes").items() if name.startswith("codes-")}
    assert sorted(written) == [shard_name(number) for number in (1, 3, 5)]
    assert written.items() <= content(degraded).items()


@pytest.mark.parametrize(
    "change", [{"source": None}, {"source": ["noise:0.05-0.4"]}, {"source": ["downscale:2", "noise:0.05-0.3"]}]
)
def test_a_folder_begun_with_another_source_is_refused(
    make: Make, degraded: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    (folder := tmp_path / "codes").mkdir()
    for name in (PLAN, shard_name(0)):
        shutil.copy(degraded / name, folder / name)
    with pytest.raises(UserError, match=r"--source \[.*--overwrite"):
        tokenize(make(folder, **AUGMENTED, **change))


def test_random_sources_make_views_of_images_that_are_not_augmented(make: Make, tmp_path: Path) -> None:
    tokenize(make(tmp_path / "codes", views=3, source=["noise:0.1"]))
    files = CodeFiles(tmp_path / "codes", "train")
    views = [files.gather(range(30), [view] * 30) for view in range(3)]
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])
    sources = [files.gather_source(range(30), [view] * 30) for view in range(3)]
    assert max(agreement(sources[a], sources[b]) for a, b in ((0, 1), (0, 2), (1, 2))) < 0.9
    with pytest.raises(UsageError, match="--views"):
        make(tmp_path / "no", views=3, source=["blur:2"])


def test_grey_is_for_colour_images(make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--source grey.*1 channel"):
        tokenize(make(tmp_path / "codes", source=["grey"]))
    assert not (tmp_path / "codes").exists()
    colour = make_tokenizer(tmp_path / "tokenizer", channels=3)
    tokenize(make(tmp_path / "codes", tokenizer=colour, source=["grey"]))
    files = CodeFiles(tmp_path / "codes", "heldout")  # of garments, which are grey
    assert agreement(files.gather(range(10), [0] * 10), files.gather_source(range(10), [0] * 10)) > 0.9


# --- pairs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inverted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The garments in negative, as BMP files of the same names."""
    folder = tmp_path_factory.mktemp("inverted") / "negatives"
    for path in images.glob("*/*.png"):
        target = folder / path.parent.name / f"{path.stem}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path).convert("L")).save(target)
    return folder


def table_of(path: Path, rows: list[tuple[Path, Any]], column: str = "key", kind: Any = None) -> Path:
    """A parquet file of images with a key."""
    keys = pa.array([key for _, key in rows], kind)
    pq.write_table(pa.table({"image": pa.array([file.read_bytes() for file, _ in rows]), column: keys}), path)
    return path


def test_partners_by_name_get_the_same_flip_and_crop(
    make: Make, tokenizer: Path, images: Path, inverted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(tmp_path / "codes", source_data=str(inverted), **AUGMENTED)
    tokenize(config)
    assert "40 of 40 images have a partner" in capsys.readouterr().out
    model = Tokenizer.load(tokenizer)
    for split in ("train", "heldout"):
        files = CodeFiles(tmp_path / "codes", split)
        files.verify()
        indices = list(range(len(files)))
        for view in range(files.views):
            plain = batch_of(config, str(images), split, view, indices, indices)
            other = model.encode(255 - plain)  # but for rounding of the resized
            assert agreement(files.gather_source(indices, [view] * len(files)), other) > 0.95
            assert agreement(files.gather_source(indices, [view] * len(files)), other.flip(2)) < 0.7
    record = CodeFiles(tmp_path / "codes", "train").source
    assert record is not None and (record.kind, record.degradations) == ("paired", [])
    assert record.description == "negatives by name" and record.data_fingerprint != files.data_fingerprint
    # Resumed with other partners it is refused.
    shutil.copytree(inverted, tmp_path / "other")
    next((tmp_path / "other").glob("*/*.bmp")).unlink()
    with pytest.raises(UserError, match="--source-data"):
        tokenize(make(tmp_path / "codes", source_data=str(tmp_path / "other"), unpaired="skip", **AUGMENTED))


def test_partners_by_column_whatever_the_order_and_type(
    make: Make, tokenizer: Path, images: Path, inverted: Path, tmp_path: Path
) -> None:
    files = sorted(images.glob("*/*.png"))
    others = [inverted / path.parent.name / f"{path.stem}.bmp" for path in files]
    table_of(tmp_path / "a.parquet", [(path, str(100 + i)) for i, path in enumerate(files)])
    table_of(
        tmp_path / "b.parquet", [(path, 100 + i) for i, path in reversed(list(enumerate(others)))], kind=pa.int32()
    )
    paired = {"data": str(tmp_path / "a.parquet"), "source_data": str(tmp_path / "b.parquet"), "pair_by": "key"}
    tokenize(make(tmp_path / "codes", **paired))
    found = CodeFiles(tmp_path / "codes", "heldout")
    config = make(tmp_path, **paired)
    mine = batch_of(config, paired["data"], "heldout", 0, list(range(10)), list(range(10)))
    sources = found.gather_source(range(10), [0] * 10)
    assert agreement(found.gather(range(10), [0] * 10), Tokenizer.load(tokenizer).encode(mine)) > 0.999
    inverse = Tokenizer.load(tokenizer).encode(255 - mine)
    assert agreement(sources, inverse) > 0.95 and agreement(sources.roll(1, 0), inverse) < 0.7


def test_images_of_one_key_take_turns(
    make: Make, tokenizer: Path, inverted: Path, images: Path, tmp_path: Path
) -> None:
    """Two images with one key, and three partners: images and views take the next of them."""
    source, other = tmp_path / "a", tmp_path / "b"
    files, others = sorted(images.glob("*/*.png"))[:4], sorted(inverted.glob("*/*.bmp"))[:4]
    for folder, rows in (
        (source, [(files[0], "x"), (files[1], "x"), (files[2], "y")]),
        (other, [(others[0], "x"), (others[3], "y"), (others[1], "x"), (others[2], "x"), (others[3], None)]),
    ):
        folder.mkdir()
        table_of(folder / "train.parquet", rows)
        table_of(folder / "validation.parquet", rows[:1])
    options = {"data": str(source), "source_data": str(other), "pair_by": "key", "views": 2, "flip": True}
    tokenize(config := make(tmp_path / "codes", **options))
    found = CodeFiles(tmp_path / "codes", "train")
    # Of the partners with x in train, rows 0, 2 and 3, image 0 takes 0 and 2, image 1 2 and 3.
    for view, rows in ((0, [0, 2, 1]), (1, [2, 3, 1])):
        expected = Tokenizer.load(tokenizer).encode(batch_of(config, str(other), "train", view, rows, [0, 1, 2]))
        assert torch.equal(found.gather_source(range(3), [view] * 3), expected)


def test_partners_are_of_the_same_split_where_that_has_one(images: Path, inverted: Path, tmp_path: Path) -> None:
    """Files called alike in every split, as 1.png, are other images."""
    files, others = sorted(images.glob("*/*.png")), sorted(inverted.glob("*/*.bmp"))
    named = {"train": "1 2 3 4 5 6", "val": "1 2", "test": "1 7"}
    for folder, paths in (tmp_path / "a", files), (tmp_path / "b", others):
        numbers = iter(range(100))
        for split, names in named.items():
            (folder / split).mkdir(parents=True)
            for name in names.split():
                shutil.copy(paths[next(numbers)], folder / split / f"{name}{paths[0].suffix}")
    (tmp_path / "b" / "test" / "7.bmp").rename(tmp_path / "b" / "train" / "7.bmp")  # found there, as test has none

    def partners(data: Path, other: Path, split: Split) -> list[tuple[str, str]]:
        source = open_source(str(data), split, 0.34)
        pairs, kept = pair({split: source}, str(other), "name", "error", ImageConfig([32, 32], 1))
        places = pairs.partners(split, np.arange(len(source)), 0)
        mine = [Path(kept[split].item_name(i)) for i in range(len(source))]
        theirs = [Path(pairs.images.source.item_name(int(i))) for i in places]
        return [(f"{a.parent.name}/{a.stem}", f"{b.parent.name}/{b.stem}") for a, b in zip(mine, theirs, strict=True)]

    a, b = tmp_path / "a", tmp_path / "b"
    assert all(one == other for one, other in partners(a, b, "train") + partners(a, b, "heldout"))
    assert partners(a, b, "test") == [("test/1", "test/1"), ("test/7", "train/7")]
    shutil.rmtree(a / "val")  # now some of the training images are held out
    for split in ("train", "heldout"):
        found = partners(a, b, split)
        assert len(found) in (2, 4) and all(one == other for one, other in found)


def test_a_row_without_a_key_has_no_partner(make: Make, images: Path, tmp_path: Path) -> None:
    """Whatever the others are called."""
    files = sorted(images.glob("*/*.png"))[:4]
    for name, keys in ("a", [None, "x", "x", "x"]), ("b", ["x", "None"]):
        table_of(tmp_path / f"{name}.parquet", list(zip(files, keys)))
    data = {"data": str(tmp_path / "a.parquet"), "source_data": str(tmp_path / "b.parquet"), "pair_by": "key"}
    tokenize(make(tmp_path / "codes", **data, unpaired="skip"))
    assert sum(len(CodeFiles(tmp_path / "codes", split)) for split in ("train", "heldout")) == 3


def test_no_image_is_its_own_partner(make: Make, tokenizer: Path, images: Path, tmp_path: Path) -> None:
    """A table paired with itself: the three images with x take turns, the only one with y is left out."""
    files = sorted(images.glob("*/*.png"))[:4]
    folder = tmp_path / "a"
    folder.mkdir()
    table_of(folder / "train.parquet", list(zip(files, "xyxx")))
    table_of(folder / "validation.parquet", [(files[1], "x")])
    (tmp_path / "same").symlink_to(folder)
    options = {"data": str(folder), "pair_by": "key", "views": 2, "unpaired": "skip"}
    tokenize(config := make(tmp_path / "codes", **options, source_data=str(tmp_path / "same/train.parquet")))
    found = CodeFiles(tmp_path / "codes", "train")
    assert len(found) == 3
    model = Tokenizer.load(tokenizer)
    for view, rows in ((0, [2, 3, 0]), (1, [3, 0, 2])):
        expected = model.encode(batch_of(config, str(folder), "train", view, rows, [0, 1, 2]))
        assert torch.equal(found.gather_source(range(3), [view] * 3), expected)
    with pytest.raises(UsageError, match=r"--views: found 3, .* 2 partners"):
        tokenize(make(tmp_path / "more", **{**options, "views": 3, "source_data": str(folder / "train.parquet")}))
    heldout = CodeFiles(tmp_path / "codes", "heldout")  # of another file than its partners
    expected = model.encode(batch_of(config, str(folder), "train", 0, [0], [0]))
    assert torch.equal(heldout.gather_source([0], [0]), expected)


def test_no_image_is_its_own_partner_in_splits_of_datasets(make: Make, images: Path, tmp_path: Path) -> None:
    """Row 1 of the validation images, the first of its key, is not row 1 of the training images, the second of its."""
    files, saved = sorted(images.glob("*/*.png")), tmp_path / "saved"
    features = datasets.Features(image=datasets.Image(), key=datasets.Value("string"))
    made = {
        split: datasets.Dataset.from_dict(
            {"image": [{"bytes": file.read_bytes(), "path": None} for file in chosen], "key": list(keys)}, features
        )
        for split, keys, chosen in (("train", "aa", files[:2]), ("validation", "cbb", files[2:5]))
    }
    datasets.DatasetDict(made).save_to_disk(str(saved))
    tokenize(make(tmp_path / "codes", data=str(saved), pair_by="key", unpaired="skip", source_data=str(saved)))
    found = CodeFiles(tmp_path / "codes", "train")
    assert torch.equal(found.gather_source([0, 1], [0, 0]), found.gather([1, 0], [0, 0]))


def test_images_without_a_partner_are_counted_and_left_out(
    make: Make, images: Path, inverted: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    shutil.copytree(inverted, tmp_path / "few")
    for path in sorted((tmp_path / "few").glob("*/*.bmp"))[::8]:
        path.unlink()
    paired = make(tmp_path / "codes", source_data=str(tmp_path / "few"))
    refused = cli(encode.main, *words(paired))
    assert refused.code == 1 and len(refused.err.splitlines()) == 1
    assert "5 of 40" in refused.err and "--unpaired" in refused.err and not (tmp_path / "codes").exists()
    done = cli(encode.main, *words(dataclasses.replace(paired, unpaired="skip")))
    assert done.code == 0 and "5 are left out" in done.out
    files = [CodeFiles(tmp_path / "codes", split) for split in ("train", "heldout")]
    assert sum(map(len, files)) == 35
    kept = {(path.parent.name, path.stem) for path in (tmp_path / "few").glob("*/*.bmp")}
    for one, split in zip(files, ("train", "heldout")):
        source = open_images(str(images), split, ImageConfig(holdout=0.25)).source  # type: ignore[arg-type]
        names = [Path(source.item_name(i)) for i in range(len(source))]
        expected = [int(label) for name, label in zip(names, source.labels) if (name.parent.name, name.stem) in kept]
        assert one.labels.tolist() == expected


def test_a_broken_partner_leaves_its_image_out(
    make: Make, tokenizer: Path, images: Path, inverted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And only that: every other image keeps its own partner."""
    for name, folder in (("a", images), ("b", inverted)):
        shutil.copytree(folder, tmp_path / name)
    whole = make(tmp_path / "whole", data=str(tmp_path / "a"), source_data=str(tmp_path / "b"), **AUGMENTED)
    tokenize(whole)
    source = open_images(str(tmp_path / "a"), "train", whole.images).source
    lost = [Path(source.item_name(i)) for i in (3, 11)]
    for path in (tmp_path / "b" / lost[0].parent.name / f"{lost[0].stem}.bmp", lost[1]):
        path.write_bytes(bytes(path.stat().st_size))  # of the same size: the same data as before to the plan
    capsys.readouterr()
    damaged = dataclasses.replace(whole, output=tmp_path / "damaged")
    with pytest.raises(UserError, match="--max-broken"):
        tokenize(damaged)
    images_config = dataclasses.replace(damaged.images, max_broken=0.1)
    tokenize(dataclasses.replace(damaged, images=images_config, overwrite=True))
    told = capsys.readouterr().err
    assert told.count(f"{lost[0].stem}.bmp") >= 1 and f"{lost[1].stem}.png" in told
    before, after = CodeFiles(tmp_path / "whole", "train"), CodeFiles(tmp_path / "damaged", "train")
    rows = np.array([i for i in range(30) if i not in (3, 11)])
    assert len(after) == 28
    for view in range(3):
        for read in ("gather", "gather_source"):
            one = getattr(before, read)(rows, [view] * 28)
            assert agreement(one, getattr(after, read)(range(28), [view] * 28)) > 0.999


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"source_data": "nowhere/at/all"}, "--source-data: nowhere/at/all"),
        ({"source_data": "{table}"}, "--pair-by.* no column name.*image, key"),
        ({"source_data": "{images}", "pair_by": "key"}, "--pair-by: found key"),
        ({"data": "{table}", "source_data": "{table}", "pair_by": "image"}, "--pair-by.*binary"),
        ({"data": "{table}", "source_data": "{other}", "pair_by": "key", "unpaired": "skip"}, "40 of 40.*--pair-by"),
    ],
)
def test_pairs_that_cannot_be_made_are_one_line(
    make: Make, images: Path, tmp_path: Path, changes: dict[str, str], fact: str
) -> None:
    files = sorted(images.glob("*/*.png"))
    places = {"images": images, "table": table_of(tmp_path / "t.parquet", [(p, str(p)) for p in files])}
    places["other"] = table_of(tmp_path / "o.parquet", [(path, None) for path in files], kind=pa.string())
    given = {name: value.format(**places) for name, value in changes.items()}
    with pytest.raises(UserError, match=fact) as refused:
        tokenize(make(tmp_path / "codes", **given))
    assert "\n" not in str(refused.value) and not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--source", "grey", "--source-data", "x"], "--source"),
        (["--source", "rain"], "rain"),
        (["--pair-by", "key"], "--pair-by"),
        (["--unpaired", "skip"], "--unpaired"),
        (["--source-data", "x", "--unpaired", "maybe"], "--unpaired"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(
    tmp_path: Path, cli: Callable[..., Any], options: list[str], fact: str
) -> None:
    words = ["--tokenizer", tmp_path, "--data", "demo", "--output", tmp_path / "codes", *options]
    result = cli(encode.main, *words)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and fact in result.err
