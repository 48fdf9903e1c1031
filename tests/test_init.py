"""--init: a run that starts from the weights of another tokenizer."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from helpers.toy_network import StridedConfig

from vqgen.files.write import LOCK
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import NETWORKS, NetworkConfig, register
from vqgen.tokenizer.quantizers.options import QUANTIZERS
from vqgen.tokenizer.train import TokenizerTraining, main
from vqgen.tokenizer.trainer import TokenizerTrainer, build

SIZES = "--data demo --channels 1 --size 16 16 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 6".split()
SHORT = "--batch-size 8 --precision fp32 --validation-images 8 --cache-mb 0 --code-dim 4".split()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 32 codes after three steps."""
    folder = tmp_path_factory.mktemp("source") / "run"
    assert main([*SIZES, *SHORT, "--codebook-size", "32", "--steps", "3", "--output", str(folder)]) == 0
    return folder


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def begun(source: Path, output: Path, **quantizer) -> TokenizerTrainer:
    """A trainer that has just begun from `source`."""
    config = TokenizerTraining(data="demo", output=output, init=source)
    description = Tokenizer.load(source).config
    config.model, config.images.size, config.images.channels = description.model, [16, 16], 1
    config.images.cache_mb, config.run.batch_size, config.run.precision = 0, 8, "fp32"
    config.quantizer = type(description.quantizer)(**{**vars(description.quantizer), **quantizer})
    made = build(config)
    assert made is not None
    made[1].begin(0)
    return made[1]


def test_the_run_begins_with_the_given_weights(source: Path, tmp_path: Path) -> None:
    trainer = begun(source, tmp_path / "run")
    given = Tokenizer.load(source)
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    trainer.tokenizer.eval()
    assert torch.equal(trainer.tokenizer.encode(images), given.encode(images))
    with torch.no_grad():
        torch.testing.assert_close(trainer.tokenizer(images).images, given(images).images)


def test_the_codes_do_not_jump_at_the_first_update(source: Path, tmp_path: Path) -> None:
    """Their averages, which a model folder has not, must stand where the codes do."""
    trainer = begun(source, tmp_path / "run", codebook_decay=0.999)
    book = trainer.tokenizer.quantizer.codebook
    before = book.codes.clone()
    trainer.step(0)
    moved = (book.codes - before).norm(dim=1)
    assert 0 < moved.max() < 0.05, "a decay of 0.999 and 8 x 64 vectors move a code of unit length by little"


def test_a_quantizer_of_another_size_starts_anew(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = begun(source, tmp_path / "run", codebook_size=64)
    assert f"--init: the quantizer of {source} has other sizes" in capsys.readouterr().err
    given, own = Tokenizer.load(source).state_dict(), trainer.tokenizer.state_dict()
    assert all(torch.equal(own[key], given[key]) for key in given if not key.startswith("quantizer."))
    # By k-means, not by the random codes of a new quantizer, which have unit length to the last bit.
    images = trainer._tensors(next(trainer.batches))[0]
    assert trainer.tokenizer.eval()(images).quantized.stats["usage"] > 0.25


def test_other_sizes_are_refused_by_the_first_that_differs(source: Path, tmp_path: Path, cli) -> None:
    words = [*SIZES, *SHORT, "--init", source, "--width", 16, "--steps", 2, "--output", tmp_path / "run"]
    result = cli(main, *words)
    assert result.code == 1
    assert f"--init: {source} has decoder.last.weight as (1, 8, 3, 3), this run has (1, 16, 3, 3)" in result.err


def test_another_network_is_refused_by_name(source: Path, tmp_path: Path, cli, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "strided", NetworkConfig)
    register("strided", "helpers.toy_network")(StridedConfig)
    words = "--data demo --channels 1 --size 16 16 --latent-dim 6 --network strided --steps 2".split()
    result = cli(main, *words, *SHORT, "--init", source, "--output", tmp_path / "run")
    assert result.code == 1
    assert f"--init: {source} has --network vqgan, this run has --network strided" in result.err
    assert len([line for line in result.err.splitlines() if "--init" in line]) == 1


def test_a_resumed_run_keeps_what_it_learned(source: Path, tmp_path: Path) -> None:
    """--init is for the first step alone: stopped and resumed, a run ends as one that was never stopped."""
    fixed = "--codebook-size 32 --checkpoint-every 2 --lr-schedule constant_with_warmup --lr-warmup 0".split()
    common = [*SIZES, *SHORT, *fixed, "--init", str(source)]
    for steps, name in (("2", "a"), ("4", "a"), ("4", "b")):
        assert main([*common, "--steps", steps, "--output", str(tmp_path / name)]) == 0
    assert Tokenizer.load(tmp_path / "a").fingerprint == Tokenizer.load(tmp_path / "b").fingerprint


@pytest.mark.parametrize("given", [[], ["--width", "16"]])
def test_a_bad_init_costs_no_earlier_run(source: Path, tmp_path: Path, cli, given: list[str]) -> None:
    """--overwrite removes the finished run only after --init was read and compared."""
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    before = read_files(folder)
    init = source if given else tmp_path / "missing"
    words = [*SIZES, *SHORT, *given, "--codebook-size", 32, "--steps", 2, "--output", folder, "--overwrite"]
    assert cli(main, *words, "--init", init).code == 1
    assert read_files(folder) == before


def test_an_init_that_is_a_link_to_itself_is_one_line(source: Path, tmp_path: Path, cli) -> None:
    (tmp_path / "loop").symlink_to("loop")
    shutil.copytree(source, folder := tmp_path / "run")
    before = read_files(folder)
    words = [*SIZES, *SHORT, "--codebook-size", 32, "--steps", 2, "--output", folder, "--overwrite"]
    result = cli(main, *words, "--init", tmp_path / "loop")
    assert result.code == 1 and str(tmp_path / "loop") in result.err.splitlines()[-1]
    assert read_files(folder) == before


@pytest.mark.parametrize("place", [".", "tokenizer"])
def test_a_run_does_not_start_from_what_it_removes(source: Path, tmp_path: Path, cli, place: str) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    shutil.copytree(source, folder)
    shutil.copytree(source, folder / "tokenizer")
    link.symlink_to(folder)
    before = read_files(folder)
    words = [*SIZES, *SHORT, "--codebook-size", 32, "--steps", 2, "--output", folder, "--overwrite"]
    result = cli(main, *words, "--init", link / place)
    assert result.code == 2 and f"--init: {link / place}" in result.err and "--overwrite" in result.err
    assert read_files(folder) == before


def test_options_that_change_the_codes_are_named(source: Path, tmp_path: Path, cli) -> None:
    """They fit the same weights: a decoder would learn for codes that the prior does not draw."""
    words = [*SIZES, *SHORT, "--codebook-size", 32, "--init", source, "--steps", 1, "--output", tmp_path / "run"]
    for option, given in ("--groups", [2]), ("--no-l2-normalize", []), ("--fit", ["pad"]):
        result = cli(main, *words, option, *given, "--decoder-only")
        assert result.code == 1 and option in result.err and str(source) in result.err
        assert not (tmp_path / "run/metrics.jsonl").exists()
    result = cli(main, *words, "--groups", 2, "--no-l2-normalize")
    assert result.code == 0
    (line,) = [line for line in result.err.splitlines() if line.startswith("--init")]
    assert all(option in line for option in ("--groups 4", "--groups 2", "--l2-normalize", "--no-l2-normalize"))


def test_options_of_training_alone_do_not_change_the_codes(source: Path, tmp_path: Path, cli) -> None:
    options = "--revive-after 7 --commitment-weight 1 --estimator rotation"
    for codebook in ("--codebook gradient", "--codebook-decay 0.9"):
        given = f"{options} {codebook}".split()
        words = [*SIZES, *SHORT, "--codebook-size", 32, "--dropout", 0.1, *given, "--init", source]
        result = cli(main, *words, "--steps", 2, "--decoder-only", "--overwrite", "--output", tmp_path / "run")
        assert result.code == 0 and "--init:" not in result.err
        assert Tokenizer.load(tmp_path / "run").has_codes_of(Tokenizer.load(source))


def test_names_of_options_of_training_exist() -> None:
    for config in (*NETWORKS.values(), *QUANTIZERS.values()):
        named = set[str]().union(*(vars(base).get("training_only", ()) for base in config.__mro__))
        assert named <= {field.name for field in dataclasses.fields(config)}


@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_a_codebook_is_kept_where_it_learns_in_another_way(
    source: Path, tmp_path: Path, cli, capsys: pytest.CaptureFixture, learn: str
) -> None:
    other, start = ("ema" if learn == "gradient" else "gradient"), tmp_path / "start"
    words = [*SIZES, *SHORT, "--codebook-size", 32, "--codebook", other, "--steps", 2, "--output", start]
    assert cli(main, *words).code == 0
    trainer = begun(start, tmp_path / "run", codebook=learn)
    assert "--init:" not in capsys.readouterr().err
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    assert torch.equal(trainer.tokenizer.eval().encode(images), Tokenizer.load(start).encode(images))


def test_the_decoder_alone_is_trained(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*SIZES, *SHORT, "--steps", "3", "--init", str(source), "--output", str(tmp_path / "run"), "--decoder-only"]
    assert main([*words, "--codebook-size", "64"]) == 1
    assert "--decoder-only" in (err := capsys.readouterr().err) and str(source) in err
    assert main([word for word in [*words, "--codebook-size", "32"] if word not in ("--init", str(source))]) == 2
    assert main([*words, "--codebook-size", "32", "--overwrite"]) == 0
    before, after = Tokenizer.load(source), Tokenizer.load(tmp_path / "run")
    assert after.has_codes_of(before) and after.fingerprint != before.fingerprint
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    codes = before.encode(images)
    assert torch.equal(codes, after.encode(images)) and not torch.equal(before.decode(codes), after.decode(codes))
    with torch.no_grad():
        after.quantizer.codebook.codes[3] += 1
    assert not after.has_codes_of(before)


def test_codes_that_are_frozen_stay_so_in_training_mode(source: Path) -> None:
    tokenizer = Tokenizer.load(source)
    tokenizer.freeze_codes()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    output = tokenizer.train()(images)
    (output.images.square().mean() + output.quantized.loss).backward()
    assert torch.equal(output.quantized.codes, tokenizer.encode(images))
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())
    trained = {name.partition(".")[0] for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert trained == {"decoder"} and not tokenizer.encoder.training and tokenizer.decoder.training
