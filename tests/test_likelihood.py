"""vqgen-eval likelihood: the negative log-likelihood against a naive loop, its map, and what it refuses."""

import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import NAMES, SIZE, codes_for, make_prior, write_codes
from torchvision.io import decode_image

import vqgen.evaluation.program as evaluate
from vqgen.errors import UsageError
from vqgen.evaluation.likelihood import heat_map
from vqgen.evaluation.measurement import check_classes
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.parts.source import PairedSource
from vqgen.prior.vocabulary import Vocabulary
from vqgen.sampling.generator import SHIPPED
from vqgen.tokenizer.codes.format import CodeFiles, SourceRecord
from vqgen.tokenizer.reconstruction import write_png_atomic


def naive(prior: Prior, row: list[int]) -> list[float]:
    """-log p of each code of a sequence by a full softmax over one prefix at a time."""
    found = []
    for position in range(1, len(row)):
        with torch.no_grad():
            scores = prior(torch.tensor([row[:position]]))[0, -1].double().tolist()
        found.append(math.log(sum(math.exp(score) for score in scores)) - scores[row[position]])
    return found


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("unconditional", [False, True])
def test_metrics_are_those_of_a_naive_loop(cli, tmp_path, depth, unconditional):
    model = make_prior(tmp_path / "model", depth=depth)
    labels = torch.tensor([0, 1, 2, 0, -1, 2, 2, 0, 1]).numpy()
    folder = codes_for(tmp_path / "codes", model, depth=depth, labels=labels)
    words = ["--model", model, "--codes", folder, "--split", "train", "--batch-size", 4]
    words += ["--map", tmp_path / "map.png", *(["--unconditional"] if unconditional else [])]
    result = cli(evaluate.main, "likelihood", *words)
    assert result.code == 0, result.err
    receipt = model / ("likelihood-train-unconditional.json" if unconditional else "likelihood-train.json")
    found = json.loads(receipt.read_text())
    metrics, details = found["metrics"], found["details"]

    prior, files = Prior.load(model), CodeFiles(folder, "train")
    vocabulary = prior.vocabulary
    codes = torch.as_tensor(files.gather(range(9), [0] * 9)).long()  # type: ignore[arg-type]
    given = torch.full((9,), -1) if unconditional else torch.from_numpy(labels)
    tokens = torch.cat([prior.conditioning.classes.of_labels(given)[:, None], vocabulary.to_tokens(codes)], 1)
    each = torch.tensor([naive(prior, row) for row in tokens.tolist()])
    mean = each.mean().item()
    assert metrics["nats_per_token"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert metrics["bits_per_dimension"] == pytest.approx(mean * 6 * depth / math.log(2) / 72, rel=1e-5)
    grid = each.mean(0).view(2, 3, depth).permute(2, 0, 1).squeeze(0)
    torch.testing.assert_close(torch.tensor(details["nats_by_position"]), grid, rtol=1e-4, atol=1e-4)
    groups = (
        {"no class": range(9)}
        if unconditional
        else {**dict(zip(NAMES, ([0, 3, 7], [1, 8], [2, 5, 6]))), "no class": [4]}
    )
    assert details["images_by_class"] == {name: len(rows) for name, rows in groups.items()}
    for name, rows in groups.items():
        own = each[list(rows)].mean().item()
        assert metrics["nats_by_class"][name] == pytest.approx(own, rel=1e-5)
    picture = decode_image(str(tmp_path / "map.png"))
    assert picture.shape == (3, 48, 72 * depth + 6 * (depth - 1))
    assert f"{mean:.5g} nats per token" in result.out and "rate of the codes" in result.out


def test_a_class_may_be_called_as_images_without_one() -> None:
    layout = Conditioning(Vocabulary(SIZE, 1, (2, 3)), [Classes(2, ["shoe", "no class"])])
    assert len(set(layout.group_names)) == 3 and layout.group_names[:2] == ["shoe", "no class"]


def described(folder: Path, **changes: Any) -> Path:
    """The same prior with other values in `vqgen.json`."""
    path = folder / "vqgen.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_no_class_is_given_where_it_is_learned_from_images_without_one(cli, tmp_path):
    model = described(make_prior(tmp_path / "model"), label_dropout=0, unlabelled=True)
    found = []
    for name, labels, words in (("some", [0, -1, 2], ["--unconditional"]), ("none", [-1] * 3, [])):
        folder = codes_for(tmp_path / name, model, counts=(3,), labels=np.array(labels))
        words += ["--model", model, "--codes", folder, "--split", "train", "--output", tmp_path / "receipt.json"]
        assert cli(evaluate.main, "likelihood", *words).code == 0
        found.append(json.loads((tmp_path / "receipt.json").read_text()))
    assert found[0]["metrics"] == found[1]["metrics"] and list(found[0]["metrics"]["nats_by_class"]) == ["no class"]


def test_a_class_that_was_never_absent_cannot_be_left_out_whatever_other_conditions_can(cli, tmp_path):
    model = described(make_prior(tmp_path / "model"), label_dropout=0)
    words = ["likelihood", "--model", model, "--codes", codes_for(tmp_path / "codes", model), "--split", "train"]
    result = cli(evaluate.main, *words, "--unconditional")
    assert result.code == 2 and "--unconditional" in result.err and "--label-dropout 0" in result.err
    classes, source = Classes(3, NAMES, 0.0), PairedSource(SourceRecord("degraded", [2, 3], "d" * 64, ["grey"]), 0.1)
    prior = types.SimpleNamespace(conditioning=Conditioning(Vocabulary(SIZE, 1, (2, 3)), [source, classes]))
    with pytest.raises(UsageError, match=r"--unconditional: .*--label-dropout 0"):
        check_classes(prior, NAMES, True, "codes")  # type: ignore[arg-type]


def test_the_map_is_dark_where_values_are_low():
    picture = heat_map(torch.tensor([[0.0, 1.0], [3.0, 2.0]])).float().mean(0)
    cells = picture.view(2, 24, 2, 24).mean((1, 3)).flatten()[[0, 1, 3, 2]]
    assert cells.tolist() == sorted(cells.tolist()) and cells[3] > 200 > 30 > cells[0]
    assert heat_map(torch.ones(2, 2)).unique().numel() == 2  # no difference, one colour


def test_other_codes_are_refused(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    folder = codes_for(tmp_path / "codes", model)
    (other := tmp_path / "other").mkdir()
    write_codes(other, size=SIZE)
    for words, part in (
        (["--codes", other, "--split", "train"], "holds codes of the tokenizer ffffffffffff"),
        (["--codes", folder], "holds no heldout images"),
        (["--codes", folder, "--batch-size", 0], "--batch-size: found 0"),
        (["--codes", tmp_path / "nowhere"], "nowhere"),
        (["--codes", folder, "--model", tmp_path / "nowhere"], "nowhere"),
    ):
        result = cli(evaluate.main, "likelihood", "--model", model, *words)
        assert result.code and part in result.err and len(result.err.strip().splitlines()) == 1, result.err
    renamed = codes_for(tmp_path / "renamed", model, names=["a", "b", "c"])
    words = ["--model", model, "--codes", renamed, "--split", "train"]
    assert "has the classes a, b, c, the prior has shirt" in cli(evaluate.main, "likelihood", *words).err
    assert cli(evaluate.main, "likelihood", *words, "--unconditional").code == 0


def test_a_prior_of_the_package_is_found_by_its_name(cli, tmp_path, monkeypatch):
    model = make_prior(tmp_path / "model")
    monkeypatch.setitem(SHIPPED, "packaged", model)
    words = ["--model", "packaged", "--codes", codes_for(tmp_path / "codes", model), "--split", "train"]
    result = cli(evaluate.main, "likelihood", *words)
    assert result.code == 2 and "--output" in result.err and not list(model.glob("likelihood*"))
    result = cli(evaluate.main, "likelihood", *words, "--output", tmp_path / "receipt.json")
    assert result.code == 0, result.err
    assert cli(evaluate.main, "replay", tmp_path / "receipt.json").code == 0


def test_receipts_of_several_precisions_replay_in_one_call(cli, tmp_path):
    """Accelerate's state, which is one for the process, keeps the first precision unless it is reset."""
    model = make_prior(tmp_path / "model")
    codes_for(tmp_path / "codes", model)
    words = ["--model", model, "--codes", tmp_path / "codes", "--split", "train", "--n", 5]
    for precision in ("fp32", "bf16"):
        result = cli(evaluate.main, "likelihood", *words, "--precision", precision)
        assert result.code == 0, result.err
    receipts = [model / f"likelihood-train-5{end}.json" for end in ("", "-bf16")]
    assert [json.loads(path.read_text())["environment"]["precision"] for path in receipts] == ["fp32", "bf16"]
    result = cli(evaluate.main, "replay", *receipts)
    assert result.code == 0 and result.out.count("same: ") == 2, result.err


def test_a_map_replaces_no_picture_of_others(cli, tmp_path):
    model = make_prior(tmp_path / "model")
    folder = codes_for(tmp_path / "codes", model)
    words = ["likelihood", "--model", model, "--codes", folder, "--split", "train"]
    words += ["--map", tmp_path / "positions.png"]
    for _ in range(2):
        assert cli(evaluate.main, *words).code == 0
    picture = (tmp_path / "positions.png").read_bytes()
    write_png_atomic(tmp_path / "positions.png", torch.zeros(3, 4, 4, dtype=torch.uint8))
    foreign = (tmp_path / "positions.png").read_bytes()
    result = cli(evaluate.main, *words)
    assert result.code == 2 and "--map" in result.err and str(tmp_path / "positions.png") in result.err
    assert (tmp_path / "positions.png").read_bytes() == foreign != picture


def test_sources_are_measured_and_in_the_receipt(cli, tmp_path):
    """Two folders of the same codes with other sources differ, and without any there is an NLL without a source."""
    codes, sources = CodeFiles(codes_for(tmp_path / "plain", make_prior(tmp_path / "plainly")), "train"), []
    about = SourceRecord("degraded", [2, 3], "d" * 64, ["grey"])
    prior = Prior.load(tmp_path / "plainly")
    conditioning = Conditioning(prior.vocabulary, [PairedSource(about, 0.1), Classes(3, NAMES)])
    torch.manual_seed(0)
    model = Prior(PriorConfig(dim=16, layers=2, heads=2), conditioning, (3, 4, 6), prior.tokenizer_fingerprint)
    model.save(tmp_path / "model", tmp_path / "plainly" / "tokenizer")
    for name, shift in (("one", 1), ("two", 2)):
        drawn = (np.arange(9 * 6).reshape(9, 1, 2, 3) + shift) % SIZE
        sources.append(codes_for(tmp_path / name, tmp_path / "model", source=drawn))

    def measured(folder: Path, *words: str) -> dict[str, Any]:
        words = ("--codes", str(folder), "--split", "train", "--output", str(tmp_path / "receipt.json"), *words)
        result = cli(evaluate.main, "likelihood", "--model", tmp_path / "model", *words)
        assert result.code == 0, result.err
        (tmp_path / "receipt.json").replace(tmp_path / "kept.json")
        return json.loads((tmp_path / "kept.json").read_text())

    one, two = (measured(folder) for folder in sources)
    assert one["fingerprints"]["codes"] == two["fingerprints"]["codes"]
    assert one["fingerprints"]["sequences"] != two["fingerprints"]["sequences"]
    assert one["metrics"]["nats_per_token"] != two["metrics"]["nats_per_token"]
    without = [measured(folder, "--unconditional")["metrics"] for folder in (*sources, codes.folder)]
    assert without[0] == without[1] == without[2]
    result = cli(
        evaluate.main, "likelihood", "--model", tmp_path / "model", "--codes", codes.folder, "--split", "train"
    )
    assert result.code == 1 and "no source codes" in result.err and "--unconditional" in result.err
