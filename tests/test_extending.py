"""The changes that docs/extending.md describes, each done with a toy."""

import json

import pytest
from processes import write_images

from vqgen.evaluation import program as evaluate
from vqgen.metric import Metric
from vqgen.tokenizer import train
from vqgen.tokenizer.metrics import RECONSTRUCTION

TINY = "--size 16 --channels 1 --width 8 --multipliers 1 2 --blocks 1 --groups 4 --latent-dim 8 --codebook-size 32"
TINY += " --batch-size 4 --holdout 0.2 --precision fp32"


def test_another_metric(cli, tmp_path, monkeypatch):
    """One entry in the registry: validations and receipts have it."""

    def mean_absolute_error(images, targets):
        return (images.float() - targets.float()).abs().flatten(1).mean(dim=1)

    monkeypatch.setitem(RECONSTRUCTION, "mae", Metric("mae", "Mean absolute error", "", "lower", mean_absolute_error))
    write_images(tmp_path / "images", 20)
    run, data = tmp_path / "run", ["--data", tmp_path / "images"]
    assert cli(train.main, *data, "--output", run, *TINY.split(), "--steps", 2, "--log-every", 1).code == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [row["heldout/mae"] for row in rows if "heldout/mae" in row][-1]
    words = ["--tokenizer", run, *data, "--holdout", 0.2, "--output", tmp_path / "receipt.json", "--device", "cpu"]
    assert cli(evaluate.main, "reconstruction", *words).code == 0
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    measured = receipt.get("metrics", receipt.get("figures"))["mae"]
    assert 0 < measured < 255 and measured == pytest.approx(validated, rel=1e-5)
