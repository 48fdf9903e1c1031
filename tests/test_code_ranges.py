"""Codes outside of the codebook and labels outside of the classes: found before they are trained on or measured."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import NAMES, SIZE, codes_for, make_prior, write_codes
from numpy.typing import NDArray

from vqgen.artifact import read_tensors, write_tensors
from vqgen.errors import UserError
from vqgen.evaluation import program as evaluate
from vqgen.evaluation.codebook import count_codes
from vqgen.files import read_json, write_json
from vqgen.prior import train
from vqgen.tokenizer.codes import format as codes_format
from vqgen.tokenizer.codes.format import MANIFEST, CodeFiles, check_range, shard_name


def damage(folder: Path, what: str, value: int, number: int = 1, signed: bool = True) -> Path:
    """Set the last code or label of a shard, past the check of the writer; in the manifest, too, where `signed`."""
    path = folder / shard_name(number)
    before, tensors = codes_format.checksum(path), read_tensors(path)
    tensors[what].view(-1)[-1] = value
    write_tensors(path, tensors)
    if signed:
        text = (folder / MANIFEST).read_text()
        (folder / MANIFEST).unlink()  # it may be a link to one that others use
        (folder / MANIFEST).write_text(text.replace(before, codes_format.checksum(path)))
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_ranges_of_every_type(dtype: type) -> None:
    values: NDArray[Any] = np.array([0, 3, 254], dtype)
    check_range(Path("x"), "code", values, 0, 255)
    check_range(Path("x"), "code", values[:0], 0, 1)
    with pytest.raises(UserError, match="code 254"):
        check_range(Path("x"), "code", values, 0, 254)
    if dtype == np.int32:
        with pytest.raises(UserError, match="code -1"):
            check_range(Path("x"), "code", np.array([3, -1], dtype), 0, 255)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prior(tmp_path_factory.mktemp("model"))


def two_splits(folder: Path, model: Path) -> Path:
    """Code files to train on: a shard of each split, and the tokenizer."""
    codes = codes_for(folder, model)
    manifest = read_json(codes / MANIFEST)
    shards = manifest["splits"]["train"]["shards"]
    manifest["splits"] = {
        split: {"views": 1, "count": shard["count"], "shards": [shard]}
        for split, shard in zip(("train", "heldout"), shards)
    }
    write_json(codes / MANIFEST, manifest)
    (codes / "tokenizer").symlink_to(model / "tokenizer")
    return codes


CASES = [("codes", SIZE), ("codes", 255), ("labels", len(NAMES)), ("labels", -2), ("labels", 2**31 - 1)]


@pytest.mark.parametrize(("what", "value"), CASES)
def test_training_refuses_them(model: Path, tmp_path: Path, cli: Callable[..., Any], what: str, value: int) -> None:
    codes = two_splits(tmp_path / "codes", model)
    small = ["--dim", 16, "--layers", 1, "--heads", 2, "--steps", 2, "--batch-size", 2, "--lr-warmup", 1]
    words = ["--codes", codes, *small, "--preview-images", 0]
    assert cli(train.main, *words, "--output", tmp_path / "fine").code == 0
    for number in (0, 1):  # of the training and of the held-out images
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for path in codes.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / shard_name(number)).unlink()
        (folder / shard_name(number)).write_bytes((codes / shard_name(number)).read_bytes())
        path = damage(folder, what, value, number)
        result = cli(train.main, "--codes", folder, *words[2:], "--output", tmp_path / f"out-{number}")
        assert result.code == 1 and len(result.err.splitlines()) == 1, result.err
        assert path.name in result.err and str(value) in result.err


def test_a_changed_shard_is_neither_trained_on_nor_measured(
    model: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    """Its codes and labels are valid, but not those that were written."""
    codes = two_splits(tmp_path / "codes", model)
    last = int(read_tensors(codes / shard_name(0))["codes"].view(-1)[-1])
    path = damage(codes, "codes", (last + 1) % SIZE, number=0, signed=False)
    trained = cli(train.main, "--codes", codes, "--steps", 2, "--output", tmp_path / "out")
    words = ["--model", model, "--codes", codes, "--split", "train", "--output", tmp_path / "receipt.json"]
    for result in (trained, cli(evaluate.main, "likelihood", *words)):
        assert result.code == 1 and len(result.err.splitlines()) == 1, result.err
        assert path.name in result.err and MANIFEST in result.err
    assert not (tmp_path / "receipt.json").exists()


@pytest.mark.parametrize(("what", "value"), CASES)
def test_likelihoods_refuse_them(model: Path, tmp_path: Path, cli: Callable[..., Any], what: str, value: int) -> None:
    codes = codes_for(tmp_path / "codes", model)
    path = damage(codes, what, value)
    words = ["--model", model, "--codes", codes, "--split", "train", "--output", tmp_path / "receipt.json"]
    result = cli(evaluate.main, "likelihood", *words)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert path.name in result.err and str(value) in result.err and not (tmp_path / "receipt.json").exists()


def test_what_is_gathered_is_checked(tmp_path: Path) -> None:
    write_codes(tmp_path)
    path = damage(tmp_path, "codes", 300)
    files = CodeFiles(tmp_path, "train")
    assert files.gather([0, 7], [0, 0]).shape == (2, 2, 3)
    for read in (lambda: files.gather([0, 8], [0, 0]), files.check, lambda: count_codes(tmp_path)):
        with pytest.raises(UserError, match=rf"{path.name}.* 300"):
            read()


def test_labels_of_files_without_classes_are_free(tmp_path: Path) -> None:
    write_codes(tmp_path, names=None, labels=np.arange(9) + 1000)
    files = CodeFiles(tmp_path, "train")
    files.check()
    assert files.labels[0] == 1000


def test_a_check_is_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_codes(tmp_path / "codes")
    before = sorted(path.name for path in (tmp_path / "codes").iterdir())
    CodeFiles(tmp_path / "codes", "train").check()
    assert not (tmp_path / "cache").exists()  # takes no time
    monkeypatch.setattr(codes_format, "REMEMBERED", 1)
    CodeFiles(tmp_path / "codes", "train").check()
    with monkeypatch.context() as patch:
        patch.setattr(CodeFiles, "verify", None)
        CodeFiles(tmp_path / "codes", "train").check()
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == before
    path = damage(tmp_path / "codes", "codes", 301)
    with pytest.raises(UserError, match=path.name):
        CodeFiles(tmp_path / "codes", "train").check()
    write_codes(tmp_path / "codes")
    os.chmod(tmp_path / "cache", 0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    CodeFiles(tmp_path / "codes", "train").check()


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("codebook_size", [0, -1, 1.5, "8", None, True, 10**18, 2**70]),
        ("grid", [None, 3, [2], [2, 3, 4], [0, 3], ["2", 3], [10**18, 10**18]]),
        ("depth", [0, None, 10**18, "1"]),
        ("image_size", [None, [4], [4, 7], [8, 6], [10**18, 6]]),
        ("channels", [0, "3", 10**18]),
        ("class_names", ["abc", [1, 2, 3], {"a": 1}, 3]),
        ("tokenizer_fingerprint", [None, 3]),
        ("splits", [None, [], {"training": {"views": 1, "count": 0, "shards": []}}]),
        ("splits.train", [None, {}, 3]),
        ("splits.train.views", [0, 10**18, 1.5, None]),
        ("splits.train.count", [8, -1, 2**70, "9", 9.0]),
        ("splits.train.shards", [None, {}, [3], [{}]]),
        ("splits.train.shards.0.count", [-5, 10**18, True]),
        ("splits.train.shards.0.file", ["../x", "/etc/passwd", "", ".", "..", "a/b", "x" * 300, 3, None]),
        ("splits.train.shards.0.sha256", [None, 3]),
    ],
)
def test_manifests_are_checked_as_a_whole(tmp_path: Path, place: str, values: list[Any]) -> None:
    write_codes(tmp_path)
    whole = read_json(tmp_path / MANIFEST)
    for value in values:
        write_json(tmp_path / MANIFEST, whole)
        tree = read_json(tmp_path / MANIFEST)
        *keys, last = place.split(".")
        inner = tree
        for key in keys:
            inner = inner[int(key)] if isinstance(inner, list) else inner[key]
        inner[last] = value
        write_json(tmp_path / MANIFEST, tree)
        with pytest.raises(UserError, match=MANIFEST) as refused:
            CodeFiles(tmp_path, "train")
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500, value


def test_shards_are_regular_files(tmp_path: Path) -> None:
    write_codes(tmp_path)
    (tmp_path / shard_name(0)).unlink()
    os.mkfifo(tmp_path / shard_name(0))
    with pytest.raises(UserError, match=shard_name(0)):
        CodeFiles(tmp_path, "train")
    with pytest.raises(UserError, match=shard_name(0)):
        codes_format.checksum(tmp_path / shard_name(0))


def test_a_folder_of_many_shards_opens_them_when_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = write_codes(tmp_path, counts=(2, 3, 4))
    reference = CodeFiles(tmp_path, "train")
    shards, count = len(reference.manifest.splits["train"].shards), len(reference)
    assert shards > 2
    order = np.random.default_rng(0).integers(0, count, 50)
    for at_once, most in ((1, 1), (0, 2)):
        monkeypatch.setattr(codes_format, "AT_ONCE", at_once)
        monkeypatch.setattr(codes_format, "MOST_OPEN", most)
        files = CodeFiles(tmp_path, "train")
        assert len(files._opened) == at_once
        files._large = True  # pages are read one by one, which changes no value
        assert np.array_equal(files.gather(order, [0] * 50).numpy(), codes[order, 0])
        assert np.array_equal(files.gather_labels(order), reference.labels[order])
        assert files.unlabelled == bool((reference.labels < 0).any())
        assert len(files._opened) == most
        files.verify()
    last = tmp_path / shard_name(shards - 1)
    data = last.read_bytes()
    last.write_bytes(data[:20])
    with pytest.raises(UserError, match=last.name):
        CodeFiles(tmp_path, "train")
    last.unlink()
    with pytest.raises(UserError, match=last.name):
        CodeFiles(tmp_path, "train")
    last.write_bytes(bytes([255]) + data[1:])  # long enough: found when it is read
    files = CodeFiles(tmp_path, "train")
    with pytest.raises(UserError, match=last.name):
        files.gather([count - 1], [0])
