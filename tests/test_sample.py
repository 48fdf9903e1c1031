"""vqgen-sample and the pipeline below it: which images, in which files, and what is refused."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import SAMPLE, run, run_together, tree
from torchvision.io import decode_image

import vqgen.sampling.sample as program
from vqgen import __version__
from vqgen.config import as_dict
from vqgen.devices import find_device
from vqgen.errors import UsageError, UserError
from vqgen.files import checksum
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import DEFAULT, Generator, find_model
from vqgen.sampling.known import Known
from vqgen.sampling.output import Names
from vqgen.sampling.oversample import candidates_of
from vqgen.sampling.settings import SamplingSettings
from vqgen.tokenizer.data.pixels import to_uint8
from vqgen.tokenizer.data.sources import open_source
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.tokenizer.reconstruction import write_png_atomic

NAMES = ["shirt", "shoe", "bag"]


def make_model(folder: Path, classes=3, channels=3, seed=0, label_dropout=0.1, unlabelled=False) -> Path:
    """A random prior of 2x3 codes with its tokenizer, images 4x6."""
    torch.manual_seed(seed)
    architecture = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    tokenizer = Tokenizer(TokenizerConfig([4, 6], channels, architecture, VQConfig(codebook_size=16, code_dim=4)))
    mark = tokenizer.save(folder / "made-of")
    config = PriorConfig(dim=32, layers=2, heads=2)
    part = Classes(classes, NAMES[:classes] or None, label_dropout, unlabelled)
    prior = Prior(config, Conditioning(Vocabulary(16, 1, (2, 3)), [part]), (channels, 4, 6), mark)
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


def listed(folder: Path, file: str, label: int, name: str | None) -> dict:
    """What samples.json says of an image."""
    return {"file": file, "label": label, "class": name, "sha256": checksum(folder / file)}


# The generator


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_image_depends_on_seed_and_index_alone(model, precision):
    generator = Generator.load(model, "cpu", precision)
    settings = SamplingSettings(guidance_scale=2.0)
    whole = generator.draw(range(70), settings=settings, seed=4, batch_size=64)
    assert whole.images.shape == (70, 3, 4, 6) and whole.images.dtype == torch.uint8
    assert whole.labels.tolist() == [i % 3 for i in range(70)]
    for indices, batch_size in [(range(8), 1), (range(20), 7), (range(63, 70), 64), ([69, 3], 2)]:
        part = generator.draw(indices, settings=settings, seed=4, batch_size=batch_size)
        assert torch.equal(part.codes, whole.codes[list(indices)])
        assert torch.equal(part.images, whole.images[list(indices)])
    other = generator.draw(range(70), settings=settings, seed=5)
    assert not (other.codes == whole.codes).flatten(1).all(1).any()


def test_images_of_one_class_differ_and_so_do_the_classes(model):
    generator = Generator.load(model, "cpu", "fp32")
    shoes = generator.draw(range(30), {"class": [1] * 30})
    assert len({codes.numpy().tobytes() for codes in shoes.codes}) == 30
    bags = generator.draw(range(30), {"class": [2] * 30})
    assert not torch.equal(shoes.codes, bags.codes)


@pytest.mark.parametrize("size", [[8, 8], [28, 28], [32, 32]])
def test_decoding_an_image_does_not_depend_on_the_batch(model, size):
    torch.manual_seed(0)
    architecture = VQGANConfig(width=32, multipliers=[1, 2, 4])
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
    generator.prior(torch.zeros(1, 2, dtype=torch.long))  # builds the network, which has buffers
    assert {p.dtype for p in generator.prior.backbone.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in generator.prior.backbone.buffers() if b.is_floating_point()} == {torch.float32}
    assert {p.dtype for p in generator.tokenizer.parameters()} == {torch.float32}
    assert generator.precision == "bf16"


def test_sampling_leaves_the_model_folder_alone(model):
    before = tree(model)
    Generator.load(model, "cpu", "bf16").draw(range(2))
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
        generator.draw([0], {"class": [3]})
    for call in (lambda: generator.draw([0], {"class": []}), lambda: generator.sample(1, classes=[])):
        with pytest.raises(UsageError, match="--class: found no values"):
            call()
    assert generator.draw([]).images.shape == (0, 3, 4, 6)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta"):
        with pytest.raises(UsageError, match=f"--device: found {name}, expected auto"):
            find_device(name)
    with pytest.raises(UsageError, match="torch sees"):
        find_device("cuda:99")


def test_a_description_that_does_not_fit_the_tokenizer_is_refused(tmp_path):
    folder = make_model(tmp_path / "mine")
    about = json.loads((folder / "vqgen.json").read_text())
    (folder / "vqgen.json").write_text(json.dumps({**about, "grid": [3, 2]}))
    with pytest.raises(UserError, match=r"vqgen.json says .* its tokenizer has \(16, 1, \(2, 3\)\)"):
        Generator.load(folder, "cpu")


def test_no_two_classes_share_a_path_and_none_is_too_long():
    names = ["a_b-2", "a_b", "a/b", "A/B", "\N{GRINNING FACE}" * 80, "a_b-3"]
    files = [Names("folders", range(6), names).file(index) for index in range(6)]
    assert len({Path(file).parent.name.casefold() for file in files}) == 6
    assert all(len(part.encode()) < 200 for file in files for part in Path(file).parts)


def test_which_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VQGEN_MODEL", raising=False)
    assert find_model(None) == DEFAULT
    Path("runs/demo/prior").mkdir(parents=True)
    assert find_model(None) == DEFAULT  # nothing is trained there yet
    Path("runs/demo/prior/vqgen.json").write_text("{}")
    assert find_model(None) == Path("runs/demo/prior")
    monkeypatch.setenv("VQGEN_MODEL", "elsewhere")
    assert find_model(None) == Path("elsewhere")
    assert find_model(Path("named")) == Path("named")
    # The models of the package have names; a model of that name in the working directory goes before.
    assert find_model(Path("cifar10")) == DEFAULT
    monkeypatch.setenv("VQGEN_MODEL", "cifar10")
    assert find_model(None) == DEFAULT
    Path("cifar10").mkdir()
    assert find_model(None) == DEFAULT
    Path("cifar10/vqgen.json").write_text("{}")
    assert find_model(None) == Path("cifar10")


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
    assert said["settings"] == as_dict(SamplingSettings(temperature=0.9))
    assert said["class_names"] == NAMES
    assert said["images"][4] == listed(folder, "00004.png", 1, "shoe")
    # samples.json is enough to draw the images again.
    settings, labels = SamplingSettings(**said["settings"]), [image["label"] for image in said["images"]]
    again = Generator.load(model, "auto", said["precision"]).draw(range(7), {"class": labels}, settings, said["seed"])
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
    folder = tmp_path / "samples"
    assert about(folder)["images"][1] == listed(folder, "00001.png", -1, None)
    assert decode_image(str(tmp_path / "samples" / "00000.png")).shape == (1, 4, 6)


def test_names_come_before_indices():
    assert Classes(3, ["2", "0", "1"]).parse(["2", "1"]) == [0, 2]
    classes = Classes(3, ["cats, dogs", "#1", "[a"])
    assert classes.parse(["cats, dogs", "#1", "[a"]) == [0, 1, 2]
    assert classes.parse(["[a,1"]) == [2, 1]
    with pytest.raises(UsageError, match="no class 'dogs'"):
        classes.parse(["0,dogs"])


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


def test_the_grid_of_large_images_has_fewer(sample, tmp_path, monkeypatch):
    monkeypatch.setattr("vqgen.sampling.write_samples.GRID_PIXELS", 7 * 24)
    assert sample("--n", 9).code == 0
    assert decode_image(str(tmp_path / "samples" / "grid.png")).shape == (3, 2 * 6 + 2, 3 * 8 + 2)


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
    with pytest.raises(UsageError, match=r"--class: .*--label-dropout 0"):
        Generator.load(model, "cpu").log_likelihood(torch.zeros(3, 4, 6, dtype=torch.uint8))


def test_images_without_a_class_in_training_do_for_label_dropout(cli, tmp_path):
    model = make_model(tmp_path / "model", label_dropout=0.0, unlabelled=True)
    assert json.loads((model / "vqgen.json").read_text())["unlabelled"] is True
    words = ["--model", model, "--n", 1, "--output", tmp_path / "samples"]
    assert cli(program.main, *words, "--guidance-scale", 2).code == 0
    assert Generator.load(model).sample(2, classes=[-1, 0]).codes.shape == (2, 2, 3)


@pytest.mark.parametrize("option", ["class", "init-image"])
def test_by_default_nothing_that_is_given_is_left_out(sample, tmp_path, option):
    path = tmp_path / "IMAGE.png"
    write_png_atomic(path, torch.zeros(3, 4, 6, dtype=torch.uint8))
    given = [index % 3 for index in range(66)] if option == "class" else [path] * 66
    assert sample(f"--{option}", *given).code == 0
    assert about(tmp_path / "samples")["n"] == 66


def test_classes_with_commas_have_as_many_images_each(sample, tmp_path):
    assert sample("--class", "shoe,bag", "--num-per-class", 2).code == 0
    assert [image["class"] for image in about(tmp_path / "samples")["images"]] == ["shoe", "bag"] * 2


def test_a_folder_with_files_is_refused_unless_overwritten(sample, tmp_path):
    folder = tmp_path / "samples"
    assert sample("--n", 9).code == 0
    before = tree(folder)
    result = sample("--n", 4, "--seed", 1)
    assert result.code == 2 and "the samples of another run (seed 0, now 1)" in result.err
    assert "--overwrite" in result.err
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
    (folder / "00001.png").rename(folder / "vqgen.json")
    for words in ([], ["--overwrite"]):
        result = sample("--n", 1, *words)
        assert result.code == 2 and "other files (vqgen.json)" in result.err and "--overwrite" not in result.err
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("vqgen.json", b"a photograph")]


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
    import vqgen.tokenizer.reconstruction as reconstruct

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
    for words, part in [(["--n", 3], "(n 9, now 3)"), (["--n", 9, "--top-k", 5], "(top k 0, now 5)")]:
        result = sample(*words)
        assert result.code == 2 and "a run that did not end" in result.err and part in result.err
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    result = sample("--n", 9, "--batch-size", 2)
    assert result.code == 0 and "4 images in" in result.out and "(5 were there)" in result.out
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert sample("--n", 9, "--output", tmp_path / "whole").code == 0
    assert images(folder) == images(tmp_path / "whole") and about(folder) == about(tmp_path / "whole")
    assert not (folder / "samples.partial.json").exists()
    assert sample("--n", 3, "--seed", 1, "--overwrite").code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "00000.png",
        "00001.png",
        "00002.png",
        "grid.png",
        "samples.json",
    ]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_write_what_one_writes(sample, model, tmp_path, precision):
    words = ["--model", model, "--n", 9, "--seed", 3, "--precision", precision, "--guidance-scale", 1.5]
    two = tmp_path / "two"
    for ended in run_together(SAMPLE, *words, "--batch-size", 2, "--device", "cpu", "--output", two):
        ended.ok()
    assert sample(*words, "--device", "cpu").code == 0
    one = tmp_path / "samples"
    assert images(two) == images(one) and len(images(one)) == 9
    assert (two / "grid.png").read_bytes() == (one / "grid.png").read_bytes()
    assert {p.name for p in two.iterdir()} == {p.name for p in one.iterdir()}
    assert about(two) == about(one)
    for ended in run_together(SAMPLE, *words, "--temperature", 0.5, "--device", "cpu", "--output", two):
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


def test_a_finished_run_goes_on_to_more_images(sample, tmp_path):
    folder = tmp_path / "samples"
    assert sample("--n", 5).code == 0
    before = tree(folder)
    for n in (5, 2):
        result = sample("--n", n)
        assert result.code == 0 and "holds these 5 images already" in result.out and tree(folder) == before
    (folder / "00003.png").unlink()  # what is missing is drawn, whatever the list says
    assert "1 images in" in sample("--n", 5).out
    assert {name: file[1] for name, file in tree(folder).items()} == {name: file[1] for name, file in before.items()}
    assert sample("--n", 5, "--columns", 5).code == 0
    assert decode_image(str(folder / "grid.png")).shape == (3, 8, 42)
    assert sample("--n", 2, "--columns", 4).code == 0
    assert decode_image(str(folder / "grid.png")).shape == (3, 2 * 6 + 2, 4 * 8 + 2), "of all five"
    (folder / "00006.png").write_bytes(b"mine")
    result = sample("--n", 9)
    assert result.code == 2 and "00006.png, which is not of that run" in result.err
    (folder / "00006.png").unlink()
    assert sample("--n", 9).code == 0 and about(folder)["n"] == 9
    assert sample("--n", 9, "--output", tmp_path / "whole").code == 0
    assert images(folder) == images(tmp_path / "whole")


def test_a_run_of_a_version_with_fewer_settings_goes_on(sample, tmp_path):
    folder = tmp_path / "samples"
    assert sample("--n", 5).code == 0
    found = about(folder)
    for new in ("source_guidance_scale", "guidance_exponent"):
        del found["settings"][new]
    (folder / "samples.json").write_text(json.dumps(found))
    assert "2 images in" in sample("--n", 7).out
    assert about(folder)["settings"]["source_guidance_scale"] == 1


def test_class_folders_are_a_labelled_dataset(sample, tmp_path):
    assert sample("--num-per-class", 3, "--layout", "folders").code == 0
    folder = tmp_path / "samples"
    source = open_source(str(folder / "images"), "all", 0.1)
    assert source.class_names == sorted(NAMES) and len(source.rows) == 9
    assert np.bincount(source.labels).tolist() == [3, 3, 3]
    said = about(folder)
    assert said["images"][4] == listed(folder, "images/shoe/00004.png", 1, "shoe")
    assert sample("--n", 9, "--output", tmp_path / "flat").code == 0
    for image, name in zip(said["images"], sorted(images(tmp_path / "flat"))):
        assert (folder / image["file"]).read_bytes() == (tmp_path / "flat" / name).read_bytes()
    assert sample("--n", 2, "--overwrite").code == 0
    assert {p.name for p in folder.glob("*.png")} == {"00000.png", "00001.png", "grid.png"}
    assert not list((folder / "images").rglob("*.png"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--n", "4", "--num-per-class", "2"], "--num-per-class: --n is given too"),
        (["--keep-rows", "1"], "--keep-rows: needs --init-image"),
        (["--no-paste"], "--no-paste"),
        (["--init-image", "IMAGE", "--vary", "0.5", "--no-paste"], "--no-paste"),
        (["--init-image", "IMAGE", "--keep-rows", "1", "--no-paste"], "--no-paste"),
        (["--init-image", "IMAGE", "--keep-rows", "2"], "--keep-rows: found 2, but an image has 2 rows"),
        (["--init-image", "IMAGE", "--keep-rows", "0"], "--keep-rows: found 0"),
        (["--init-image", "IMAGE", "--layout", "folders"], "--layout: folders needs classes"),
        (["--init-image", "IMAGE", "--num-per-class", "2"], "--num-per-class: these images have no classes"),
        (["--class", "bag", "2", "--num-per-class", "2"], "--num-per-class: --class names a class twice"),
        (["--class", "shoe,shoe,bag", "--num-per-class", "2"], "--num-per-class: --class names a class twice"),
        (["--init-image", "nowhere.png"], "--init-image: nowhere.png cannot be read (No such file"),
        (["--init-image", "TEXT"], "cannot be read (no known image format)"),
        (["--init-image", "EMPTY"], "holds no images"),
        (["--init-image", "FIFO"], "not a regular file"),
        (["--init-image", f"{'x' * 300}.png"], "--init-image"),
    ],
)
def test_what_does_not_go_together(sample, tmp_path, words, part):
    write_png_atomic(tmp_path / "IMAGE.png", torch.zeros(3, 5, 7, dtype=torch.uint8))
    (tmp_path / "TEXT.png").write_text("no image")
    (tmp_path / "EMPTY").mkdir()
    os.mkfifo(tmp_path / "FIFO.png")
    places = {"EMPTY": tmp_path / "EMPTY", **{name: tmp_path / f"{name}.png" for name in ("IMAGE", "TEXT", "FIFO")}}
    result = sample(*(places.get(word, word) for word in words))
    assert result.code in (1, 2) and part in result.err and len(result.err.strip().splitlines()) == 1
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(("words", "kept"), [(["--keep-rows", 1], 3), ([], 3)])
def test_completions_keep_what_they_were_given(sample, model, tmp_path, words, kept):
    (tmp_path / "given").mkdir()
    given = torch.randint(256, (64, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = Generator.load(model, "cpu", "fp32").encode(given).flatten(1)
    other = next(index for index in range(64) if codes[index, 0] != codes[0, 0])
    given = torch.nn.functional.interpolate(given[[0, other]], scale_factor=2)  # to be fitted again
    for index, image in enumerate(given):
        write_png_atomic(tmp_path / "given" / f"{index}.png", image)
    words = [*words, "--init-image", tmp_path / "given", "--precision", "fp32", "--n", 6, "--seed", 2]
    assert sample(*words).code == 0
    said, generator = about(tmp_path / "samples"), Generator.load(model, "cpu", "fp32")
    assert said["kept_codes"] == kept and {image["label"] for image in said["images"]} == {-1}
    codes = generator.encode(given)
    known = Known(codes, (torch.arange(2) < 1)[:, None].expand(2, 2, 3), generator.vocabulary)
    drawn = generator.draw(range(6), {"class": [-1]}, seed=2, known=known)
    for index in range(6):
        assert torch.equal(drawn.codes[index, :1], codes[index % 2, :1])
        written = decode_image(str(tmp_path / "samples" / f"{index:05d}.png"))
        assert torch.equal(written, drawn.images[index])
    assert len({codes.numpy().tobytes() for codes in drawn.codes}) > 2
    # Another image to begin with is another run.
    write_png_atomic(tmp_path / "given" / "1.png", given[0])
    assert "the samples of another run (kept fingerprint" in sample(*words).err


def test_the_likeliest_candidates_stay(model):
    generator = Generator.load(model, "cpu", "fp32")
    plain = generator.draw(range(96), seed=1)
    settings = SamplingSettings(oversample=1.5)
    best = generator.draw(range(96), settings=settings, seed=1)
    for label in range(3):
        of = plain.labels == label
        # 8 of 24 candidates went, and none that stayed is less likely than the likeliest of those that went.
        for group in (slice(0, 16), slice(16, 32)):
            kept, drawn = best.nats[of][group], plain.nats[of][group]
            assert kept.max() <= drawn.max() and kept.sum() < drawn.sum()
            assert len(set(kept.tolist()) & set(drawn.tolist())) >= 8
    for indices, batch_size in ([5], 1), (range(40, 60), 7), ([95, 0, 50], 64):
        part = generator.draw(indices, settings=settings, seed=1, batch_size=batch_size)
        assert torch.equal(part.codes, best.codes[list(indices)])
        assert torch.equal(part.nats, best.nats[list(indices)])
    # The prior's own likelihood counts ids that may not stand there too; here they hold next to nothing less.
    assert (generator.nats(best.codes, {"class": best.labels.tolist()}).sum(1) >= best.nats - 1e-4).all()


def test_an_image_asked_for_twice_comes_twice(model):
    generator = Generator.load(model, "cpu", "fp32")
    assert [len(candidates_of(3, 2, share)) for share in (1.1, 1.25, 2)] == [18, 20, 32], "of 16 images, rounded up"
    for oversample in (1.0, 1.1):
        drawn = generator.draw([3, 7, 3], settings=SamplingSettings(oversample=oversample))
        assert torch.equal(drawn.codes[0], drawn.codes[2]) and not torch.equal(drawn.codes[0], drawn.codes[1])


def test_a_series_of_completions_is_not_one_of_plain_images(sample, tmp_path):
    write_png_atomic(tmp_path / "given.png", torch.zeros(3, 4, 6, dtype=torch.uint8))
    given = ["--init-image", tmp_path / "given.png", "--class", "bag"]
    assert sample("--n", 2, *given).code == 0
    result = sample("--n", 4, "--class", "bag")
    assert result.code == 2 and "the samples of another run (kept codes 3, now None)" in result.err
    result = sample("--n", 2, "--init-image", tmp_path / "given.png", "--guidance-scale", 2, "--overwrite")
    assert result.code == 2 and "--guidance-scale" in result.err and "--class" in result.err


def test_an_overwriting_that_was_cut_off_adopts_no_old_image(sample, tmp_path, monkeypatch):
    assert sample("--n", 4, "--seed", 1).code == 0
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00002.png":
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)
    assert sample("--n", 4, "--seed", 2, "--overwrite").code == 1
    monkeypatch.undo()
    assert sample("--n", 4, "--seed", 2).code == 0
    assert sample("--n", 4, "--seed", 2, "--output", tmp_path / "whole").code == 0
    assert images(tmp_path / "samples") == images(tmp_path / "whole")


def test_names_of_classes_become_paths_that_differ():
    names = Names("folders", [0, 1, 2, 3, 4, 5], ["a/b", "a_b", "A b", "a b", "...", "x" * 300])
    files = [names.file(index) for index in range(6)]
    assert files[0] == "images/a_b/00000.png" and files[2] == "images/A b/00002.png"
    assert len({Path(file).parent.name.casefold() for file in files}) == 6
    assert all(len(Path(file).parent.name) < 100 and Path(file).parts[0] == "images" for file in files)
    assert all(len(Path(file).parts) == 3 and ".." not in Path(file).parts for file in files)


def test_numbers_are_indices_and_words_names_first(model):
    generator = Generator.load(model, "cpu", "fp32")
    generator.conditioning.classes.names = ["0", "10", "2"]
    assert generator.sample(3, classes=[2, 0]).labels.tolist() == [2, 0, 2]
    assert generator.sample(2, classes="10").labels.tolist() == [1, 1]
    assert generator.sample(2, classes=torch.tensor([1, 2])).labels.tolist() == [1, 2]
    for options, part in (
        *(({"seed": seed}, "--seed") for seed in (-1, 2**64)),
        ({"batch_size": 0}, "--batch-size"),
        *(({"classes": wrong}, "--class") for wrong in (7, 1.0, "1" * 5000)),
    ):
        with pytest.raises(UsageError, match=part):
            generator.sample(1, **options)


def test_oversampling_from_the_command_line(sample, tmp_path):
    words = ["--n", 20, "--oversample", 1.25, "--precision", "fp32", "--class", "shoe", "bag"]
    assert sample(*words, "--batch-size", 7).code == 0
    assert sample(*words, "--output", tmp_path / "other").code == 0
    assert images(tmp_path / "samples") == images(tmp_path / "other")
    (tmp_path / "other" / "00003.png").unlink()
    (tmp_path / "other" / "samples.json").rename(tmp_path / "other" / "samples.partial.json")
    assert "1 images in" in sample(*words, "--output", tmp_path / "other").out
    assert images(tmp_path / "samples") == images(tmp_path / "other")


def test_the_generator_as_people_call_it(model):
    generator = Generator.load(model, "cpu", "fp32")
    drawn = generator.sample(4, temperature=0.9, classes="shoe", seed=3)
    assert drawn.images.dtype == torch.uint8 and drawn.labels.tolist() == [1] * 4
    assert torch.equal(
        drawn.images, generator.draw(range(4), {"class": [1]}, SamplingSettings(temperature=0.9), seed=3).images
    )
    assert generator.sample(3, classes=["bag", 0]).labels.tolist() == [2, 0, 2]
    with pytest.raises(UsageError, match="no class 'zebra'"):
        generator.sample(1, classes="zebra")
    with pytest.raises(TypeError, match="warmth"):
        generator.sample(1, warmth=2)
    image = torch.randint(256, (3, 20, 30), dtype=torch.uint8)
    codes = generator.encode(image)
    for mask_rows in (1, 2):
        done = generator.complete(image, mask_rows, n=3)
        assert torch.equal(done.codes[:, : 2 - mask_rows], codes[:, : 2 - mask_rows].expand(3, -1, -1))
    with pytest.raises(UsageError, match="mask_rows: found 3"):
        generator.complete(image, 3)
    with pytest.raises(UserError, match="expected uint8"):
        generator.encode(image.float())
    with pytest.raises(UserError, match="of type ndarray, expected a tensor"):
        generator.complete(image.numpy(), 1)  # type: ignore[arg-type]
    for classes in (3, -2, [0, 7]):
        with pytest.raises(UsageError, match="--class: found"):
            generator.log_likelihood(image, classes)
    with pytest.raises(UsageError, match=r"--class: found 1\.7"):
        generator.log_likelihood(image, 1.7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="images: found none"):
        generator.complete(image[None][:0], 1, n=3)
    with pytest.raises(UserError, match=r"images: found .*\(3, 0, 5\)|\(1, 3, 0, 5\)"):
        generator.encode(image[:, :0, :5])
    assert generator.sample(2, classes=torch.tensor(1)).labels.tolist() == [1, 1]
    for n in (-3, 1.5):
        with pytest.raises(UsageError, match=f"--n: found {n}"):
            generator.sample(n)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--precision: found half"):
        Generator.load(model, "cpu", "half")


@pytest.mark.parametrize(
    "name, value",
    [("top_k", 2.5), ("temperature", "1"), ("guidance_scale", None), ("min_p", True), ("guidance_interval", [0, "1"])],
)
def test_settings_of_another_type_are_refused_in_python_too(model, name, value):
    generator = Generator.load(model, "cpu", "fp32")
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: found .*, expected "):
        generator.sample(1, **{name: value})


@pytest.mark.parametrize(
    "option, value", [("seed", 1.5), ("seed", "1"), ("seed", True), ("batch_size", 2.0), ("batch_size", None)]
)
def test_seeds_and_batches_that_are_no_integers_are_refused(model, option, value):
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: found {value!r}, expected an integer"):
        Generator.load(model, "cpu", "fp32").sample(1, **{option: value})


def test_numbers_of_numpy_and_torch_and_tuples_are_taken(model):
    generator, scheduled = Generator.load(model, "cpu", "fp32"), {"guidance_schedule": "interval"}
    plain = {"temperature": 0.5, "top_k": 3, "guidance_scale": 2, "guidance_interval": [0.25, 1]}
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "guidance_scale": torch.tensor(2.0)}
    given["guidance_interval"] = (np.float64(0.25), 1)  # type: ignore[assignment]
    found = generator.sample(np.int64(2), seed=np.uint64(3), **given, **scheduled)  # type: ignore[arg-type]
    assert torch.equal(found.images, generator.sample(2, seed=3, **plain, **scheduled).images)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 2**64, 0.5, torch.tensor(1)])
def test_indices_are_integers_of_the_series(model, index):
    with pytest.raises(UsageError, match=re.escape(f"indices: found {index!r}")):
        Generator.load(model, "cpu", "fp32").draw([0, index])


def test_many_images_are_encoded_in_batches(model, monkeypatch):
    """Thousands of images at once ran out of memory."""
    generator, batches = Generator.load(model, "cpu", "fp32"), []
    encode = generator.tokenizer.encode

    def noted(images):
        batches.append(len(images))
        return encode(images)

    monkeypatch.setattr(generator.tokenizer, "encode", noted)
    images = torch.randint(256, (30_000, 3, 4, 6), dtype=torch.uint8)
    codes = generator.encode(images)
    assert len(codes) == 30_000 and len(set(batches)) == 1 and max(batches) * 24 <= 2**18
    assert torch.equal(codes[-3:], encode(images[-3:]))
    batches.clear()
    small = torch.randint(256, (20, 3, 5, 7), dtype=torch.uint8)  # to be fitted first
    with monkeypatch.context() as patch:
        patch.setattr("vqgen.sampling.drawing.PART_PIXELS", {"cpu": 24 * 6})
        few = generator.log_likelihood(small)
    assert set(batches) == {6}
    torch.testing.assert_close(few, generator.log_likelihood(small))


def test_completion_with_a_mask_keeps_what_is_not_drawn(model):
    generator = Generator.load(model, "cpu", "fp32")
    images = torch.randint(256, (3, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    codes = generator.encode(images)
    mask = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    found = generator.complete(images, mask=mask, n=6, seed=4, guidance_scale=2.0, classes="bag")
    again = generator.draw([5, 1], {"class": [2]}, SamplingSettings(guidance_scale=2.0), seed=4, batch_size=1,
        known=Known(codes, ~mask, generator.vocabulary))  # fmt: skip
    assert torch.equal(again.codes, found.codes[[5, 1]]), "an image depends on no other, masked or not"
    for index in range(6):
        assert torch.equal(found.codes[index][~mask[index % 3]], codes[index % 3][~mask[index % 3]])
    rows = torch.tensor([[False] * 3, [True] * 3])
    one, other = generator.complete(images, 1, seed=2), generator.complete(images, mask=rows, seed=2)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.nats, other.nats)
    nothing = generator.complete(images, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(nothing.codes, codes) and (nothing.nats == 0).all()
    for options in ({"mask": rows, "mask_rows": 1}, {}, {"mask": rows.int()}, {"mask": rows[:1]}):
        with pytest.raises(UsageError, match="mask"):
            generator.complete(images, **options)


def test_likelihood_of_images_is_that_of_a_full_softmax(model):
    generator = Generator.load(model, "cpu", "fp32")
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    tokens = generator.encode(images).flatten(1)
    for classes, label in ((None, generator.conditioning.null), ("bag", 18), ([0, 1, 2, 0, 1], None)):
        found = generator.log_likelihood(images, classes)
        for i in range(5):
            total, sequence = 0.0, [16 + [0, 1, 2, 0, 1][i] if label is None else label]
            for token in tokens[i].tolist():
                logits = generator.prior(torch.tensor([sequence]))[0, -1].double()
                total += (logits[token] - torch.logsumexp(logits, 0)).item()
                sequence.append(token)
            assert found[i].item() == pytest.approx(total, abs=1e-4)
    with pytest.raises(UsageError, match="class: found 2 values for 5 images"):
        generator.log_likelihood(images, [0, 1])


def test_a_folder_that_is_removed_while_images_are_drawn_ends_the_run(sample, tmp_path, monkeypatch):
    decode = Generator.decode

    def removing(self, codes):
        shutil.rmtree(tmp_path / "samples", ignore_errors=True)
        return decode(self, codes)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "decode", removing)
        result = sample("--n", 9, "--batch-size", 3)
    assert result.code == 1 and "samples was moved or removed" in result.err
    assert not list((tmp_path / "samples").glob("0*.png")) if (tmp_path / "samples").exists() else True
    assert sample("--n", 9).code == 0 and len(images(tmp_path / "samples")) == 9
