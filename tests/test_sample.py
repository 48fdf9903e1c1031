"""vqgen-sample and the pipeline below it: which images, in which files, and what is refused."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import SAMPLE, run, run_two, tree
from torchvision.io import decode_image

import vqgen.sampling.sample as program
from vqgen import __version__
from vqgen.errors import UsageError, UserError
from vqgen.prior.model import Prior, PriorConfig, Vocabulary
from vqgen.sampling.logits import SamplingSettings
from vqgen.sampling.pipeline import Generator, find_device, find_model
from vqgen.tokenizer.layers import ModelConfig
from vqgen.tokenizer.model import Tokenizer, TokenizerConfig
from vqgen.tokenizer.pixels import to_uint8
from vqgen.tokenizer.quantize import QuantizerConfig

NAMES = ["shirt", "shoe", "bag"]


def make_model(folder: Path, classes=3, channels=3, seed=0, label_dropout=0.1) -> Path:
    """A random prior of 2x3 codes with its tokenizer, images 4x6."""
    torch.manual_seed(seed)
    architecture = ModelConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    tokenizer = Tokenizer(
        TokenizerConfig([4, 6], channels, architecture, QuantizerConfig(codebook_size=16, code_dim=4))
    )
    mark = tokenizer.save(folder / "made-of")
    config = PriorConfig(dim=32, layers=2, heads=2)
    vocabulary, names = Vocabulary(16, 1, (2, 3), classes), NAMES[:classes] or None
    prior = Prior(config, vocabulary, (channels, 4, 6), names, mark, label_dropout)
    with torch.no_grad():
        prior.backbone.lm_head.weight.mul_(10)  # so that classes differ
    prior.save(folder, folder / "made-of")
    shutil.rmtree(folder / "made-of")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("conditional"))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("unconditional"), classes=0, channels=1)


@pytest.fixture
def sample(cli, model, tmp_path) -> Callable:
    """Call vqgen-sample with the model and `tmp_path/samples`."""
    return lambda *words: cli(program.main, "--model", model, "--output", tmp_path / "samples", *words)


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png") if path.name != "grid.png"}


def about(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


# The generator


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_depends_on_seed_and_index_alone(model, precision):
    generator = Generator.load(model, "cpu", precision)
    settings = SamplingSettings(guidance_scale=2.0)
    whole = generator.sample(range(70), settings=settings, seed=4, batch_size=64)
    assert whole.images.shape == (70, 3, 4, 6) and whole.images.dtype == torch.uint8
    assert whole.labels.tolist() == [i % 3 for i in range(70)]
    for indices, batch_size in [(range(8), 1), (range(20), 7), (range(63, 70), 64), ([69, 3], 2)]:
        part = generator.sample(indices, settings=settings, seed=4, batch_size=batch_size)
        assert torch.equal(part.codes, whole.codes[list(indices)])
        assert torch.equal(part.images, whole.images[list(indices)])
    other = generator.sample(range(70), settings=settings, seed=5)
    assert not (other.codes == whole.codes).flatten(1).all(1).any()


def test_images_of_one_class_differ_and_so_do_the_classes(model):
    generator = Generator.load(model, "cpu", "fp32")
    shoes = generator.sample(range(30), [1] * 30)
    assert len({codes.numpy().tobytes() for codes in shoes.codes}) == 30
    bags = generator.sample(range(30), [2] * 30)
    assert not torch.equal(shoes.codes, bags.codes)


@pytest.mark.parametrize("size", [[8, 8], [28, 28], [32, 32]])
def test_decoding_an_image_does_not_depend_on_the_batch(model, size):
    torch.manual_seed(0)
    architecture = ModelConfig(width=32, multipliers=[1, 2, 4])
    tokenizer = Tokenizer(TokenizerConfig(size, 3, architecture)).eval()
    generator = Generator(Prior.load(model), tokenizer, torch.device("cpu"))
    codes = torch.randint(1024, (9, *tokenizer.grid), generator=torch.Generator().manual_seed(0))
    whole = generator.decode(codes)
    assert torch.equal(torch.cat([generator.decode(codes[:1]), generator.decode(codes[1:7])]), whole[:7])
    assert (whole.int() - to_uint8(tokenizer.decode(codes)).int()).abs().max() <= 1
    assert generator.decode(codes[:0]).shape == (0, 3, *size)


def test_only_parameters_are_cast(model):
    generator = Generator.load(model, "cpu", "bf16")
    assert {p.dtype for p in generator.prior.backbone.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in generator.prior.backbone.buffers() if b.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in generator.tokenizer.parameters()} == {torch.float32}
    assert generator.precision == "bf16"


def test_sampling_leaves_the_model_folder_alone(model):
    before = tree(model)
    Generator.load(model, "cpu", "bf16").sample(range(2))
    assert tree(model) == before


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path):
    mine, other = make_model(tmp_path / "mine"), make_model(tmp_path / "other", seed=1)
    shutil.rmtree(mine / "tokenizer")
    shutil.copytree(other / "tokenizer", mine / "tokenizer")
    expected, found = (json.loads((d / "tokenizer" / "vqgen.json").read_text())["fingerprint"] for d in (other, mine))
    assert expected == found  # the copy is whole: it is only another one
    wanted = json.loads((mine / "vqgen.json").read_text())["tokenizer_fingerprint"]
    with pytest.raises(UserError) as error:
        Generator.load(mine)
    assert found[:12] in str(error.value) and wanted[:12] in str(error.value)


def test_labels_are_checked(model):
    generator = Generator.load(model, "cpu")
    with pytest.raises(UsageError, match="--class: found 3, but the model has 3 classes"):
        generator.sample([0], [3])
    with pytest.raises(ValueError, match="1 labels for 2 indices"):
        generator.sample([0, 1], [1])
    assert generator.sample([], []).images.shape == (0, 3, 4, 6)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta"):
        with pytest.raises(UsageError, match=f"--device: found {name}, expected auto"):
            find_device(name)
    with pytest.raises(UsageError, match="torch sees"):
        find_device("cuda:99")


def test_which_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQGEN_MODEL", raising=False)
    with pytest.raises(UsageError, match="--model: not given"):
        find_model(None)
    Path("runs/demo/prior").mkdir(parents=True)
    assert find_model(None) == Path("runs/demo/prior")
    monkeypatch.setenv("VQGEN_MODEL", "elsewhere")
    assert find_model(None) == Path("elsewhere")
    assert find_model(Path("named")) == Path("named")


# The program


def test_files_and_what_samples_json_says(sample, model, tmp_path):
    result = sample("--n", 7, "--batch-size", 3, "--temperature", 0.9, "--seed", 11, "--precision", "fp32")
    assert result.code == 0, result.err
    folder = tmp_path / "samples"
    assert {p.name for p in folder.iterdir()} == {f"{i:05d}.png" for i in range(7)} | {"grid.png", "samples.json"}
    assert str(folder / "grid.png") in result.out and "images/s" in result.out
    said = about(folder)
    prior = json.loads((model / "vqgen.json").read_text())
    assert said["prior_fingerprint"] == prior["fingerprint"]
    assert said["tokenizer_fingerprint"] == prior["tokenizer_fingerprint"]
    assert said["version"] == __version__ and said["seed"] == 11 and said["n"] == 7
    assert (said["precision"], said["device"]) == ("fp32", find_device("auto").type)
    assert said["settings"] == {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "guidance_scale": 1.0}
    assert said["class_names"] == NAMES
    assert said["images"][4] == {"file": "00004.png", "label": 1, "class": "shoe"}
    # samples.json is enough to draw the images again.
    settings, labels = SamplingSettings(**said["settings"]), [image["label"] for image in said["images"]]
    again = Generator.load(model, "auto", said["precision"]).sample(range(7), labels, settings, said["seed"])
    for image, entry in zip(again.images, said["images"]):
        assert torch.equal(decode_image(str(folder / entry["file"])), image)


def test_classes_are_drawn_in_turn(sample, tmp_path):
    assert sample("--n", 5, "--class", "2", "SHOE").code == 0
    assert [image["class"] for image in about(tmp_path / "samples")["images"]] == ["bag", "shoe", "bag", "shoe", "bag"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--class", "shoes"], ["no class 'shoes'", "did you mean 'shoe'?"]),
        (["--class", "SHIRTT"], ["did you mean 'shirt'?"]),
        (["--class", "zebra"], ["no class 'zebra'", "shirt, shoe, bag"]),
        (["--class", "3"], ["--class: found 3", "0 to 2"]),
        (["--class", "-1"], ["--class: found -1", "0 to 2"]),
        (["--n", "0"], ["--n: found 0"]),
        (["--batch-size", "0"], ["--batch-size: found 0"]),
        (["--columns", "0"], ["--columns: found 0"]),
        (["--seed", "-1"], ["--seed: found -1"]),
        (["--top-p", "0"], ["--top-p: found 0"]),
        (["--temperature", "-1"], ["--temperature: found -1"]),
        (["--device", "tpu"], ["--device: found tpu"]),
        (["--model", "nowhere"], ["nowhere"]),
    ],
    ids=" ".join,
)
def test_wrong_options_are_one_line_and_write_nothing(sample, tmp_path, words, parts):
    result = sample(*words)
    assert result.code == (1 if "nowhere" in words else 2)
    assert len(result.err.strip().splitlines()) == 1, result.err
    for part in parts:
        assert part in result.err
    assert not (tmp_path / "samples").exists()


def test_an_unconditional_model(cli, unconditional, tmp_path):
    words = ["--model", unconditional, "--output", tmp_path / "samples", "--n", 4]
    for more, part in [(["--class", "1"], "--class: found 1"), (["--guidance-scale", 2], "--guidance-scale: found 2")]:
        result = cli(program.main, *words, *more)
        assert result.code == 2 and part in result.err and "unconditional" in result.err
    assert cli(program.main, *words).code == 0
    assert about(tmp_path / "samples")["images"][1] == {"file": "00001.png", "label": -1, "class": None}
    assert decode_image(str(tmp_path / "samples" / "00000.png")).shape == (1, 4, 6)


def test_names_come_before_indices(model):
    prior = Prior.load(model)
    prior.class_names = ["2", "0", "1"]
    assert program.find_classes(["2", "1"], prior) == [0, 2]
    assert program.find_classes(None, prior) == [0, 1, 2]


@pytest.mark.parametrize(
    ("n", "words", "rows", "columns"),
    [
        (7, [], 3, 3),  # a column a class
        (7, ["--class", "1"], 3, 3),  # a square
        (7, ["--columns", "5"], 2, 5),
        (2, [], 1, 2),
        (103, [], 33, 3),  # whole rows of at most 100
    ],
)
def test_the_grid(sample, tmp_path, n, words, rows, columns):
    assert sample("--n", n, *words).code == 0
    folder = tmp_path / "samples"
    grid = decode_image(str(folder / "grid.png"))
    assert grid.shape == (3, rows * 6 + 2, columns * 8 + 2)
    first, below = (decode_image(str(folder / f"{i:05d}.png")) for i in (0, columns if rows > 1 else 1))
    assert torch.equal(grid[:, 2:6, 2:8], first)
    left, top = (2, 8) if rows > 1 else (10, 2)
    assert torch.equal(grid[:, top : top + 4, left : left + 6], below)


def test_files_of_nobodys_run_are_not_overwritten(sample, tmp_path):
    (folder := tmp_path / "samples").mkdir()
    for name in ("00000.png", "grid.png"):
        (folder / name).write_bytes(b"mine")
        result = sample("--n", 1, "--overwrite")
        assert result.code == 2 and name in result.err and len(result.err.splitlines()) == 1
        assert (folder / name).read_bytes() == b"mine" and len(list(folder.iterdir())) == 1
        (folder / name).unlink()


def test_guidance_needs_images_without_a_class(cli, tmp_path):
    model = make_model(tmp_path / "model", label_dropout=0.0)
    words = ["--model", model, "--n", 1, "--output", tmp_path / "samples"]
    result = cli(program.main, *words, "--guidance-scale", 2)
    assert result.code == 2 and "--label-dropout 0" in result.err
    assert cli(program.main, *words).code == 0


def test_a_folder_with_files_is_refused_unless_overwritten(sample, tmp_path):
    folder = tmp_path / "samples"
    assert sample("--n", 9).code == 0
    before = tree(folder)
    result = sample("--n", 4)
    assert result.code == 2 and "the samples of another run" in result.err and "--overwrite" in result.err
    assert tree(folder) == before
    (folder / "00100.png").write_bytes(b"mine")
    (folder / "notes.txt").write_text("mine")
    assert sample("--n", 4, "--overwrite").code == 0
    names = {f"{i:05d}.png" for i in range(4)} | {"grid.png", "samples.json"}
    assert {p.name for p in folder.iterdir()} == names | {"00100.png", "notes.txt"}
    assert about(folder)["n"] == 4


def test_other_files_are_refused_and_survive(sample, tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "00001.png").write_bytes(b"a photograph")
    result = sample("--n", 1)
    assert result.code == 2 and "other files (00001.png)" in result.err
    assert sample("--n", 1, "--overwrite").code == 0
    assert (folder / "00001.png").read_bytes() == b"a photograph"


def test_an_output_that_is_a_file(cli, model, tmp_path):
    (tmp_path / "file").touch()
    result = cli(program.main, "--model", model, "--output", tmp_path / "file")
    assert result.code == 2 and "is a file" in result.err


def test_removing_that_is_cut_off_loses_no_list(sample, tmp_path, monkeypatch):
    folder, unlink = tmp_path / "samples", Path.unlink
    assert sample("--n", 9).code == 0

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00004.png":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)
    result = sample("--n", 2, "--overwrite")
    assert result.code == 1 and "cannot remove" in result.err and "Permission denied" in result.err
    assert not (folder / "samples.json").exists()  # it would name images that are gone
    monkeypatch.undo()
    assert sample("--n", 2, "--overwrite").code == 0
    assert {p.name for p in folder.iterdir()} == {"00000.png", "00001.png", "grid.png", "samples.json"}


def die_while_writing() -> None:
    """SIGKILL when half of the sixth PNG is on disk."""
    import vqgen.tokenizer.reconstruct as reconstruct

    write, written = reconstruct.Path.write_bytes, []

    def write_bytes(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) < 6:
            return write(path, data)
        write(path, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    reconstruct.Path.write_bytes = write_bytes


def test_killed_midway_no_png_is_half_written(sample, model, tmp_path):
    folder = tmp_path / "samples"
    ended = run(SAMPLE, "--model", model, "--output", folder, "--n", 9, "--batch-size", 4, hook=die_while_writing)
    assert ended.code == -signal.SIGKILL
    assert sorted(images(folder)) == [f"{i:05d}.png" for i in range(5)]
    for name in images(folder):
        assert decode_image(str(folder / name)).shape == (3, 4, 6)
    assert not (folder / "samples.json").exists()
    result = sample("--n", 3)
    assert result.code == 2 and "a run that did not end" in result.err
    assert sample("--n", 3, "--overwrite").code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "grid.png",
        "samples.json",
    ]


def test_two_processes_write_what_one_writes(sample, model, tmp_path):
    words = ["--model", model, "--n", 9, "--seed", 3, "--precision", "fp32", "--guidance-scale", 1.5]
    two = tmp_path / "two"
    for ended in run_two(SAMPLE, *words, "--batch-size", 2, "--device", "cpu", "--output", two):
        ended.ok()
    assert sample(*words, "--device", "cpu").code == 0
    one = tmp_path / "samples"
    assert images(two) == images(one) and len(images(one)) == 9
    assert (two / "grid.png").read_bytes() == (one / "grid.png").read_bytes()
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
    assert {**about(two), "batch_size": 0} == {**about(one), "batch_size": 0}
    for ended in run_two(SAMPLE, *words, "--device", "cpu", "--output", two):
        assert re.search("the samples of another run", ended.refused(2, "--overwrite"))


def test_settings_reach_the_images(sample, tmp_path):
    folder, found = tmp_path / "samples", []
    for words in (
        [],
        ["--temperature", "0"],
        ["--temperature", "3"],
        ["--top-k", "2"],
        ["--top-p", "0.3"],
        ["--min-p", "0.5"],
        ["--guidance-scale", "4"],
        ["--seed", "1"],
    ):
        assert sample("--n", 12, "--overwrite", *words).code == 0
        found.append(tuple(images(folder).values()))
    assert len(set(found)) == len(found)
    assert len(set(found[1])) == 3  # greedy: one image a class
