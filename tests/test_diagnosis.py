"""Runs that are made to fail report the problem and the remedy; healthy ones report nothing."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.quantizers import quantizer_options
from processes import TOKENIZER, Ended, at_row, rows, run, write_images
from safetensors.torch import save_file

from vqgen.tokenizer.diagnosis import diagnose
from vqgen.tokenizer.losses.options import GanConfig
from vqgen.tokenizer.quantizers.options import FSQConfig, LFQConfig, VQConfig
from vqgen.training.health import Finding

HEALTHY = (
    "--data demo --channels 1 --size 16 --width 16 --multipliers 1 2 --groups 8 --blocks 1 --no-attention "
    "--latent-dim 16 --codebook-size 512 --code-dim 8 --revive-after 10 --batch-size 32 --lr 2e-3 --lr-warmup 10 "
    "--ema-decay 0.9 --steps 60 --validate-every 20 --validation-images 200 --log-every 5 --checkpoint-every 60 "
    "--precision fp32"
).split()
GAN = "--gan-layers 1 --gan-width 16".split()
Train = Callable[..., tuple[Ended, list[dict]]]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """A training with these options on top of the healthy ones: how it ended, and what it found."""

    def call(*words: object) -> tuple[Ended, list[dict]]:
        ended = run(TOKENIZER, *HEALTHY, *words, "--output", tmp_path / "run")
        return ended, [row for row in rows(tmp_path / "run") if "health" in row]

    return call


def reports(outcome: tuple[Ended, list[dict]], name: str, *remedies: str) -> dict:
    """The one finding of a run that reached its end: printed once and kept in metrics.jsonl."""
    ended, found = outcome
    assert [row["health"] for row in found] == [name], ended.ok().err
    line = f"warning: {found[0]['message']}"
    assert ended.ok().err.splitlines().count(line) == 1, ended.err
    assert found[0]["message"].startswith(f"{name}: ")
    for remedy in remedies:
        assert remedy in found[0]["message"].partition("; ")[2]
    return found[0]


def reports_nothing(outcome: tuple[Ended, list[dict]]) -> None:
    ended, found = outcome
    assert found == [] and "warning" not in ended.ok().err, ended.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "",
        "--log-every 20",
        "--validate-every 5",
        "--gan-weight 0.1 --gan-start 20 --gan-warmup 10 --gan-ramp 10",
        "--quantizer residual --depth 2 --codebook-size 128",
    ],
)
def test_a_healthy_run_reports_nothing(train: Train, words: str) -> None:
    reports_nothing(train(*(GAN if "--gan-weight" in words else []), *words.split()))


def test_a_codebook_too_large_for_the_images(train: Train, tmp_path: Path) -> None:
    """Known before the first step: with k-means the start alone would take minutes."""
    write_images(tmp_path / "images", 100)
    words = ["--data", tmp_path / "images", "--codebook-size", 16_384, "--code-dim", 64, "--no-l2-normalize"]
    words += ["--no-kmeans-start", "--steps", 1, "--batch-size", 8, "--validation-images", 5]
    found = reports(train(*words), "codebook too large", "--codebook-size 128", "more images")
    assert found["step"] == 0 and "16384" in found["message"] and "6080" in found["message"]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "--grad-clip 0", "--log-every 20 --validate-every 40", "--lr-warmup 0"])
def test_a_learning_rate_thirty_times_too_high(train: Train, words: str) -> None:
    """Named as what it is, and not as the collapse of the codebook that it leads to."""
    found = reports(train("--lr", 6e-2, *words.split()), "learning rate too high", "--lr ", "--lr-warmup")
    assert "norm of the weights" in found["message"] and found["step"] <= 40


@pytest.mark.slow
def test_a_resumed_run_finds_what_it_would_have_found(tmp_path: Path) -> None:
    """Killed after a checkpoint whose rows say enough: it is told at the next validation, not at the start."""
    words = [*HEALTHY, "--lr", 6e-2, "--lr-warmup", 0, "--steps", 10, "--validate-every", 10, "--validation-images", 32]
    words += ["--codebook-size", 64, "--log-every", 1, "--checkpoint-every", 5]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(TOKENIZER, *words, "--output", whole).ok()
    assert run(TOKENIZER, *words, "--output", killed, hook=at_row(7)).code == -signal.SIGKILL
    run(TOKENIZER, *words, "--output", killed).ok()
    assert rows(killed) == rows(whole)
    assert [(row["step"], row["health"]) for row in rows(whole) if "health" in row] == [(10, "learning rate too high")]


def test_a_learning_rate_that_ends_in_numbers_that_are_not_finite(train: Train) -> None:
    ended, found = train("--lr", 1e12, "--lr-warmup", 0, "--grad-clip", 0, "--checkpoint-every", 1)
    ended.refused(1, "not finite", "it began in", "a lower --lr", "last good checkpoint")
    assert [row["health"] for row in found][-1] == "not finite"


@pytest.mark.slow
def test_no_revival_and_no_k_means(train: Train) -> None:
    words = ["--no-kmeans-start", "--revive-after", 0]
    found = reports(train(*words), "codebook collapse", "use --kmeans-start --revive-after 100, or a smaller")
    assert "512 codes" in found["message"]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["", "--no-gan-adaptive"])
def test_a_discriminator_from_the_first_step_at_full_weight(train: Train, words: str) -> None:
    gan = [*GAN, *"--gan-weight 1 --gan-start 0 --gan-warmup 0 --gan-ramp 0".split()]
    found = reports(train(*gan, *words.split()), "adversarial loss dominates", "--gan-start", "--gan-weight")
    assert found["step"] <= 40


def test_lpips_without_its_weights(train: Train, tmp_path: Path) -> None:
    """Refused before any image is looked for: the data does not exist."""
    words = ["--data", tmp_path / "nothing", "--size", 32, "--perceptual-weight", 0.1]
    line = train(*words)[0].refused(2, "--perceptual-weights is needed with --perceptual-weight 0.1", "torchvision")
    assert "vgg convolutions" in line
    missing = tmp_path / "vgg.safetensors"
    train(*words, "--perceptual-weights", missing)[0].refused(1, f"--perceptual-weights: {missing} does not exist")
    missing.write_bytes(b"PK\x03\x04 a pickle")
    train(*words, "--perceptual-weights", missing)[0].refused(1, str(missing), "is not a complete safetensors file")
    names = [f"features.{n}.{kind}" for n in (0, 3, 6, 8, 10) for kind in ("weight", "bias")]
    save_file({name: torch.zeros(1) for name in names}, missing)
    train(*words, "--perceptual-weights", missing)[0].refused(1, str(missing), "features.")
    assert not (tmp_path / "run").exists()


# ---- which rules apply ----


def validation(step: int, used: float) -> dict:
    return {"step": step, "heldout/codes_used": used, "heldout/perplexity": used / 2, "heldout/psnr": 20.0}


def names(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


def test_a_collapse_is_not_named_where_it_is_a_consequence() -> None:
    rows = [validation(400, 9), validation(500, 9)]
    gan = GanConfig()
    assert names(diagnose(rows, VQConfig(), gan, 10**6, 10**5)) == ["codebook collapse"]
    growth = {"step": 20, "train/weight_growth": 3.0}
    assert names(diagnose([growth, *rows], VQConfig(), gan, 10**6, 10**5)) == ["learning rate too high"]
    assert names(diagnose(rows, VQConfig(), gan, 5000, 10**5)) == ["codebook too large"]


def test_a_collapse_is_named_once_unused_codes_could_have_been_revived() -> None:
    early = [validation(20, 9), validation(180, 9)]
    vq, lfq = VQConfig(), LFQConfig()
    assert diagnose(early, vq, GanConfig(), 10**6, 10**5) == []
    assert names(diagnose(early, lfq, GanConfig(), 10**6, 10**5)) == ["codebook collapse"]
    assert names(diagnose(early, VQConfig(revive_after=0), GanConfig(), 10**6, 10**5)) == ["codebook collapse"]


def test_fixed_codes_need_no_vectors_to_learn_from() -> None:
    for config, found in ((VQConfig(), ["codebook too large"]), (LFQConfig(), []), (FSQConfig(), [])):
        assert names(diagnose([], config, GanConfig(), 5000, 1000)) == found


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({}, "use a smaller --codebook-size or a larger --batch-size, or lower --lr"),
        ({"codebook": "gradient", "kmeans_start": False}, "use --codebook ema --kmeans-start, or a smaller"),
        ({"l2_normalize": False, "code_dim": 256}, "use --l2-normalize --code-dim 8, or a smaller"),
        ({"revive_after": 0}, "use --revive-after 100, or a smaller"),
        ({"quantizer": "residual", "revive_after": 0}, "use --revive-after 100, or"),
        ({"quantizer": "lfq"}, "raise --entropy-weight (it is 0.02), or use a smaller"),
        ({"quantizer": "gumbel"}, "raise --entropy-weight (it is 0.005) or --gumbel-kl-weight, or use"),
        ({"quantizer": "fsq"}, "use smaller --levels"),
        ({"quantizer": "simvq"}, "use a smaller --codebook-size"),
    ],
)
def test_a_remedy_is_something_that_is_not_done_yet(options: dict, remedy: str) -> None:
    assert quantizer_options(**options).collapse_remedy().startswith(remedy)
