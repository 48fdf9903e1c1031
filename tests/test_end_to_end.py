"""The whole path in tiny size on real images: train a tokenizer, tokenize, train a prior, sample."""

import json
from pathlib import Path

import pytest
import torch
from processes import PRIOR, SAMPLE, TOKENIZE, TOKENIZER, Ended, rows, run, tree
from torchvision.io import read_image
from transformers import AutoModelForCausalLM

from vqgen.artifact import load_artifact
from vqgen.prior.model import Prior
from vqgen.tokenizer.codes.format import CodeFiles
from vqgen.tokenizer.data.dataset import open_images
from vqgen.tokenizer.data.options import ImageConfig
from vqgen.tokenizer.data.pixels import to_float
from vqgen.tokenizer.model import Tokenizer

# 28 x 28 to 7 x 7 codes.
STAGE_ONE = (
    "--data demo --channels 1 --size 28 --width 8 --multipliers 1 2 2 --groups 4 --blocks 1 --latent-dim 16 "
    "--codebook-size 32 --lr 3e-3 --lr-warmup 2 --batch-size 32 --steps 12 --validation-images 64 --precision fp32 "
    "--log-every 4 --validate-every 4 --checkpoint-every 6"
).split()
STAGE_TWO = (
    "--dim 16 --layers 1 --heads 2 --lr 1e-2 --lr-warmup 2 --batch-size 32 --steps 12 --validation-images 64 "
    "--preview-images 10 --precision fp32 --log-every 4 --validate-every 6 --checkpoint-every 6"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/{tokenizer,codes,prior,samples}, each made by its program."""
    folder = tmp_path_factory.mktemp("runs")
    run(TOKENIZER, *STAGE_ONE, "--output", folder / "tokenizer").ok()
    words = ["--tokenizer", folder / "tokenizer", "--data", "demo", "--precision", "fp32"]
    run(TOKENIZE, *words, "--output", folder / "codes").ok()
    run(PRIOR, "--codes", folder / "codes", *STAGE_TWO, "--output", folder / "prior").ok()
    run(SAMPLE, "--model", folder / "prior", "--n", 5, "--output", folder / "samples").ok()
    return folder


def files(folder: Path) -> set[str]:
    return {name for name in tree(folder) if not name.startswith("checkpoints/")}


def test_everything_is_there_and_nothing_else(runs: Path) -> None:
    pictures = {f"images/step-{step:08d}.png" for step in (4, 8, 12)}
    model = {"vqgen.json", "model.safetensors"}
    run_files = {*model, "config.yaml", "metrics.jsonl", "machine.json", "finished.json"}
    assert files(runs / "tokenizer") == {*run_files, *pictures}
    checkpoint = {"tokenizer.safetensors", "average.safetensors", "optimizers.pt", "state.json"}
    assert {path.name for path in (runs / "tokenizer/checkpoints/step-00000012").iterdir()} == checkpoint
    inner = {f"tokenizer/{name}" for name in model}
    assert {"manifest.json", "codes-00000.safetensors", *inner} <= files(runs / "codes")
    pictures = {f"images/step-{step:08d}.png" for step in (6, 12)}
    assert files(runs / "prior") == {*run_files, *inner, "config.json", *pictures}
    assert {"grid.png", "samples.json"} <= files(runs / "samples")
    assert sum(name.endswith(".png") for name in files(runs / "samples")) == 5 + 1
    pickles = {path for path in runs.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pth", ".pickle", ".ckpt")}
    assert {path.parent.parent.name for path in pickles} == {"checkpoints"}
    assert not [path for path in runs.rglob(".*")]


def test_the_artefacts_belong_together(runs: Path) -> None:
    tokenizer = Tokenizer.load(runs / "tokenizer")
    prior = Prior.load(runs / "prior")
    copies = {load_artifact(runs / place / "tokenizer", "tokenizer").fingerprint for place in ("codes", "prior")}
    assert copies == {tokenizer.fingerprint} == {prior.tokenizer_fingerprint}
    heldout = CodeFiles(runs / "codes", "heldout")
    assert (len(heldout), heldout.grid, heldout.codebook_size) == (1000, (7, 7), 32)
    assert heldout.class_names == prior.conditioning.describe()["class_names"] and len(heldout.class_names or []) == 10
    # The codes on disk are those of the images.
    images = open_images("demo", "heldout", ImageConfig(size=[28, 28], channels=1))
    pixels = torch.stack([to_float(images[index].image) for index in range(4)])
    codes = heldout.gather(torch.arange(4).numpy(), torch.zeros(4, dtype=torch.long).numpy())
    assert torch.equal(codes, tokenizer.encode(pixels))


def test_the_prior_is_a_transformers_folder(runs: Path) -> None:
    prior = Prior.load(runs / "prior")
    backbone = AutoModelForCausalLM.from_pretrained(runs / "prior").eval()
    tokens = torch.randint(0, 32, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone(tokens).logits, prior(tokens))


def test_the_histories_tell_what_was_measured(runs: Path) -> None:
    found = rows(runs / "tokenizer")
    assert [row["step"] for row in found] == [4, 4, 8, 8, 12, 12]
    heldout = {"heldout/psnr", "heldout/ssim", "heldout/codes_used", "heldout/usage", "heldout/perplexity"}
    assert heldout <= found[-1].keys()
    assert found[-1]["heldout/psnr"] > found[1]["heldout/psnr"]
    found = [row for row in rows(runs / "prior") if "best" not in row]
    assert found[-1]["heldout/nats_per_token"] < found[1]["heldout/nats_per_token"]
    bits = found[-1]["heldout/nats_per_token"] / torch.log(torch.tensor(2.0)).item() * 49 / (28 * 28)
    assert found[-1]["heldout/bits_per_dimension"] == pytest.approx(bits, rel=1e-5)
    best = [row for row in rows(runs / "prior") if "best" in row][-1]  # of which validation the weights are
    assert best["best"] == min(row["heldout/nats_per_token"] for row in found if "heldout/nats_per_token" in row)
    assert not [row for row in [*rows(runs / "tokenizer"), *found] if "health" in row], "a healthy run says nothing"


def test_the_pictures_show_images(runs: Path) -> None:
    for place in ("tokenizer", "prior"):
        for path in (runs / place / "images").glob("*.png"):
            assert read_image(str(path)).float().std() > 5, path
    assert json.loads((runs / "samples/samples.json").read_text())


def collapse(folder: Path, *words: object) -> Ended:
    return run(TOKENIZER, *STAGE_ONE, "--validation-images", 64, *words, "--output", folder).ok()


def test_a_codebook_that_collapses_is_named(tmp_path: Path) -> None:
    words = "--codebook gradient --no-kmeans-start --revive-after 0 --no-l2-normalize --codebook-size 2048".split()
    ended = collapse(tmp_path / "run", *words)
    named = [row for row in rows(tmp_path / "run") if "health" in row]
    assert [row["health"] for row in named] == ["codebook collapse"], "named once"
    assert named[0]["step"] == 8, "after two validations"
    for text in (ended.err, named[0]["message"]):
        assert "codes in use" in text and "--kmeans-start" in text and "--revive-after" in text
    assert ended.err.count("warning: codebook collapse") == 1


@pytest.mark.slow
def test_both_stages_compile(runs: Path, tmp_path: Path) -> None:
    gan = "--gan-weight 0.1 --gan-start 1 --gan-warmup 1 --gan-ramp 1 --gan-layers 2 --gan-width 8".split()
    words = [*STAGE_ONE, *gan, "--steps", 4, "--compile"]
    run(TOKENIZER, *words, "--output", tmp_path / "tokenizer").ok()
    words = ["--codes", runs / "codes", *STAGE_TWO, "--steps", 4, "--compile"]
    run(PRIOR, *words, "--output", tmp_path / "prior").ok()
    assert rows(tmp_path / "tokenizer")[-1]["heldout/psnr"] > 5
    # Names in the model folder are those of the modules themselves.
    Tokenizer.load(tmp_path / "tokenizer")
    Prior.load(tmp_path / "prior")
