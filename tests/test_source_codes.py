"""Source codes and captions in code files: what is written is read back, and whatever a file says is checked."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import write_codes
from torch import Tensor

from vqgen.artifact import read_tensors, write_tensors
from vqgen.errors import UserError
from vqgen.files import checksum, read_json, write_json
from vqgen.tokenizer.codes.format import MANIFEST, MAX_CAPTION, CodeFiles, Manifest, shard_name, write_shard

CAPTIONS = ["a shoe", "", "Straßenbahn", "犬", "x" * MAX_CAPTION, "two\nlines", "", "z", "é"]


@pytest.mark.parametrize(("views", "depth"), [(1, 1), (2, 3)])
def test_source_codes_and_captions_come_back_across_shards(tmp_path: Path, views: int, depth: int) -> None:
    codes = write_codes(tmp_path, views=views, depth=depth, source=True, captions=CAPTIONS)
    files = CodeFiles(tmp_path, "train")
    files.verify()
    rows, of_view = [8, 0, 4, 5, 0], [views - 1, 0, 0, views - 1, views - 1]
    found = files.gather_source(rows, of_view)
    assert found.dtype == torch.int64 and torch.equal(found, torch.from_numpy(299 - codes[rows, of_view]))
    assert torch.equal(files.gather(rows, of_view), torch.from_numpy(codes[rows, of_view]))
    assert files.captions(range(9)) == CAPTIONS and files.captions([8, 2, 2]) == ["é", "Straßenbahn", "Straßenbahn"]
    assert files.has_captions and files.source is not None and files.source.degradations == ["grey"]
    empty = CodeFiles(tmp_path, "heldout")
    assert empty.gather_source([], []).shape == (0, *codes.shape[2:]) and empty.captions([]) == []
    for read in (lambda: files.gather_source([9], [0]), lambda: files.captions([9]), lambda: files.captions([-1])):
        with pytest.raises(IndexError):
            read()


def test_folders_without_them_are_the_same_files_as_before(tmp_path: Path) -> None:
    """And say that they have none where one is asked for."""
    write_codes(tmp_path)
    assert not {"source", "captions"} & read_json(tmp_path / MANIFEST).keys()
    assert read_tensors(tmp_path / shard_name(0)).keys() == {"codes", "labels"}
    files = CodeFiles(tmp_path, "train")
    assert files.source is None and not files.has_captions
    for read in (lambda: files.gather_source([0], [0]), lambda: files.captions([0])):
        with pytest.raises(UserError, match=str(tmp_path)):
            read()


def test_what_the_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    codes, labels, path = np.zeros((2, 1, 2, 3), int), np.zeros(2), tmp_path / "s.safetensors"
    for source in (codes + 8, codes - 1, codes[:1], np.zeros((2, 2, 2, 3), int)):
        with pytest.raises(ValueError, match="source"):
            write_shard(path, codes, labels, 8, source)
    for captions in (["one"], ["", "é" * (MAX_CAPTION // 2 + 1)]):
        with pytest.raises(ValueError, match="captions"):
            write_shard(path, codes, labels, 8, None, captions)
    assert not list(tmp_path.iterdir())


def resign(folder: Path, number: int, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the tensors of a shard, and its checksum in the manifest with them."""
    path = folder / shard_name(number)
    before, tensors = checksum(path), read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    manifest = folder / MANIFEST
    manifest.write_text(manifest.read_text().replace(before, checksum(path)))
    return path


DAMAGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "source code 300": lambda held: held["source"].view(-1)[-1:].fill_(300),
    "no UTF-8": lambda held: held["caption_bytes"][-1:].fill_(0xFF),
    "caption of image 0": lambda held: held["caption_offsets"][1:2].fill_(-1),
    "caption of image 1": lambda held: held["caption_offsets"][2:3].fill_(2**62),
    "caption of image 2": lambda held: held["caption_offsets"][3:4].fill_(8),
    "at most": lambda held: held.update(
        caption_bytes=torch.zeros(30_000, dtype=torch.uint8), caption_offsets=torch.tensor([0, 0, 0, 0, 30_000])
    ),
}


@pytest.mark.parametrize("fact", DAMAGES)
def test_signed_nonsense_is_refused_by_the_check_and_by_reading(tmp_path: Path, fact: str) -> None:
    write_codes(tmp_path, source=True, captions=CAPTIONS)
    path = resign(tmp_path, 1, DAMAGES[fact])
    files = CodeFiles(tmp_path, "train")
    for read in (files.check, lambda: (files.gather_source(range(9), [0] * 9), files.captions(range(9)))):
        with pytest.raises(UserError, match=fact) as refused:
            read()
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_bytes_that_belong_to_no_caption_are_refused(tmp_path: Path) -> None:
    write_codes(tmp_path, captions=CAPTIONS)
    path = resign(tmp_path, 1, lambda held: held.update(caption_bytes=torch.zeros(20, dtype=torch.uint8)))
    with pytest.raises(UserError, match=f"{path}.*of 20"):
        CodeFiles(tmp_path, "train").check()


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.pop("source"),
        lambda held: held.pop("caption_offsets"),
        lambda held: held.update(further=torch.zeros(1)),
        lambda held: held.update(source=held["source"].long()),
        lambda held: held.update(source=held["source"][:, :, :1]),
        lambda held: held.update(caption_bytes=held["caption_bytes"].reshape(1, -1)),
        lambda held: held.update(caption_bytes=held["caption_bytes"].to(torch.int16)),
        lambda held: held.update(caption_offsets=held["caption_offsets"][1:]),
        lambda held: held.update(caption_offsets=torch.tensor(0)),
    ],
)
def test_other_tensors_than_promised_do_not_open(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    write_codes(tmp_path, source=True, captions=CAPTIONS)
    path = resign(tmp_path, 1, change)
    with pytest.raises(UserError) as refused:
        CodeFiles(tmp_path, "train")
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_source_codes_that_the_manifest_does_not_promise_do_not_open(tmp_path: Path) -> None:
    """They would be ignored without a word."""
    write_codes(tmp_path, source=True)
    manifest = read_json(tmp_path / MANIFEST)
    del manifest["source"]
    write_json(tmp_path / MANIFEST, manifest)
    with pytest.raises(UserError, match="unexpected source"):
        CodeFiles(tmp_path, "train")


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"kind": "other"}},
        {"source": {"grid": [0, 3]}},
        {"source": {"grid": [2**40, 3]}},
        {"source": {"grid": None}},
        {"source": {"data_fingerprint": 3}},
        {"source": {"degradations": []}},
        {"source": {"degradations": ["x" * 2000]}},
        {"source": {"degradations": ["grey"] * 1000}},
        {"source": {"kind": "paired"}},
        {"source": {"description": ["x"]}},
        {"captions": 1},
        {"captions": "yes"},
    ],
)
def test_the_manifests_of_them_are_checked(tmp_path: Path, change: dict[str, object]) -> None:
    write_codes(tmp_path, source=True, captions=CAPTIONS)
    manifest = read_json(tmp_path / MANIFEST)
    for key, value in change.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=MANIFEST) as refused:
        Manifest.read(tmp_path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
