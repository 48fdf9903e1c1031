"""The changes that docs/extending.md describes, each done with a toy."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toy_network import StridedConfig
from helpers.toy_quantizer import BinaryConfig
from processes import write_images

from vqgen.errors import UsageError, UserError
from vqgen.evaluation import program as evaluate
from vqgen.evaluation.report import program as report
from vqgen.metric import Metric
from vqgen.prior import conditioning
from vqgen.prior.convert import program as convert
from vqgen.prior.export import program as export
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.prior.orders import ORDERS
from vqgen.prior.parts.part import Classes, Part, Rows
from vqgen.prior.train import PriorTraining
from vqgen.prior.train import train as train_prior
from vqgen.sampling.generator import Generator
from vqgen.sampling.known import Known
from vqgen.sampling.sample import SampleConfig
from vqgen.sampling.write_samples import write_samples as draw_samples
from vqgen.tokenizer import encode, train
from vqgen.tokenizer.codes.format import CodeFiles, Manifest, ShardEntry, SplitEntry, checksum, write_shard
from vqgen.tokenizer.metrics import RECONSTRUCTION
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import NETWORKS, NetworkConfig, VQGANConfig
from vqgen.tokenizer.networks.options import register as register_network
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import QUANTIZERS, QuantizerConfig, VQConfig
from vqgen.tokenizer.quantizers.options import register as register_quantizer
from vqgen.training.options import OptimizerConfig, RunConfig

TINY = "--size 16 --channels 1 --width 8 --multipliers 1 2 --blocks 1 --groups 4 --latent-dim 8 --codebook-size 32"
TINY += " --batch-size 4 --holdout 0.2 --precision fp32"


def use(cli, folder: Path, *words: Any) -> tuple[Tokenizer, dict[str, Any]]:
    """Train a tokenizer for three steps, load it, tokenize with it; return it and its architecture in vqgen.json."""
    write_images(folder / "images", 20)
    data = ["--data", folder / "images", "--holdout", 0.2, "--precision", "fp32"]
    sizes = "--size 16 --channels 1 --latent-dim 8 --batch-size 4 --steps 3 --gan-weight 0.1 --gan-start 0".split()
    sizes += "--gan-warmup 0 --gan-layers 1".split()
    done = cli(train.main, *data, *sizes, *words, "--output", folder / "run")
    assert done.code == 0, done.err
    tokenizer = Tokenizer.load(folder / "run")
    images = torch.linspace(-1, 1, 2 * 16 * 16).view(2, 1, 16, 16)
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.decode(codes), tokenizer.reconstruct(images))
    done = cli(encode.main, *data, "--tokenizer", folder / "run", "--output", folder / "codes", "--device", "cpu")
    assert done.code == 0, done.err
    files = CodeFiles(folder / "codes", "train")
    assert len(files) == 16 and (files.codebook_size, files.grid) == (tokenizer.codebook_size, tokenizer.grid)
    return tokenizer, json.loads((folder / "run" / "vqgen.json").read_text())["architecture"]


def test_another_decoder(cli, tmp_path, monkeypatch):
    """A module with `Encoder` and `Decoder`, and its options, registered by name."""
    monkeypatch.setitem(NETWORKS, "strided", NetworkConfig)
    register_network("strided", "helpers.toy_network")(StridedConfig)
    small = "--quantizer vq --codebook-size 8 --code-dim 4".split()
    tokenizer, architecture = use(cli, tmp_path, "--network", "strided", "--stride", 8, *small)
    assert architecture["model"] == {"network": "strided", "latent_dim": 8, "stride": 8}
    assert tokenizer.grid == (2, 2) and type(tokenizer.decoder).__module__ == "helpers.toy_network"
    refused = cli(train.main, "--data", "demo", "--network", "strided", "--multipliers", 1)
    assert refused.code == 2 and "--multipliers" in refused.err and "vqgan" in refused.err
    refused = cli(train.main, "--data", "demo", "--size", 20, "--network", "strided", "--stride", 8)
    assert refused.code == 2 and "--size" in refused.err and "strided" in refused.err
    words = ["--input", tmp_path / "run", "--to", "diffusers", "--output", tmp_path / "vqmodel"]
    refused = cli(convert.main, *words)
    assert refused.code == 1 and "--network is strided" in refused.err


def test_another_quantizer(cli, tmp_path, monkeypatch):
    """A `Quantizer` and its options, registered by name."""
    monkeypatch.setitem(QUANTIZERS, "binary", QuantizerConfig)
    register_quantizer("binary", "helpers.toy_quantizer:Binary")(BinaryConfig)
    sizes = "--width 8 --multipliers 1 2 --blocks 1 --groups 4".split()
    tokenizer, architecture = use(cli, tmp_path, "--quantizer", "binary", "--bits", 5, *sizes)
    assert architecture["quantizer"] == {"quantizer": "binary", "codebook_size": 1024, "bits": 5}
    assert tokenizer.codebook_size == 32 and tokenizer.depth == 1
    refused = cli(train.main, "--data", "demo", "--quantizer", "binary", "--code-dim", 8)
    assert refused.code == 2 and "--code-dim" in refused.err and "binary" in refused.err


def test_another_metric(cli, tmp_path, monkeypatch):
    """One entry in the registry: validations, receipts and the report have it."""

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
    measured = receipt["metrics"]["mae"]
    assert 0 < measured < 255 and measured == pytest.approx(validated, rel=1e-5)
    assert cli(report.main, run, "--output", tmp_path / "report.html").code == 0
    assert "Mean absolute error" in (tmp_path / "report.html").read_text()


# ---- the prior ----


def write_dark_and_light(folder: Path, count=256) -> Path:
    """Code files of 2x3 codes of 16, with their tokenizer; the codes of an image are in one quarter of the range."""
    torch.manual_seed(0)
    network = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    tokenizer = Tokenizer(TokenizerConfig([4, 6], 3, network, VQConfig(codebook_size=16, code_dim=4)))
    mark = tokenizer.save(folder / "tokenizer")
    random = np.random.default_rng(0)
    codes = random.integers(4, size=(count, 1, 1, 1)) * 4 + random.integers(4, size=(count, 1, 2, 3))
    labels = np.arange(count) % 2
    splits = {}
    for split, rows in (("train", slice(32, None)), ("heldout", slice(32))):
        path = folder / f"{split}.safetensors"
        write_shard(path, codes[rows], labels[rows], 16)
        entry = ShardEntry(path.name, len(codes[rows]), checksum(path))
        splits[split] = SplitEntry(1, entry.count, [entry])
    Manifest(16, [2, 3], 1, [4, 6], 3, ["a", "b"], mark, "d" * 64, "fp32", "0", splits).write(folder)
    return folder


def trained(codes: Path, output: Path, steps: int, **model: Any) -> Generator:
    train_prior(
        PriorTraining(
            codes,
            output,
            patience=0,
            preview_images=4,
            model=PriorConfig(dim=32, layers=2, heads=2, dropout=0.0, **model),
            optimizer=OptimizerConfig(lr=1e-2, lr_warmup=5, ema_decay=0.9),
            run=RunConfig(steps=steps, batch_size=64, validate_every=steps, checkpoint_every=steps, precision="fp32"),
        )
    )
    return Generator.load(output, "cpu", "fp32")


class Brightness(Part):
    """The mean code of an image in four buckets, then the id of no brightness."""

    name = "brightness"
    dropout = 0.1
    ids = 5

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "Brightness":
        return cls()

    @classmethod
    def from_description(cls, about) -> "Brightness | None":
        return cls() if "brightness" in about else None

    def describe(self) -> dict[str, Any]:
        return {"brightness": 4}

    def of_rows(self, rows: Rows) -> torch.Tensor:
        return self.first + (rows.codes.float().mean((1, 2)) / 4).long()[:, None]

    def of_value(self, value: Any) -> list[int]:
        return [self.first + value]

    def parse(self, given: Any) -> list[Any]:
        return [int(word) for word in given]


@dataclass
class BrightSampleConfig(SampleConfig):
    brightness: list[int] | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        return {**super().conditions, "brightness": self.brightness}


def test_another_kind_of_conditioning(cli, tmp_path, monkeypatch):
    """A class in a module of prior/parts/, its name and option in prior/options.py, an option in sampling/sample.py."""
    monkeypatch.setattr(conditioning, "PARTS", [Brightness, Classes])
    codes, model = write_dark_and_light(tmp_path / "codes"), tmp_path / "prior"
    generator = trained(codes, model, 100)
    found = generator.conditioning
    assert (found.length, found.classes.first, found.null, found.parts[0].first, found.size) == (2, 16, 18, 19, 24)
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 8
    assert json.loads((model / "vqgen.json").read_text())["brightness"] == 4
    # It decides what is drawn; with guidance and without.
    for guidance in ({}, {"guidance_scale": 1.5}):
        drawn = generator.sample(64, conditions={"brightness": [0, 3]}, seed=1, **guidance).codes.float()
        assert drawn[0::2].mean() < 4 and drawn[1::2].mean() > 11
    assert generator.sample(64, seed=1).codes.float().mean((1, 2)).std() > 2, "absent, it leaves every brightness"
    # Known codes and likelihoods work as with a class alone.
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    completed = generator.complete(images, 1)
    assert torch.equal(completed.codes[:, 0], generator.encode(images)[:, 0])
    assert (generator.log_likelihood(images, "a") < 0).all()
    # vqgen-sample records it; another value is another run.
    config = BrightSampleConfig(model, n=4, output=tmp_path / "samples", brightness=[3], device="cpu")
    draw_samples(config)
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["conditions"] == {"brightness": [3]}
    config.brightness = [0]
    with pytest.raises(UsageError, match="the samples of another run"):
        draw_samples(config)
    # An exported folder says how to draw from it with transformers alone.
    assert cli(export.main, "--model", model, "--output", tmp_path / "export").code == 0
    assert run_card(tmp_path / "export")["codes"].shape == (4, 2, 3)


class Corners(Part):
    """The first and the last code of an image, as one pair in words such as 3,15."""

    name, length, ids, dropout_option = "corners", 2, 17, "--corners-dropout"

    @classmethod
    def for_files(cls, files: CodeFiles, options: ObjectiveConfig) -> "Corners":
        return cls()

    @classmethod
    def from_description(cls, about) -> "Corners | None":
        return cls() if "corners" in about else None

    def describe(self) -> dict[str, Any]:
        return {"corners": 16}

    def of_rows(self, rows: Rows) -> torch.Tensor:
        return self.first + rows.codes.flatten(1)[:, [0, -1]]

    def of_value(self, value: Any) -> list[int]:
        return [self.first + code for code in value]

    def parse(self, given: Any) -> list[Any]:
        return [tuple(map(int, each.split(","))) if isinstance(each, str) else each for each in given]


@dataclass
class CornersSampleConfig(SampleConfig):
    corners: list[str] | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        return {**super().conditions, "corners": self.corners}


@pytest.fixture
def with_corners(tmp_path, monkeypatch) -> Path:
    """A prior with a part of two tokens, hardly trained."""
    monkeypatch.setattr(conditioning, "PARTS", [Corners, Classes])
    trained(write_dark_and_light(tmp_path / "codes"), tmp_path / "prior", 2)
    return tmp_path / "prior"


def test_a_part_of_two_tokens(with_corners, tmp_path, monkeypatch):
    generator = Generator.load(with_corners, "cpu", "fp32")
    found, part = generator.conditioning, generator.conditioning.parts[0]
    assert found.length == 3 and part.absent == [part.first + 16] * 2
    assert found.prefixes(found.conditions({"corners": ["3,15"], "class": "b"}), [0]).tolist() == [
        [part.first + 3, part.first + 15, found.classes.first + 1]
    ]
    # A run whose values become lists in samples.json is continued, and its values are compared.
    config = CornersSampleConfig(with_corners, n=2, output=tmp_path / "samples", corners=["3,15"], device="cpu")
    draw_samples(config)
    config.n = 4
    draw_samples(config)
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["conditions"] == {"corners": [[3, 15]]}
    config.corners = ["3,14"]
    with pytest.raises(UsageError, match="the samples of another run"):
        draw_samples(config)
    # Another installation names the keys that it does not know.
    monkeypatch.setattr(conditioning, "PARTS", [Classes])
    with pytest.raises(UserError, match=r"prior.vqgen\.json has 'corners'"):
        Generator.load(with_corners, "cpu")


def test_conditions_in_python_are_parsed_as_on_the_command_line(with_corners):
    generator = Generator.load(with_corners, "cpu", "fp32")
    corners = generator.conditioning.parts[0]
    corners.dropout = 0.1  # so that it may be absent
    words, values = {"corners": ["3,15", "0,1"]}, {"corners": [(3, 15), (0, 1)], "class": [1]}
    drawn = generator.sample(4, "b", conditions=words)
    for again in (
        generator.sample(4, conditions={**words, "class": ["b"]}),
        generator.sample(4, conditions=values),
        generator.draw(range(4), values),
        generator.complete(torch.zeros(1, 3, 4, 6, dtype=torch.uint8), 2, 4, "b", conditions=words),
    ):
        assert torch.equal(again.nats, drawn.nats) and again.labels.tolist() == [1] * 4
    images = torch.randint(256, (3, 3, 4, 6), dtype=torch.uint8)
    nothing = generator.log_likelihood(images)
    assert torch.equal(nothing, generator.log_likelihood(images, conditions={"corners": [-1], "class": -1}))
    assert not torch.equal(nothing, generator.log_likelihood(images, conditions={"corners": ["3,15"]}))
    for call, named in (
        (lambda: generator.sample(1, "b", conditions={"class": ["a"]}), "class"),
        (lambda: generator.sample(1, conditions={"corners": []}), "--corners: found no values"),
        (lambda: generator.complete(images, 1, conditions={"class": []}), "--class: found no values"),
        (lambda: generator.complete(images, 1, conditions={"colour": [1]}), "--colour"),
        (lambda: generator.log_likelihood(images, conditions=words), "corners: found 2 values for 3 images"),
    ):
        with pytest.raises(UsageError, match=named):
            call()
    corners.dropout = generator.conditioning.classes.dropout = 0.0
    with pytest.raises(UsageError, match="--corners-dropout 0, --label-dropout 0"):
        generator.sample(1, "b", conditions=words, guidance_scale=2.0)
    with pytest.raises(UsageError, match=r"^--corners: .*--corners-dropout 0"):
        generator.log_likelihood(images, "b")


def run_card(folder: Path) -> dict[str, Any]:
    """What the program in the model card of a folder computes."""
    program = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    computed: dict[str, Any] = {}
    exec(program.replace("FOLDER", str(folder)), computed)
    return computed


def test_another_order_of_drawing(cli, tmp_path, monkeypatch):
    """A function in prior/orders.py."""
    monkeypatch.setitem(ORDERS, "columns", lambda h, w: [row * w + column for column in range(w) for row in range(h)])
    codes, model = write_dark_and_light(tmp_path / "codes"), tmp_path / "prior"
    generator = trained(codes, model, 60, order="columns")
    assert json.loads((model / "vqgen.json").read_text())["prior"]["order"] == "columns"
    grid = torch.arange(6).view(1, 2, 3)
    assert generator.vocabulary.to_tokens(grid).tolist() == [[0, 3, 1, 4, 2, 5]]
    assert torch.equal(generator.vocabulary.to_codes(generator.vocabulary.to_tokens(grid)), grid)
    drawn = generator.sample(64, seed=1).codes
    assert (drawn // 4 == drawn[:, :1, :1] // 4).float().mean() > 0.9, "one quarter of the range an image, as learned"
    images = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    given = generator.encode(images)
    for mask in (torch.tensor([[False, True, True]] * 2), torch.tensor([[True, False, True], [False, True, False]])):
        completed = generator.complete(images, mask=mask).codes
        assert torch.equal(completed[:, ~mask], given[:, ~mask])
        assert not torch.equal(completed[:, mask], given[:, mask])
    known = Known(given, torch.tensor([[True, False, False]] * 2).expand(5, 2, 3), generator.vocabulary)
    assert known.span == range(2, 6), "the first column is drawn first"
    assert cli(export.main, "--model", model, "--output", tmp_path / "export").code == 0
    drawn = run_card(tmp_path / "export")["codes"]
    assert drawn.shape == (4, 2, 3) and (drawn // 4 == drawn[:, :1, :1] // 4).float().mean() > 0.8
    # What is no permutation is refused, and so is a prior whose order this installation lacks.
    for wrong in ([0, 3, 1, 4, 2, 2], [0, 1, 2], [1, 2, 3, 4, 5, 6]):
        monkeypatch.setitem(ORDERS, "columns", lambda h, w, wrong=wrong: wrong)
        with pytest.raises(UserError, match=r"prior/orders\.py: order 'columns'"):
            Generator.load(model, "cpu")
    monkeypatch.delitem(ORDERS, "columns")
    with pytest.raises(UserError, match=r"prior.vqgen\.json has the order 'columns'"):
        Generator.load(model, "cpu")
