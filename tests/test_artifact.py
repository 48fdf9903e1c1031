"""vqgen/artifact.py: what stands under its final name is whole, and what is damaged is recognised."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.errors import refusal
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import vqgen
from vqgen.artifact import copy_artifact, fingerprint, load_artifact, read_tensors, save_artifact, write_tensors
from vqgen.errors import UserError
from vqgen.files import DESCRIPTION, WEIGHTS, atomic_path, read_json, write_json, write_text
from vqgen.files.write import LOCK

TYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"b.weight": torch.randn(4, 3, generator=generator), "a": torch.randn(5, generator=generator)}


# ---- writing ----


def test_text_and_json_round_trip_into_new_folders(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "new" / "x.json", value)
    assert read_json(tmp_path / "new" / "x.json") == value
    assert "é" in (tmp_path / "new" / "x.json").read_text(encoding="utf-8")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.json"]


def test_tensors_round_trip_whatever_their_layout(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES}
    tensors |= {"strided": torch.arange(12.0).reshape(3, 4).T[::2], "scalar": torch.tensor(2.5)}
    tensors |= {"empty": torch.zeros(0, 3), "gradient": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert fingerprint(back) == fingerprint(tensors)


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), UserError("x")])
@pytest.mark.parametrize("as_folder", [False, True])
def test_an_exception_midway_leaves_what_was_there(tmp_path: Path, error: BaseException, as_folder: bool) -> None:
    path = tmp_path / "item"
    if as_folder:
        path.mkdir()
        (path / "old").write_text("old")
    else:
        path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        if as_folder:
            temporary.mkdir()
            (temporary / "new").write_text("half")
        else:
            temporary.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["item"]
    assert (path / "old" if as_folder else path).read_text() == "old"


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"rest")

    assert refusal(write) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_tensors_that_do_not_fit_on_the_disk_leave_the_old_file(tmp_path: Path) -> None:
    """safetensors writes outside Python: its error too must become one line. A size limit stands in for a full disk."""
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from vqgen.artifact import write_tensors; from vqgen.errors import UserError\n"
        "path = Path(sys.argv[1]); write_tensors(path, {'a': torch.ones(10)})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_tensors(path, {'a': torch.zeros(100_000)})\n"
        "except UserError as error: print(error)"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "w.safetensors")]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert out.startswith(f"cannot write {tmp_path / 'w.safetensors'}: ") and out.count("\n") == 1
    assert "File too large" in out
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    assert torch.equal(read_tensors(tmp_path / "w.safetensors")["a"], torch.ones(10))


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refusal(write_text, tmp_path / "file" / "y.txt", "y")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    assert refusal(write_text, tmp_path / "folder", "y").startswith(f"cannot write {tmp_path / 'folder'}: ")
    assert "name too long" in refusal(write_text, tmp_path / ("n" * 300), "y")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert refusal(write_text, tmp_path / "x", "y") == f"cannot write {tmp_path / 'x'}: Permission denied"


def write_folder(path: Path) -> None:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("new")


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).touch()  # the program's own
    (tmp_path / "link").symlink_to(tmp_path / "run")
    write_folder(tmp_path / "link")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["new"] and (tmp_path / "link").is_symlink()
    (tmp_path / "again").mkdir()
    # Open: on NFS a file that is removed stays in its folder until it is closed.
    with (tmp_path / "again" / LOCK).open("w"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, **_: pytest.fail(f"removed {self}"))
        write_folder(tmp_path / "again")
    assert [p.name for p in (tmp_path / "again").iterdir()] == ["new"]
    shutil.rmtree(tmp_path / "again")
    (tmp_path / "run" / "new").rename(tmp_path / "run" / ".hidden")
    assert refusal(write_folder, tmp_path / "run") == f"cannot write {tmp_path / 'run'}: Directory not empty"
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".hidden"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "run"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("é" * 127), "x")
    assert [len(os.fsencode(path.name)) for path in tmp_path.iterdir()] == [254]


def test_a_copied_model_leaves_other_files(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
        for file in (DESCRIPTION, WEIGHTS, "notes.txt"):
            (tmp_path / name / file).write_text(name)
    copy_artifact(tmp_path / "source", tmp_path / "target")
    found = {path.name: path.read_text() for path in (tmp_path / "target").iterdir()}
    assert found == {DESCRIPTION: "source", WEIGHTS: "source", "notes.txt": "target"}


# ---- SIGKILL ----

CRASH = """
import os, signal, sys, time
from pathlib import Path
import torch
from vqgen.artifact import save_artifact
from vqgen.files import atomic_path, write_text

def text(mark):
    write_text(folder / "text", mark * size)

def tree(mark):
    with atomic_path(folder / f"tree-{mark}") as temporary:
        temporary.mkdir()
        for name in "ab":
            (temporary / name).write_text(mark * 10)

def model(mark):
    save_artifact(folder / "model", "tokenizer", {"mark": mark}, {"w": torch.full((1000,), float(ord(mark)))})

def everything(mark):
    text(mark), tree(mark), model(mark)

def child(work):
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process

def forever():
    while True:
        text("A"), text("B")

def crashing(left):  # dies just before its call number `left` that changes names or reaches the disk
    def wrapped(call):
        def counted(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)
        return counted
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, wrapped(getattr(os, name)))
    everything("B")

root, size, delays = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
if delays:
    for number, delay in enumerate(delays):
        folder = root / str(number)
        process = child(forever)
        while not (folder / "text").exists():  # on a busy machine the first write may take longer than the delay
            time.sleep(0.001)
        time.sleep(float(delay))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
else:
    number, status = 0, None
    while status != 0:
        folder = root / str(number)
        everything("A")
        _, status = os.waitpid(child(lambda: crashing(number)), 0)
        number += 1
"""


def crash(root: Path, size: int, *delays: float) -> list[Path]:
    """Run CRASH; the folders it left, one a kill, in order: after each delay, else before every step."""
    words = [str(word) for word in (root, size, *delays)]
    run = subprocess.run([sys.executable, "-c", CRASH, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return sorted(root.iterdir(), key=lambda folder: int(folder.name))


def test_a_kill_before_any_step_of_a_write_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    marks: dict[str, list[str]] = {"text": [], "tree": [], "model": []}
    folders = crash(tmp_path, 1000)
    assert len(folders) > 12
    for folder in folders:
        text = (folder / "text").read_text()
        assert text in ("A" * 1000, "B" * 1000)
        marks["text"].append(text[0])
        trees = [path.name[-1] for path in sorted(folder.glob("tree-*"))]
        assert all((folder / f"tree-{mark}" / name).read_text() == mark * 10 for mark in trees for name in "ab")
        marks["tree"].append(trees[-1])
        try:
            model = load_artifact(folder / "model", "tokenizer")
            assert torch.equal(model.tensors["w"], torch.full((1000,), float(ord(model.description["mark"]))))
            marks["model"].append(model.description["mark"])
        except UserError as error:  # new weights beside the old description
            assert "has fingerprint" in str(error)
            marks["model"].append("refused")
    assert [mark for mark, _ in itertools.groupby(marks["text"])] == ["A", "B"]
    assert [mark for mark, _ in itertools.groupby(marks["tree"])] == ["A", "B"]
    assert [mark for mark, _ in itertools.groupby(marks["model"])] == ["A", "refused", "B"]
    assert not list(folders[-1].glob(".*"))


def test_a_kill_at_any_moment_leaves_no_partial_file(tmp_path: Path) -> None:
    delays = [random.Random(i).uniform(0.01, 0.15) for i in range(16)]
    texts = [folder / "text" for folder in crash(tmp_path, 3_000_000, *delays)]
    found = [path.read_text() for path in texts]
    for text in found:
        assert len(text) == 3_000_000 and len(set(text)) == 1


# ---- fingerprints ----


def test_the_fingerprint_is_of_fixed_form_and_value() -> None:
    """Fixed for good: codes and priors on people's disks name it."""
    assert fingerprint({}) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    found = fingerprint({"w": torch.tensor([[1.0, 2.0]]), "n": torch.tensor(3)})
    assert re.fullmatch("[0-9a-f]{64}", found)
    expected = hashlib.sha256(b"'n' torch.int64 ()\n" + struct.pack("<q", 3))
    expected.update(b"'w' torch.float32 (1, 2)\n" + struct.pack("<ff", 1, 2))
    assert found == expected.hexdigest()


@given(st.permutations(sorted(weights())), st.integers(0, 99))
def test_the_fingerprint_ignores_order_layout_and_gradients(names: list[str], seed: int) -> None:
    tensors = weights(seed)
    changed = {name: tensors[name].clone().requires_grad_() for name in names}
    changed["b.weight"] = tensors["b.weight"].T.contiguous().T
    assert fingerprint(changed) == fingerprint(tensors) != fingerprint(weights(seed + 1))


@given(st.sampled_from(TYPES[:-1]), st.integers(0, 7), st.integers(0, 7), st.integers(0, 4))
def test_the_fingerprint_changes_with_any_bit(dtype: torch.dtype, byte: int, bit: int, item: int) -> None:
    tensor = torch.arange(5).to(dtype)
    flipped = tensor.clone()
    raw = flipped.view(torch.uint8)
    raw[item * dtype.itemsize + byte % dtype.itemsize] ^= 1 << bit
    assert fingerprint({"a": tensor}) != fingerprint({"a": flipped})


def test_the_fingerprint_changes_with_name_type_and_shape() -> None:
    zeros = torch.zeros(2, 6)
    variants = [{"a": zeros}, {"b": zeros}, {"a": zeros.reshape(3, 4)}, {"a": zeros.reshape(12)}, {"a": -zeros}]
    variants += [{"a": zeros.to(torch.int32)}, {"a": zeros.half()}, {"a": zeros.bfloat16()}, {"a": zeros, "b": zeros}]
    variants += [{"a": zeros[:1], "b": zeros[1:]}, {"a": zeros, "empty": zeros[:0]}, {}]
    # A name that imitates the header of a further tensor.
    one, two = torch.tensor([65], dtype=torch.uint8), torch.tensor([66], dtype=torch.uint8)
    variants += [{"a": one, "b": two}, {"a torch.uint8 (1,)\nAb": two}, {"a' torch.uint8 (1,)\nA'b": two}]
    assert len({fingerprint(v) for v in variants}) == len(variants)


# ---- model folders ----


def test_a_model_folder_round_trips(tmp_path: Path) -> None:
    mark = save_artifact(tmp_path / "m", "tokenizer", {"grid": [8, 8], "name": "é"}, weights())
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == sorted([DESCRIPTION, WEIGHTS])
    found = load_artifact(tmp_path / "m", "tokenizer")
    assert found.description == {"grid": [8, 8], "name": "é"} and found.fingerprint == mark == fingerprint(weights())
    assert {k: v.tolist() for k, v in found.tensors.items()} == {k: v.tolist() for k, v in weights().items()}
    written = read_json(tmp_path / "m" / DESCRIPTION)
    assert written["kind"] == "tokenizer" and written["version"] == vqgen.__version__
    assert written["fingerprint"] == mark


def test_any_changed_bit_of_the_weights_is_noticed(tmp_path: Path) -> None:
    """Only bits of the header that say nothing about a tensor may differ, and then the tensors are the same."""
    mark = save_artifact(tmp_path, "prior", {}, weights())
    whole = (tmp_path / WEIGHTS).read_bytes()
    harmless = []
    for offset in range(len(whole)):
        raw = bytearray(whole)
        raw[offset] ^= 1 << offset % 8
        (tmp_path / WEIGHTS).write_bytes(raw)
        try:
            assert load_artifact(tmp_path, "prior").fingerprint == mark
            harmless.append(offset)
        except UserError as error:
            assert str(tmp_path / WEIGHTS) in str(error) and "\n" not in str(error)
    first, end = whole.index(b"{"), whole.index(b"}")
    assert len(harmless) < 30 and all(first < offset < end for offset in harmless), harmless


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.99])
def test_truncated_files_are_noticed(tmp_path: Path, share: float) -> None:
    for name in (WEIGHTS, DESCRIPTION):
        save_artifact(tmp_path, "prior", {"a": 1}, weights())
        raw = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(raw[: int(share * len(raw))])
        assert str(tmp_path / name) in refusal(load_artifact, tmp_path, "prior")


def test_what_is_no_model_folder_is_named(tmp_path: Path) -> None:
    save_artifact(tmp_path / "t", "tokenizer", {}, weights())
    assert (
        refusal(load_artifact, tmp_path / "t", "prior")
        == f"{tmp_path / 't'} holds a tokenizer, where a prior is needed"
    )
    assert (
        refusal(load_artifact, tmp_path / "no", "prior")
        == f"{tmp_path / 'no'} is not a prior folder: it does not exist; give the run or model folder of a prior"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    expected = f"{empty} is not a prior folder: it holds no {DESCRIPTION}; give the run or model folder of a prior"
    assert refusal(load_artifact, empty, "prior") == expected
    (empty / "checkpoints").mkdir()
    assert refusal(load_artifact, empty, "prior").endswith("its training has not finished")
    assert refusal(load_artifact, tmp_path / "t" / DESCRIPTION, "prior").startswith(
        f"{tmp_path / 't' / DESCRIPTION} is"
    )
    (tmp_path / "t" / WEIGHTS).unlink()
    assert refusal(load_artifact, tmp_path / "t", "tokenizer") == f"{tmp_path / 't' / WEIGHTS} does not exist"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"1" * 5000, b'{"kind": NaN'])
def test_a_description_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    save_artifact(tmp_path, "prior", {}, weights())
    (tmp_path / DESCRIPTION).write_bytes(content)
    message = refusal(load_artifact, tmp_path, "prior")
    assert message.startswith(str(tmp_path / DESCRIPTION)) and message.endswith("; restore or remove it")


def test_a_folder_where_a_file_belongs_is_one_line(tmp_path: Path) -> None:
    assert refusal(read_json, tmp_path).startswith(f"{tmp_path} cannot be read as JSON")
    assert refusal(read_tensors, tmp_path).startswith(f"{tmp_path} is not a whole safetensors file")


def test_saving_again_replaces_the_model(tmp_path: Path) -> None:
    save_artifact(tmp_path, "prior", {"v": 1}, weights(1))
    save_artifact(tmp_path, "prior", {"v": 2}, weights(2))
    found = load_artifact(tmp_path, "prior")
    assert found.description == {"v": 2} and found.fingerprint == fingerprint(weights(2))
    assert json.loads((tmp_path / DESCRIPTION).read_text())["v"] == 2


def test_what_is_written_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:  # another thread would write with what it is set to meanwhile
            patch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
            write_tensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
            write_json(tmp_path / "b.json", {})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"a.safetensors": 0o640, "b.json": 0o640}


def test_the_weights_say_what_they_are_and_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """safetensors writes metadata in random order; `name`, `version` and `fingerprint` change no fingerprint."""
    files = set()
    for n in range(8):
        mark = save_artifact(tmp_path / str(n), "prior", {}, weights())
        files.add((tmp_path / str(n) / WEIGHTS).read_bytes())
    assert len(files) == 1 and mark == fingerprint(weights())
    with safe_open(tmp_path / "0" / WEIGHTS, "pt") as file:
        known = {"format": "pt", "name": "vqgen prior", "version": vqgen.__version__, "fingerprint": mark}
        assert file.metadata() == known
    # Files of version 0.1, or of other writers, say less; what they say has to be right.
    for metadata, loads in (
        ({"format": "pt"}, True),
        (None, True),
        ({**known, "fingerprint": "0" * 64}, False),
        ({**known, "name": "vqgen tokenizer"}, False),
        ({key: value for key, value in known.items() if key != "version"}, False),
    ):
        save_file(weights(), tmp_path / "0" / WEIGHTS, metadata=metadata)
        if loads:
            assert load_artifact(tmp_path / "0", "prior").fingerprint == mark
        else:
            assert str(tmp_path / "0" / WEIGHTS) in refusal(load_artifact, tmp_path / "0", "prior")
