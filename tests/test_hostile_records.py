"""JSON that programs of ours wrote and somebody changed: one line that names the file, or a note in the report."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import codes_for, make_prior

from vqgen.errors import UserError
from vqgen.evaluation import program as evaluate
from vqgen.evaluation.options import SamplesConfig
from vqgen.evaluation.receipt import read_receipt
from vqgen.evaluation.report import program as report
from vqgen.evaluation.samples import open_samples
from vqgen.files import read_json
from vqgen.prior import train
from vqgen.tokenizer import train as train_tokenizer
from vqgen.tokenizer.codes.format import MANIFEST
from vqgen.tokenizer.data.pixels import to_uint8
from vqgen.tokenizer.diagnosis import diagnose
from vqgen.tokenizer.losses.options import GanConfig
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.tokenizer.reconstruction import write_png_atomic
from vqgen.training.health import adversary_dominates, overfitting
from vqgen.training.trackers import read_rows

OLD = Path(__file__).parent / "data" / "version-0.1"
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000
NO_JSON = ["", "{", "[1]", "null", "\udcff{}", DEEP, '{"steps": 1, "steps": 2}', '{"steps": ' + "9" * 5000 + "}"]
VALUES = [None, "x", -1, 1.5, True, [], {}, 10**18, 2**63, 1e308, [[]], "\0", float("nan"), float("-inf")]
LINES = [
    b"\xff\xfe\xfd",
    b"[1, 2]",
    b"3",
    b"{",
    b'{"train/loss": 1.0}',
    b'{"step": "5", "train/loss": 1.0}',
    b'{"step": true}',
    b'{"step": -3}',
    b'{"step": 1.0}',
    b'{"step": ' + b"9" * 400 + b"}",
    b'{"step": 1, "health": ["x"]}',
    b'{"step": 1, "train/loss": {"a": 1}}',
    b'{"step": 1, "train/loss": 1e200}',
    b'{"step": 1, "train/weight_norm": ' + b"9" * 400 + b"}",
    b'{"step": 1, "step": 1}',
    DEEP.encode(),
    b"\0\0\0\0",
]


def some(cases: list[Any], count: int) -> list[Any]:
    """A fixed choice of cases: all of them take half a minute a test, and passed when they were written."""
    return random.Random(0).sample(cases, min(count, len(cases)))


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_prior(tmp_path_factory.mktemp("model"))
    folder = codes_for(tmp_path_factory.mktemp("codes") / "codes", model)
    manifest = read_json(folder / MANIFEST)
    manifest["splits"]["heldout"] = manifest["splits"]["train"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    return folder


def words(codes: Path, output: Path, steps: int) -> list[Any]:
    small = ["--dim", 16, "--layers", 1, "--heads", 2, "--batch-size", 2, "--lr-warmup", 1, "--preview-images", 2]
    often = ["--log-every", 1, "--validate-every", 2, "--checkpoint-every", 2]
    return ["--codes", codes, "--output", output, "--steps", steps, *small, *often]


@pytest.fixture(scope="module")
def trained(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    assert train.main([str(word) for word in words(codes, output, 4)]) == 0
    return output


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_lines_of_a_history_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == ([], 0)
    good = [{"step": 1, "train/loss": 1.5}, {"step": 2, "train/loss": "nan"}, {"step": 2, "health": "x", "a/b": None}]
    lines = [json.dumps(row).encode() for row in good]
    path.write_bytes(b"\n".join([lines[0], *LINES, lines[1], b"", lines[2], b'{"step": 3, "tra']))
    assert read_rows(path) == (good, len(LINES) + 1)


def test_a_run_resumes_without_them(run: Path, codes: Path, cli: Callable[..., Any]) -> None:
    path = run / "metrics.jsonl"
    good, _ = read_rows(path)
    path.write_bytes(b"\n".join([*LINES, path.read_bytes()]))
    result = cli(train.main, *words(codes, run, 6))
    assert result.code == 0, result.err
    assert len([line for line in result.err.splitlines() if "metrics.jsonl" in line and str(len(LINES)) in line]) == 1
    rows, damaged = read_rows(path)
    assert rows[: len(good)] == good and len(rows) > len(good) and not damaged


@pytest.mark.parametrize("growth", [(0,), (0.0, 1e-90), (1e-90, 1e90), (-1.5,)])
def test_a_tokenizer_resumes_from_numbers_that_no_run_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any], growth: tuple[float, ...]
) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")  # from where the run names its data
    path = Path("tokenizer-stopped/metrics.jsonl")
    odd = [json.dumps({"step": 1, "train/weight_growth": value}) for value in growth]
    path.write_text("\n".join([*odd, path.read_text()]))
    result = cli(train_tokenizer.main, "--config", path.with_name("config.yaml"), "--output", path.parent)
    assert result.code == 0 and "resuming from" in result.err, result.err
    rows, damaged = read_rows(path)
    assert [row["train/weight_growth"] for row in rows[: len(odd)]] == list(growth) and not damaged


LOGGED = "train/weight_growth train/lr train/loss train/reconstruction train/adversarial train/discriminator"
LOGGED += " train/discriminator_real train/discriminator_fake heldout/psnr heldout/lpips heldout/codes_used"
LOGGED += " heldout/perplexity heldout/nats_per_token"
ODD = [0, -1, True, 1.5, 5e-324, 1e-90, 1e90, -9e99]


def test_no_numbers_in_a_history_are_too_odd_for_its_diagnosis() -> None:
    draw = random.Random(0)
    for _ in range(1000):
        chosen = {name: draw.choices(ODD, k=10) for name in draw.sample(LOGGED.split(), 6)}
        rows = [{"step": draw.randrange(30), **{name: each[n] for name, each in chosen.items()}} for n in range(10)]
        diagnose(rows, VQConfig(), GanConfig(), 10**6, 10**6)
        overfitting(rows)


@pytest.mark.parametrize("name", ["finished.json", "vqgen.json", "config.json", "machine.json"])
def test_a_run_whose_records_are_damaged(run: Path, codes: Path, cli: Callable[..., Any], name: str) -> None:
    """It goes on where the record says nothing of the training, and else ends with one line that names the file."""
    whole = (run / name).read_text()
    key = {
        "finished.json": "steps",
        "vqgen.json": "fingerprint",
        "config.json": "vocab_size",
        "machine.json": "sessions",
    }
    changed = [json.dumps({**json.loads(whole), key[name]: value}) for value in VALUES]
    for text in [*NO_JSON, *changed]:
        (run / name).write_text(text, errors="surrogateescape")
        result = cli(train.main, *words(codes, run, 4))
        assert result.code in (0, 1) and "Traceback" not in result.err, (text[:80], result.err)
        if result.code:
            assert name in result.err and name == "finished.json"
        (run / name).write_text(whole)


@pytest.mark.parametrize("name", ["finished.json", "vqgen.json", "config.yaml", "machine.json", "metrics.jsonl"])
def test_a_report_shows_what_can_be_read(run: Path, tmp_path: Path, cli: Callable[..., Any], name: str) -> None:
    whole = (run / name).read_text()
    changed = []
    if name.endswith(".json"):
        tree = json.loads(whole)
        keys = list(tree)[:2] if name == "machine.json" else list(tree)
        changed = [json.dumps({**tree, key: value}) for key in keys for value in VALUES[::2]]
        changed += [json.dumps({"sessions": [{"first_step": v, "last_step": v, "seconds": v}]}) for v in VALUES]
    elif name == "metrics.jsonl":
        changed = [json.dumps({"step": v, "heldout/nats_per_token": v, "a/b": v}) for v in VALUES]
        changed += [whole + json.dumps({"step": 9, "heldout/nats_per_token": v, "health": v}) for v in VALUES]
    else:
        changed = ["a: &a [*a]", "codes: !!int x", "run: {steps: 1e400}\ncodes: x\noptimizer: {lr: [1]}", "[" * 5000]
    for text in some([*NO_JSON, *changed], 30):
        (run / name).write_text(text, errors="surrogateescape")
        result = cli(report.main, run, "--output", tmp_path / "report.html")
        assert result.code in (0, 2) and "Traceback" not in result.err, (text[:80], result.err)


RECEIPT: dict[str, Any] = {
    "kind": "vqgen receipt",
    "program": "likelihood",
    "options": {"model": "m", "codes": "c", "split": "heldout", "n": 0},
    "fingerprints": {"prior": "f"},
    "counts": {"images": 3},
    "metrics": {"nats_per_token": 2.0, "nats_by_class": {"a": 1.0}},
    "environment": {"vqgen": "0.2"},
    "details": {"nats_by_position": [[1.0, 2.0], [3.0, 4.0]]},
}


def changes(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """The tree with each value, and each value one level below, replaced by others, or left out."""
    found: list[dict[str, Any]] = []
    for key, inner in tree.items():
        found += [{**tree, key: value} for value in VALUES] + [{k: v for k, v in tree.items() if k != key}]
        for name in inner if isinstance(inner, dict) else ():
            found += [{**tree, key: {**inner, name: value}} for value in VALUES]
            found += [{**tree, key: {k: v for k, v in inner.items() if k != name}}]
    return found


def test_receipts_in_a_report_and_in_a_replay(run: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    path = run / "likelihood.json"
    receipt = {**RECEIPT, "fingerprints": {"prior": read_json(run / "vqgen.json")["fingerprint"]}}
    for tree in some(changes(receipt), 40):
        path.write_text(json.dumps(tree))
        result = cli(report.main, run, "--output", tmp_path / "report.html")
        assert result.code == 0, (tree, result.err)
        result = cli(evaluate.main, "replay", path)
        assert result.code in (1, 2) and len(result.err.splitlines()) == 1, (tree, result.err)
    for text in NO_JSON:
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match=r"likelihood\.json"):
            read_receipt(path)


def test_lists_of_samples(tmp_path: Path, cli: Callable[..., Any]) -> None:
    write_png_atomic(tmp_path / "a.png", to_uint8(torch.zeros(3, 8, 8)))
    write_png_atomic(tmp_path / "grid.png", to_uint8(torch.zeros(3, 8, 8)))
    outside = tmp_path.parent / "outside.png"
    write_png_atomic(outside, to_uint8(torch.zeros(3, 8, 8)))
    path, config = tmp_path / "samples.json", SamplesConfig(samples=tmp_path, data="demo")
    whole = {
        "images": [{"file": "a.png", "label": 0}],
        "class_names": ["cat"],
        "settings": {"temperature": 1.0},
        "n": 1,
    }
    path.write_text(json.dumps(whole))
    assert len(open_samples(tmp_path, config)[0]) == 1
    images = [{"file": name, "label": 0} for name in ("../outside.png", str(outside), "", ".", "nothing.png", 3)]
    images += [{"file": "a.png", "label": label} for label in (1, -2, "0", None, 10**18)] + [{}, 3]
    for text in [
        *NO_JSON,
        *(json.dumps({**whole, "images": [image]}) for image in images),
        *(json.dumps({**whole, "class_names": names}) for names in ("cat", [1], {"a": 1}, 3)),
        *(json.dumps({**whole, "images": value}) for value in (None, {}, 3, [])),
    ]:
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(UserError) as refused:
            open_samples(tmp_path, config)
        assert str(tmp_path) in str(refused.value), text[:80]
    for tree in some(changes(whole), 20):
        path.write_text(json.dumps(tree))
        result = cli(report.main, tmp_path, "--output", tmp_path.parent / "report.html")
        assert result.code in (0, 2) and "Traceback" not in result.err, (tree, result.err)


def test_text_in_place_of_a_number_is_no_measurement() -> None:
    rows: list[dict[str, Any]] = [{"step": n, "heldout/psnr": 30 - n, "heldout/lpips": "nan"} for n in range(5)]
    found = adversary_dominates([{**row, "train/adversarial": 0.1} for row in rows])
    assert found is not None and "PSNR fell from 30.0 dB to 26.0 dB" in found.measured
