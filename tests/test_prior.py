"""The prior: vocabulary, backbones and their folder, sequences from code files, likelihood and the preview."""

import copy
import dataclasses
import json
import math
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.models import NAMES, codes_for, conditioning_of, make_prior, small_prior, tokens_for, write_codes
from helpers.tokenizing import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vqgen.config import parse
from vqgen.errors import DataError, UsageError, UserError
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.dataset import Examples, Sequences
from vqgen.prior.likelihood import likelihood, token_nats
from vqgen.prior.model import Prior
from vqgen.prior.options import ObjectiveConfig, PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.parts.source import MaskedSource
from vqgen.prior.train import PriorTraining
from vqgen.prior.trainer import PriorTrainer, build, preview_codes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.codes.format import CodeFiles, Manifest, code_shape
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers.options import VQConfig
from vqgen.training.trainer import next_batch

BACKBONES = ["llama", "qwen3", "gpt2"]
backbones = pytest.mark.parametrize("backbone", BACKBONES)


# ---- vocabulary ----


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(2, 70_000),
    depth=st.sampled_from([1, 3]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(0, 3),
)
def test_tokens_and_codes_are_inverse(seed, size, depth, grid, batch):
    vocabulary = Vocabulary(size, depth, grid)
    codes = torch.randint(size, (batch, *code_shape(grid, depth)), generator=torch.Generator().manual_seed(seed))
    tokens = vocabulary.to_tokens(codes)
    assert tokens.shape == (batch, vocabulary.length) and tokens.dtype == torch.int64
    assert torch.equal(vocabulary.to_codes(tokens), codes)
    for position in range(vocabulary.length):
        first, end = vocabulary.allowed(position)
        assert end - first == size and bool(((tokens[:, position] >= first) & (tokens[:, position] < end)).all())


def test_order_of_tokens_by_hand():
    flat = Vocabulary(10, 1, (2, 2))
    assert flat.to_tokens(torch.tensor([[[1, 2], [3, 4]]])).tolist() == [[1, 2, 3, 4]]
    deep = Vocabulary(10, 3, (1, 2))
    codes = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]])
    assert deep.to_tokens(codes).tolist() == [[1, 12, 23, 4, 15, 26]]
    assert [deep.allowed(position) for position in range(4)] == [(0, 10), (10, 20), (20, 30), (0, 10)]


@pytest.mark.parametrize("depth", [1, 3])
def test_ids_are_codes_then_classes_then_null(depth):
    found = conditioning_of(10, depth, (2, 3), 4, ["a", "b", "c", "d"])
    vocabulary = found.vocabulary
    assert (vocabulary.length, found.size, found.null) == (6 * depth, 10 * depth + 5, 10 * depth + 4)
    codes = {i for position in range(vocabulary.length) for i in range(*vocabulary.allowed(position))}
    ids = found.classes.of_labels(torch.tensor([-1, 0, 1, 2, 3])).tolist()
    assert ids == [found.null, *range(10 * depth, 10 * depth + 4)]
    assert found.prefixes({"class": [-1, 0, 1, 2, 3]}, range(7)).flatten().tolist() == [*ids, *ids[:2]]
    assert sorted([*codes, *ids]) == list(range(found.size)), "every id has one meaning, none is unused"
    assert conditioning_of(10, depth, (2, 3), 0).null == 10 * depth


@pytest.mark.parametrize("shape", [(1, 3, 2), (1, 2, 3, 2), (1, 6)])
def test_codes_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match=r"this prior was made for \(2, 3\)"):
        Vocabulary(10, 1, (2, 3)).to_tokens(torch.zeros(shape, dtype=torch.long))


# ---- backbones ----


@backbones
@pytest.mark.parametrize("depth", [1, 3])
def test_logits(backbone, depth):
    prior = small_prior(backbone, depth).eval()
    tokens = tokens_for(prior)
    assert prior(tokens[:, :-1]).shape == (4, prior.vocabulary.length, prior.conditioning.size)
    assert prior(tokens[:, :1]).shape == (4, 1, prior.conditioning.size)
    # A sequence's logits depend on no other sequence.
    torch.testing.assert_close(prior(tokens[1:2]), prior(tokens)[1:2], atol=1e-5, rtol=1e-4)


@backbones
def test_future_tokens_change_no_earlier_logits(backbone):
    prior = small_prior(backbone).eval()
    tokens = tokens_for(prior, batch=1)
    before = prior(tokens)
    for position in range(tokens.shape[1]):
        for other in range(prior.conditioning.size):
            changed = tokens.clone()
            changed[0, position] = other
            if torch.equal(changed, tokens):
                continue
            after = prior(changed)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.allclose(after[:, position:], before[:, position:])
            break
    # Nor does the length of what follows.
    for end in range(1, tokens.shape[1]):
        torch.testing.assert_close(prior(tokens[:, :end]), before[:, :end], atol=1e-5, rtol=1e-4)


@backbones
def test_the_condition_and_the_order_of_codes_matter(backbone):
    prior = small_prior(backbone).eval()
    tokens = tokens_for(prior, batch=1).expand(4, -1).clone()
    tokens[:, 0] = prior.conditioning.classes.of_labels(torch.tensor([-1, 0, 1, 2]))
    last = prior(tokens)[:, -1]
    assert all(not torch.allclose(last[i], last[j]) for i in range(4) for j in range(i))
    tokens = tokens[:1].clone()
    tokens[0, 1:3] = torch.tensor([1, 2])
    swapped = tokens.clone()
    swapped[0, 1:3] = torch.tensor([2, 1])
    assert not torch.allclose(prior(tokens)[:, -1], prior(swapped)[:, -1])


@backbones
def test_dropout_is_in_training_and_nowhere_else(backbone):
    prior = small_prior(backbone, dropout=0.3)
    tokens = tokens_for(prior)
    assert prior.training
    one, two = prior(tokens), prior(tokens)
    assert not torch.allclose(one, two)
    torch.manual_seed(5)
    one = prior(tokens)
    torch.manual_seed(5)
    assert torch.equal(prior(tokens), one), "the same random state gives the same dropout"
    prior.eval()
    plain = prior(tokens)
    assert torch.equal(prior(tokens), plain)
    without = small_prior(backbone, dropout=0.0).train()
    assert torch.equal(without(tokens), plain), "dropout is no part of what the weights mean"


@backbones
def test_dropout_follows_a_copy(backbone):
    """The averaged and the best weights are copies of a prior; each obeys its own mode."""
    prior = small_prior(backbone, dropout=0.3)
    tokens = tokens_for(prior)
    twin = copy.deepcopy(prior).eval()
    assert torch.equal(twin(tokens), twin(tokens)) and prior.training
    assert not torch.allclose(prior(tokens), prior(tokens))
    twin.train()
    assert not torch.allclose(twin(tokens), twin(tokens))


@backbones
def test_dropout_stands_where_gpt2_has_it(backbone):
    """At rate p kept values are scaled by 1 / (1 - p): the embeddings that reach the first block show it."""
    prior = small_prior(backbone, dropout=0.5)
    seen = []
    body = prior.backbone.transformer.h if backbone == "gpt2" else prior.backbone.model.layers
    body[0].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    tokens = tokens_for(prior, batch=64)
    prior(tokens)
    zero = (seen[0] == 0).float().mean().item()
    assert 0.4 < zero < 0.6


@backbones
def test_every_parameter_gets_a_gradient(backbone):
    prior = small_prior(backbone)
    tokens = tokens_for(prior)
    token_nats(prior(tokens[:, :-1]), tokens[:, 1:]).mean().backward()
    assert [name for name, p in prior.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 3}, "--heads: 3 does not divide --dim 16"),
        ({"dim": 6, "heads": 2}, "--heads: .* rotary"),
        ({"dim": 0}, "--dim"),
        ({"layers": 0}, "--layers"),
        ({"hidden_dim": 0}, "--hidden-dim"),
        ({"dropout": 1.0}, "--dropout"),
        ({"dropout": -0.1}, "--dropout"),
    ],
)
def test_impossible_options_are_named(options, named):
    with pytest.raises(UsageError, match=named) as caught:
        PriorConfig(**{"dim": 16, "heads": 2, "layers": 1, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("backbone", "hidden"), [("llama", 128), ("qwen3", 128), ("gpt2", 192)])
def test_feed_forward_width(backbone, hidden):
    def width(config: PriorConfig) -> int:
        model = Prior(config, conditioning_of(8, 1, (2, 3), 0), (3, 4, 6), "f").backbone
        return (
            model.transformer.h[0].mlp.c_fc.nf if backbone == "gpt2" else model.model.layers[0].mlp.up_proj.out_features
        )

    # 8/3 of 40 is 107, four times it is 160: each rounded up to a multiple of 64.
    assert width(PriorConfig(backbone=backbone, dim=40, heads=2, layers=1)) == hidden
    assert width(PriorConfig(backbone=backbone, dim=40, heads=2, layers=1, hidden_dim=24)) == 24


# ---- the folder ----


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tuple[Path, str]:
    """A tokenizer's folder and its fingerprint."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    model = VQGANConfig(width=8, multipliers=[1, 1], blocks=1, latent_dim=8, groups=4)
    made = Tokenizer(TokenizerConfig([4, 6], 3, model, VQConfig(codebook_size=8, code_dim=4)))
    return folder, made.save(folder)


@backbones
def test_folder_round_trip(tmp_path, tokenizer, backbone):
    folder, mark = tokenizer
    prior = small_prior(backbone, mark=mark).eval()
    saved = prior.save(tmp_path / "run", folder)
    loaded = Prior.load(tmp_path / "run")
    assert saved == loaded.fingerprint == prior.fingerprint and not loaded.training
    assert (loaded.vocabulary, loaded.config) == (prior.vocabulary, prior.config)
    described = json.loads((tmp_path / "run" / "vqgen.json").read_text())
    assert "order" not in described["prior"], "the keys of version 0.1"
    assert loaded.conditioning.describe() == {"classes": 3, "class_names": NAMES, "label_dropout": 0.1}
    assert (loaded.image_shape, loaded.tokenizer_fingerprint) == ((3, 4, 6), mark)
    tokens = tokens_for(prior)
    expected = prior(tokens)
    assert torch.equal(loaded(tokens), expected)
    # What transformers and serving engines read is the same network.
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run", local_files_only=True, attn_implementation="sdpa", dtype=torch.float32
    )
    assert torch.equal(plain(input_ids=tokens).logits, expected)
    assert plain.config.eos_token_id is None and plain.config.bos_token_id == prior.conditioning.null
    # The tokenizer inside is whole and the one it was trained for.
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint == mark
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer", "vqgen.json"]
    assert loaded.save(tmp_path / "again", tmp_path / "run" / "tokenizer") == saved
    assert prior.save(tmp_path / "run", tmp_path / "run" / "tokenizer") == saved, "a folder can be saved over itself"


@pytest.mark.parametrize(
    "own, given, option",
    [
        ({"heads": 4}, {}, "--heads 2"),
        ({"backbone": "gpt2"}, {"backbone": "mingpt"}, "--backbone mingpt"),
        ({"hidden_dim": 32}, {}, "--hidden-dim 64"),
        ({"layers": 3}, {}, "--layers 2"),
    ],
)
def test_the_weights_of_another_architecture_start_no_run(tmp_path, tokenizer, own, given, option):
    folder, mark = tokenizer
    conditioning, sizes = conditioning_of(8, 1, (2, 3), 3), {"dim": 16, "layers": 2, "heads": 2}
    Prior(PriorConfig(**{**sizes, **given}), conditioning, (3, 4, 6), mark).save(tmp_path / "run", folder)
    with pytest.raises(UserError, match=f"--init: .*{option}.*{next(iter(own.values()))}"):
        Prior(PriorConfig(**{**sizes, **own}), conditioning, (3, 4, 6), mark).start_from(tmp_path / "run")


@pytest.mark.parametrize("backbone", ["llama", "gpt2"])
def test_ids_of_other_meaning_keep_their_weights_where_there_are_as_many(tmp_path, tokenizer, backbone):
    folder, mark = tokenizer
    config = PriorConfig(backbone, dim=16, layers=2, heads=2)
    given = Prior(config, conditioning_of(8, 1, (2, 3), 4, list("abcd")), (3, 4, 6), mark)
    given.save(tmp_path / "run", folder)
    layout = Conditioning(given.vocabulary, [MaskedSource(0.5), Classes(3, NAMES)])
    prior = Prior(config, layout, (3, 4, 6), mark)
    assert layout.size == given.conditioning.size
    before = {name: value.clone() for name, value in prior.backbone.state_dict().items()}
    prior.start_from(tmp_path / "run")
    name = "transformer.wte.weight" if backbone == "gpt2" else "model.embed_tokens.weight"
    for each in (name, "lm_head.weight"):
        own, theirs = prior.backbone.state_dict()[each], given.backbone.state_dict()[each]
        assert torch.equal(own[:8], theirs[:8]) and torch.equal(own[8:11], before[each][8:11])
        assert torch.equal(own[11], theirs[12]) and torch.equal(own[12], before[each][12]), "no class, unknown"


def test_classes_start_from_those_of_their_names(tmp_path, tokenizer):
    folder, mark = tokenizer
    config, size = PriorConfig(dim=16, layers=2, heads=2), 8
    given = Prior(config, conditioning_of(size, 1, (2, 3), 3, ["shoe", "hat", "bag"]), (3, 4, 6), mark)
    given.save(tmp_path / "run", folder)
    prior = Prior(config, conditioning_of(size, 1, (2, 3), 3, NAMES), (3, 4, 6), mark)  # shirt, shoe, bag
    name = "model.embed_tokens.weight"
    before = prior.backbone.state_dict()[name].clone()
    (said,) = prior.start_from(tmp_path / "run")
    own, theirs = prior.backbone.state_dict()[name], given.backbone.state_dict()[name]
    assert "2 of 3 classes" in said and str(tmp_path / "run") in said
    assert torch.equal(own[size:], torch.stack([before[size], theirs[size], theirs[size + 2], theirs[size + 3]]))
    same = Prior(config, conditioning_of(size, 1, (2, 3), 3, ["shoe", "hat", "bag"]), (3, 4, 6), mark)
    assert same.start_from(tmp_path / "run") == []
    assert torch.equal(same.backbone.state_dict()[name], theirs)


@pytest.mark.parametrize("names", [["cat", "dog"], None])
def test_no_class_means_the_same_whatever_the_classes(tmp_path, tokenizer, names):
    """The token that every sequence without a class begins with is taken also where no class is shared."""
    folder, mark = tokenizer
    config, size = PriorConfig(dim=16, layers=2, heads=2), 8
    given = Prior(config, conditioning_of(size, 1, (2, 3), 3, NAMES), (3, 4, 6), mark)
    given.save(tmp_path / "run", folder)
    count = len(names or [])
    prior = Prior(config, conditioning_of(size, 1, (2, 3), count, names), (3, 4, 6), mark)
    name = "model.embed_tokens.weight"
    before = prior.backbone.state_dict()[name].clone()
    prior.start_from(tmp_path / "run")
    own, theirs = prior.backbone.state_dict()[name], given.backbone.state_dict()[name]
    assert torch.equal(own[size:], torch.cat([before[size : size + count], theirs[-1:]]))


def test_codes_with_another_tokenizer_beside_them_start_no_run(tmp_path):
    codes = codes_for(tmp_path / "codes", make_prior(tmp_path / "of"))
    manifest = Manifest.read(codes)
    splits = {"train": manifest.splits["train"], "heldout": manifest.splits["train"]}
    dataclasses.replace(manifest, splits=splits).write(codes)
    make_tokenizer(codes / "tokenizer")
    words = ["--codes", str(codes), "--output", str(tmp_path / "run"), "--dim", "16", "--heads", "2", "--layers", "1"]
    with pytest.raises(UserError, match=f"{codes / 'tokenizer'} has fingerprint"):
        build(parse(PriorTraining, words))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_batches_that_cannot_be_read_are_an_error_of_the_data():
    def batches():
        yield 1
        raise UserError("codes-00000.safetensors: gone")

    found = batches()
    assert next_batch(found) == 1
    with pytest.raises(DataError, match="gone"):
        next_batch(found)


def test_unconditional_and_deep_priors_are_restored(tmp_path, tokenizer):
    folder, mark = tokenizer
    prior = small_prior(depth=3, classes=0, mark=mark).eval()
    prior.save(tmp_path, folder)
    loaded = Prior.load(tmp_path)
    assert loaded.vocabulary == prior.vocabulary and loaded.conditioning.classes.names is None
    assert torch.equal(loaded(tokens_for(prior)), prior(tokens_for(prior)))


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    folder, mark = tokenizer
    prior = small_prior(mark="0" * 64)
    with pytest.raises(UserError) as caught:
        prior.save(tmp_path / "run", folder)
    text = str(caught.value)
    assert mark[:12] in text and "0" * 12 in text and str(folder) in text and "\n" not in text
    assert not (tmp_path / "run").exists()


def not_loaded(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        Prior.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, **values) -> None:
    tree = json.loads(path.read_text())
    for key, value in values.items():
        tree.pop(key) if value is None else tree.update({key: value})
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("backbone", "values"),
    [
        ("llama", {"vocab_size": 13}),
        ("llama", {"model_type": "qwen3"}),
        ("llama", {"model_type": "unheard-of"}),
        ("llama", {"model_type": None}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}),
        ("llama", {"hidden_size": "abc"}),
        ("llama", {"vocab_size": None}),
        ("qwen3", {"max_position_embeddings": 3}),
        ("gpt2", {"n_head": 4}),
        ("gpt2", {"activation_function": "relu"}),
    ],
)
def test_an_edited_config_json_is_refused(tmp_path, tokenizer, backbone, values):
    folder, mark = tokenizer
    small_prior(backbone, mark=mark).save(tmp_path, folder)
    Prior.load(tmp_path)
    edit(tmp_path / "config.json", **values)
    assert "config.json" in not_loaded(tmp_path)


def test_names_of_the_writer_in_config_json_do_not_matter(tmp_path, tokenizer):
    folder, mark = tokenizer
    small_prior(mark=mark).save(tmp_path, folder)
    edit(tmp_path / "config.json", transformers_version="5.17.0", dtype="bfloat16")
    Prior.load(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"prior": None},
        {"prior": {"dim": 32}},
        {"prior": {"surprise": 1}},
        {"prior": 3},
        {"grid": None},
        {"grid": 4},
        {"codebook_size": 9},
        {"codebook_size": "many"},
        {"codebook_size": 8.0},
        {"classes": None},
        {"class_names": ["one", "two"]},
        {"class_names": [1, 2, 3]},
        {"class_names": "abc"},
        {"label_dropout": "x"},
        {"tokenizer_fingerprint": 5},
        {"tokenizer_fingerprint": None},
        {"kind": "tokenizer"},
    ],
)
def test_an_edited_description_is_refused(tmp_path, tokenizer, values):
    folder, mark = tokenizer
    small_prior(mark=mark).save(tmp_path, folder)
    edit(tmp_path / "vqgen.json", **values)
    not_loaded(tmp_path)


def test_damaged_weights_are_refused(tmp_path, tokenizer):
    folder, mark = tokenizer
    small_prior(mark=mark).save(tmp_path, folder)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    assert "not a whole safetensors file" in not_loaded(tmp_path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "fingerprint" in not_loaded(tmp_path)
    path.write_bytes(data)
    (tmp_path / "config.json").unlink()
    assert "config.json does not exist" in not_loaded(tmp_path)


def test_weights_keep_the_names_of_transformers(tmp_path, tokenizer):
    folder, mark = tokenizer
    small_prior(dropout=0.5, mark=mark).save(tmp_path, folder)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" in names
    assert not any("dropout" in name or "backbone" in name for name in names)


# ---- sequences ----


def sequences(folder: Path) -> Sequences:
    files = CodeFiles(folder, "train")
    return Sequences(files, Conditioning.for_files(files))


@pytest.mark.parametrize("depth", [1, 3])
def test_rows_are_condition_and_codes(tmp_path, depth):
    codes = write_codes(tmp_path, depth=depth, views=2)
    found = sequences(tmp_path)
    vocabulary = found.conditioning.vocabulary
    assert vocabulary == Vocabulary(300, depth, (2, 3)) and len(found) == 9
    rows = found.rows(np.array([7, 0, 4]), np.array([1, 0, 1])).tokens
    assert rows.shape == (3, 1 + vocabulary.length) and rows.dtype == torch.int64
    assert rows[:, 0].tolist() == [300 * depth + label for label in (1, 0, 1)]
    assert np.array_equal(vocabulary.to_codes(rows[:, 1:]).numpy(), codes[[7, 0, 4], [1, 0, 1]])


def test_unlabelled_images_get_the_null_id(tmp_path):
    labels = np.array([0, -1, 2, -1, 1, 0, 1, 2, -1])
    write_codes(tmp_path, labels=labels)
    found = sequences(tmp_path)
    null = found.conditioning.null
    rows = found.rows(np.arange(9), np.zeros(9, dtype=np.int64)).tokens
    assert rows[:, 0].tolist() == [null if label < 0 else 300 + label for label in labels]


@pytest.mark.parametrize("labels", [np.full(9, -1), np.arange(9) % 3])
def test_without_class_names_every_condition_is_null(tmp_path, labels):
    write_codes(tmp_path, labels=labels, names=None)
    found = sequences(tmp_path)
    assert found.conditioning.classes.count == 0 and found.conditioning.null == 300
    rows = found.rows(np.arange(9), np.zeros(9, dtype=np.int64)).tokens
    assert rows[:, 0].tolist() == [300] * 9


def test_ordered_batches_are_plain_views_in_order(tmp_path):
    codes = write_codes(tmp_path, views=3)
    found = sequences(tmp_path)
    batches = list(found.ordered(range(1, 9, 2), 3))
    assert [len(batch) for batch in batches] == [3, 1]
    rows = found.conditioning.vocabulary.to_codes(torch.cat([batch.tokens for batch in batches])[:, 1:])
    assert np.array_equal(rows.numpy(), codes[1:9:2, 0])


def take(batches, count: int) -> list[torch.Tensor]:
    return [next(batches).tokens for _ in range(count)]


def test_training_batches_are_a_function_of_seed_and_step(tmp_path):
    write_codes(tmp_path, views=3)
    found = sequences(tmp_path)
    whole = take(found.training(4, 7, 0, 0, 1), 10)
    for first in (0, 3, 9):
        resumed = take(sequences(tmp_path).training(4, 7, first, 0, 1), 10 - first)
        assert all(torch.equal(one, two) for one, two in zip(whole[first:], resumed))
    other = take(found.training(4, 8, 0, 0, 1), 10)
    assert not torch.equal(torch.cat(whole), torch.cat(other))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_partition_the_global_batch(tmp_path, world):
    write_codes(tmp_path, views=3)
    found = sequences(tmp_path)
    alone = take(found.training(2 * world, 7, 5, 0, 1), 6)
    parts = [take(found.training(2, 7, 5, rank, world), 6) for rank in range(world)]
    for step, whole in enumerate(alone):
        assert torch.equal(torch.cat([part[step] for part in parts]), whole)


def test_every_epoch_shows_every_image_once_and_in_time_every_view(tmp_path):
    codes = write_codes(tmp_path, views=3)
    found = sequences(tmp_path)
    place = {codes[i, v].tobytes(): (i, v) for i in range(9) for v in range(3)}
    assert len(place) == 27
    batches = take(found.training(3, 0, 0, 0, 1), 300)
    drawn = []
    for row in torch.cat(batches):
        image, view = place[
            found.conditioning.vocabulary.to_codes(row[None, 1:])[0].numpy().astype(codes.dtype).tobytes()
        ]
        assert row[0] == 300 + image % 3, "the condition is the class of this very image"
        drawn.append((image, view))
    for epoch in range(0, 900, 9):
        assert sorted(image for image, _ in drawn[epoch : epoch + 9]) == list(range(9))
    assert len({tuple(drawn[epoch : epoch + 9]) for epoch in range(0, 900, 9)}) > 90, "each epoch has its own order"
    counts = Counter(drawn)
    assert set(counts) == set(place.values())
    assert min(counts.values()) > 10 and max(counts.values()) < 70  # 33 on average


# ---- likelihood ----


@backbones
def test_likelihood_is_that_of_a_naive_loop(backbone):
    prior = small_prior(backbone).eval()
    tokens = tokens_for(prior, batch=3)
    total, count = 0.0, 0
    for row in tokens.tolist():
        for position in range(1, len(row)):
            with torch.no_grad():
                scores = prior(torch.tensor([row[:position]]))[0, -1].double().tolist()
            total -= scores[row[position]] - math.log(sum(math.exp(score) for score in scores))
            count += 1
    assert count == 3 * 6
    found = likelihood(prior, [Examples(tokens, prior.conditioning)], Accelerator(cpu=True))
    assert found.nats_per_token == pytest.approx(total / count, rel=1e-4)
    # Bits for the 6 codes of an image, over its 3 x 4 x 6 values.
    assert found.bits_per_dimension == pytest.approx(total / 3 / math.log(2) / (3 * 4 * 6), rel=1e-4)


def test_bits_per_dimension_of_a_uniform_prior_by_hand():
    prior = small_prior(depth=3, classes=0, codebook_size=5).eval()  # 15 codes and the null id: 16 ids, 4 bits each
    torch.nn.init.zeros_(prior.backbone.lm_head.weight)
    found = likelihood(prior, [Examples(tokens_for(prior), prior.conditioning)], Accelerator(cpu=True))
    assert found.nats_per_token == pytest.approx(math.log(16), rel=1e-5)
    assert found.bits_per_dimension == pytest.approx(18 * 4 / 72, rel=1e-5)


def test_likelihood_does_not_depend_on_the_batch_size():
    prior = small_prior().eval()
    tokens = tokens_for(prior, batch=7)
    whole = likelihood(prior, [Examples(tokens, prior.conditioning)], Accelerator(cpu=True))
    for size in (1, 3):
        parts = [Examples(part, prior.conditioning) for part in tokens.split(size)]
        found = likelihood(prior, parts, Accelerator(cpu=True))
        assert found.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-5)


def test_token_nats_are_float32_and_by_target():
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]], dtype=torch.bfloat16)
    found = token_nats(logits, torch.tensor([[1, 0]]))
    assert found.dtype == torch.float32 and found.shape == (1, 2)
    assert found[0].tolist() == pytest.approx([math.log(4 / 3), math.log(2)], rel=1e-2)


# ---- the preview ----


@backbones
@pytest.mark.parametrize(("depth", "classes"), [(1, 3), (3, 0)])
def test_preview_draws_legal_codes_and_leaves_the_random_state(backbone, depth, classes):
    # Of the ids 10 to 14 in 15 are illegal at any position: an untrained prior would draw them at once.
    prior = small_prior(backbone, depth, classes, codebook_size=5 if depth == 3 else 1 + 1).eval()
    before = torch.get_rng_state()
    codes = preview_codes(prior, 40, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert codes.shape == (40, *code_shape((2, 3), depth)) and codes.dtype == torch.int64
    assert codes.min() == 0 and codes.max() == prior.vocabulary.codebook_size - 1
    torch.rand(5)
    assert torch.equal(preview_codes(prior, 40, seed=3), codes)
    assert not torch.equal(preview_codes(prior, 40, seed=4), codes)


def test_preview_shows_the_classes_in_turn(monkeypatch):
    prior = small_prior().eval()
    given: list[list[int]] = []
    generate = type(prior.backbone).generate

    def noted(self, conditions, **options):
        given.append(conditions[:, 0].tolist())
        return generate(self, conditions, **options)

    monkeypatch.setattr(prior.backbone, "generate", types.MethodType(noted, prior.backbone))
    preview_codes(prior, 7, seed=0)
    assert given == [[8, 9, 10, 8, 9, 10, 8]]


def test_a_decoder_whose_output_is_not_finite_ends_no_preview(tmp_path):
    prior, tokenizer = Prior.load(make_prior(tmp_path / "model")), Tokenizer.load(tmp_path / "model" / "tokenizer")
    tokenizer.decoder.register_forward_hook(lambda _module, _given, found: found / 0)
    own = types.SimpleNamespace(
        run=types.SimpleNamespace(accelerator=Accelerator(cpu=True), main=True, folder=tmp_path),
        config=types.SimpleNamespace(preview_images=3, run=types.SimpleNamespace(seed=0)),
        conditioning=prior.conditioning,
        tokenizer=tokenizer,
        _preview_conditions=dict,
    )
    PriorTrainer._preview(own, 5, prior)  # type: ignore[arg-type]
    assert (tmp_path / "images" / "step-00000005.png").exists()


def test_preview_draws_from_the_prior_as_it_is():
    """Frequencies of the first code are the prior's own probabilities, renormalised over the legal ids.

    64 codes, since transformers' own default keeps the 50 likeliest; their variation distance to what is drawn here
    would be 0.12, that of a temperature of 0.5 0.14, and the noise of 4000 draws is 0.05.
    """
    prior = small_prior(classes=0, codebook_size=64).eval()
    with torch.no_grad():
        prior.backbone.lm_head.weight *= 5  # uneven, so that another temperature shows
        expected = prior(torch.tensor([[prior.conditioning.null]]))[0, -1, :64].softmax(dim=0)
    found = preview_codes(prior, 4000, seed=0)[:, 0, 0]
    shares = torch.bincount(found, minlength=64) / 4000
    assert (shares - expected).abs().sum() / 2 < 0.08
    assert (shares > 0).all()


@pytest.mark.parametrize("preset, millions", [("tiny", 24), ("small", 44), ("base", 111), ("large", 343)])
def test_presets_have_the_sizes_they_name(preset, millions):
    """With LlamaGen's codebook of 16,384 and its 1,000 classes; base and large are as large as LlamaGen-B and -L."""
    config = parse(PriorTraining, ["--config", f"prior-{preset}", "--codes", "nowhere"]).model
    with torch.device("meta"):
        prior = Prior(config, Conditioning(Vocabulary(16384, 1, (16, 16)), [Classes(1000)]), (3, 256, 256), "")
    assert round(sum(p.numel() for p in prior.parameters()) / 1e6) == pytest.approx(millions, rel=0.01)


def test_images_without_a_class_are_recorded(tmp_path):
    for name, labels in ("all", [0, 1, 2]), ("some", [0, -1, 2]):
        (folder := tmp_path / name).mkdir()
        write_codes(folder, counts=(3,), labels=np.array(labels))
        part = Conditioning.for_files(CodeFiles(folder, "train"), ObjectiveConfig(label_dropout=0)).classes
        assert part.guidable == (name == "some")
        assert Classes.from_description(part.describe()).describe() == part.describe()
