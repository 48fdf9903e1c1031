"""Code files: the format, its reader, and vqgen-tokenize with its resuming, processes and failures."""

import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers.tokenizing import DIE, SIZE, content, environment, make_tokenizer, save_garments, words
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import TOKENIZE, run_together
from safetensors.torch import load_file

from vqgen import artifact
from vqgen.config import save, values_of
from vqgen.errors import UsageError, UserError
from vqgen.tokenizer import encode
from vqgen.tokenizer.codes import writer
from vqgen.tokenizer.codes.format import (
    MANIFEST,
    CodeFiles,
    Manifest,
    ShardEntry,
    SplitEntry,
    checksum,
    code_dtype,
    code_shape,
    open_shard,
    shard_name,
    used_codes,
    write_shard,
)
from vqgen.tokenizer.codes.reading import view_seed
from vqgen.tokenizer.codes.writer import tokenize
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.data.views import flips
from vqgen.tokenizer.encode import TokenizeConfig
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.train import TokenizerTraining

pytestmark = pytest.mark.usefixtures("one_thread")  # in every process of these tests: their bytes are compared


def write_folder(folder: Path, counts: list[int], views=1, grid=(2, 3), depth=1, size=300, seed=0) -> np.ndarray:
    """A folder of random codes with shards of `counts` images as split train; returns all codes as one array."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, size, (sum(counts), views, *code_shape(grid, depth)))
    labels = random.integers(-1, 4, sum(counts))
    shards, start = [], 0
    for number, count in enumerate(counts):
        path = folder / shard_name(number)
        write_shard(path, codes[start : start + count], labels[start : start + count], size)
        shards.append(ShardEntry(path.name, count, checksum(path)))
        start += count
    splits = {"train": SplitEntry(views, sum(counts), shards), "heldout": SplitEntry(1, 0, [])}
    names, image = ["a", "b", "c", "d"], [4 * side for side in grid]
    Manifest(size, list(grid), depth, image, 3, names, "f" * 64, "d" * 64, "fp32", "0", splits).write(folder)
    return codes


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    "size, dtype",
    [(256, np.uint8), (257, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)],
)
def test_round_trip_in_the_smallest_type(tmp_path, size, dtype, depth):
    codes = np.stack([np.full(code_shape((2, 3), depth), c) for c in (0, 1, size - 1)])[:, None]
    write_shard(tmp_path / "s.safetensors", codes, np.array([-1, 0, 2]), size)
    shard = open_shard(tmp_path / "s.safetensors", size, codes.shape[1:])
    assert shard.codes.dtype == dtype == code_dtype(size)
    assert (shard.codes == codes).all() and shard.labels.tolist() == [-1, 0, 2]
    # Any safetensors reader sees the same.
    stored = load_file(tmp_path / "s.safetensors")
    assert stored["codes"].shape == codes.shape and stored["labels"].tolist() == [-1, 0, 2]


def test_code_outside_the_codebook_is_not_written(tmp_path):
    for code in (-1, 256):
        with pytest.raises(ValueError, match="256"):
            write_shard(tmp_path / "s.safetensors", np.full((1, 1, 2, 2), code), np.zeros(1), 256)
    assert not list(tmp_path.iterdir())


@settings(max_examples=40, deadline=None)
@given(data=st.data(), counts=st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum))
def test_gather_equals_plain_indexing(tmp_path_factory, data, counts):
    views, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    size = data.draw(st.sampled_from([5, 300, 70_000]))
    folder = tmp_path_factory.mktemp("codes")
    codes = write_folder(folder, counts, views, (2, 3), depth, size)
    rows = data.draw(st.lists(st.tuples(st.integers(0, sum(counts) - 1), st.integers(0, views - 1)), max_size=20))
    image, view = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    found = CodeFiles(folder, "train").gather(image, view)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.from_numpy(codes[image, view].astype(np.int64)))


def test_gather_takes_tensors_and_refuses_what_is_not_there(tmp_path):
    codes = write_folder(tmp_path, [3, 2], views=2)
    files = CodeFiles(tmp_path, "train")
    assert (files.gather(torch.tensor([4, 0]), torch.tensor([1, 0])).numpy() == codes[[4, 0], [1, 0]]).all()
    for image, view in ((5, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            files.gather([image], [view])


def test_loaded_rows_are_what_was_asked_for(tmp_path):
    codes = write_folder(tmp_path, [3, 2], views=2)
    files = CodeFiles(tmp_path, "train")
    images, views = np.array([4, 0, 3, 0, 0]), np.array([1, 0, 0, 1, 0])
    loaded = files.load(images, views)
    places = [3, 0, 4, 4, 1, 2]
    assert len(loaded) == 5 and (loaded.gather(places, 0).numpy() == codes[images, views][places]).all()
    assert (loaded.gather_labels(places) == files.labels[images][places]).all()
    for image, view in ((5, 0), (-1, 0), (0, 1)):
        with pytest.raises(IndexError):
            loaded.gather([image], [view])


@pytest.mark.parametrize("wrong", [[True, False, True], [0.9, 1.9], np.array([0.0]), ["0"]])
def test_indices_are_integers(tmp_path, wrong):
    write_folder(tmp_path, [3, 2], views=2)
    files = CodeFiles(tmp_path, "train")
    for rows in (files, files.load([0, 1, 3], [0, 1, 0])):
        with pytest.raises(IndexError, match="integers"):
            rows.gather(wrong, 0)
        with pytest.raises(IndexError, match="integers"):
            rows.gather([0] * len(wrong), wrong)
        with pytest.raises(IndexError, match="integers"):
            rows.gather_labels(wrong)
        assert rows.gather([], []).shape == (0, 2, 3)
    with pytest.raises(IndexError, match="integers"):
        files.load(wrong, [0] * len(wrong))


def test_properties_and_empty_split(tmp_path):
    write_folder(tmp_path, [3, 2], views=2, depth=2)
    files = CodeFiles(tmp_path, "train")
    assert (len(files), files.views, files.grid, files.depth, files.codebook_size) == (5, 2, (2, 3), 2, 300)
    assert (files.image_size, files.channels, files.class_names) == ((8, 12), 3, ["a", "b", "c", "d"])
    assert (files.tokenizer_fingerprint, files.data_fingerprint) == ("f" * 64, "d" * 64)
    assert files.labels.shape == (5,) and files.labels.dtype == np.int64
    empty = CodeFiles(tmp_path, "heldout")
    assert len(empty) == len(empty.labels) == 0 and empty.gather([], []).shape == (0, 2, 3, 2)


def test_pickled_files_are_opened_not_copied(tmp_path):
    codes = write_folder(tmp_path, [2000], grid=(8, 8))
    data = pickle.dumps(CodeFiles(tmp_path, "train"))
    assert len(data) < 2000
    assert (pickle.loads(data).gather([7], [0]).numpy() == codes[[7], [0]]).all()


def resident(path: Path) -> int:
    """Bytes of this process' mappings of a file that have been read into memory."""
    total, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0] and not line.split()[0].endswith(":"):
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="looks at Linux' account of mapped pages")
def test_opening_reads_no_data(tmp_path):
    """A shard of a gibibyte, nearly all hole: after opening next to none of it is in memory, and no read() took it."""
    write_folder(tmp_path, [4], grid=(16, 16), size=1024)
    count, row = 2**21, 16 * 16 * 2
    header = json.dumps(
        {
            "codes": {"dtype": "U16", "shape": [count, 1, 16, 16], "data_offsets": [0, count * row]},
            "labels": {"dtype": "I32", "shape": [count], "data_offsets": [count * row, count * (row + 4)]},
        }
    ).encode()
    path = tmp_path / shard_name(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        start = file.tell()
        file.truncate(start + count * (row + 4))
        file.seek(start + 1_234_567 * row)
        file.write(np.full(256, 777, np.uint16).tobytes())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["splits"]["train"].update(count=count, shards=[{"file": path.name, "count": count, "sha256": "0" * 64}])
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_so_far()
    files = CodeFiles(tmp_path, "train")
    assert read_so_far() - before < 2**20
    assert resident(path) < 2**20
    assert files.gather([1_234_567, 0], [0, 0]).unique(dim=0).tolist() == [[[0] * 16] * 16, [[777] * 16] * 16]
    assert resident(path) < 2**21
    # A look that must read everything is seen by this measure.
    assert files.labels.any() == False  # noqa: E712
    assert resident(path) > 4 * count


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in parts), text


def test_a_folder_without_manifest_is_unfinished(tmp_path):
    with pytest.raises(UserError) as error:
        CodeFiles(tmp_path / "absent", "train")
    one_line(error, str(tmp_path / "absent"), "does not exist")
    write_folder(tmp_path, [3])
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError) as error:
        CodeFiles(tmp_path, "train")
    one_line(error, str(tmp_path), "holds no manifest.json")


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, -1])
def test_a_truncated_shard_is_refused_at_opening(tmp_path, keep):
    write_folder(tmp_path, [3, 4])
    path = tmp_path / shard_name(1)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError) as error:
        CodeFiles(tmp_path, "train")
    one_line(error, str(path))


def test_missing_and_foreign_shards_are_refused_at_opening(tmp_path):
    write_folder(tmp_path, [3, 4])
    path = tmp_path / shard_name(0)
    for damage in (
        lambda: path.unlink(),
        lambda: path.write_bytes(b"not a safetensors file, however long it may be"),
        lambda: write_shard(path, np.zeros((3, 1, 2, 2), int), np.zeros(3), 300),  # another grid
        lambda: write_shard(path, np.zeros((2, 1, 2, 3), int), np.zeros(2), 300),  # another count
        lambda: write_shard(path, np.zeros((3, 1, 2, 3), int), np.zeros(3), 200),  # another type
        lambda: (path.unlink(), path.mkdir()),
    ):
        damage()
        with pytest.raises(UserError) as error:
            CodeFiles(tmp_path, "train")
        one_line(error, str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"codebook_size": "many"},
        {"grid": [4]},
        {"unheard_of": 1},
        {"splits": {"train": {"views": 1, "count": 1, "shards": []}}},
        {"splits": {"train": {"views": 1, "count": 1, "shards": [{"file": "../x", "count": 1, "sha256": ""}]}}},
        {"splits": {"train": {"views": 0, "count": 0, "shards": []}}},
        {"splits": {"train": {"views": 1}}},
        {"splits": []},
        {"splits": {}},
    ],
)
def test_a_foreign_or_malformed_manifest_is_one_line(tmp_path, change):
    write_folder(tmp_path, [3])
    tree = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**tree, **change}))
    with pytest.raises(UserError) as error:
        CodeFiles(tmp_path, "train")
    one_line(error, str(tmp_path / MANIFEST))


def test_verify_finds_one_flipped_bit_that_opening_cannot(tmp_path):
    write_folder(tmp_path, [3, 4])
    CodeFiles(tmp_path, "train").verify()
    path = tmp_path / shard_name(1)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    files = CodeFiles(tmp_path, "train")
    with pytest.raises(UserError) as error:
        files.verify()
    one_line(error, str(path), "sha256", hashlib.sha256(data).hexdigest()[:12])


def test_verify_finds_codes_outside_the_codebook_and_labels_outside_the_classes(tmp_path):
    write_folder(tmp_path, [3, 4])
    manifest = Manifest.read(tmp_path)
    dataclasses.replace(manifest, codebook_size=290).write(tmp_path)
    with pytest.raises(UserError) as error:
        CodeFiles(tmp_path, "train").verify()
    one_line(error, "codes-0000", "the code 29", "0 to 289")
    dataclasses.replace(manifest, class_names=["a", "b"]).write(tmp_path)
    with pytest.raises(UserError) as error:
        CodeFiles(tmp_path, "train").verify()
    one_line(error, "codes-0000", "the label", "-1 to 1")


def test_used_codes_counts_each_depth_by_itself(tmp_path):
    codes = np.array([[[[[0, 5], [1, 5]]]]])
    write_shard(tmp_path / "s.safetensors", codes, np.zeros(1), 8)
    used = used_codes(open_shard(tmp_path / "s.safetensors", 8, codes.shape[1:]), 8, 2)
    assert [np.flatnonzero(level).tolist() for level in used] == [[0, 1], [5]]


# --- vqgen-tokenize -------------------------------------------------------------------------------------------------

SHARD = 20


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A hundred real garments as PNG files in a folder a class."""
    return save_garments(tmp_path_factory.mktemp("images"), 100)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def make(tokenizer, images) -> Callable[..., TokenizeConfig]:
    """A configuration with three views; options of the image section are given by name like all others."""

    def config(output: Path, **changes: Any) -> TokenizeConfig:
        names = {f.name for f in dataclasses.fields(ImageConfig)}
        section = {
            "flip": True,
            "random_crop": 0.25,
            "holdout": 0.3,
            **{k: changes.pop(k) for k in names & set(changes)},
        }
        options = {"tokenizer": tokenizer, "data": str(images), "views": 3, "shard_size": SHARD, "batch_size": 8}
        options |= {"precision": "fp32", "device": "cpu", "seed": 5}
        return TokenizeConfig(output=output, images=ImageConfig(**section), **(options | changes))

    return config


@pytest.fixture(scope="module")
def reference(make, tmp_path_factory) -> Path:
    """The folder of an undisturbed run of a single process."""
    folder = tmp_path_factory.mktemp("reference") / "codes"
    tokenize(make(folder))
    assert len(content(folder)) == 4 + 2 + 2  # 70 training images, 30 held out; manifest and plan
    return folder


def test_codes_are_those_of_the_images_in_order(reference, tokenizer, images):
    model = Tokenizer.load(tokenizer)
    for split in ("train", "heldout"):
        files = CodeFiles(reference, split)
        files.verify()
        dataset = open_images(str(images), split, ImageConfig(size=[SIZE, SIZE], channels=1, holdout=0.3))
        assert (len(files), files.views) == ((70, 3) if split == "train" else (30, 1))
        assert files.labels.tolist() == dataset.labels.tolist() and len(set(files.labels.tolist())) > 5
        assert files.class_names == dataset.class_names == sorted(p.name for p in images.iterdir())
        batch = dataset.__getitems__(range(len(dataset)))
        found = files.gather(range(len(files)), [0] * len(files))
        assert (found == model.encode(to_float(batch.images))).float().mean() > 0.999
    assert files.tokenizer_fingerprint == model.fingerprint
    assert (files.grid, files.depth, files.codebook_size, files.image_size, files.channels) == (
        (8, 8),
        1,
        300,
        (16, 16),
        1,
    )


def test_another_share_than_the_tokenizer_held_out_is_said(make, tokenizer, images, tmp_path, capsys):
    model = shutil.copytree(tokenizer, tmp_path / "model")
    for data, share, said in ((images, 0.1, True), (images, 0.3, False), (images, 0.5, False), (tmp_path, 0.1, False)):
        save(TokenizerTraining(str(data), images=ImageConfig(holdout=share)), model / "config.yaml")
        tokenize(make(tmp_path / "codes", tokenizer=model))
        assert ("--holdout: found 0.3" in capsys.readouterr().out) == said


def test_further_views_are_augmented_by_seed_image_and_view_alone(make, reference, tmp_path):
    files = CodeFiles(reference, "train")
    views = [files.gather(range(70), [view] * 70) for view in range(3)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (views[one] == views[other]).flatten(1).all(1).float().mean() < 0.2
    tokenize(make(tmp_path / "layout", views=2, shard_size=33, batch_size=33))
    layout = CodeFiles(tmp_path / "layout", "train")
    for view in range(2):
        assert (layout.gather(range(70), [view] * 70) == views[view]).float().mean() > 0.999
    tokenize(make(tmp_path / "seed", views=2, seed=6))
    seed = CodeFiles(tmp_path / "seed", "train")
    assert torch.equal(seed.gather(range(70), [0] * 70), views[0])
    assert (seed.gather(range(70), [1] * 70) == views[1]).flatten(1).all(1).float().mean() < 0.5


def test_a_test_split_is_written_after_the_others(make, images, tmp_path):
    """Also where version 0.1 had finished or begun the folder, which wrote no test split."""
    source, folder = tmp_path / "images", tmp_path / "codes"
    for number, path in enumerate(sorted(images.glob("*/*.png"))[:45]):
        place = source / ("train", "val", "test")[number % 3] / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    shutil.move(source / "test", tmp_path / "test")
    tokenize(make(folder, data=str(source), shard_size=10))
    before = content(folder)
    shutil.move(tmp_path / "test", source / "test")
    tokenize(make(folder, data=str(source), shard_size=10))
    assert content(folder) == before, "finished, and left alone"
    (folder / MANIFEST).unlink()
    manifest = tokenize(make(folder, data=str(source), shard_size=10))
    assert {name: (split.count, split.views) for name, split in manifest.splits.items()} == {
        "train": (15, 3),
        "heldout": (15, 1),
        "test": (15, 1),
    }
    after = content(folder)
    assert (
        all(after[name] == data for name, data in before.items() if name != MANIFEST) and len(after) == len(before) + 2
    )
    files = CodeFiles(folder, "test")
    expected = open_images(str(source), "test", ImageConfig(size=[SIZE, SIZE], channels=1))
    assert files.labels.tolist() == expected.labels.tolist() and files.data_fingerprint == manifest.data_fingerprint
    codes = Tokenizer.load(folder / "tokenizer").encode(expected.__getitems__(range(15)).images)
    assert (files.gather(range(15), [0] * 15) == codes).float().mean() > 0.999
    # Begun with this test split, the folder takes no other.
    tokenize(make(tmp_path / "new", data=str(source), shard_size=10))
    next((source / "test").glob("*/*.png")).unlink()
    with pytest.raises(UserError) as error:
        tokenize(make(tmp_path / "new", data=str(source), shard_size=10))
    one_line(error, "--data")


@pytest.mark.slow
def test_killed_at_any_point_a_run_ends_with_the_same_bytes(make, reference, tmp_path):
    folder = tmp_path / "codes"
    stamps: dict[str, tuple[int, int]] = {}
    deaths = (("codes-00000.safetensors", "SIGKILL"), ("codes-00003.safetensors", "SIGTERM"), (MANIFEST, "SIGKILL"))
    for done, (name, death) in zip((0, 3, 6), deaths):
        command = [sys.executable, "-c", DIE, name, death, *words(make(folder))]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == -getattr(signal, death), result.stderr
        shards = sorted(folder.glob("codes-*"))
        assert len(shards) == done and not (folder / MANIFEST).exists()
        assert [p for p in folder.iterdir() if p.name.startswith(f".{name}") and p.suffix == ".part"]
        with pytest.raises(UserError, match="holds no manifest"):
            CodeFiles(folder, "train")
        for path in shards:
            now = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert stamps.setdefault(path.name, now) == now
    tokenize(make(folder))
    assert content(folder) == content(reference)
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("codes-*")} == stamps
    assert not list(folder.glob(".*"))


def test_two_processes_write_what_one_writes(make, reference, tmp_path):
    first, second = run_together(TOKENIZE, *words(make(tmp_path / "codes")), environ={"OMP_NUM_THREADS": "1"})
    assert first.ok().out.count("training images") == 1 and not second.ok().out
    assert content(tmp_path / "codes") == content(reference)


def test_each_process_takes_its_own_shards(make, reference, tmp_path, monkeypatch):
    """The test above would also pass if both did everything."""
    monkeypatch.setitem(PartialState._shared_state, "num_processes", 2)
    monkeypatch.setitem(PartialState._shared_state, "process_index", 1)
    written = []
    monkeypatch.setattr(writer, "write_shard", lambda path, *rest, **further: written.append(path.name))
    with pytest.raises(UserError, match=r"codes-00000\.safetensors does not exist"):  # nobody writes the even ones
        tokenize(make(tmp_path / "codes"))
    assert written == [shard_name(number) for number in (1, 3, 5)]


def test_a_finished_folder_is_left_alone(make, reference, capsys):
    before = {p: p.stat().st_mtime_ns for p in reference.iterdir()}
    manifest = tokenize(make(reference, batch_size=5, workers=1, max_broken=0.5))
    assert "is finished" in capsys.readouterr().out
    assert manifest == Manifest.read(reference)
    assert {p: p.stat().st_mtime_ns for p in reference.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"views": 2}, {"seed": 6}, {"shard_size": 30}, {"precision": "bf16"}, {"flip": False}, {"random_crop": 0.5},
        {"random_shift": 1}, {"holdout": 0.2},
    ],
)  # fmt: skip
def test_a_folder_begun_under_other_options_is_refused(make, reference, tmp_path, change):
    (folder := tmp_path / "codes").mkdir()
    for name in ("plan.json", "codes-00000.safetensors"):
        (folder / name).write_bytes((reference / name).read_bytes())
    with pytest.raises(UserError) as error:
        tokenize(make(folder, **change))
    ((name, value),) = change.items()
    before = values_of(make(folder)).get(name)
    one_line(error, str(folder), f"--{name.replace('_', '-')} {before}", f"now {value}", "--overwrite")
    assert len(content(folder)) == 2


def test_another_tokenizer_or_other_images_are_refused(make, reference, tmp_path, images):
    (folder := tmp_path / "codes").mkdir()
    (folder / "plan.json").write_bytes((reference / "plan.json").read_bytes())
    plan = json.loads((folder / "plan.json").read_text())
    other = make_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(UserError) as error:
        tokenize(make(folder, tokenizer=other))
    one_line(error, f"--tokenizer {plan['tokenizer'][:12]}, now {Tokenizer.load(other).fingerprint[:12]}")  # type: ignore[index]
    shutil.copytree(images, tmp_path / "images")
    next((tmp_path / "images").glob("*/*.png")).unlink()
    with pytest.raises(UserError) as error:
        tokenize(make(folder, data=str(tmp_path / "images")))
    one_line(error, f"--data {plan['data'][:12]}, now ")


def test_overwrite_keeps_the_tokenizer_that_it_reads(make, reference, tmp_path):
    folder, link = tmp_path / "codes", tmp_path / "link"
    shutil.copytree(reference, folder)
    link.symlink_to(folder)
    kept = content(folder / "tokenizer")
    tokenize(make(folder, tokenizer=link / "tokenizer", overwrite=True, shard_size=20))
    assert content(folder / "tokenizer") == kept
    assert Manifest.read(folder).tokenizer_fingerprint == Tokenizer.load(folder / "tokenizer").fingerprint


def test_overwrite_starts_anew_but_touches_nothing_else(make, reference, tmp_path):
    folder = tmp_path / "codes"
    tokenize(make(folder, seed=1, shard_size=10))
    (folder / "notes.txt").write_text("mine")
    tokenize(make(folder, overwrite=True))
    assert content(folder) == content(reference) and (folder / "notes.txt").read_text() == "mine"
    (foreign := tmp_path / "foreign").mkdir()
    (foreign / MANIFEST).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(UserError) as error:
            tokenize(make(foreign, overwrite=overwrite))
        one_line(error, "--output", str(foreign), "something else")
    assert (foreign / MANIFEST).read_text() == "{}" and len(list(foreign.iterdir())) == 1


def test_a_damaged_shard_is_found_and_made_again(make, reference, tmp_path, capsys):
    folder = tmp_path / "codes"
    shutil.copytree(reference, folder)
    command = ["--verify", "--output", str(folder)]
    assert encode.main(command) == 0 and "train is complete, 70 images" in capsys.readouterr().out
    first, second = folder / shard_name(0), folder / shard_name(4)
    for path in (first, second):
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    assert encode.main(command) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(first) in errors and "sha256" in errors
    # One is deleted as told; the other must not get a fresh checksum by that.
    first.unlink()
    with pytest.raises(UserError) as error:
        tokenize(make(folder))
    one_line(error, str(second), "sha256")
    second.unlink()
    tokenize(make(folder))
    assert content(folder) == content(reference)


def test_a_tokenizer_that_changes_meanwhile_is_not_the_one_that_is_copied(make, tmp_path, monkeypatch, capsys):
    given, folder, encode_all = make_tokenizer(tmp_path / "given"), tmp_path / "codes", writer._encode
    mark = Tokenizer.load(given).fingerprint

    def encode_and_replace(*arguments: Any) -> None:
        encode_all(*arguments)
        make_tokenizer(given, seed=1)

    monkeypatch.setattr(writer, "_encode", encode_and_replace)
    tokenize(make(folder, tokenizer=given, views=1, flip=False, random_crop=0.0))
    assert Tokenizer.load(given).fingerprint != mark
    assert Tokenizer.load(folder / "tokenizer").fingerprint == Manifest.read(folder).tokenizer_fingerprint == mark


def test_a_tokenizer_that_changes_before_it_is_copied_ends_the_run(make, tmp_path, monkeypatch):
    given, begin = make_tokenizer(tmp_path / "given"), writer.begin

    def replace_and_begin(*arguments: Any) -> None:
        make_tokenizer(given, seed=1)
        begin(*arguments)

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(writer, "begin", replace_and_begin)
        tokenize(make(tmp_path / "codes", tokenizer=given))
    one_line(error, "--tokenizer", str(given))
    assert not list((tmp_path / "codes").glob("codes-*"))
    make_tokenizer(given)
    tokenize(make(tmp_path / "codes", tokenizer=given))
    assert content(tmp_path / "codes" / "tokenizer") == content(given)


def test_a_tokenizer_in_16_bits_is_copied_as_it_is(make, tmp_path):
    given, folder = tmp_path / "given", tmp_path / "codes"
    mark = Tokenizer.load(make_tokenizer(tmp_path / "whole")).half().save(given)
    manifest = tokenize(make(folder, tokenizer=given))
    assert content(folder / "tokenizer") == content(given) and manifest.tokenizer_fingerprint == mark
    assert encode.main(["--verify", "--output", str(folder)]) == 0


def test_another_tokenizer_beside_the_codes_is_found(make, reference, tmp_path, capsys):
    folder = tmp_path / "codes"
    shutil.copytree(reference, folder)
    make_tokenizer(folder / "tokenizer", seed=1)
    assert encode.main(["--verify", "--output", str(folder)]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and str(folder / "tokenizer") in errors and "fingerprint" in errors
    with pytest.raises(UserError) as error:
        tokenize(make(folder))
    one_line(error, str(folder / "tokenizer"))


@pytest.mark.parametrize("left", [[], ["vqgen.json"]])
def test_a_lost_tokenizer_beside_finished_codes_is_copied_again(make, reference, tmp_path, left, capsys):
    folder = tmp_path / "codes"
    shutil.copytree(reference, folder)
    for path in (folder / "tokenizer").iterdir():
        if path.name not in left:
            path.unlink()
    tokenize(make(folder))
    assert content(folder) == content(reference) and "is finished" in capsys.readouterr().out


def test_an_encoder_whose_output_is_not_finite_writes_no_shard(make, tmp_path, monkeypatch):
    """Also where the device is waited for only when the codes of a shard are read."""
    note = Tokenizer._note_finite

    def on_cpu(self: Tokenizer, part: str, output: torch.Tensor, at_once: bool) -> None:
        note(self, part, output * math.inf, at_once)

    def elsewhere(self: Tokenizer, part: str, *_: Any) -> None:
        self._finite[part] = torch.tensor(False)

    for number, patched in enumerate((on_cpu, elsewhere)):
        monkeypatch.setattr(Tokenizer, "_note_finite", patched)
        with pytest.raises(UserError) as error:
            tokenize(make(tmp_path / str(number)))
        one_line(error, "--precision", "encoder")
        assert not list((tmp_path / str(number)).glob("codes-*"))


def test_a_truncated_shard_stops_a_resuming_run_at_once(make, reference, tmp_path, monkeypatch):
    (folder := tmp_path / "codes").mkdir()
    for name in ("plan.json", shard_name(2)):
        (folder / name).write_bytes((reference / name).read_bytes())
    with (folder / shard_name(2)).open("r+b") as file:
        file.truncate(400)
    monkeypatch.setattr(writer, "encode_batch", lambda *_: pytest.fail("encoded before looking"))
    with pytest.raises(UserError) as error:
        tokenize(make(folder))
    one_line(error, str(folder / shard_name(2)), "delete it")


def test_a_tokenizer_of_the_same_weights_and_other_settings_does_not_go_on(make, reference, tmp_path):
    folder, other = tmp_path / "codes", tmp_path / "other"
    shutil.copytree(reference, folder)
    (folder / shard_name(2)).unlink()
    shutil.copytree(reference / "tokenizer", other)
    description = json.loads((other / "vqgen.json").read_text())
    quantizer = description["architecture"]["quantizer"]
    quantizer["l2_normalize"] = not quantizer["l2_normalize"]
    (other / "vqgen.json").write_text(json.dumps(description))
    before = content(folder)
    with pytest.raises(UserError) as error:
        tokenize(make(folder, tokenizer=other))
    one_line(error, "--tokenizer", str(other), "--overwrite")
    assert content(folder) == before
    tokenize(make(folder))
    assert content(folder) == content(reference)


def test_a_shard_with_labels_of_other_images_is_not_taken_over(make, reference, tmp_path):
    (folder := tmp_path / "codes").mkdir()
    for name in ("plan.json", shard_name(2)):
        (folder / name).write_bytes((reference / name).read_bytes())
    held = load_file(folder / shard_name(2))
    artifact.write_tensors(folder / shard_name(2), {**held, "labels": held["labels"].flip(0) + 1})
    with pytest.raises(UserError) as error:
        tokenize(make(folder))
    one_line(error, str(folder / shard_name(2)), "labels", "delete it")
    (folder / shard_name(2)).unlink()
    tokenize(make(folder))
    assert content(folder) == content(reference)


@pytest.mark.parametrize("where", ["artifact.save_file", "files.write.os.fsync"])
def test_a_full_disk_is_one_line_and_loses_no_finished_shard(make, reference, tmp_path, monkeypatch, where):
    folder = tmp_path / "codes"
    real = artifact.save_file if where == "artifact.save_file" else os.fsync

    def full(*arguments: Any, **options: Any) -> Any:
        if f".{shard_name(2)}" in str(arguments) or list(folder.glob(f".{shard_name(2)}*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"vqgen.{where}", full)
        with pytest.raises(UserError) as error:
            tokenize(make(folder))
    one_line(error, str(folder / shard_name(2)), "No space left on device")
    assert sorted(content(folder)) == [shard_name(0), shard_name(1), "plan.json"]
    assert not list(folder.glob(".*"))
    tokenize(make(folder))
    assert content(folder) == content(reference)


def test_broken_images_are_named_counted_and_left_out(make, images, tmp_path, capsys):
    source = tmp_path / "images"
    shutil.copytree(images, source)
    train = open_images(str(source), "train", ImageConfig(size=[SIZE, SIZE], channels=1, holdout=0.3))
    gone = [3, 4, 41, *range(20, 40)]  # the second shard loses all it has
    for index in gone:
        Path(train.source.item_name(index)).write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError) as error:
        tokenize(make(tmp_path / "codes", data=str(source)))
    one_line(error, "--max-broken")
    with pytest.raises(UserError) as error:
        tokenize(make(tmp_path / "strict", data=str(source), broken="error"))
    one_line(error, "--broken error", train.source.item_name(3))
    capsys.readouterr()
    manifest = tokenize(make(tmp_path / "codes", data=str(source), max_broken=0.5))
    told = capsys.readouterr()
    assert "23 broken images skipped" in told.out
    assert all(told.err.count(train.source.item_name(index)) == 1 for index in gone)
    assert [shard.count for shard in manifest.splits["train"].shards] == [18, 0, 19, 10]
    files = CodeFiles(tmp_path / "codes", "train")
    files.verify()
    kept = [index for index in range(70) if index not in gone]
    assert files.labels.tolist() == train.labels[kept].tolist()
    found = files.gather(range(len(kept)), [0] * len(kept))
    assert torch.equal(found[kept.index(50)], CodeFiles(tmp_path / "codes", "train").gather([kept.index(50)], [0])[0])
    # What was skipped under a lenient limit does not pass a stricter one when the run is finished later.
    (tmp_path / "codes" / MANIFEST).unlink()
    with pytest.raises(UserError) as error:
        tokenize(make(tmp_path / "codes", data=str(source), max_broken=0.1))
    one_line(error, "--max-broken 0.1", "23 of 70 train images")


def test_a_split_without_an_intact_image_is_refused(make, images, tmp_path):
    source = tmp_path / "images"
    shutil.copytree(images, source)
    heldout = open_images(str(source), "heldout", ImageConfig(size=[SIZE, SIZE], channels=1, holdout=0.3))
    for index in range(len(heldout)):
        Path(heldout.source.item_name(index)).write_bytes(b"\x89PNG nothing")
    with pytest.raises(UserError) as error:
        tokenize(make(tmp_path / "codes", data=str(source), max_broken=1.0))
    one_line(error, "--data", "30 heldout images", str(source))
    assert not (tmp_path / "codes" / MANIFEST).exists()


@pytest.mark.parametrize("option", [["--channels", 3], ["--size", 32], ["--fit", "crop"]])
def test_a_default_that_is_given_is_no_default(cli, images, tmp_path, option):
    """The tokenizer decides size, channels and fit: of others than it takes, also the usual ones are refused."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    model = Tokenizer.load(tokenizer)
    model.config.fit = "pad"
    model.save(tokenizer)
    words = ["--tokenizer", tokenizer, "--data", images, "--output", tmp_path / "codes"]
    result = cli(encode.main, *words, *option)
    assert result.code == 2 and result.err.startswith(f"vqgen-tokenize: {option[0]}: found")
    assert not (tmp_path / "codes").exists()
    given = ["--channels", 1, "--size", SIZE, "--fit", "pad"]
    assert cli(encode.main, *words, *given).code == 0


def test_with_flips_every_other_view_is_flips(make, tmp_path):
    config = make(tmp_path / "codes", flip=True)
    for index in range(20):
        seeds = [view_seed(config, index, view) for view in (1, 2, 3)]
        assert [flips(seed) for seed in seeds] == [True, False, True] and len(set(seeds)) == 3


@pytest.mark.parametrize(
    "change, option",
    [
        ({"batch_size": 0}, "--batch-size"),
        ({"views": 0}, "--views"),
        ({"shard_size": 0}, "--shard-size"),
        ({"flip": False, "random_crop": 0.0}, "--views"),
        ({"views": 1}, "--flip"),
        ({"views": 1, "flip": False}, "--random-crop"),
        ({"views": 1, "flip": False, "random_crop": 0.0, "random_shift": 1}, "--random-shift"),
        ({"views": 10, "flip": False, "random_crop": 0.0, "random_shift": 1}, "--views"),
        ({"random_shift": 32}, "--random-shift"),
        ({"size": [64, 64]}, "--size"),
        ({"channels": 1, "size": [32, 48]}, "--size"),
        ({"fit": "pad"}, "--fit"),
        ({"views": 3, "random_crop": 0.0}, "--views"),
        ({"tokenizer": None}, "--tokenizer"),
        ({"data": None}, "--data"),
        ({"precision": "fp16"}, "--precision"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "--device")]),
    ],
)
def test_impossible_options_are_usage_errors_before_anything_is_written(make, tmp_path, change, option):
    with pytest.raises(UsageError) as error:
        tokenize(make(tmp_path / "codes", **change))
    one_line(error, option)
    assert not (tmp_path / "codes").exists()
