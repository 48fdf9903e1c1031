"""The output folder of vqgen-sample: forged lists, links, damaged images."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import tree

import vqgen.sampling.sample as program
from vqgen.errors import UsageError
from vqgen.sampling import output
from vqgen.tokenizer.reconstruction import write_png_atomic

PRIOR = Path(__file__).parent / "data" / "version-0.1" / "prior"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished samples."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    assert program.main(["--model", str(PRIOR), "--n", "4", "--device", "cpu", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "samples")
    return tmp_path / "samples"


@pytest.fixture
def sample(cli: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    return lambda *words: cli(program.main, "--model", PRIOR, "--device", "cpu", "--output", folder, *words)


def change(folder: Path, **values: Any) -> None:
    path = folder / "samples.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_more_images_than_a_list_is_read_of_are_refused(sample, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(output, "MAX_TEXT", 4000)
    result = sample("--n", 40, "--output", tmp_path / "many")
    assert result.code == 2 and "--n: " in result.err and not (tmp_path / "many").exists()
    most = int(result.err.split("draw ")[1].split()[0])
    assert sample("--n", most, "--output", tmp_path / "many").code == 0
    size = (tmp_path / "many" / "samples.json").stat().st_size
    assert 4000 - size / most < size <= 4000


@pytest.mark.parametrize("layout", ["flat", "folders"])
@pytest.mark.parametrize("order", [1, -1])
def test_the_size_of_a_list_is_that_of_all_its_texts(tmp_path: Path, monkeypatch, layout: Any, order: int) -> None:
    """Whether the long ones come first or last."""
    texts = [["a" * 200, "é\n" * 100, *"bcdef", -1][place] for place in range(8)][::order]
    labels, n = [0, 2, -1], 30
    names = output.Names(layout, labels, ["x", "y", "a long name"][::order])
    kept = {"labels": labels, "class_names": ["x", "y", "a long name"][::order]}
    about = {"n": n, "layout": layout, **kept, "conditions": {"text": texts, "source": "0" * 64}}
    for index in range(n):
        (tmp_path / names.file(index)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / names.file(index)).touch()

    def written(count: int) -> int:
        output.finish(tmp_path, names, {**about, "n": count})
        return (tmp_path / "samples.json").stat().st_size

    for count in (1, 2, 5, 8, 17, n):
        monkeypatch.setattr(output, "MAX_TEXT", written(count))
        output.check_list(names, {**about, "n": count})
        monkeypatch.setattr(output, "MAX_TEXT", written(count) - 1)
        with pytest.raises(UsageError, match=f"--n: .* of {count} .*; draw {count - 1} at most"):
            output.check_list(names, {**about, "n": count})


def test_long_prompts_at_the_beginning_count(monkeypatch) -> None:
    """The list has them twice, as conditions and with their images: a million bytes each time."""
    names = output.Names("flat", [-1], None)
    texts = ["a" * 1000] * 1000 + ["b"] * 1000
    about = {"n": 2000, "layout": "flat", "labels": [-1], "class_names": None, "conditions": {"text": texts}}
    monkeypatch.setattr(output, "MAX_TEXT", 2_000_000)
    with pytest.raises(UsageError, match="--n: "):
        output.check_list(names, about)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_forged_list_removes_nothing_but_samples(sample, folder: Path, overwrite: list[str]) -> None:
    victims = [folder.parent / "victim.txt", folder / "notes.txt", folder / "images" / "cat.png", folder / "a.png"]
    for path in victims:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    names = ["../victim.txt", str(victims[0]), "notes.txt", "images/cat.png", "a.png", "images", "..", "", "/"]
    change(folder, former=names, images=[{"file": name} for name in names])
    ended = sample("--n", 4, *overwrite)
    assert ended.code == 0, ended.err
    assert all(path.read_text() == "mine" for path in victims)
    assert (folder / "00003.png").exists() and json.loads((folder / "samples.json").read_text())["n"] == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n", 10**12), ("n", -1), ("n", 4.5), ("n", "4"), ("layout", "round"), ("labels", []), ("labels", ["0"]),
        ("labels", [7]), ("labels", [-2]), ("class_names", "ab"), ("class_names", [1]), ("former", "00000.png"),
        ("former", [1]), ("images", {"file": "x"}),
    ],
)  # fmt: skip
def test_a_list_with_impossible_values_is_refused(sample, folder: Path, key: str, value: Any) -> None:
    change(folder, **{key: value})
    before = tree(folder)
    for words in ([], ["--overwrite"]):
        ended = sample("--n", 4, *words)
        assert ended.code == 1 and str(folder / "samples.json") in ended.err
        assert len(ended.err.strip().splitlines()) == 1 and tree(folder) == before


def test_links_in_the_folder_are_refused(sample, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "elsewhere" / "boot")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    for words in (["--layout", "folders", "--overwrite"], ["--overwrite"], []):
        ended = sample("--n", 4, *words)
        assert ended.code == 2 and "the link images" in ended.err
    (folder / "images").unlink()
    (folder / "00002.png").unlink()
    (folder / "00002.png").symlink_to(tmp_path / "elsewhere" / "boot" / "00002.png")
    for words in (["--seed", 1, "--overwrite"], []):
        ended = sample("--n", 4, *words)
        assert ended.code == 2 and "the link 00002.png" in ended.err
    assert tree(tmp_path / "elsewhere") == before


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def unfinish(folder: Path) -> None:
    """Make the run one that was interrupted before its first image."""
    about = json.loads((folder / "samples.json").read_text())
    del about["images"], about["grid"]  # and with them the checksums
    (folder / "samples.partial.json").write_text(json.dumps(about))
    (folder / "samples.json").unlink()
    (folder / "00000.png").unlink()


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "flipped":
        data[len(data) // 2] ^= 4
    kinds = {"emptied": b"", "cut off": data[: len(data) // 2], "text": b"no image", "flipped": data}
    kinds["longer"] = data + b"more"  # behind its last chunk
    kinds["no pixels"] = data[:33] + data[-12:]  # signature and IHDR, then IEND
    for name, count in (("too few", 9), ("too many", 10**6)):
        pixels = b"IDAT" + zlib.compress(bytes(count))
        checksum = zlib.crc32(pixels).to_bytes(4, "big")
        kinds[name] = data[:33] + (len(pixels) - 4).to_bytes(4, "big") + pixels + checksum + data[-12:]
    path.write_bytes(kinds[kind])


DAMAGES = ["emptied", "cut off", "text", "flipped", "no pixels", "too few", "too many", "longer"]


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "partial"])
def test_damaged_images_are_drawn_again(sample, folder: Path, drawn: Path, kind: str, finished: bool) -> None:
    if not finished:
        unfinish(folder)
    elif kind in ("too few", "too many"):
        pytest.skip("a whole image of another checksum is not ours to replace")
    for name in ("00001.png", "grid.png"):
        damage(folder / name, kind)
    ended = sample("--n", 4)
    assert ended.code == 0 and "holds these" not in ended.out
    lines = [line for line in ended.err.splitlines() if "damaged" in line]
    assert len(lines) == 2 and any(str(folder / "00001.png") in line for line in lines)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        p.name: p.read_bytes() for p in drawn.iterdir()
    }
    assert "holds these 4 images already" in sample("--n", 4).out


def test_fewer_images_than_there_are_lose_none(sample, folder: Path, drawn: Path) -> None:
    damage(folder / "00000.png", "emptied")
    assert sample("--n", 2).code == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        p.name: p.read_bytes() for p in drawn.iterdir()
    }


@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
def test_another_image_in_the_place_of_a_sample_is_nobodys_to_replace(sample, folder: Path, older: bool) -> None:
    """Known by its checksum, or by its size where the list is of an earlier version and has none."""
    side = 16
    if older:
        images = json.loads((folder / "samples.json").read_text())["images"]
        change(folder, images=[{key: image[key] for key in ("file", "label", "class")} for image in images])
        assert "holds these 4 images already" in sample("--n", 4).out
        side = 20
    write_png_atomic(folder / "00002.png", torch.full((1, side, side), 7, dtype=torch.uint8))
    before = tree(folder)
    ended = sample("--n", 4)
    assert ended.code == 2 and "00002.png" in ended.err and "--overwrite" in ended.err and tree(folder) == before


@pytest.mark.parametrize("mode", ["P", "1", "LA", "RGBA", "I;16"])
def test_a_picture_of_another_kind_in_an_unfinished_run_is_not_ours(sample, folder: Path, mode: str) -> None:
    """Of the size of the samples, but vqgen writes grey and colour of 8 bits alone."""
    unfinish(folder)
    Image.new(mode, (16, 16)).save(folder / "00002.png")
    before = tree(folder)
    ended = sample("--n", 4)
    assert ended.code == 2 and "00002.png" in ended.err and "--overwrite" in ended.err and tree(folder) == before


def test_what_a_kill_left_beside_finished_samples_goes(sample, folder: Path) -> None:
    left, mine = folder / ".samples.json.vqgen-0123456789abcdef.part", folder / ".thesis.part"
    left.mkdir()
    mine.touch()
    assert "holds these 4 images already" in sample("--n", 4).out
    assert not left.exists() and mine.exists()
