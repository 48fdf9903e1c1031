"""What version 0.1 wrote is read, and what it had begun goes on: `tests/data/version-0.1`, see the README there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import PRIOR, SAMPLE, TOKENIZE, TOKENIZER, run
from safetensors.torch import load_file

import vqgen

WRITTEN = Path(__file__).parent / "data" / "version-0.1"
QUANTIZERS = sorted(path.name for path in (WRITTEN / "quantizers").iterdir())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of the folder as the working directory, from where the runs name their data."""
    shutil.copytree(WRITTEN, tmp_path / "version-0.1")
    monkeypatch.chdir(tmp_path / "version-0.1")
    return tmp_path / "version-0.1"


IDLE = {
    "encoder.layers.2.conv1.bias",
    *(f"decoder.layers.5.{name}.bias" for name in ("conv1", "conv2", "shortcut")),
    *(f"decoder.layers.6.{name}.bias" for name in ("conv1", "conv2")),
}
"""Biases of the tokenizer that a norm of single channels takes away again: their gradients are rounding alone, which
the optimizer makes as large as those of others, and which is another one on every kind of processor."""


def close(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors but for `IDLE`, up to the rounding of another processor."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.allclose(left[k], right[k], atol=1e-3) for k in left.keys() - IDLE)


def patterns() -> torch.Tensor:
    return torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


@pytest.mark.parametrize(("stage", "program"), [("tokenizer", TOKENIZER), ("prior", PRIOR)])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(here, stage, program):
    stopped = here / f"{stage}-stopped"
    done = run(program, "--config", stopped / "config.yaml", "--output", stopped).ok()
    assert "resuming from" in done.err
    assert close(stopped / "model.safetensors", here / stage / "model.safetensors")
    if stage == "tokenizer":
        images = [vqgen.Tokenizer.load(folder).reconstruct(patterns()) for folder in (stopped, here / stage)]
        assert torch.allclose(*images, atol=1e-4)
    found, expected = losses(stopped), losses(here / stage)
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-3)


def test_idle_biases_have_no_effect_and_no_others_are():
    tokenizer = vqgen.Tokenizer.load(WRITTEN / "tokenizer")
    expected, found = tokenizer.reconstruct(patterns()), set()
    for name, weight in tokenizer.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        if torch.allclose(tokenizer.reconstruct(patterns()), expected, atol=1e-5):
            found.add(name)
        with torch.no_grad():
            weight.copy_(before)
    assert found == IDLE


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_tokenizers_of_all_quantizers_load(here, kind):
    tokenizer = vqgen.Tokenizer.load(here / "quantizers" / kind)
    described = json.loads((here / "quantizers" / kind / "vqgen.json").read_text())
    assert tokenizer.fingerprint == described["fingerprint"]
    assert (tokenizer.codebook_size, tokenizer.depth) == (described["codebook_size"], described["depth"])
    images = torch.linspace(-1, 1, 2 * 16 * 16).view(2, 1, 16, 16)
    codes = tokenizer.encode(images)
    assert 0 <= codes.min() <= codes.max() < tokenizer.codebook_size
    assert torch.equal(tokenizer.decode(codes), tokenizer.reconstruct(images))


def test_code_files_are_read_and_made_again_alike(here):
    before = {path.name: path.read_bytes() for path in here.glob("codes/codes-*.safetensors")}
    words = "--data images --tokenizer tokenizer --flip --views 2 --holdout 0.2 --precision fp32 --shard-size 20"
    assert "is finished" in run(TOKENIZE, *words.split(), "--output", "codes").ok().out
    run(TOKENIZE, *words.split(), "--output", "again").ok()
    for name, content in before.items():
        assert (here / "again" / name).read_bytes() == content
    assert len(vqgen.CodeFiles(here / "codes", "train")) == 32


def test_samples_are_known_as_drawn_and_drawn_again_alike(here):
    words = "--model prior --n 6 --seed 3 --guidance-scale 2 --top-k 16 --precision fp32".split()
    assert "holds these 6 images already" in run(SAMPLE, *words, "--output", "drawn").ok().out
    before = {path.name: path.read_bytes() for path in (here / "drawn").glob("0*.png")}
    run(SAMPLE, *words, "--output", "again").ok()
    assert {path.name: path.read_bytes() for path in (here / "again").glob("0*.png")} == before
