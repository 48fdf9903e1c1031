"""Descriptions of models that promise what their weights do not hold, or that no weights could hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_prior

from vqgen.artifact import save_artifact
from vqgen.errors import UserError
from vqgen.evaluation.classifier import Classifier, ClassifierConfig
from vqgen.files import read_json
from vqgen.prior.model import Prior
from vqgen.tokenizer.model import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prior(tmp_path_factory.mktemp("model"))


def with_value(folder: Path, place: str, value: Any) -> None:
    """Set one value, a.b.c, of a JSON file of a folder."""
    name, *keys = place.split(":")[0], *place.split(":")[1].split(".")
    tree = read_json(folder / name)
    inner = tree
    for key in keys[:-1]:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[int(keys[-1]) if isinstance(inner, list) else keys[-1]] = value
    (folder / name).unlink()  # a link, see `copy_of`
    (folder / name).write_text(json.dumps(tree))


def copy_of(model: Path, target: Path) -> Path:
    for path in model.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(model)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.hardlink_to(path)
    return target


LARGE, WRONG = [10**18, 10**6, 2**70], [None, "8", 1.5, True, [], {}, -1, 0]


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("vqgen.json:prior.layers", [*LARGE, *WRONG, 900]),
        ("vqgen.json:prior.dim", [*LARGE, *WRONG, 2**20]),
        ("vqgen.json:prior.heads", [*LARGE, *WRONG]),
        ("vqgen.json:prior.hidden_dim", [*LARGE, "8", 1.5, True, 2**20]),
        ("vqgen.json:prior.dropout", [None, "x", True, -1, 2, float("inf"), float("nan")]),
        ("vqgen.json:prior", [None, 3, [], {"steps": 1}]),
        ("vqgen.json:codebook_size", [*LARGE, *WRONG, 2**24]),
        ("vqgen.json:depth", [*LARGE, *WRONG, 200]),
        ("vqgen.json:grid", [*WRONG, [1], [0, 2], [1, 2, 3], [10**9, 10**9], [2, "3"], [2.0, 3]]),
        ("vqgen.json:image_shape", [*WRONG, [3, 4], [3, 4, 10**18], [3, True, 6]]),
        ("vqgen.json:classes", [*LARGE, None, "3", 1.5, True, -1, 2**24]),
        ("vqgen.json:class_names", ["abc", [1, 2, 3], {"a": 1}, ["a"], 3]),
        ("vqgen.json:label_dropout", [None, "x", True, -1, 1, float("nan")]),
        ("vqgen.json:unlabelled", [None, "x", 1, [True]]),
        ("vqgen.json:tokenizer_fingerprint", [None, 3, ["f"]]),
        ("config.json:num_hidden_layers", [*LARGE, *WRONG]),
        ("config.json:vocab_size", [*LARGE, "x"]),
        ("config.json:model_type", [None, 3, "bert"]),
        ("config.json:rope_parameters", [3, "x"]),
    ],
)
def test_a_prior_whose_description_does_not_fit(model: Path, tmp_path: Path, place: str, values: list[Any]) -> None:
    for number, value in enumerate(values):
        folder = copy_of(model, tmp_path / str(number))
        with_value(folder, place, value)
        with pytest.raises(UserError) as refused:
            Prior.load(folder)
        assert str(folder) in str(refused.value) and refused.value.exit_code == 1, value


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("architecture", [None, 3, [], "x", {}]),
        ("architecture.image_size", [None, 4, [4], [0, 2], [1, 2, 3], [10**18, 2], [4.0, 6], ["4", 6]]),
        ("architecture.channels", [*LARGE, *WRONG, 5]),
        ("architecture.model.width", [*LARGE, *WRONG, 2**20]),
        ("architecture.model.multipliers", [*WRONG, [10**18], [1] * 100, [1, True], [1, 1, 1]]),
        ("architecture.model.blocks", [*LARGE, *WRONG, 500]),
        ("architecture.model.latent_dim", [*LARGE, *WRONG, 2**20]),
        ("architecture.model.attention", [None, 1, "yes"]),
        ("architecture.model.attention_levels", [3, [9], ["0"]]),
        ("architecture.quantizer.codebook_size", [*LARGE, *WRONG, 2**24]),
        ("architecture.quantizer.code_dim", [*LARGE, *WRONG, 2**20]),
        ("architecture.quantizer.quantizer", [3, None, [], "none"]),
        ("architecture.quantizer.entropy_weight", ["x", None, float("nan"), float("inf"), True]),
        ("architecture.fit", [3, None, "x", []]),
    ],
)
def test_a_tokenizer_whose_description_does_not_fit(model: Path, tmp_path: Path, place: str, values: list[Any]) -> None:
    for number, value in enumerate(values):
        folder = copy_of(model / "tokenizer", tmp_path / str(number))
        with_value(folder, f"vqgen.json:{place}", value)
        with pytest.raises(UserError) as refused:
            Tokenizer.load(folder)
        assert str(folder) in str(refused.value) and refused.value.exit_code == 1, value


def test_a_classifier_whose_description_does_not_fit(tmp_path: Path) -> None:
    about = {"size": [16, 16], "channels": 3, "class_names": ["a", "b"], "width": 8}
    state = Classifier(ClassifierConfig(**about)).state_dict()
    save_artifact(tmp_path, "classifier", {"classifier": about}, state)
    Classifier.load(tmp_path, torch.device("cpu"))
    for key, values in {
        "size": [None, 16, ["x", 16], [0, 0]],
        "channels": [*LARGE, *WRONG, 2**20],
        "class_names": [None, "ab", [1, 2], ["a"] * 100_000],
        "width": [*LARGE, *WRONG, 7, 2**20],
    }.items():
        for value in values:
            save_artifact(tmp_path, "classifier", {"classifier": {**about, key: value}}, state)
            with pytest.raises(UserError, match=str(tmp_path)) as refused:
                Classifier.load(tmp_path, torch.device("cpu"))
            assert refused.value.exit_code == 1, (key, value)


def test_keys_that_are_given_twice_are_refused(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "twice")
    text = (folder / "vqgen.json").read_text()
    (folder / "vqgen.json").unlink()
    (folder / "vqgen.json").write_text(text.replace('"depth": 1', '"depth": 2, "depth": 1'))
    with pytest.raises(UserError, match=r"vqgen\.json.*depth"):
        Prior.load(folder)


def test_loading_draws_no_further_random_numbers(model: Path) -> None:
    """What follows a load draws the same numbers as before descriptions were compared with weights."""
    tokenizer = Tokenizer.load(model / "tokenizer")
    torch.manual_seed(0)
    Tokenizer(tokenizer.config)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    Tokenizer.load(model / "tokenizer")
    assert torch.equal(torch.get_rng_state(), expected)
