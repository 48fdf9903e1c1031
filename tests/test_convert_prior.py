"""vqgen-convert: priors of taming-transformers, against logits of their own code; and what it refuses."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import small_prior, tokens_for
from safetensors import safe_open
from safetensors.torch import save_file
from test_convert import DATA, save_lightning, seeded
from torch import Tensor
from transformers import AutoModelForCausalLM

from vqgen.artifact import fingerprint
from vqgen.errors import UsageError
from vqgen.prior.convert.program import main
from vqgen.prior.likelihood import token_nats
from vqgen.prior.objective import objective
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.sampling import sample
from vqgen.sampling.generator import Generator
from vqgen.sampling.settings import SamplingSettings

CLASSES, UNCONDITIONAL = "taming-class-prior", "taming-unconditional-prior"
Known = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


@cache
def fixture(name: str) -> Known:
    """Weights, what taming's class made of them (see tests/data/README.md), and the arguments of that class."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        origin = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    weights = seeded(json.loads(origin["shapes"]), int(origin["seed"]))
    assert fingerprint(weights) == origin["fingerprint"]
    arguments = json.loads(origin["arguments"])
    size = arguments["transformer_config"]["params"]["block_size"]
    mask = torch.ones(size, size).tril()[None, None]
    return weights | {f"transformer.blocks.{n}.attn.mask": mask for n in range(2)}, tensors, arguments


def words_for(folder: Path, weights: dict[str, Tensor], arguments: dict[str, Any]) -> list[Any]:
    """Write a checkpoint and its YAML file; return the options that convert it."""
    save_lightning(folder / "last.ckpt", weights)
    target = "taming.models.cond_transformer.Net2NetTransformer"
    (folder / "project.yaml").write_text(yaml.dump({"model": {"target": target, "params": arguments}, "data": {}}))
    return ["--input", folder / "last.ckpt", "--taming-config", folder / "project.yaml", "--size", 16, 24]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def convert(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        weights, _, arguments = fixture(name)
        words = words_for(folder, weights, arguments)
        assert main([str(word) for word in [*words, "--output", folder / "prior"]]) == 0
        return folder / "prior"

    return convert


@pytest.mark.parametrize("name", [CLASSES, UNCONDITIONAL])
def test_codes_logits_and_images_are_those_of_taming(converted, name):
    _, known, arguments = fixture(name)
    generator = Generator.load(converted(name), "cpu", "fp32")
    tokenizer, prior, vocabulary = generator.tokenizer, generator.prior, generator.vocabulary
    assert torch.equal(tokenizer.encode(known["images"]), known["codes"].long())
    torch.testing.assert_close(
        tokenizer.decode(known["codes"].long()), known["reconstructions"].clamp(-1, 1), rtol=0, atol=1e-5
    )
    classes = 36 * (name == CLASSES)
    assert prior.conditioning.classes.count == classes
    conditions = generator.conditioning.conditions({"class": [3, 34]} if classes else None)
    tokens = vocabulary.to_tokens(known["codes"].long())
    sequences = torch.cat([generator.conditioning.prefixes(conditions, range(2)), tokens], 1)
    theirs = known["logits"][..., : vocabulary.size]
    with torch.no_grad():
        ours = generator.conditioning.of_codes(prior(sequences[:, :-1]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        model = AutoModelForCausalLM.from_pretrained(converted(name)).eval()
        torch.testing.assert_close(model(sequences[:, :-1]).logits[..., : vocabulary.size], theirs, rtol=0, atol=1e-5)
    # The likelihood is that of codes among codes, as in taming where its vocabulary has nothing else.
    nats = token_nats(theirs, tokens).double()
    torch.testing.assert_close(generator.nats(known["codes"].long(), conditions), nats, rtol=0, atol=1e-5)
    # The sampler, by its own decoder, draws the most likely code of the same logits.
    greedy = generator.draw(range(2), conditions, SamplingSettings(temperature=0))
    again = torch.cat([sequences[:, :1], vocabulary.to_tokens(greedy.codes)], 1)
    with torch.no_grad():
        assert torch.equal(prior(again[:, :-1]).argmax(-1), again[:, 1:])
    assert arguments["transformer_config"]["params"]["block_size"] != 1 + vocabulary.length


def test_a_converted_prior_samples_by_class_and_has_no_guidance(converted, cli, tmp_path):
    words = ["--model", converted(CLASSES), "--n", 2, "--output", tmp_path / "drawn", "--device", "cpu"]
    done = cli(sample.main, *words, "--class", 35)
    assert done.code == 0, done.err
    assert (tmp_path / "drawn/00001.png").exists()
    guided = cli(sample.main, *words, "--guidance-scale", 2)
    assert guided.code == 2 and len(guided.err.splitlines()) == 1 and "--guidance-scale" in guided.err
    outside = cli(sample.main, *words, "--class", 36)
    assert outside.code == 2 and "--class" in outside.err
    picture = tmp_path / "drawn/00000.png"
    without = cli(sample.main, *words[:4], "--output", tmp_path / "more", "--init-image", picture)
    assert without.code == 2 and len(without.err.splitlines()) == 1 and "--class" in without.err
    named = cli(sample.main, *words[:4], "--output", tmp_path / "more", "--init-image", picture, "--class", 1)
    assert named.code == 0, named.err


def test_an_unconditional_prior_samples(converted, cli, tmp_path):
    words = ["--model", converted(UNCONDITIONAL), "--n", 2, "--output", tmp_path / "drawn", "--device", "cpu"]
    assert cli(sample.main, *words).code == 0


def test_the_start_token_may_be_in_the_condition(cli, tmp_path, converted):
    weights, _, arguments = fixture(UNCONDITIONAL)
    provider = {"target": "taming.modules.util.SOSProvider", "params": {"sos_token": 7}}
    about = {**arguments, "cond_stage_config": provider, "unconditional": False, "sos_token": 0}
    assert cli(main, *words_for(tmp_path, weights, about), "--output", tmp_path / "out").code == 0
    made, known = (Generator.load(folder).prior.fingerprint for folder in (tmp_path / "out", converted(UNCONDITIONAL)))
    assert made == known


def test_mingpt_has_the_exact_gelu_and_predicts_codes_alone():
    ours, other = small_prior("mingpt", depth=2).eval(), small_prior("gpt2", depth=2).eval()
    other.backbone.load_state_dict(ours.backbone.state_dict())
    tokens = tokens_for(ours)
    with torch.no_grad():
        logits, theirs = ours(tokens), other(tokens)[..., : ours.vocabulary.size]
    assert logits.shape == theirs.shape and not torch.equal(logits, theirs)
    torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-2)
    layout = ours.conditioning.plain
    targets, config = layout.split(tokens)[1], ObjectiveConfig(label_smoothing=0.1, z_loss=1e-4)
    terms, total = objective(layout.of_codes(ours(tokens[:, :-1])), targets, config, ours.vocabulary)
    assert total.isfinite() and terms["cross-entropy"].isfinite()
    with pytest.raises(UsageError, match="--heads"):
        PriorConfig("llama", 18, 1, 6)
    assert PriorConfig("mingpt", 18, 1, 6).model_type == "gpt2"  # its positions are learned


def changed(arguments: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Arguments with another value at a path of keys; None removes the key."""
    found = copy.deepcopy(arguments)
    *heads, last = path.split(".")
    place = found
    for head in heads:
        place = place[head]
    place[last] = value
    if value is None:
        del place[last]
    return found


BLOCK = "transformer.blocks.1."
DEPTH = {"target": "taming.models.vqgan.VQModel", "params": {"n_embed": 1024}}
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": ({f"{BLOCK}attn.key.weight": None}, {}, f"{BLOCK}attn.key.weight is missing"),
    "missing tokenizer": ({"first_stage_model.quant_conv.bias": None}, {}, "quant_conv.bias is missing"),
    "shape": ({f"{BLOCK}mlp.0.weight": torch.zeros(64, 32)}, {}, "mlp.0.weight is 64x32"),
    "type": ({f"{BLOCK}ln1.weight": torch.zeros(32, dtype=torch.long)}, {}, "ln1.weight is 32"),
    "NaN": ({"transformer.head.weight": torch.full((40, 32), torch.nan)}, {}, "transformer.head.weight holds NaN"),
    "more layers": (
        {"transformer.blocks.2.ln1.weight": torch.ones(32)},
        {},
        "transformer.blocks.2.ln1.weight does not",
    ),
    "other embedding": ({"transformer.tok_emb.bias": torch.ones(32)}, {}, "transformer.tok_emb.bias does not exist"),
    "images as condition": ({"cond_stage_model.x": torch.ones(1)}, {}, "cond_stage_model.x does not exist"),
    "mask": ({f"{BLOCK}attn.mask": torch.ones(1, 1, 6, 6)}, {}, f"{BLOCK}attn.mask is not causal"),
    "order": ({"permuter.forward_shuffle_idx": torch.arange(6)}, {}, "permuter.forward_shuffle_idx does not exist"),
    "depth": ({}, {"cond_stage_config": DEPTH, "cond_stage_key": "depth"}, "depth"),
    "first stage": ({}, {"cond_stage_config": "__is_first_stage__", "cond_stage_key": "image"}, "__is_first_stage__"),
    "coordinates": ({}, {"cond_stage_config": {"target": "taming.modules.misc.coord.CoordStage"}}, "CoordStage"),
    "start token": ({}, {"cond_stage_config": "__is_unconditional__", "sos_token": 40}, "need 41"),
    "no classes": ({}, {"cond_stage_config.params.n_classes": None}, "n_classes is None"),
    "pkeep": ({}, {"pkeep": 0.0}, "pkeep is 0.0"),
    "unmasked": ({}, {"transformer_config.params.n_unmasked": 3}, "n_unmasked is 3"),
    "permuter": ({}, {"permuter_config": {"target": "taming.modules.transformer.permuter.ZCurve"}}, "ZCurve"),
    "CodeGPT": ({}, {"transformer_config.target": "taming.modules.transformer.mingpt.CodeGPT"}, "CodeGPT"),
    "heads": ({}, {"transformer_config.params.n_head": 5}, "n_head is 5"),
    "vocabulary": ({}, {"transformer_config.params.vocab_size": 35}, "vocab_size is 35"),
    "short": ({}, {"transformer_config.params.block_size": 5}, "block_size is 5"),
    "text": ({}, {"transformer_config.params.n_layer": "two"}, "n_layer"),
    "no GPT": ({}, {"transformer_config": None}, "transformer_config"),
    "tokenizer": ({}, {"first_stage_config.params.n_embed": 64}, "n_embed is 64, expected 32"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_fit_is_one_line(tmp_path, cli, case):
    tensors, keys, message = FAULTS[case]
    weights, _, arguments = fixture(CLASSES)
    weights = {name: value for name, value in {**weights, **tensors}.items() if value is not None}
    for path, value in keys.items():
        arguments = changed(arguments, path, value)
    done = cli(main, *words_for(tmp_path, weights, arguments), "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert message in done.err and ("project.yaml" in done.err) == bool(keys)
    assert not (tmp_path / "out").exists()


def test_positions_are_compared_before_masks_are_made(tmp_path, cli):
    """A mask has the square of the block size, which the YAML file may give as any."""
    weights, _, arguments = fixture(CLASSES)
    words = words_for(tmp_path, weights, changed(arguments, "transformer_config.params.block_size", 2**11))
    done = cli(main, *words, "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert "transformer.pos_emb is 1x6x32" in done.err and "1x2048x32" in done.err


def test_options_that_do_not_fit_a_prior(tmp_path, cli):
    weights, _, arguments = fixture(CLASSES)
    words = words_for(tmp_path, weights, arguments)
    for given, option in (
        ([*words[:2], *words[4:]], "--taming-config"),
        ([*words, "--to", "diffusers"], "--to"),
        ([*words, "--from", "llamagen"], "--from"),
        ([*words, "--codebook-l2-norm", "true"], "--codebook-l2-norm"),
    ):
        done = cli(main, *given, "--output", tmp_path / "out")
        assert (done.code, len(done.err.splitlines())) == (2, 1) and f": {option}: " in done.err
    # Without --size, the YAML file's resolution counts: 16x16 images have 2x2 codes, which the block also holds.
    assert cli(main, *words[:4], "--output", tmp_path / "out").code == 0


def test_a_file_of_one_model_is_not_read_as_the_other(tmp_path, cli):
    weights, _, arguments = fixture(UNCONDITIONAL)
    gpt = {name: value for name, value in weights.items() if not name.startswith("first_stage_model.")}
    done = cli(main, *words_for(tmp_path, gpt, arguments), "--output", tmp_path / "out")
    assert done.code == 1 and "first_stage_model" in done.err
    names = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "cls_embedding.embedding_table.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "c2i.safetensors")
    done = cli(main, "--input", tmp_path / "c2i.safetensors", "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1) and "rotary" in done.err


def test_a_checkpoint_of_latent_diffusion_is_no_prior(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """It has a first stage under the same name."""
    tensors = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "model.diffusion_model.a": torch.zeros(1)}
    save_file(tensors, tmp_path / "ldm.safetensors")
    result = cli(main, "--input", tmp_path / "ldm.safetensors", "--output", tmp_path / "out")
    assert result.code == 1 and "is not of taming-transformers or LlamaGen" in result.err
    assert len(result.err.splitlines()) == 1
