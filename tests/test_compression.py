"""Compression: what is restored is what was encoded, in as many bits as the prior needs, and damage is told."""

import dataclasses
import importlib.util
import json
import math
import os
import zlib
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import make_prior

from vqgen.errors import UserError
from vqgen.prior.model import Prior
from vqgen.sampling.compression import archive, work
from vqgen.sampling.compression.archive import (
    MAGIC,
    MAX_SIDE,
    ROWS,
    Header,
    Picture,
    Stream,
    file_names,
    read_archive,
    write_archive,
)
from vqgen.sampling.compression.coding import Coder, rounded
from vqgen.sampling.compression.compress import main as main_compress
from vqgen.sampling.compression.decompress import main as main_decompress
from vqgen.sampling.compression.work import ARCHIVE
from vqgen.sampling.generator import Generator
from vqgen.tokenizer.data.decoding import decode
from vqgen.tokenizer.reconstruction import write_png_atomic

ROOT = Path(__file__).parents[1]
KINDS = ["exact", "rounded", "histogram"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_prior(tmp_path_factory.mktemp("model"))


def photos(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images of 3 channels and these heights and widths."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    for number, size in enumerate(sizes):
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=random)
        write_png_atomic(folder / f"photo {number}.png", image)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("count", [1, ROWS - 1, 2 * ROWS + 3])
def test_codes_survive_and_take_the_bits_of_their_probabilities(tmp_path: Path, kind, depth: int, count: int) -> None:
    generator = Generator.load(make_prior(tmp_path / "model", depth=depth), "cpu", "fp32")
    codes = generator.sample(count, seed=3).codes
    tokens = generator.vocabulary.to_tokens(codes)
    writer, reader = Coder(generator, kind), Coder(generator, kind)
    bits = 0
    for block in tokens.split(ROWS):
        words = writer.encode(block)
        bits += 32 * len(words)
        assert torch.equal(reader.decode(words, len(block)), block)
    if kind == "exact" and depth == 1:
        conditioning = generator.conditioning
        prefix = conditioning.prefixes(conditioning.conditions({"class": [-1]}), range(count))
        with torch.no_grad():
            logits = conditioning.of_codes(generator.prior(torch.cat([prefix, tokens], 1)[:, :-1]))
        logits = logits[..., : generator.vocabulary.size]  # codes alone are possible
        nats = -logits.log_softmax(-1).gather(2, tokens[..., None]).sum().item()
        assert bits == pytest.approx(nats / math.log(2), rel=2e-3, abs=64 * -(-count // ROWS))


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_any_size_are_restored_in_another_process(cli, model: Path, tmp_path: Path, kind: str) -> None:
    sizes = [(4, 6), (5, 7), (12, 18), (1, 1), (9, 3)]
    folder = photos(tmp_path / "photos", sizes)
    words = ["--model", model, "--output", tmp_path / "small", "--probabilities", kind]
    result = cli(main_compress, folder, *words)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "small" / "summary.json").read_text())
    assert summary["images"] == 5 and summary["bytes"] == (tmp_path / "small" / ARCHIVE).stat().st_size
    result = cli(main_decompress, tmp_path / "small", "--model", model, "--output", tmp_path / "restored")
    assert result.code == 0, result.err
    generator = Generator.load(model, "cpu", "fp32")
    for number, size in enumerate(sizes):
        found = decode((tmp_path / "restored" / f"photo {number}.png").read_bytes(), 3)
        assert found.shape == (3, *size)
        if size in ((4, 6), (12, 18)):  # no padding: what the tokenizer makes of the whole image
            original = decode((folder / f"photo {number}.png").read_bytes(), 3)
            assert torch.equal(found, generator.tokenizer.reconstruct(original[None])[0])
    again = cli(main_compress, folder, "--model", model, "--output", tmp_path / "again", "--probabilities", kind)
    assert again.code == 0
    assert (tmp_path / "again" / ARCHIVE).read_bytes() == (tmp_path / "small" / ARCHIVE).read_bytes()


def test_every_damaged_byte_is_told(cli, model: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", [(8, 12)] * 6)
    assert cli(main_compress, folder, "--model", model, "--output", tmp_path / "small").code == 0
    whole = (tmp_path / "small" / ARCHIVE).read_bytes()
    random = np.random.default_rng(0)
    start = 12 + int.from_bytes(whole[8:12], "little")
    for number, place in enumerate(random.integers(0, len(whole), 40)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.integers(8)
        (tmp_path / "damaged.vqc").write_bytes(damaged)
        output = tmp_path / f"restored-{number}"
        result = cli(main_decompress, tmp_path / "damaged.vqc", "--model", model, "--output", output)
        assert result.code == 1 and "damaged.vqc" in result.err and result.err.count("\n") == 1, (place, result.err)
        assert not output.exists()
    for cut in (0, 5, 11, start - 1, start + 3, len(whole) - 1):
        (tmp_path / "damaged.vqc").write_bytes(whole[:cut])
        result = cli(main_decompress, tmp_path / "damaged.vqc", "--model", model, "--output", tmp_path / "cut")
        assert result.code == 1 and "damaged.vqc" in result.err and result.err.count("\n") == 1


def test_another_model_is_refused(cli, model: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", [(4, 6)])
    assert cli(main_compress, folder, "--model", model, "--output", tmp_path / "small").code == 0
    other = make_prior(tmp_path / "other", depth=2)
    result = cli(main_decompress, tmp_path / "small", "--model", other, "--output", tmp_path / "restored")
    assert result.code == 1 and read_archive(tmp_path / "small" / ARCHIVE)[0].prior[:12] in result.err
    result = cli(main_decompress, tmp_path / "small", "--model", model, "--output", folder)
    assert result.code == 2 and "photo 0.png" in result.err and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["../a.png"],
        ["/a.png"],
        ["a/../b.png"],
        ["a.png", "A.jpg"],
        [".hidden.png"],
        [""],
        ["x" * 300],
        ["a\\b"],
        ["a.jpg", "A.png/b.png"],
    ],
)
def test_names_that_leave_the_folder_or_coincide_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError):
        file_names([Picture(name, 1, 1) for name in names])


def test_what_cannot_be_compressed_is_named(cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    for words, named in (([tmp_path / "text.png"], "text.png"), ([tmp_path / "empty"], "empty"), ([], "IMAGES")):
        result = cli(main_compress, *words, "--model", model, "--output", tmp_path / "out")
        assert result.code and named in result.err and result.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    photos(tmp_path / "a", [(4, 6)])
    photos(tmp_path / "b", [(4, 6)])
    result = cli(main_compress, tmp_path / "a", tmp_path / "b", "--model", model, "--output", tmp_path / "out")
    names = [str(tmp_path / folder / "photo 0.png") for folder in "ab"]
    assert result.code == 2 and all(name in result.err for name in names)


def test_all_images_below_a_folder_are_restored_with_their_paths(cli, model: Path, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", [(4, 6), (5, 7)])
    (folder / "trip").mkdir()
    photos(folder / "trip" / "day 1", [(6, 9)])
    photos(folder / ".hidden", [(4, 6)])
    (folder / "trip" / "notes.txt").write_text("no image")
    photos(tmp_path / "elsewhere", [(4, 6)])
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "trip" / "back").symlink_to(folder)
    assert cli(main_compress, folder, "--model", model, "--output", tmp_path / "small").code == 0
    result = cli(main_decompress, tmp_path / "small", "--model", model, "--output", tmp_path / "restored")
    assert result.code == 0, result.err
    found = sorted(
        path.relative_to(tmp_path / "restored").as_posix() for path in (tmp_path / "restored").rglob("*.png")
    )
    assert found == ["linked/photo 0.png", "photo 0.png", "photo 1.png", "trip/day 1/photo 0.png"]


def test_a_folder_that_cannot_be_read_is_not_left_out(cli, model: Path, tmp_path: Path, monkeypatch) -> None:
    folder, scan = photos(tmp_path / "photos", [(4, 6)]), os.scandir
    photos(folder / "private", [(4, 6)])

    def refused(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    result = cli(main_compress, folder, "--model", model, "--output", tmp_path / "small")
    assert result.code == 1 and "IMAGES" in result.err and str(folder / "private") in result.err
    assert not (tmp_path / "small").exists()


def test_an_image_that_could_not_be_restored_is_not_compressed(cli, model: Path, tmp_path: Path) -> None:
    write_png_atomic(tmp_path / "long.png", torch.zeros(3, 1, MAX_SIDE + 1, dtype=torch.uint8))
    result = cli(main_compress, tmp_path / "long.png", "--model", model, "--output", tmp_path / "out")
    assert result.code == 1 and "long.png" in result.err and "65537x1" in result.err and result.err.count("\n") == 1


def test_names_that_are_no_text_are_named(cli, model: Path, tmp_path: Path) -> None:
    file = photos(tmp_path / "photos", [(4, 6)]) / "photo 0.png"
    file.rename(file.with_name("caf\udce9.png"))
    result = cli(main_compress, tmp_path / "photos", "--model", model, "--output", tmp_path / "out")
    assert result.code == 2 and "IMAGES: 'caf\\udce9.png'" in result.err


def test_an_archive_of_nothing_is_refused(cli, model: Path, tmp_path: Path) -> None:
    prior = Generator.load(model, "cpu", "fp32")
    marks = str(prior.prior.fingerprint), str(prior.tokenizer.fingerprint)
    write_archive(tmp_path / "none.vqc", Header("0", *marks, "exact", ROWS, "c", [], []), [])
    result = cli(main_decompress, tmp_path / "none.vqc", "--model", model, "--output", tmp_path / "restored")
    assert result.code == 1 and "none.vqc" in result.err and not (tmp_path / "restored").exists()


def test_what_is_interrupted_can_be_repeated(cli, model: Path, tmp_path: Path, monkeypatch) -> None:
    folder = photos(tmp_path / "photos", [(4, 6)] * 2)
    calls = (
        (work, "write_json", main_compress, [folder], tmp_path / "small"),
        (work, "write_png_atomic", main_decompress, [tmp_path / "small"], tmp_path / "restored"),
    )
    for module, name, main, given, output in calls:
        words, whole, done = [*given, "--model", model, "--output", output], getattr(module, name), []

        def failing(*written, whole=whole, done=done, last=name == "write_json"):
            if done or last:
                raise OSError(28, "No space left on device")
            done.append(whole(*written))

        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing)
            result = cli(main, *words)
        assert result.code == 1 and str(output) in result.err
        assert not output.exists() or not [path for path in output.iterdir() if not path.name.startswith(".")]
        result = cli(main, *words)
        assert result.code == 0, result.err
        assert len([path for path in output.iterdir() if not path.name.startswith(".")]) == 2


def test_a_prior_that_always_had_a_class_tells_no_probabilities_without(cli, tmp_path: Path) -> None:
    model, folder = make_prior(tmp_path / "model"), photos(tmp_path / "photos", [(4, 6)])
    about = json.loads((model / "vqgen.json").read_text())
    (model / "vqgen.json").write_text(json.dumps(about | {"label_dropout": 0}))
    words = [folder, "--model", model, "--output", tmp_path / "small"]
    for kind in KINDS[:2]:
        result = cli(main_compress, *words, "--probabilities", kind)
        assert result.code == 2 and "--label-dropout 0" in result.err and "--probabilities histogram" in result.err
    assert cli(main_compress, *words, "--probabilities", "histogram").code == 0


def test_a_machine_that_rounds_otherwise_is_named(cli, model: Path, tmp_path: Path, monkeypatch) -> None:
    folder = photos(tmp_path / "photos", [(8, 12)] * 6)
    assert cli(main_compress, folder, "--model", model, "--output", tmp_path / "small").code == 0
    written = work._machine()
    assert "float32 on one thread" in written and f"constriction {version('constriction')}" in written
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: softmax(x * 1.01, dim))
    monkeypatch.setattr(work, "_machine", lambda: "another processor")
    result = cli(main_decompress, tmp_path / "small", "--model", model, "--output", tmp_path / "restored")
    assert result.code == 1 and "CRC" in result.err and written in result.err and "another processor" in result.err
    assert "--probabilities rounded" in result.err
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("kind", KINDS[:2])
def test_logits_that_are_not_finite_are_one_line_on_both_sides(cli, model: Path, tmp_path: Path, kind: str) -> None:
    """Finite weights may overflow; that is no damage of the archive."""
    prior = Prior.load(model)
    with torch.no_grad():
        prior.backbone.model.norm.weight.fill_(1e30)
        prior.backbone.lm_head.weight.mul_(1e20)
    mark = prior.save(tmp_path / "overflowing", model / "tokenizer")
    folder = photos(tmp_path / "photos", [(4, 6)])
    words = ["--output", tmp_path / "small", "--probabilities", kind]
    result = cli(main_compress, folder, "--model", tmp_path / "overflowing", *words)
    assert result.code == 1 and "not finite" in result.err and result.err.count("\n") == 1, result.err
    assert not (tmp_path / "small").exists()
    assert cli(main_compress, folder, "--model", model, *words).code == 0
    header, streams = read_archive(tmp_path / "small" / ARCHIVE)
    write_archive(tmp_path / "other.vqc", dataclasses.replace(header, prior=mark), streams)
    words = ["--model", tmp_path / "overflowing", "--output", tmp_path / "restored"]
    result = cli(main_decompress, tmp_path / "other.vqc", *words)
    assert result.code == 1 and "not finite" in result.err and "CRC" not in result.err
    assert result.err.count("\n") == 1 and not (tmp_path / "restored").exists()


def test_the_documentation_has_what_rounding_costs_by_the_size_of_the_codebook() -> None:
    document, random = (ROOT / "docs/compression.md").read_text(encoding="utf-8"), torch.Generator().manual_seed(0)
    for scale in (1.5, 2.5):
        stated = next(line for line in document.splitlines() if line.startswith(f"| {scale} |")).split("|")[2:-1]
        for size, percent in zip((512, 4096, 8192, 16384), stated, strict=True):
            exact = (scale * torch.randn(200, size, generator=random)).double().softmax(-1)
            counts = rounded(exact)
            assert counts.min() >= 1
            entropy, rate = (-(exact * p.log()).sum(-1).mean() for p in (exact, counts / counts.sum(-1, keepdim=True)))
            assert 100 * (rate / entropy - 1) == pytest.approx(float(percent.removesuffix(" % ")), abs=0.3)


HUGE = [Picture("a.png", 2**16, 2**16)]
MANY = [Picture(f"{number}.png", 2**13, 2**13) for number in range(99)]


@pytest.mark.parametrize("pictures", [HUGE, MANY], ids=["huge", "many"])
def test_sizes_that_no_stream_is_there_for_are_refused_at_once(cli, model: Path, tmp_path: Path, pictures) -> None:
    folder = photos(tmp_path / "photos", [(4, 6)])
    assert cli(main_compress, folder, "--model", model, "--output", tmp_path / "small").code == 0
    header, streams = read_archive(tmp_path / "small" / ARCHIVE)
    write_archive(tmp_path / "forged.vqc", dataclasses.replace(header, pictures=pictures), streams)
    result = cli(main_decompress, tmp_path / "forged.vqc", "--model", model, "--output", tmp_path / "restored")
    assert result.code == 1 and "forged.vqc" in result.err and not (tmp_path / "restored").exists()


@pytest.mark.parametrize("text", [bytes(2**27), b'{"version": 1}' + bytes(9), b"{"], ids=["long", "odd", "short"])
def test_headers_that_are_too_long_or_odd_are_refused(tmp_path: Path, text: bytes) -> None:
    packed = zlib.compress(text)
    data = MAGIC + len(packed).to_bytes(4, "little") + packed
    (tmp_path / "forged.vqc").write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))
    with pytest.raises(UserError, match=r"forged\.vqc"):
        read_archive(tmp_path / "forged.vqc")


def test_names_take_few_bytes_and_too_many_are_refused(tmp_path: Path) -> None:
    pictures = [Picture(f"{number:05d}.png", 32, 32) for number in range(10_000)]
    header = Header("0", "a", "b", "exact", ROWS, "c", pictures, [])
    assert write_archive(tmp_path / "many.vqc", header, []) < 5 * len(pictures)
    assert read_archive(tmp_path / "many.vqc") == (header, [])
    long = [Picture("x" * 2**13 + str(number), 32, 32) for number in range(2**13)]
    with pytest.raises(UserError, match=r"more\.vqc"):
        write_archive(tmp_path / "more.vqc", dataclasses.replace(header, pictures=long), [])
    assert not (tmp_path / "more.vqc").exists()


def test_what_would_be_too_large_to_be_read_is_not_written(tmp_path: Path, monkeypatch) -> None:
    words = np.arange(1000, dtype=np.uint32)
    header = Header("0", "a", "b", "exact", ROWS, "c", [Picture("a.png", 32, 32)], [Stream(len(words), 0)])
    size = write_archive(tmp_path / "whole.vqc", header, [words])
    monkeypatch.setattr(archive, "MAX_ARCHIVE", size)
    assert write_archive(tmp_path / "largest.vqc", header, [words]) == size
    assert read_archive(tmp_path / "largest.vqc")[0] == header
    monkeypatch.setattr(archive, "MAX_ARCHIVE", size - 1)
    with pytest.raises(UserError, match=rf"more\.vqc.* {size} bytes, at most {size - 1}"):
        write_archive(tmp_path / "more.vqc", header, [words])
    assert not (tmp_path / "more.vqc").exists()
    with pytest.raises(UserError, match=r"largest\.vqc"):
        read_archive(tmp_path / "largest.vqc")


def test_the_documentation_has_the_tables_of_equal_bytes() -> None:
    spec = importlib.util.spec_from_file_location("compression", ROOT / "benchmarks" / "compression.py")
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    document = (ROOT / "docs/compression.md").read_text(encoding="utf-8")
    results = list(benchmark.RESULTS.glob("quality-*.json"))
    assert results
    for path in results:
        found = "\n".join(benchmark.table(json.loads(path.read_text())))
        assert found in document, f"the table of {path.stem} is now\n{found}"


def test_the_documentation_has_the_measured_rates() -> None:
    found = json.loads((ROOT / "benchmarks/results/compression/round-trip-1000.json").read_text())
    document = (ROOT / "docs/compression.md").read_text(encoding="utf-8")
    assert f"{found['nll']:.4f}" in document and found["exact"]["nats_per_code"] < 1.005 * found["nll"]
    every = json.loads((ROOT / "benchmarks/results/compression/round-trip-10000.json").read_text())
    assert every["exact"]["equal"] and every["exact"]["nats_per_code"] < 1.005 * every["nll"]
    assert f"{every['nll']:.4f}" in document and f"{every['exact']['nats_per_code']:.4f}" in document
    for kind in KINDS:
        entry = found[kind]
        sizes = [f"{entry[key] / found['images']:.1f}" for key in ("stream_bytes", "bytes")]
        assert entry["equal"] and f"{entry['nats_per_code']:.4f}" in document and ", ".join(sizes) in document
