"""A run that goes on in another precision: `--precision auto` is one on this machine and another on the next."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import rows, steps

from vqgen.tokenizer.train import main
from vqgen.training import run

OTHER = {"cpu": "bf16", "cuda": "fp16"}
WORDS = (
    "--data demo --channels 1 --size 16 --width 8 --multipliers 1 2 --groups 4 --blocks 1 --latent-dim 8 "
    "--codebook-size 64 --batch-size 8 --workers 0 --validation-images 8 --lr-warmup 1 --log-every 1 "
    "--validate-every 9 --checkpoint-every 2"
).split()


def test_it_resumes_and_says_so(
    trained_on: str, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, said = OTHER[trained_on], []
    for count, precision in ((2, "no"), (4, other), (6, other), (8, "no")):
        monkeypatch.setattr(run, "precision_of", lambda *_, found=precision: found)
        result = cli(main, *WORDS, "--steps", count, "--output", tmp_path / "run")
        assert result.code == 0, result.err
        said.append([line for line in result.err.splitlines() if line.startswith("--precision")])
    assert [len(lines) for lines in said] == [0, 1, 0, 1]
    for (line,), words in ((said[1], ("fp32", "step 2", other)), (said[3], (other, "step 6", "fp32"))):
        places = [line.index(word) for word in words]
        assert places == sorted(places)
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == [*range(1, 9)]
    assert steps(tmp_path / "run") == [6, 8]
