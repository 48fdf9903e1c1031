"""--init: a run that starts from the weights of another tokenizer."""

from pathlib import Path

import pytest
import torch
from helpers.toy_network import StridedConfig

from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import NETWORKS, NetworkConfig, register
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
