"""A prior that goes on with other codes than those it began with: refused by what differs, or trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.models import NAMES, SIZE, codes_for, make_prior
from processes import rows, steps, tree

from vqgen.evaluation.report.run_folder import open_folder
from vqgen.evaluation.report.series import final
from vqgen.files import read_json
from vqgen.prior import train
from vqgen.prior.export.card import measured
from vqgen.prior.model import Prior
from vqgen.prior.selection import BEST, NATS
from vqgen.tokenizer.codes.format import MANIFEST, checksum, write_shard

WORDS = "--dim 16 --layers 1 --heads 2 --batch-size 2 --lr-warmup 1 --preview-images 0 --precision fp32"
WORDS += " --log-every 1 --validate-every 2 --checkpoint-every 2"
CAPTIONS = ["a red shoe", "a bag", "a shirt"] * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior whose tokenizer the codes are of."""
    return make_prior(tmp_path_factory.mktemp("model"))


def write(folder: Path, model: Path, **options: Any) -> Path:
    """Code files in place of others, with the training images held out as well."""
    shutil.rmtree(folder, ignore_errors=True)
    codes_for(folder, model, **options)
    manifest = read_json(folder / MANIFEST)
    manifest["splits"]["heldout"] = manifest["splits"]["train"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    return folder


def change(codes: Path, **values: Any) -> None:
    """Change keys of the manifest."""
    path = codes / MANIFEST
    path.write_text(json.dumps(read_json(path) | values))


def rewrite_state(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the `extra` of all checkpoints, as if an earlier version without checksums had written them."""
    for path in run.glob("checkpoints/step-*/state.json"):
        state = json.loads(path.read_text())
        change(state["extra"])
        path.write_text(json.dumps({"step": state["step"], "extra": state["extra"]}))


def words(codes: Path, run: Path, count: int) -> list[Any]:
    return [*WORDS.split(), "--codes", codes, "--output", run, "--steps", count]


@pytest.mark.parametrize(
    ("began", "now", "found"),
    [
        ({"names": ["cat", "dog", "horse"]}, {"names": ["ape", "dog", "horse"]}, ["'ape'", "'cat'"]),
        ({"names": ["cat", "dog", "horse"]}, {"names": ["dog", "cat", "horse"]}, ["class 0", "'dog'", "'cat'"]),
        ({}, {"names": [*NAMES, "hat"]}, ["4 classes", "3 classes"]),
        ({"names": None, "labels": np.full(9, -1)}, {}, ["3 classes", "0 classes"]),
        ({"captions": CAPTIONS}, {"captions": ["a blue boot in the rain"] * 9}, ["text_tokenizer.json", "captions"]),
        ({"captions": CAPTIONS}, {}, ["text, "]),
        ({}, {"captions": CAPTIONS}, ["text, "]),
        ({}, {"source": True}, ["sources"]),
    ],
    ids=["renamed", "reordered", "more", "labelled", "captions", "uncaptioned", "captioned", "sources"],
)
def test_codes_of_another_kind_are_refused_before_a_checkpoint_is_read(cli, model, tmp_path, began, now, found) -> None:
    codes, run = write(tmp_path / "codes", model, **began), tmp_path / "run"
    assert cli(train.main, *words(codes, run, 2)).code == 0
    before = {name: content for name, (_, content) in tree(run).items()}
    write(codes, model, **now)
    change(codes, data_fingerprint="e" * 64)
    result = cli(train.main, *words(codes, run, 4))
    assert result.code == 1 and "Traceback" not in result.err
    line = result.err.splitlines()[-1]
    assert all(part in line for part in [*found, "--overwrite"]) and "remove" not in line and "damaged" not in line
    assert {name: content for name, (_, content) in tree(run).items()} == before


def test_a_tokenizer_with_another_codebook_is_named(cli, model, tmp_path) -> None:
    codes, run = write(tmp_path / "codes", model), tmp_path / "run"
    assert cli(train.main, *words(codes, run, 2)).code == 0
    other = make_prior(tmp_path / "other", depth=2)
    write(codes, other, depth=2)
    result = cli(train.main, *words(codes, run, 4))
    mark = str(Prior.load(other).tokenizer_fingerprint)[:12]
    assert result.code == 1 and "--codes" in result.err and mark in result.err and "damaged" not in result.err


def test_the_checkpoint_of_an_earlier_version_is_of_another_model_and_stays(cli, model, tmp_path) -> None:
    """It does not say what its codes were; with codes of the same sizes the run goes on."""
    codes, run = write(tmp_path / "codes", model), tmp_path / "run"
    assert cli(train.main, *words(codes, run, 4)).code == 0
    rewrite_state(run, lambda extra: extra.pop("codes"))
    write(codes, model, names=[*NAMES, "hat"])
    result = cli(train.main, *words(codes, run, 6))
    assert result.code == 1 and "size mismatch" in result.err and "remove" not in result.err
    assert steps(run) == [2, 4]
    write(codes, model, names=["ape", "dog", "horse"])
    assert cli(train.main, *words(codes, run, 6)).code == 0
    # Those since then do not say what the classes were.
    rewrite_state(run, lambda extra: [extra.get("codes", {}).pop(name, None) for name in ("class_names", "prefix")])
    write(codes, model)
    result = cli(train.main, *words(codes, run, 8))
    assert result.code == 0 and "other images" not in result.err, result.err


def test_dropout_of_conditions_that_the_codes_lack_is_refused_of_a_new_run(cli, model, tmp_path) -> None:
    codes, run = write(tmp_path / "codes", model, names=None, labels=np.full(9, -1)), tmp_path / "run"
    option = ["--label-dropout", 0.5]
    none = tmp_path / "none"
    assert cli(train.main, *words(codes, none, 2), "--label-dropout", 0).code == 0, "0 asks for nothing"
    for each in (option, ["--text-dropout", 0.5]):
        for length in ([], ["--epochs", 1]):
            given = words(codes, run, 2)[: -2 if length else None]
            result = cli(train.main, *given, *length, *each)
            assert result.code == 2 and f"{each[0]}: found 0.5" in result.err and not (run / "checkpoints").exists()
    shared = tmp_path / "shared.yaml"
    shared.write_text("objective:\n  label_dropout: 0.5\n")
    assert cli(train.main, *words(codes, run, 2), "--config", shared).code == 0
    result = cli(train.main, *words(codes, run, 4), *option)
    assert result.code == 0 and "resuming" in result.err, "a run of an earlier version goes on"
    assert cli(train.main, *words(codes, run, 4), *option, "--overwrite").code == 2


def test_card_and_report_have_the_validation_whose_weights_are_saved(cli, model, tmp_path) -> None:
    """Of a run that went on with images of another kind, whose codes are harder to predict."""
    easy, hard = np.zeros((9, 1, 2, 3), dtype=int), np.random.default_rng(0).integers(SIZE, size=(9, 1, 2, 3))
    codes, run = write(tmp_path / "codes", model), tmp_path / "run"

    def fill(values: np.ndarray, mark: str) -> None:
        entries, start = read_json(codes / MANIFEST)["splits"]["train"], 0
        for shard in entries["shards"]:
            part = slice(start, start + shard["count"])
            write_shard(codes / shard["file"], values[part], np.arange(9)[part] % 3, SIZE)
            shard["sha256"], start = checksum(codes / shard["file"]), part.stop
        change(codes, data_fingerprint=mark * 64, splits={"train": entries, "heldout": {**entries, "views": 1}})

    fill(easy, "a")
    options = ["--lr", 0.03, "--ema-decay", 0.0, "--patience", 0]
    assert cli(train.main, *words(codes, run, 8), *options).code == 0
    fill(hard, "b")
    result = cli(train.main, *words(codes, run, 12), *options)
    assert result.code == 0 and "other images" in result.err
    found = {row["step"]: row[f"heldout/{NATS}"] for row in rows(run) if f"heldout/{NATS}" in row}
    since = {step: nats for step, nats in found.items() if step > 8}
    best = min(since, key=lambda step: since[step])
    assert min(found.values()) < since[best] and [row for row in rows(run) if BEST in row][-1]["step"] == best
    (opened,) = open_folder(run).runs
    assert (final(opened) or (0,))[0] == best
    (row,) = [row for row in measured(run, Prior.load(run)) if row.name == NATS]
    assert row.value == since[best] and f"step {best}" in row.source
