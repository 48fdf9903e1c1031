"""The baselines in docs/benchmarks.md are those of the receipts, and the receipts of a row belong together."""

import importlib.util
import re
from pathlib import Path

import pytest

from vqgen.config import parse
from vqgen.evaluation.receipt import flatten, read_receipt
from vqgen.files import read_json
from vqgen.prior.train import PriorTraining

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("baselines", ROOT / "benchmarks" / "baselines.py")
assert _spec and _spec.loader
baselines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(baselines)
FOLDERS = sorted(path.parent for path in baselines.RECEIPTS.glob("*/*/training.json"))


@pytest.mark.parametrize("data", list(baselines.ROWS))
def test_the_documentation_has_the_table_of_the_receipts(data):
    found = "\n".join(baselines.table(data))
    document = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert found in document, f"the table of {data} is now\n{found}"


def test_the_presets_state_the_metrics_of_the_receipts():
    receipts = {name: f for f in FOLDERS if f.parent.name == "cifar10" for name in (f.name, f"quantizer-{f.name}")}
    presets = [preset for preset in sorted((ROOT / "configs").glob("*.yaml")) if preset.stem in receipts]
    assert len(presets) == 15
    for preset in presets:
        metrics = read_receipt(receipts[preset.stem] / "reconstruction.json")["metrics"]
        text = " ".join(re.findall("^# ?(.*)", preset.read_text(encoding="utf-8"), re.MULTILINE))
        stated = re.search(r"Measured on .*?: ([\d.]+) dB.*?([\w.]+)( %| codes)? in use, perplexity (\d+)", text)
        used = "all" if metrics["usage"] == 1 else f"{100 * metrics['usage']:.1f}"
        expected = f"{metrics['psnr']:.2f}", used, f"{metrics['perplexity']:.0f}"
        assert stated and stated.group(1, 2, 4) == expected, preset


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_receipts_of_a_row_belong_together(folder):
    found = {path.stem: read_receipt(path) for path in folder.glob("*.json") if path.stem != "training"}
    trained = read_json(folder / "training.json")
    assert "reconstruction" in found and ("likelihood" in found) == ("samples" in found) == ("prior" in trained)
    for mark in ("tokenizer", "prior", "classifier"):
        # A search of settings has a classifier of its own.
        of = [r for r in found.values() if (mark, r["program"]) != ("classifier", "settings")]
        assert len({r["fingerprints"][mark] for r in of if r["fingerprints"].get(mark)}) <= 1, mark
    for receipt in found.values():
        assert not [value for value in receipt["options"].values() if str(value).startswith("/")]
        assert all(isinstance(value, (int, float)) for _, value in flatten(receipt["metrics"]))
    assert found["reconstruction"]["counts"]["images"] == 10_000


def test_the_priors_of_a_new_row_are_trained_as_those_of_the_receipts():
    run = parse(PriorTraining, [*baselines.PRIOR, "--codes", "codes"]).run
    trained = [read_json(folder / "training.json").get("prior") for folder in FOLDERS if folder.name != "package"]
    assert {(each["steps"], each["seen"]) for each in trained if each} == {(run.steps, run.steps * run.batch_size)}


def test_rows_that_are_measured_are_rows_that_can_be_made():
    assert FOLDERS
    for folder in FOLDERS:
        assert folder.name in baselines.ROWS[folder.parent.name] or folder.name == "package"
