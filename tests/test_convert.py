"""vqgen-convert: parity with the projects whose weights it reads and writes, and what it refuses."""

import argparse
import dataclasses
import json
import pickle
import sys
import zlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.quantizers import quantizer_options
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vqgen.artifact import fingerprint
from vqgen.errors import UserError
from vqgen.prior.convert.program import main
from vqgen.tokenizer import encode
from vqgen.tokenizer.convert.read import read_checkpoint
from vqgen.tokenizer.convert.weights import DIFFUSERS, LLAMAGEN, TAMING, Foreign, to_diffusers
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.networks.options import VQGANConfig
from vqgen.tokenizer.options import TokenizerConfig
from vqgen.tokenizer.quantizers import QUANTIZERS
from vqgen.tokenizer.reconstruction import write_png_atomic

DATA = Path(__file__).parent / "data"
MODEL_CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
needs_diffusers = pytest.mark.skipif(sys.version_info < (3, 11), reason="diffusers of these dependencies needs 3.11")


def seeded(shapes: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights as a function of name, shape and seed, the same on every machine; see tests/data/README.md."""
    weights = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode())).random_sample(tuple(shape)) * 2 - 1
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))
        else:
            values = 1 + 0.3 * values if name.endswith(".weight") else 0.1 * values
        if name.startswith("decoder.conv_out."):  # reconstructions within [-1, 1]
            values /= 4
        weights[name] = torch.from_numpy(values.astype(np.float32))
    return weights


@dataclasses.dataclass(frozen=True)
class Fixture:
    """What another project's class gave for `images`, and its weights."""

    weights: dict[str, Tensor]
    images: Tensor
    codes: Tensor
    reconstructions: Tensor
    arguments: dict[str, Any]


@cache
def fixture(name: str) -> Fixture:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        origin = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    assert {"repository", "commit", "class"} <= origin.keys()
    weights = seeded(json.loads(origin["shapes"]), int(origin["seed"]))
    assert fingerprint(weights) == origin["fingerprint"]
    return Fixture(weights, arguments=json.loads(origin["arguments"]), **tensors)


def same(tokenizer: Tokenizer, images: Tensor, codes: Tensor, reconstructions: Tensor) -> None:
    """The same codes, enough of them that this says something, and reconstructions within 1e-5."""
    assert len(codes.unique()) > 10
    assert torch.equal(tokenizer.encode(images), codes.long())
    with torch.no_grad():
        torch.testing.assert_close(tokenizer(images).images, reconstructions, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokenizer.decode(codes.long()), reconstructions.clamp(-1, 1), rtol=0, atol=1e-5)


# ---- files of torch.save ----


def foreign_object(patch: pytest.MonkeyPatch, path: str, kind: type) -> Any:
    """Give `kind` the dotted name of a class of a package that is not installed, for as long as `patch` lasts."""
    module, _, name = path.rpartition(".")
    parts = module.split(".")
    for n in range(1, len(parts) + 1):
        patch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
    patch.setattr(sys.modules[module], name, kind, raising=False)
    kind.__module__, kind.__qualname__, kind.__name__ = module, name, name
    return kind


def save_lightning(path: Path, state: dict[str, Tensor], zipped: bool = True) -> None:
    """A checkpoint as Lightning of taming's time leaves it: classes as keys, a dict of its own, numpy's numbers."""
    with pytest.MonkeyPatch.context() as patch:
        callback = foreign_object(patch, MODEL_CHECKPOINT, type("", (), {}))
        stopping = foreign_object(patch, "pytorch_lightning.callbacks.early_stopping.EarlyStopping", type("", (), {}))
        attributes = foreign_object(patch, "pytorch_lightning.utilities.parsing.AttributeDict", type("", (dict,), {}))
        checkpoint = {
            "epoch": 3,
            "global_step": 1000,
            "pytorch-lightning_version": "1.0.8",
            "callbacks": {callback: {"best_model_score": torch.tensor(0.5), "best_model_path": "a"}, stopping: {}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}],
            "lr_schedulers": [{"last_lr": [np.float64(0.1)]}],
            "hyper_parameters": attributes(embed_dim=8),
            "state_dict": state,
        }
        torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False])
def test_taming_checkpoint(tmp_path, cli, zipped):
    known = fixture("taming")
    loss = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.perceptual_loss.lin0.weight": torch.zeros(2)}
    save_lightning(tmp_path / "last.ckpt", {**known.weights, **loss}, zipped)
    params = {**known.arguments, "lossconfig": {"target": "x.Loss"}}
    (tmp_path / "model.yaml").write_text(yaml.dump({"model": {"target": "x.VQModel", "params": params}}))
    out = tmp_path / "out"
    done = cli(main, "--input", tmp_path / "last.ckpt", "--taming-config", tmp_path / "model.yaml", "--output", out)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "left out 2 tensors used only in training: loss."
    assert "from taming to vqgen" in done.out
    tokenizer = Tokenizer.load(out)
    assert tokenizer.config.image_size == [32, 32]
    assert tokenizer.config.model == VQGANConfig(16, 64, [1, 2, 2], attention_levels=[1])
    assert (tokenizer.codebook_size, tokenizer.config.quantizer.l2_normalize) == (64, False)
    same(tokenizer, known.images, known.codes, known.reconstructions)
    assert "pytorch_lightning" not in sys.modules


def test_taming_gumbel(tmp_path, cli):
    known = fixture("taming-gumbel")
    save_lightning(tmp_path / "last.ckpt", known.weights)
    words = ["--input", tmp_path / "last.ckpt", "--size", "16", "24", "--output", tmp_path / "out"]
    assert cli(main, *words).code == 0
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.config.quantizer.kind == "gumbel"
    same(tokenizer, known.images, known.codes, known.reconstructions)


def test_llamagen_takes_the_averaged_weights(tmp_path, cli):
    known = fixture("llamagen")
    checkpoint = {
        "model": {name: torch.zeros(1) for name in known.weights},
        "ema": known.weights,
        "optimizer": {},
        "steps": 10,
        "args": argparse.Namespace(image_size=256),
    }
    torch.save(checkpoint, tmp_path / "0000010.pt")
    words = ["--input", tmp_path / "0000010.pt", "--size", "16", "24", "--output", tmp_path / "out"]
    done = cli(main, *words, "--codebook-l2-norm", "true")
    assert done.code == 0, done.err
    assert "left out 1 tensor used only in training: quantize.codebook_used" in done.out
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.config.quantizer.l2_normalize and tokenizer.grid == (8, 12)
    same(tokenizer, known.images, known.codes, known.reconstructions)


@pytest.mark.parametrize("wrap", [lambda x: {"model": x}, lambda x: x, lambda x: {"state_dict": x}])
def test_state_dicts_are_found_where_files_keep_them(tmp_path, wrap):
    weights = {"a": torch.rand(2), "b.c": torch.rand(3, 1)}
    torch.save(wrap(weights), tmp_path / "x.pt")
    save_file(weights, tmp_path / "x.safetensors")
    for file in ("x.pt", "x.safetensors"):
        found = read_checkpoint(tmp_path / file)
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_numbers_of_numpy_1_are_read(tmp_path):
    """Files of numpy 1 name the function `numpy.core.multiarray.scalar`, those of numpy 2 `numpy._core…`."""

    class Number:
        def __reduce__(self):
            return sys.modules["numpy.core.multiarray"].scalar, (np.dtype("f8"), b"\0" * 8)  # type: ignore[attr-defined]

    def scalar(*_: Any) -> float:
        return 0.0

    scalar.__module__, scalar.__qualname__ = "numpy.core.multiarray", "scalar"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numpy.core.multiarray", ModuleType("numpy.core.multiarray"))
        patch.setattr(sys.modules["numpy.core.multiarray"], "scalar", scalar, raising=False)
        torch.save({"state_dict": {"a": torch.ones(1)}, "lr": Number()}, tmp_path / "x.ckpt")
    assert read_checkpoint(tmp_path / "x.ckpt").keys() == {"a"}


class Malicious:
    """Creates a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


class Shell(Malicious):
    def __reduce__(self):
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(("kind", "named"), [(Malicious, "exec"), (Shell, "posix.system")])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, cli, kind, named, zipped):
    marker, file = tmp_path / "marker", tmp_path / "last.ckpt"
    pickle.loads(pickle.dumps(kind(marker)))  # it does run when somebody unpickles it
    assert marker.exists()
    marker.unlink()
    state = {"state_dict": fixture("taming").weights, "callbacks": kind(marker)}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    done = cli(main, "--input", file, "--size", "32", "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert f"last.ckpt contains {named}, which weights do not need" in done.err
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_classes_of_the_list_are_stood_in_for_not_imported(tmp_path, monkeypatch):
    """A module of a listed name on the path is not imported, whatever a pickle asks of its class."""
    save_lightning(tmp_path / "x.ckpt", {"a": torch.ones(1)})
    (tmp_path / "pytorch_lightning").mkdir()
    (tmp_path / "pytorch_lightning" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert read_checkpoint(tmp_path / "x.ckpt").keys() == {"a"}
    # The list holds while a file is read and no longer.
    with pytest.raises(pickle.UnpicklingError, match="ModelCheckpoint"):
        torch.load(tmp_path / "x.ckpt", weights_only=True)


@pytest.mark.parametrize("content", ["empty", "text", "cut", "number", "other", "list"])
def test_what_is_no_state_dict_is_one_line(tmp_path, cli, content):
    file = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"encoder.down.0.block.0.conv1.weight": torch.ones(32, 3)}}, file)
    if content in ("empty", "text"):
        file.write_bytes(b"" if content == "empty" else b"version https://git-lfs.github.com/spec/v1\n")
    elif content == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    else:
        values = {"number": {"state_dict": {"a": 3}}, "other": {"state_dict": {"a": torch.ones(1)}}, "list": [1, 2]}
        torch.save(values[content], file)
    done = cli(main, "--input", file, "--size", "32", "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1)
    assert str(file) in done.err and "Error" not in done.err.partition("(")[0]
    assert len(done.err) < 400


# ---- parameters that do not fit ----


def make(channels: int = 3, quantizer: dict[str, Any] | None = None, **model: Any) -> Tokenizer:
    """A tokenizer of ours with seeded weights."""
    sizes = {"width": 16, "multipliers": [1, 2], "blocks": 1, "latent_dim": 12, "groups": 8, **model}
    codes = quantizer_options(**{"codebook_size": 64, "code_dim": 6, **(quantizer or {})})
    tokenizer = Tokenizer(TokenizerConfig([16, 24], channels, VQGANConfig(**sizes), codes))
    state = tokenizer.inference_state()
    weights = seeded({ours_to_seed(name): list(tensor.shape) for name, tensor in state.items()}, 0)
    tokenizer.load_state_dict({**tokenizer.state_dict(), **{name: weights[ours_to_seed(name)] for name in state}})
    tokenizer.quantizer.reset_training_state()
    return tokenizer.eval()


def ours_to_seed(name: str) -> str:
    return name.replace("decoder.last.", "decoder.conv_out.")


@cache
def small() -> dict[str, Tensor]:
    """The weights of a small VQModel."""
    return to_diffusers(make(quantizer={"l2_normalize": False}), "x")[1]


def foreign(tensors: dict[str, Tensor], groups: int = 8) -> Foreign:
    return Foreign("a.bin", DIFFUSERS, tensors, groups)


def test_the_small_model_is_whole():
    assert foreign(small()).tokenizer([32, 32]).config.model == make().config.model


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "unknown": ({"encoder.temb.dense.0.weight": (4, 4)}, "encoder.temb.dense.0.weight does not exist"),
    "remapped codes": ({"quantize.used": (64,)}, "quantize.used does not exist"),
    "averages": ({"model_ema.decay": ()}, "model_ema.decay does not exist"),
    "shortcut": (
        {"encoder.down_blocks.0.resnets.0.conv_shortcut.weight": (16, 16, 1, 1)},
        "encoder.down_blocks.0.resnets.0.conv_shortcut.weight does not exist",
    ),
    "two moments": ({"encoder.conv_out.weight": (24, 32, 3, 3)}, "encoder.conv_out.bias is 12, expected 24"),
    "other first width": ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "encoder.conv_in.weight is 8x3x3x3, expected 16x"),
    "segmentation": ({"encoder.conv_in.weight": (16, 182, 3, 3)}, "encoder.conv_in.weight takes 182 channels"),
    "other output": ({"decoder.conv_out.weight": (1, 16, 3, 3)}, "decoder.conv_out.weight is 1x16x3x3, expected 3x"),
    "flat": ({"encoder.conv_in.weight": (16,)}, "encoder.conv_in.weight is 16, expected at least 2 dimensions"),
    "groups": ({"encoder.down_blocks.0.resnets.0.conv1.weight": (12, 16, 3, 3)}, "--groups: 8 does not divide 12"),
    "huge": ({"encoder.down_blocks.0.resnets.0.conv1.weight": (2**20, 0, 0, 0)}, "--multipliers: found 32768"),
    "no width": ({"encoder.down_blocks.0.resnets.0.conv1.weight": (0, 16, 3, 3)}, "sizes do not fit together"),
    "one code": ({"quantize.embedding.weight": (1, 6)}, "--codebook-size: found 1"),
    "1x1 convolution": (
        {"encoder.mid_block.attentions.0.to_k.weight": (32, 32, 1, 1)},
        "encoder.mid_block.attentions.0.to_k.weight is 32x32x1x1, expected 32x32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_first_parameter_that_does_not_fit_is_named(case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError) as error:
        foreign({**small(), **{name: torch.zeros(shape) for name, shape in changes.items()}}).tokenizer([32, 32])
    assert str(error.value).startswith("a.bin: ") and message in str(error.value)


def test_whole_numbers_are_no_weights():
    tensors = {**small(), "decoder.conv_norm_out.bias": torch.zeros(16, dtype=torch.int64)}
    with pytest.raises(UserError, match=r"decoder\.conv_norm_out\.bias has type torch\.int64"):
        foreign(tensors).tokenizer([32, 32])


def test_of_several_the_first_in_the_file_is_named():
    with pytest.raises(UserError, match=r"zzz\.weight does not exist"):
        foreign({**small(), "zzz.weight": torch.ones(1), "aaa.weight": torch.ones(1)}).tokenizer([32, 32])


def test_no_tensor_may_be_missing():
    for missing in [*small()][::5]:
        with pytest.raises(UserError):
            foreign({name: tensor for name, tensor in small().items() if name != missing}).tokenizer([32, 32])
    rest = {name: tensor for name, tensor in small().items() if "decoder.mid_block.attentions.0.to_k" not in name}
    with pytest.raises(UserError, match=r"decoder\.mid_block\.attentions\.0\.to_k\.weight is missing"):
        foreign(rest).tokenizer([32, 32])


def test_16_bit_weights_are_widened():
    half = {name: tensor.bfloat16() for name, tensor in small().items()}
    state = foreign(half).tokenizer([32, 32]).inference_state()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert torch.equal(state["quantizer.project_in.weight"], half["quant_conv.weight"].float())


def test_gumbel_tensors_that_do_not_fit_each_other(tmp_path, cli):
    weights = {**fixture("taming-gumbel").weights, "quantize.proj.weight": torch.zeros(64, 9, 1, 1)}
    torch.save({"state_dict": weights}, tmp_path / "x.ckpt")
    done = cli(main, "--input", tmp_path / "x.ckpt", "--size", "16", "--output", tmp_path / "out")
    assert done.code == 1 and "quantize.proj.weight does not match" in done.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ch", 128),
        ("ch_mult", [1, 1, 2]),
        ("attn_resolutions", [8]),
        ("attn_resolutions", "8"),
        ("num_res_blocks", 1),
        ("double_z", True),
        ("tanh_out", True),
        ("give_pre_end", True),
        ("resamp_with_conv", False),
    ],
)
def test_the_configuration_of_another_model_is_refused(tmp_path, cli, key, value):
    known = fixture("taming")
    save_lightning(tmp_path / "last.ckpt", known.weights)
    params = {**known.arguments, "ddconfig": {**known.arguments["ddconfig"], key: value}}
    (tmp_path / "model.yaml").write_text(yaml.dump({"model": {"params": params}}))
    words = ["--input", tmp_path / "last.ckpt", "--taming-config", tmp_path / "model.yaml"]
    done = cli(main, *words, "--output", tmp_path / "out")
    assert done.code == 1 and f"model.yaml: {key} is" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "model: 3", "model: {params: {ddconfig: {dropout: x}}}", "{", "- 1"])
def test_a_configuration_that_is_none_is_one_line(tmp_path, cli, text):
    save_file({"encoder.down.0.block.0.conv1.weight": torch.ones(1)}, tmp_path / "last.safetensors")
    (tmp_path / "model.yaml").write_text(text)
    words = ["--input", tmp_path / "last.safetensors", "--taming-config", tmp_path / "model.yaml"]
    done = cli(main, *words, "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1) and "--taming-config: " in done.err


# ---- diffusers ----


def vqmodel(**options: Any) -> Any:
    """A diffusers VQModel with seeded weights."""
    from diffusers.models.autoencoders.vq_model import VQModel

    kinds = options.pop("attention", [False, False, False])
    model = VQModel(
        down_block_types=[f"{'Attn' * kind}DownEncoderBlock2D" for kind in kinds],
        up_block_types=[f"{'Attn' * kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        **{
            "block_out_channels": [16, 24, 32],
            "layers_per_block": 1,
            "latent_channels": 12,
            "num_vq_embeddings": 64,
            "vq_embed_dim": 6,
            "norm_num_groups": 8,
            "sample_size": 16,
            **options,
        },
    )
    model.load_state_dict(seeded({name: list(t.shape) for name, t in model.state_dict().items()}, 0))
    return model.eval()


def images(channels: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(4, channels, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def theirs(model: Any, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstructions of a VQModel."""
    latents = model.encode(pictures).latents
    codes = model.quantize(latents)[2][2].view(len(latents), *latents.shape[2:])
    return codes, model(pictures).sample


@needs_diffusers
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": [False, True, False]},
        {"attention": [True, False, True], "layers_per_block": 2},
        {"mid_block_add_attention": False},
        {"vq_embed_dim": None, "in_channels": 1, "out_channels": 1},
        {"block_out_channels": [16], "attention": [False], "lookup_from_codebook": True, "force_upcast": True},
    ],
    ids=str,
)
def test_vqmodel_to_vqgen(tmp_path, cli, options):
    model = vqmodel(**dict(options))
    model.save_pretrained(tmp_path / "vq")
    done = cli(main, "--input", tmp_path / "vq", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.config.image_size == [16, 16] and tokenizer.config.model.groups == 8
    pictures = images(options.get("in_channels", 3))
    same(tokenizer, pictures, *theirs(model, pictures))


@needs_diffusers
def test_older_vqmodel_folder(tmp_path, cli):
    """The folders of diffusers' first versions: a .bin, other names in attention, keys left to their defaults."""
    model = vqmodel(attention=[False, False, True])
    model.save_pretrained(tmp_path / "vq")
    (tmp_path / "vq" / "diffusion_pytorch_model.safetensors").unlink()
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = model.state_dict()
    for new, old in older.items():
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "vq" / "diffusion_pytorch_model.bin")
    config = json.loads((tmp_path / "vq" / "config.json").read_text())
    for key in ("norm_type", "mid_block_add_attention", "lookup_from_codebook", "force_upcast", "scaling_factor"):
        del config[key]
    (tmp_path / "vq" / "config.json").write_text(json.dumps(config))
    words = ["--input", tmp_path / "vq", "--from", "diffusers", "--size", "16", "24", "--output", tmp_path / "out"]
    done = cli(main, *words)
    assert done.code == 0, done.err
    same(Tokenizer.load(tmp_path / "out"), images(), *theirs(model, images()))


@needs_diffusers
@pytest.mark.parametrize(
    "options",
    [
        {"quantizer": {"l2_normalize": True}},
        {"quantizer": {"l2_normalize": False, "codebook": "gradient"}, "attention_levels": [0, 1]},
        {"quantizer": {"l2_normalize": True, "codebook": "gradient"}},
        {"quantizer": {"l2_normalize": True}, "attention": False, "channels": 1},
        {"quantizer": {"quantizer": "simvq"}, "multipliers": [2, 1, 3], "blocks": 2, "attention_levels": [1]},
    ],
    ids=str,
)
def test_vqgen_to_vqmodel(tmp_path, cli, options):
    from diffusers.models.autoencoders.vq_model import VQModel

    tokenizer = make(**options)
    tokenizer.save(tmp_path / "vqgen")
    done = cli(main, "--input", tmp_path / "vqgen", "--to", "diffusers", "--output", tmp_path / "vq")
    assert done.code == 0, done.err
    model, loading = VQModel.from_pretrained(tmp_path / "vq", output_loading_info=True)
    assert not any(loading.values()), loading
    pictures = images(options.get("channels", 3))
    codes, reconstructions = theirs(model.eval(), pictures)
    same(tokenizer, pictures, codes, reconstructions)
    with torch.no_grad():
        shape = (*codes.shape, model.config.vq_embed_dim)
        decoded = model.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    torch.testing.assert_close(decoded, reconstructions, rtol=0, atol=1e-5)


@needs_diffusers
@pytest.mark.parametrize("attention", [True, False])
def test_there_and_back_is_bit_exact(tmp_path, cli, attention):
    before = make(quantizer={"l2_normalize": False}, attention=attention, attention_levels=[1])
    before.save(tmp_path / "a")
    assert cli(main, "--input", tmp_path / "a", "--to", "diffusers", "--output", tmp_path / "b").code == 0
    assert cli(main, "--input", tmp_path / "b", "--output", tmp_path / "c").code == 0
    assert cli(main, "--input", tmp_path / "c", "--to", "diffusers", "--output", tmp_path / "d").code == 0
    after = Tokenizer.load(tmp_path / "c")
    assert (after.config.model, after.config.image_size) == (before.config.model, [16, 24])
    assert after.fingerprint == before.fingerprint
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


@needs_diffusers
def test_vqmodel_there_and_back_is_bit_exact(tmp_path, cli):
    model = vqmodel(attention=[True, False, False])
    model.save_pretrained(tmp_path / "a")
    assert cli(main, "--input", tmp_path / "a", "--output", tmp_path / "b").code == 0
    assert cli(main, "--input", tmp_path / "b", "--to", "diffusers", "--output", tmp_path / "c").code == 0
    before, after = (load_file(tmp_path / n / "diffusion_pytorch_model.safetensors") for n in "ac")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind not in ("vq", "simvq")])
def test_quantizers_that_a_vqmodel_has_not_are_refused(tmp_path, cli, kind):
    quantizer = QUANTIZERS[kind](codebook_size=16)
    model = VQGANConfig(width=8, multipliers=[1], blocks=1, groups=8)
    Tokenizer(TokenizerConfig([8, 8], 3, model, quantizer)).save(tmp_path / "in")
    done = cli(main, "--input", tmp_path / "in", "--to", "diffusers", "--output", tmp_path / "out")
    assert done.code == 1 and f"--quantizer is {kind}" in done.err and not (tmp_path / "out").exists()


def test_folded_pixels_are_refused(tmp_path, cli):
    make(patch=2).save(tmp_path / "in")
    done = cli(main, "--input", tmp_path / "in", "--to", "diffusers", "--output", tmp_path / "out")
    assert done.code == 1 and "--patch is 2" in done.err


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQModel folder that vqgen wrote."""
    folder = tmp_path_factory.mktemp("exported")
    make().save(folder / "in")
    assert main(["--input", str(folder / "in"), "--to", "diffusers", "--output", str(folder / "vq")]) == 0
    return folder / "vq"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "gelu", "act_fn is gelu, expected silu"),
        ("norm_type", "spatial", "norm_type is spatial, expected group"),
        ("_class_name", "AutoencoderKL", "_class_name is AutoencoderKL, expected VQModel"),
        ("norm_num_groups", "8", "norm_num_groups is 8, expected a number"),
        ("norm_num_groups", True, "norm_num_groups is True, expected a number"),
        ("mid_block_add_attention", [[]], "mid_block_add_attention is [[]], expected true or false"),
        ("layers_per_block", 2, "layers_per_block is 2, expected 1"),
        ("layers_per_block", True, "layers_per_block is True, expected 1"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], "down_block_types is"),
        ("temporal_compression", 4, "temporal_compression is not a key"),
        ("norm_num_groups", 5, "--groups: 5 does not divide"),
    ],
)
def test_a_vqmodel_of_another_architecture_is_refused(tmp_path, cli, exported, key, value, message):
    config = json.loads((exported / "config.json").read_text())
    (tmp_path / "vq").mkdir()
    (tmp_path / "vq" / "config.json").write_text(json.dumps({**config, key: value}))
    (tmp_path / "vq" / "diffusion_pytorch_model.safetensors").symlink_to(
        exported / "diffusion_pytorch_model.safetensors"
    )
    done = cli(main, "--input", tmp_path / "vq", "--output", tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (1, 1) and message in done.err
    assert not (tmp_path / "out").exists()


# ---- the program ----


def test_options_that_do_not_fit(tmp_path, cli, exported):
    save_file(fixture("taming").weights, tmp_path / "taming.safetensors")
    torch.save(fixture("llamagen").weights, tmp_path / "llamagen.pt")
    make().save(tmp_path / "in")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    taming, llamagen = tmp_path / "taming.safetensors", tmp_path / "llamagen.pt"
    for code, words, message in [
        (2, [], "--input"),
        (1, ["--input", tmp_path / "none"], "none does not exist"),
        (1, ["--input", tmp_path / "empty"], "contains neither vqgen.json (vqgen) nor config.json (diffusers)"),
        (2, ["--input", taming], "--size: "),
        (2, ["--input", llamagen, "--codebook-l2-norm", "true"], "--size: "),
        (
            2,
            ["--input", llamagen, "--size", "31", "32", "--codebook-l2-norm", "true"],
            "--size: 31x32 is not divisible",
        ),
        (2, ["--input", llamagen, "--size", "8", "8", "8"], "--size: found"),
        (2, ["--input", llamagen, "--size", "32"], "--codebook-l2-norm: "),
        (2, ["--input", taming, "--size", "32", "--codebook-l2-norm", "false"], "--codebook-l2-norm: "),
        (2, ["--input", exported, "--codebook-l2-norm", "true"], "--codebook-l2-norm: "),
        (2, ["--input", taming, "--size", "32", "--from", "llamagen"], "--from: found llamagen, but"),
        (2, ["--input", llamagen, "--size", "32", "--taming-config", taming], "--taming-config: "),
        (2, ["--input", tmp_path / "in"], "is of vqgen already"),
        (2, ["--input", tmp_path / "in", "--to", "diffusers", "--size", "32"], "contains its own"),
        (2, ["--input", exported, "--to", "diffusers"], "is of diffusers already"),
        (2, ["--input", taming, "--size", "32", "--output", tmp_path / "full"], "full"),
        (2, ["--input", taming, "--size", "32", "--output", taming], "is a file"),
    ]:
        done = cli(main, "--output", tmp_path / "out", *words)
        assert (done.code, len(done.err.splitlines())) == (code, 1), (words, done)
        assert message in done.err, (words, done.err)
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert cli(main, "--input", taming, "--size", "32", "--output", tmp_path / "empty").code == 0


def test_a_converted_tokenizer_tokenizes(tmp_path, cli, exported):
    """What comes out is a model folder like any other."""
    assert cli(main, "--input", exported, "--output", tmp_path / "tokenizer").code == 0
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for n in range(20):
        picture = torch.from_numpy(random.integers(0, 256, (3, 16, 24), dtype=np.uint8))
        write_png_atomic(tmp_path / "data" / f"{n}.png", picture)
    words = ["--tokenizer", tmp_path / "tokenizer", "--data", tmp_path / "data", "--output", tmp_path / "codes"]
    done = cli(encode.main, *words, "--device", "cpu")
    assert done.code == 0, done.err
    assert cli(encode.main, "--verify", "--output", tmp_path / "codes").code == 0


def test_llamagen_compares_as_it_was_trained(tmp_path, cli):
    """Codebooks scaled code by code: only where directions are compared do codes stay the same."""
    known, name = fixture("llamagen"), "quantize.embedding.weight"
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    scaled = known.weights[name] * scale
    for table, words, unit in (
        (scaled, ["--codebook-l2-norm", "true"], True),
        (scaled, ["--codebook-l2-norm", "false"], False),
        (torch.nn.functional.normalize(scaled), [], True),
    ):
        save_file({**known.weights, name: table}, tmp_path / "in.safetensors")
        out = tmp_path / f"{words}"
        done = cli(main, "--input", tmp_path / "in.safetensors", "--size", "32", "24", "--output", out, *words)
        assert done.code == 0, done.err
        tokenizer = Tokenizer.load(out)
        assert tokenizer.config.quantizer.l2_normalize == unit
        assert torch.equal(tokenizer.encode(known.images), known.codes.long()) == unit


def test_codes_of_length_one_are_the_same_either_way():
    known, name = fixture("llamagen"), "quantize.embedding.weight"
    weights = {**known.weights, name: torch.nn.functional.normalize(known.weights[name])}
    one, other = (Foreign("x", LLAMAGEN, weights, unit=unit).tokenizer([32, 24]) for unit in (True, False))
    assert torch.equal(one.encode(known.images), other.encode(known.images))
    torch.testing.assert_close(one.decode(known.codes.long()), other.decode(known.codes.long()))


@pytest.mark.parametrize("name, names", [("taming", TAMING), ("llamagen", LLAMAGEN)])
def test_multipliers_that_no_network_here_has_are_named(name, names):
    weights = fixture(name).weights
    first = names.block[0].format(level=0, block=0) + ".conv1.weight"
    stem = {"encoder.conv_in.weight": torch.zeros(7, 3, 3, 3), first: torch.zeros(len(weights[first]), 7, 3, 3)}
    with pytest.raises(UserError, match=r"first channel multiplier is not 1.*of 7"):
        Foreign("x", names, {**weights, **stem}).tokenizer([32, 24])
    level = names.block[1].format(level=0, depth=1, block=0) + ".conv1.weight"
    with pytest.raises(UserError, match=r"unequal.*\[7, "):
        Foreign("x", names, {**weights, level: weights[level][:7]}).tokenizer([32, 24])
