"""Streams of tar and parquet shards: which files, what they hold, splits, order, resuming, damage, the network."""

import os
import signal
import tarfile
import threading
import time
import weakref
from base64 import b64encode
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.streams import garments, sample, serving, write_parquets, write_tar, write_tars
from processes import TOKENIZER, at_row, rows, run, run_together, weights

from vqgen.errors import UserError
from vqgen.tokenizer.data.dataset import ordered_batches
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.data.loader import prefetch
from vqgen.tokenizer.data.options import ImageConfig, is_stream
from vqgen.tokenizer.data.sources import find_splits
from vqgen.tokenizer.streams import tar as tar_module
from vqgen.tokenizer.streams import transport
from vqgen.tokenizer.streams.dataset import Position, StreamImages, open_stream
from vqgen.tokenizer.streams.heldout import read_heldout
from vqgen.tokenizer.streams.records import Record
from vqgen.tokenizer.streams.shards import open_shards, sizes_of
from vqgen.tokenizer.train import main

CONFIG = ImageConfig(size=[16, 16], channels=1, holdout=0.2)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 files of 25 garments."""
    return write_tars(tmp_path_factory.mktemp("tars"), 4, 25)


@pytest.fixture(scope="module")
def parquets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquets(tmp_path_factory.mktemp("parquets"), 4, 25)


def records(data: str | Path, text: str | None = None) -> list[Record]:
    """Those of all splits."""
    found = [open_shards(str(data), 0.2, text)["train"]]
    return [record for each in found for record in each.read_all(each.files)]


def error(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- which files ----


def test_what_is_a_stream() -> None:
    streams = ["a.tar", "s/*.tar", "s/{00..10}.tar", "http://h/a.parquet", "s3://b/*.tar", "stream:name", "p/*.parquet"]
    assert all(map(is_stream, streams))
    assert not any(map(is_stream, ["demo", "folder", "a.parquet", "org/name", "tar", "a.tar.d"]))


def test_patterns_folders_and_braces_name_files(tars: Path, parquets: Path) -> None:
    def names(data: str) -> list[str]:
        return open_shards(data, 0.2)["train"].names

    every = [f"shard-000{n}.tar" for n in range(4)]
    assert names(f"{tars}/shard-*.tar") == names(f"stream:{tars}") == names(f"{tars}/shard-{{0000..0003}}.tar") == every
    assert names(f"{tars}/shard-000{{1,3}}.tar") == [every[1], every[3]]
    assert names("http://host/a/{x,y}-{08..10}.tar?key=1") == [f"{w}-{n}.tar" for w in "xy" for n in ("08", "09", "10")]
    assert names(f"stream:{parquets}/part-0000.parquet") == ["part-0000.parquet"]
    for data in (f"{tars}/none-*.tar", "stream:./none", f"{tars}/{{0..999999999}}.tar", f"{tars}/{{9..1}}.tar"):
        assert "--data" in error(lambda data=data: open_shards(data, 0.2))
    assert "notes.txt" in error(lambda: open_shards("http://host/notes.txt", 0.2))
    assert "nosuch" in error(lambda: open_shards("nosuch://host/*.tar", 0.2))


def test_splits_by_name(tmp_path: Path) -> None:
    for stem in ("train", "val", "test"):
        write_tars(tmp_path, 2, 3, stem)
    found = open_shards(f"{tmp_path}/*.tar", 0.2)
    assert {split: shards.names for split, shards in found.items()} == {
        "train": ["train-0000.tar", "train-0001.tar"],
        "heldout": ["val-0000.tar", "val-0001.tar"],
        "test": ["test-0000.tar", "test-0001.tar"],
    }
    assert all(len(list(shards.read(shards.files))) == 6 for shards in found.values())


@pytest.mark.parametrize("data", ["a.tar.gz", "s/*.tgz", "stream:s/a-{0..3}.tar.zst", "https://host/a.TAR.GZ?token=1"])
def test_compressed_tars_are_refused(data: str) -> None:
    assert is_stream(data) and "compressed" in error(lambda: open_shards(data, 0.2))


def test_a_missing_file_of_a_range_is_named(tars: Path, tmp_path: Path) -> None:
    assert "shard-0004.tar" in error(lambda: open_shards(f"{tars}/shard-{{0002..0005}}.tar", 0.2))
    write_tars(tmp_path, 1, 3)
    (tmp_path / "shard-0001.tar").mkdir()
    assert "shard-0001.tar" in error(lambda: open_shards(f"{tmp_path}/shard-{{0000..0001}}.tar", 0.2))
    (tmp_path / "shard-0001.tar").rmdir()
    assert len(open_shards(f"{tmp_path}/{{shard,none}}-*.tar", 0.2)["train"].files) == 1, "patterns are looked up"


def test_urls_that_differ_in_host_or_query_are_all_read() -> None:
    for data in (
        "http://{one,two}.host/a.tar",
        "http://host/a.tar?part={1,2}",
        "s3://{x,y}/a/{0..1}.tar",
        "{http,s3}://h/a.tar",
    ):
        found = open_shards(data, 0.2)["train"]
        count = 4 if ".." in data else 2
        assert len(set(found.files)) == len(set(found.names)) == count
    secret = open_shards("http://host/{0..1}.tar?token=secret", 0.2)["train"]
    assert secret.names == ["0.tar", "1.tar"] and secret.mark == open_shards("http://b/{0..1}.tar", 0.2)["train"].mark


@pytest.mark.parametrize("url", ["http://[::1/shard-0000.tar", "http://host:port/a.tar", "http://host:99999/a.tar"])
def test_a_url_that_is_none_is_one_line(url: str) -> None:
    assert url in error(lambda: open_shards(url, 0.2))


def test_files_of_no_split_beside_others_are_named(tmp_path: Path) -> None:
    write_tars(tmp_path, 1, 3, "train")
    write_tars(tmp_path, 1, 3, "more")
    assert "more-0000.tar" in error(lambda: open_shards(f"stream:{tmp_path}", 0.2))
    assert open_shards(f"{tmp_path}/train-*.tar", 0.2)["train"].names == ["train-0000.tar"]


def test_a_dataset_of_the_hub_is_its_files(parquets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    files = sorted(map(str, parquets.iterdir()))
    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": files[:3], "test": files[3:]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: {"org/name": builder}[name])
    found = open_shards("stream:org/name", 0.2)
    assert [len(each.files) for each in found.values()] == [3, 3, 1]
    assert "org/other" in error(lambda: open_shards("stream:org/other", 0.2))


# ---- what they hold ----


@pytest.mark.parametrize("kind", ["tars", "parquets"])
def test_images_labels_and_captions(kind: str, request: pytest.FixtureRequest) -> None:
    found = records(f"stream:{request.getfixturevalue(kind)}", "txt" if kind == "tars" else "text")
    assert [record.caption for record in found] == [f"{number:05d}" for number in range(100)]
    for number, (record, row) in enumerate(zip(found, garments(100))):
        assert record.label == row["label"] and not record.problem
        exact = kind == "parquets" or number % 3
        difference = decode(record.data, 1).int() - decode(row["image"], 1).int()
        assert record.data == row["image"] if exact else difference.abs().float().mean() < 5


def test_the_split_depends_on_the_key_alone(tars: Path, parquets: Path, tmp_path: Path) -> None:
    for data in (f"stream:{tars}", f"stream:{parquets}"):
        splits = open_shards(data, 0.2)
        keys = {split: [record.key for record in each.read(each.files)] for split, each in splits.items()}
        assert set(keys["train"]).isdisjoint(keys["heldout"]) and len(keys["train"] + keys["heldout"]) == 100
        assert 8 <= len(keys["heldout"]) <= 35
    more = write_tar(tmp_path / "a" / "b-00.tar", [m for n in range(100) for m in sample(f"{n:05d}", garments(1)[0])])
    held = open_shards(str(more), 0.2)["heldout"]
    first = open_shards(f"stream:{tars}", 0.2)["heldout"]
    assert [r.key for r in held.read(held.files)] == [r.key for r in first.read(first.files)]
    table = pa.table({"image": [row["image"] for row in garments(9)], "__key__": [f"{n:05d}" for n in range(9)]})
    pq.write_table(table, tmp_path / "keys.parquet")
    assert [record.key for record in records(f"stream:{tmp_path}/keys.parquet")] == [f"{n:05d}" for n in range(9)]


# ---- training: order, processes, resuming, memory ----


def stream(data: Path, config: ImageConfig = CONFIG) -> StreamImages:
    return StreamImages(open_shards(f"stream:{data}", config.holdout)["train"], config, True, True)


def take(images: StreamImages, count: int, size: int = 4, rank: int = 0, world: int = 1, buffer: int = 15) -> list[Any]:
    """The bytes of batches, each with the position behind it."""
    batches = images.batches(size, 1, rank, world, buffer)
    return [
        (batch.images.numpy().tobytes(), batch.labels.tolist(), images.position) for batch in islice(batches, count)
    ]


def seen(images: StreamImages, count: int, epochs: list[int] | None = None, **settings: Any) -> list[str]:
    """Keys of the records in the first batches of one image each; `epochs` gets theirs."""
    keys = list[str]()
    view = images._view
    images._view = lambda record, seed: (keys.append(record.key), view(record, seed))[1]  # type: ignore[method-assign]
    found = take(images, count, 1, **settings)
    if epochs is not None:
        epochs += [place.epoch for *_, place in found]
    return keys


@pytest.mark.parametrize("kind", ["tars", "parquets"])
def test_an_epoch_is_every_training_image_once(kind: str, request: pytest.FixtureRequest) -> None:
    images = stream(request.getfixturevalue(kind))
    expected = [record.key for record in images.shards.read(images.shards.files)]
    keys = seen(images, 2 * len(expected))
    first, second = keys[: len(expected)], keys[len(expected) :]
    assert sorted(first) == sorted(second) == sorted(expected)
    assert len({tuple(first), tuple(second), tuple(expected)}) == 3, "each epoch has its own order"


def test_processes_share_the_images(tars: Path) -> None:
    images = stream(tars)
    expected = sorted(record.key for record in images.shards.read(images.shards.files))
    for world in (2, 3, 6):  # 6 processes share 4 files by images
        found = list[str]()
        for rank in range(world):
            one, epochs = stream(tars), list[int]()
            keys = seen(one, 60, rank=rank, world=world, epochs=epochs)
            found += [key for key, epoch in zip(keys, epochs) if epoch == 0]
        assert sorted(found) == expected


@pytest.mark.parametrize("kind", ["tars", "parquets"])
def test_it_resumes_at_every_position(kind: str, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(kind)
    config = ImageConfig(size=[16, 16], channels=1, holdout=0.2, flip=True, random_crop=0.3, random_shift=2)
    reference = take(stream(data, config), 45)  # two epochs and more
    assert {place.epoch for *_, place in reference} == {0, 1, 2}
    assert len({images for images, *_ in reference}) == 45
    for done in (1, 3, 4, 7, 19, 20, 21, 33):
        again = stream(data, config)
        first = stream(data, config)
        first.position = reference[done - 1][2]
        assert again.resume([first.place()], 0, 1) == []
        assert take(again, 45 - done) == reference[done:]


def test_other_processes_or_files_begin_a_new_epoch(tars: Path, tmp_path: Path) -> None:
    images = stream(tars)
    take(images, 3)
    for saved, data in (([images.place()] * 2, tars), ([images.place()], write_tars(tmp_path, 3, 25))):
        other = stream(data)
        assert len(other.resume(saved, 0, 1)) == 1 and other.position == Position(1)
        assert len(take(other, 2)) == 2


def test_workers_change_nothing(tars: Path) -> None:
    config = ImageConfig(size=[16, 16], channels=1, holdout=0.2, flip=True, workers=1)
    one, none = stream(tars, config), stream(tars, ImageConfig(size=[16, 16], channels=1, holdout=0.2, flip=True))
    assert take(one, 30) == take(none, 30)


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 images, those of two blocks and of one that is being read are alive at most."""
    images, most, alive = stream(write_tars(tmp_path, 3, 200)), 0, weakref.WeakSet[Record]()
    made = tar_module._record
    monkeypatch.setattr(tar_module, "_record", lambda *words: (record := made(*words), alive.add(record))[0])
    monkeypatch.setattr(Record, "__hash__", object.__hash__)
    for batch in islice(images.batches(4, 0, 0, 1, 20), 200):
        most = max(most, len(alive))
        assert len(batch.images) == 4
    assert 40 <= most <= 80
    monkeypatch.setattr("vqgen.tokenizer.streams.dataset.BLOCK_BYTES", 1)  # one image is enough
    assert take(images, 1, buffer=100)[0][2].taken == 1


def test_heldout_images_are_fixed_and_few(tars: Path) -> None:
    train, heldout = open_stream(f"stream:{tars}", CONFIG, 8)
    names = [heldout.source.item_name(i) for i in range(len(heldout))]
    assert len(names) == 8 and len({name.split(":")[0] for name in names}) == 4, "of several files"
    again = read_heldout(open_shards(f"stream:{tars}", 0.2)["heldout"], CONFIG, 8)
    assert torch.equal(heldout[3].image, again[3].image)
    keys = {record.name for record in train.shards.read(train.shards.files)}
    assert keys.isdisjoint(names)
    assert "--holdout" in error(lambda: open_stream(f"stream:{tars}", ImageConfig(holdout=1e-9), 8))


def test_files_that_hold_more_fill_up_the_heldout_images(tmp_path: Path) -> None:
    """Of files of 2, 9, 3 and 12 images."""
    rows, sizes = garments(26), (2, 9, 3, 12)
    for file, size in enumerate(sizes):
        members = [member for n in range(size) for member in sample(f"{file}{n:02d}", rows[n])]
        write_tar(tmp_path / f"val-{file}.tar", members)
    write_tars(tmp_path, 1, 3, "train")
    shards = open_shards(f"{tmp_path}/*.tar", 0.2)["heldout"]

    def taken(count: int) -> list[str]:
        dataset = read_heldout(shards, CONFIG, count)
        return [dataset.source.item_name(index) for index in range(len(dataset))]

    assert [len(set(taken(count))) for count in (1, 8, 16, 20, 25, 26, 40)] == [1, 8, 16, 20, 25, 26, 26]
    few, more = taken(16), taken(20)
    assert few == taken(16) and {name.split(":")[0] for name in few} == {name.split(":")[0] for name in more}
    assert all(sum(f"val-{file}.tar" in name for name in few) >= min(size, 4) for file, size in enumerate(sizes))


# ---- damage ----


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def test_members_that_are_no_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tar_module, "MAX_IMAGE", 2000)
    good = garments(1)[0]
    members = [
        (header("folder", tarfile.DIRTYPE), b""),
        *sample("folder/a", good),
        (header("b.png", tarfile.SYMTYPE, link="/etc/passwd"), b""),
        ("c.png", bytes(3000)),
        (header("d.png", tarfile.CHRTYPE), b""),
        ("e.txt", b"alone"),
        (".hidden.png", b"x"),
        ("../../outside.png", good["image"]),
        ("f.v2.png", good["image"]),
    ]
    write_tar(tmp_path / "in" / "a.tar", members)
    found = {record.key: record for record in records(tmp_path / "in" / "a.tar")}
    assert {key for key, record in found.items() if not record.problem} == {"folder/a", "../../outside"}
    assert {key for key, record in found.items() if record.problem} == {"b", "c", "d", "e", "f"}
    assert "3000" in found["c"].problem and "v2.png" in found["f"].problem
    assert all(not record.data for record in found.values() if record.problem)
    assert os.listdir(tmp_path) == ["in"] and os.listdir(tmp_path / "in") == ["a.tar"]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    ["joined", "zeros", "zeros at first", "truncated", "at a member", "header", "first header", "no tar", "empty"],
)
def test_a_damaged_tar_is_one_line(damage: str, tars: Path, tmp_path: Path) -> None:
    data = (tars / "shard-0000.tar").read_bytes()
    with tarfile.open(tars / "shard-0000.tar") as tar:
        place = tar.getmembers()[9].offset
    (tmp_path / "x.tar").write_bytes(
        {
            "joined": 2 * data,
            "zeros": data[:place] + bytes(2**20 + 2048),
            "zeros at first": bytes(1024) + data,
            "truncated": data[: place + 700],
            "at a member": data[:place],
            "header": flipped(data, place + 20),
            "first header": flipped(data, 20),
            "no tar": b"\xff" * 4096,
            "empty": b"",
        }[damage]
    )
    assert "x.tar" in error(lambda: records(tmp_path / "x.tar"))


@pytest.mark.parametrize("damage", ["sparse", "extended", "long names", "behind an image"])
def test_headers_that_tarfile_fails_on_are_one_line(damage: str, tmp_path: Path) -> None:
    sparse = bytearray(header("a.png", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    sparse[482] = 1  # more of it follows, but the file ends
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    kind = tarfile.GNUTYPE_LONGNAME if damage == "long names" else tarfile.XHDTYPE
    body = b"a.png" if damage == "long names" else b"14 path=a.png\n"
    nested = 1000 * (header("x", kind, len(body)).tobuf(tarfile.GNU_FORMAT) + body.ljust(512, b"\0"))
    data = bytes(sparse) if damage in ("sparse", "behind an image") else nested
    image = (write_tar(tmp_path / "whole.tar", sample("00001", garments(1)[0]))).read_bytes().rstrip(b"\0")
    before = image + bytes(-len(image) % 512) if damage == "behind an image" else b""
    (tmp_path / "x.tar").write_bytes(before + data)
    assert "x.tar" in error(lambda: records(tmp_path / "x.tar"))


@pytest.mark.parametrize("column", ["cls", "jpg", "png"])
def test_a_text_column_that_is_no_caption_is_refused(column: str, tars: Path) -> None:
    assert f"--text-column: found {column}" in error(lambda: records(tars / "shard-0000.tar", column))


def test_padding_of_a_tar_is_no_damage(tars: Path, tmp_path: Path) -> None:
    data = (tars / "shard-0000.tar").read_bytes()
    for count in (0, 512, 10_240, 2**19):
        (tmp_path / "x.tar").write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 512 + count))
        assert len(records(tmp_path / "x.tar")) == 25


def test_a_text_column_that_no_member_has_is_named(tars: Path) -> None:
    text = error(lambda: records(tars / "shard-0000.tar", "json"))
    assert "--text-column" in text and "shard-0000.tar" in text and "json" in text and "txt" in text


def test_labels_keys_and_captions_that_do_not_fit(tmp_path: Path) -> None:
    image = garments(1)[0]["image"]
    wrong = {
        "word": [("a.png", image), ("a.cls", b"cat")],
        "large": [("a.png", image), ("a.cls", b"65536")],
        "digits": [("a.png", image), ("a.cls", b"9" * 5000)],
        "million": [("a.png", image), ("a.cls", b"2000000000")],
        "negative": [("a.png", image), ("a.cls", b"-000000002")],
        "hidden": [("a.png", image), ("a.cls", b"-0000000000000005")],
        "twice": [("a.png", image), ("a.jpg", image)],
        "bytes": [("a.png", image), ("a.txt", b"\xff\xfe\xff")],
        "long": [("a.png", image), ("a.txt", b"x" * 20_000)],
        "header": [(header("x", tarfile.XHDTYPE, 2**21), bytes(2**21))],
    }
    for name, members in wrong.items():
        path = write_tar(tmp_path / f"{name}.tar", members)
        assert f"{name}.tar" in error(lambda path=path: records(path, "txt")), name


def test_a_parquet_file_that_does_not_fit(parquets: Path, tmp_path: Path) -> None:
    image = garments(1)[0]["image"]
    pq.write_table(pa.table({"image": [image], "label": ["cat"]}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "none.parquet")
    data = (parquets / "part-0000.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:-100])
    (tmp_path / "bad.parquet").write_bytes(data[:500] + bytes(3000) + data[3500:])
    for name in ("text", "none", "cut", "bad"):
        assert f"{name}.parquet" in error(lambda name=name: records(f"stream:{tmp_path}/{name}.parquet")), name
    row = {"bytes": None, "path": "/etc/passwd"}
    pq.write_table(pa.table({"image": [{"bytes": image, "path": ""}, row]}), tmp_path / "path.parquet")
    assert [bool(record.problem) for record in records(f"stream:{tmp_path}/path.parquet")] == [False, True]


def test_a_caption_that_does_not_fit_is_named_by_its_row_in_the_file(tmp_path: Path) -> None:
    rows = garments(70)
    texts = ["short"] * 66 + ["x" * 20_000] + ["short"] * 3
    table = {"image": [row["image"] for row in rows], "text": texts}
    pq.write_table(pa.table(table), tmp_path / "long.parquet")
    assert "long.parquet row 66 " in error(lambda: records(f"stream:{tmp_path}/long.parquet", "text"))


@pytest.mark.parametrize("names", [["b", "a"], ["a", "b", "c"], None])
def test_shards_with_other_names_of_classes_are_refused(names: list[str] | None, tmp_path: Path) -> None:
    import datasets

    def write(name: str, names: list[str] | None) -> None:
        label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        features = datasets.Features({"image": datasets.Image(), "label": label})
        rows = {"image": [row["image"] for row in garments(2)], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / name)

    write("part-0.parquet", ["a", "b"])
    write("part-1.parquet", names)
    assert "part-1.parquet" in error(lambda: records(f"stream:{tmp_path}"))
    (tmp_path / "part-0.parquet").rename(tmp_path / "train.parquet")
    (tmp_path / "part-1.parquet").rename(tmp_path / "val.parquet")
    held = open_shards(f"stream:{tmp_path}", 0.2)["heldout"]
    assert "val.parquet" in error(lambda: list(held.read(held.files)))


def test_broken_images_are_replaced_counted_and_limited(tmp_path: Path) -> None:
    good = garments(60)
    members = [m for n, row in enumerate(good) for m in sample(f"{n:03d}", row if n % 20 else {**row, "image": b"no"})]
    write_tar(tmp_path / "a.tar", members)
    images, told = stream(tmp_path), list[str]()
    images.broken.report = told.append
    assert all(len(labels) == 4 for _, labels, _ in take(images, 40))
    assert 1 <= images.broken.count <= 3 and len(told) == images.broken.count and "a.tar" in told[0]
    strict = stream(tmp_path, ImageConfig(size=[16, 16], channels=1, holdout=0.2, max_broken=0))
    assert "--max-broken" in error(lambda: take(strict, 40))
    write_tar(tmp_path / "b" / "b.tar", [(f"{n}.png", good[n]["image"] if n % 2 else b"no") for n in range(50)])
    assert "--max-broken" in error(lambda: take(stream(tmp_path / "b"), 9))


def test_a_batch_that_ends_a_run_is_read_again(tmp_path: Path) -> None:
    """Its checkpoint is before the batch."""
    good = garments(60)
    write_tar(tmp_path / "a.tar", [(f"{n:03d}.png", row["image"] if n < 50 else b"no") for n, row in enumerate(good)])
    images, last = stream(tmp_path, ImageConfig(size=[16, 16], channels=1, holdout=0.2, max_broken=0)), [Position()]

    def read() -> None:
        for _ in islice(images.batches(4, 1, 0, 1, 15), 40):
            last.append(images.position)

    assert "--max-broken" in error(read)
    assert len(last) > 1 and images.position == last[-1]


def test_one_broken_image_of_few_that_are_held_out_ends_no_run(tmp_path: Path) -> None:
    good = garments(10)
    for name, images in ("train", good[:5]), ("val", [{**good[5], "image": b"no"}, *good[6:]]):
        write_tar(tmp_path / f"{name}.tar", [m for n, row in enumerate(images) for m in sample(f"{n:03d}", row)])
    _, heldout = open_stream(f"stream:{tmp_path}", CONFIG, 8)
    (batch,) = ordered_batches(heldout, range(len(heldout)), 8)
    assert len(heldout) == 5 and batch.indices.tolist() == [1, 2, 3, 4]


# ---- the network ----


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PAUSE", 0.01)


@pytest.mark.parametrize("kind", ["tars", "parquets"])
@pytest.mark.parametrize("ranges", [True, False])
def test_lost_connections_change_nothing(
    kind: str, ranges: bool, request: pytest.FixtureRequest, impatient: None
) -> None:
    folder = request.getfixturevalue(kind)
    ending = "shard-{0000..0003}.tar" if kind == "tars" else "part-{0000..0003}.parquet"
    # Of five answers, two are cut off and one does not even begin.
    with serving(folder, drop=lambda n: {0: 1000, 2: 0, 3: 5000}.get(n % 5), ranges=ranges) as server:
        found = records(f"{server.url}/{ending}?token=secret")
        assert sum(each.startswith("GET") for each in server.requests) > 4
    local = records(f"stream:{folder}")
    assert [(r.key, r.data, r.label) for r in found] == [(r.key, r.data, r.label) for r in local]
    assert not any("secret" in record.name for record in found)


def test_a_server_that_stays_away_is_one_line(tars: Path, impatient: None) -> None:
    with serving(tars, status=503) as server:
        text = error(lambda: records(f"{server.url}/shard-0000.tar"))
        assert f"{server.url}/shard-0000.tar" in text and str(transport.TRIES) in text
    assert "shard-0000.tar" in error(lambda: records(f"{server.url}/shard-0000.tar")), "nothing listens there any more"


def test_a_missing_file_is_not_asked_for_again(tars: Path, impatient: None) -> None:
    with serving(tars) as server:
        assert "none.tar" in error(lambda: records(f"{server.url}/none.tar"))
        assert len(server.requests) <= 3


def test_pauses_double(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.setattr("time.sleep", slept.append)
    with serving(tars, status=500) as server:
        error(lambda: records(f"{server.url}/shard-0000.tar"))
    assert [pause for pause in slept if pause >= 0.5] == [1, 2, 4, 8, 16]


def test_nobody_waits_for_tries_after_an_interrupt(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PAUSE", 60.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def interrupted(wait: Callable[[], object]) -> None:
        """`wait`, interrupted a moment after the server was asked."""
        asked = len(server.requests)

        def interrupt() -> None:
            while len(server.requests) == asked:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            wait()
        assert time.monotonic() - begun < 20
        thread.join()

    with serving(tars, status=503) as server:
        shards = open_shards(f"{server.url}/shard-{{0000..0003}}.tar", 0.2)["train"]
        interrupted(lambda: list(prefetch(shards.read(shards.files), 1)))
        interrupted(lambda: sizes_of(shards.files))
    signal.signal(signal.SIGINT, before)


def test_secrets_in_urls_are_not_shown(tars: Path, impatient: None) -> None:
    odd = [
        f"http://user:{odd}@host/a.tar"
        for odd in ("secret/x", "x/secret", "x@secret", "{secret}", "secret#x", "secret*x")
    ]
    odd += ["http://host:port/a.tar?email=me@x.org&token=secret", "http://user:secret?x@host/a.tar"]
    odd += ["http://user:secret@host:port/a.tar", "http://user:secret/x@host/a.tar.gz"]
    with serving(tars) as server:
        url = f"{server.url}/shard-{{0000..0001}}.tar?token=secret"
        told = [
            error(lambda: open_stream(url, ImageConfig(holdout=1e-9), 8)),
            error(lambda: find_splits(url)),
            error(lambda: records(url.replace("0001", "9999999"))),
            error(lambda: records(url.replace("0001}", "0001}}.tar{"))),
            error(lambda: records(f"{server.url}/a b.tar?token=secret")),
            error(lambda: records(f"{server.url}/none.tar?token=secret")),
            error(lambda: records("http://user:secret@127.0.0.1:1/a.tar")),
            error(lambda: records("https://user:secret@127.0.0.1/a.tar")),
            *(error(lambda url=url: records(url)) for url in odd),
        ]
    assert not [text for text in told if "secret" in text]


def test_user_and_password_of_a_url_are_sent(tars: Path, impatient: None) -> None:
    expected = f"Basic {b64encode(b'bob:se@c:et').decode()}"
    with serving(tars, authorization=expected) as server, serving(tars) as other:
        host = server.url.removeprefix("http://")
        found = records(f"http://bob:se%40c:et@{host}/shard-0000.tar")
        assert len(found) == 25 and not any("bob" in record.name for record in found)
        text = error(lambda: records(f"http://bob:wrong@{host}/shard-0000.tar"))
        assert "401" in text and "wrong" not in text
        server.elsewhere = other.url
        assert len(records(f"http://bob:se%40c:et@{host}/shard-0000.tar")) == 25
        assert server.given[-1] == expected and set(other.given) == {""}, "another server does not get them"


# ---- the program ----

WORDS = (
    "--channels 1 --size 16 --flip --random-crop 0.25 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 "
    "--codebook-size 64 --code-dim 4 --revive-after 2 --lr 3e-3 --lr-warmup 3 --batch-size 8 --accumulate 2 --steps 13 "
    "--validation-images 10 --holdout 0.2 --precision fp32 --log-every 1 --validate-every 5 --checkpoint-every 4 "
    "--shuffle-buffer 15"
).split()


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(tars: Path, tmp_path: Path) -> None:
    words = ["--data", f"{tars}/shard-{{0000..0003}}.tar", *WORDS, "--output"]
    run(TOKENIZER, *words, tmp_path / "whole").ok()
    assert run(TOKENIZER, *words, tmp_path / "killed", hook=at_row(11)).code == -signal.SIGKILL
    run(TOKENIZER, *words, tmp_path / "killed").ok()
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_and_then_one(tars: Path, tmp_path: Path) -> None:
    words = ["--data", f"stream:{tars}", *WORDS, "--output", tmp_path / "run"]
    for ended in run_together(TOKENIZER, *words):
        ended.ok()
    ended = run(TOKENIZER, *words, "--steps", 16).ok()
    assert "new epoch" in ended.err and max(row["step"] for row in rows(tmp_path / "run")) == 16


def test_a_run_whose_server_stays_away_is_saved(tars: Path, tmp_path: Path, cli: Any, impatient: None) -> None:
    failing = False
    with serving(tars, drop=lambda n: 0 if failing and n > 8 else None) as server:
        words = ["--data", f"{server.url}/shard-{{0000..0003}}.tar", *WORDS, "--checkpoint-every", 1000, "--output"]
        assert cli(main, *words, tmp_path / "whole").code == 0
        server.requests.clear()
        failing = True
        ended = cli(main, *words, tmp_path / "run")
        assert ended.code == 1 and "shard-" in ended.err.splitlines()[-1] and "Traceback" not in ended.err
        (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
        failing = False
        assert cli(main, *words, tmp_path / "run").code == 0
    assert int(saved.name.partition("-")[2]) > 0 and weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_another_token_resumes_a_run(tars: Path, tmp_path: Path, cli: Any) -> None:
    with serving(tars) as server:

        def words(file: str, steps: int) -> list[Any]:
            data = ["--data", f"{server.url}/shard-{file}.tar?token=secret{steps}"]
            return [*data, *WORDS, "--steps", steps, "--output", tmp_path / "run"]

        first, second = cli(main, *words("{0000..0003}", 2)), cli(main, *words("{0000..0003}", 3))
        other = cli(main, *words("{0000..0002}", 4))
    assert first.code == second.code == 0 and max(row["step"] for row in rows(tmp_path / "run")) == 3
    assert "new epoch" not in second.err and other.code == 1 and "--data" in other.err
    assert not any("secret" in each.out + each.err for each in (first, second, other))


@pytest.mark.parametrize("option", ["--epochs 2", "--validation-images 0"])
def test_what_needs_a_number_of_images_is_refused(option: str, tars: Path, tmp_path: Path, cli: Any) -> None:
    ended = cli(main, "--data", f"stream:{tars}", *WORDS, *option.split(), "--output", tmp_path / "run")
    assert ended.code == 2 and option.split()[0] in ended.err and not (tmp_path / "run").exists()


def test_what_needs_an_index_refuses_a_stream(tars: Path) -> None:
    assert "--data" in error(lambda: find_splits(f"stream:{tars}"))


class StoreError(Exception):
    """As the libraries of object stores have of their own."""


class FailingStore(fsspec.AbstractFileSystem):
    """An object store that refuses everything."""

    def _open(self, path: str, *_: Any, **__: Any) -> Any:
        raise StoreError("no credentials")

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        raise StoreError("no credentials")


def test_errors_of_an_object_store_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    monkeypatch.setattr(transport, "pause", lambda seconds: None)
    found = r"^--data: failing://bucket/a.tar cannot be read after 6 tries in \d+ s \(StoreError: no credentials\); "
    with pytest.raises(UserError, match=found), transport.opened("failing://bucket/a.tar"):
        pass
    with pytest.raises(UserError, match=r"^--data: failing://bucket/\*.tar cannot be listed \(StoreError: no cred"):
        open_shards("stream:failing://bucket/*.tar", 0.1)


def test_a_stream_of_a_test_split_alone_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("test", "validation"):
        write_tar(tmp_path / name / f"{name}-0000.tar", sample("a", garments(1)[0]))
        with pytest.raises(UserError, match=r"has only (test|heldout) files, and none of train"):
            open_shards(f"stream:{tmp_path / name}", 0.1)
