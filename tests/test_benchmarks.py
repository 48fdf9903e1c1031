"""Programs of benchmarks/: what is run, how often and with which options, at tiny sizes and with clocks made up."""

import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import sample, scale
from vqgen.config import parse
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.decoding.cached_transformer import CachedTransformer
from vqgen.tokenizer.encode import TokenizeConfig

Run = Callable[..., str]
CPU = torch.device("cpu")
SHAPE = PriorConfig("llama", 32, 1, 2)
WORDS = "--dim 32 --layers 1 --heads 2 --codebook-size 16 --grid 2 2 --batch-sizes 2 --precision fp32 --device cpu"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call the `main` of a program; its output comes back."""

    def call(module: Any, words: str) -> str:
        monkeypatch.setattr(sys, "argv", [module.__file__, *words.split()])
        module.main()
        return capsys.readouterr().out

    return call


# ---- scale.py ----


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TokenizeConfig, int]]:
    """The runs of vqgen-tokenize, which only seem to end: their options, and the number of processes."""
    found = list[tuple[TokenizeConfig, int]]()

    def launched(code: str, words: list[str], results: list[Path]) -> list[Any]:
        config = parse(TokenizeConfig, words)
        found.append((config, len(results)))
        config.output.mkdir()
        (config.output / "codes-00000.safetensors").write_bytes(b"codes")
        return [[0, 1e9]] * len(results)

    monkeypatch.setattr(scale, "launched", launched)
    return found


def test_streams_are_encoded_augmented_by_one_and_two_processes(run: Run, asked: list[Any]) -> None:
    found = json.loads(run(scale, "tokenize --images 8 --each 3 --tokenizer t"))
    assert [processes for _, processes in asked] == [1, 1, 2] and found["shards"] == found["equal_shards"] == 1
    assert {"quarter_peak_gb", "one_peak_gb", "two_peak_gb", "two_clock_seconds"} <= found.keys()
    quarter, one, two = (config for config, _ in asked)
    assert quarter.data != one.data == two.data
    assert all(config.views == found["views"] == 2 and config.images.augments for config, _ in asked)


def test_one_number_of_processes_and_images_as_they_are(run: Run, asked: list[Any]) -> None:
    found = json.loads(run(scale, "tokenize --images 8 --tokenizer t --processes 2 --views 1"))
    assert [processes for _, processes in asked] == [2, 2] and "one_peak_gb" not in found and "shards" not in found
    assert all(config.views == 1 and not config.images.augments for config, _ in asked)


# ---- sample.py ----


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each piece of work take a second more than the one before it; the first one second."""
    clock = count(1)
    monkeypatch.setattr(sample, "seconds", lambda work, device: (work(), float(next(clock)))[1])
    monkeypatch.setattr(sample, "matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr(sample, "copy_bandwidth", lambda *_: 1e9)


def test_the_best_and_the_slowest_run_are_kept(ticking: None) -> None:
    (found,) = sample.compared(SHAPE, Vocabulary(16, 1, (2, 2)), CPU, "fp32", [2], 3)
    assert found.seconds == {"vqgen": 1, "guided": 2, "transformers": 3}
    assert found.slowest == {"vqgen": 7, "guided": 8, "transformers": 9}


def test_several_tokens_a_feed_are_compared_with_one(ticking: None, run: Run) -> None:
    told = run(sample, f"{WORDS} --repeats 2 --feed 3")
    assert "slowest 4.00 s" in told and "slowest 6.00 s" in told
    # After the six drawings and a turn that warms up, 20 turns, seconds 9 to 48.
    (line,) = [line for line in told.splitlines() if "a feed" in line]
    for text in ("3: 9000.00 ms (slowest 47000.00)", "1: 10000.00 ms (slowest 48000.00)", "0.90 times"):
        assert text in line
    assert "a feed" not in run(sample, f"{WORDS} --repeats 1 --feed 0")


def test_each_call_of_feed_is_after_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, logits = Vocabulary(16, 1, (1, sample.BEFORE + 3)), list[torch.Tensor]()
    model = sample.random_model(SHAPE, Conditioning(vocabulary, [Classes(10)]), CPU, "fp32", "eager")
    decoder = CachedTransformer(model, vocabulary.length)  # type: ignore[arg-type]
    monkeypatch.setattr(sample, "seconds", lambda work, device: (logits.append(work().clone()), 1.0)[1])
    sample.feeding(decoder, 2, 3, (0, 16), 1)
    assert len(logits) == 2 * (1 + sample.TURNS) and not torch.equal(logits[0], logits[1])
    for place in (0, 1):
        assert all(torch.equal(each, logits[place]) for each in logits[place::2])
