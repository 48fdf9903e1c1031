"""vqgen-convert: model files of other projects to a model folder, and a model folder to a diffusers VQModel."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from vqgen.artifact import read_tensors, write_tensors
from vqgen.config import command
from vqgen.errors import UsageError, UserError
from vqgen.files import DESCRIPTION, atomic_path, read_json, write_json
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.options import TokenizerConfig

from .weights import (
    DIFFUSERS,
    LLAMAGEN,
    TAMING,
    Foreign,
    diffusers_config,
    folded_gumbel,
    to_diffusers,
    without_attention,
)

_VQMODEL = "config.json"
_WEIGHTS = "diffusion_pytorch_model"
# Keys of a VQModel's config.json that change neither codes nor reconstructions.
_FREE = ("sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast")
# Names that attention had in older versions of diffusers.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass
class ConvertConfig:
    """What is converted, and into what."""

    input: Path | None = None
    """A .ckpt of taming-transformers, a .pt of LlamaGen, either as .safetensors, a folder of a diffusers VQModel, or a
    run or model folder of vqgen. Needed."""
    from_: Literal["auto", "taming", "llamagen", "diffusers", "vqgen"] = "auto"
    """Whose --input is; auto tells by its files and by the names of its tensors."""
    to: Literal["vqgen", "diffusers"] = "vqgen"
    """A model folder of vqgen, or a folder that diffusers' VQModel.from_pretrained loads."""
    output: Path = Path("runs/converted")
    """Folder to write; must be new or empty."""
    size: list[int] = field(default_factory=list)
    """Height and width of the images it was trained on, in pixels (one number: square); empty = as its files say, which
    those of LlamaGen do not, nor a .ckpt without --taming-config."""
    taming_config: Path | None = None
    """The YAML file beside a .ckpt: gives the image size, and is checked against the weights."""

    def __post_init__(self) -> None:
        if len(self.size) == 1:
            self.size = [self.size[0]] * 2
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(f"--size: found {self.size}, expected height and width of at least 1")


# ---- files ----


class _Ignored:
    """Stands in for an object of a named class in a checkpoint: takes what it is given and keeps nothing."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# What such files hold beside tensors and plain values. Lightning before 1.5 keys the callbacks' states by class, before
# 1.1 it keeps hyper-parameters in a dict of its own; schedules leave numpy's numbers, LlamaGen's training its options.
# None of these classes is imported, so none of their code runs.
_HARMLESS: dict[str, type] = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _Ignored,
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": _Ignored,
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "numpy.core.multiarray.scalar": _Ignored,
    "numpy._core.multiarray.scalar": _Ignored,
    "numpy.dtype": _Ignored,
    "argparse.Namespace": _Ignored,
}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save` (averaged weights before others) or safetensors.

    No code in the file is run. Raises `UserError` where it holds objects of classes that such files have no use for,
    is damaged, or holds no state dict.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with torch.serialization.safe_globals([(kind, name) for name, kind in _HARMLESS.items()]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file ends in whatever error its bytes happen to lead to
        text = str(error)
        if refused := re.search(r"GLOBAL (\S+)", text):
            raise UserError(f"{path} holds {refused[1]}, which weights have no need of; it was not loaded") from error
        reason = text.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        raise UserError(f"{path} is no whole file of torch.save ({reason.splitlines()[0][:150]})") from error
    for key in ("ema", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path} holds no state dict")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    return {str(name): value for name, value in found.items()}


def _agree(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """See that a configuration says of a model what its weights say."""
    for key, value in expected.items():
        if key in found and found[key] != value:
            raise UserError(f"{where}: {key} is {found[key]}, expected {value} for these weights")


# ---- what each project says beside its weights ----


def _taming_config(path: Path) -> dict[str, Any]:
    """`ddconfig` of a taming configuration, with `n_embed` and `embed_dim` of the same model, and with a `dropout`."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        codebook = {key: params[key] for key in ("n_embed", "embed_dim") if key in params}
        return {**params["ddconfig"], **codebook, "dropout": float(params["ddconfig"].get("dropout", 0))}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--taming-config: {path} cannot be read ({' '.join(str(error).split())})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--taming-config: {path} has no model.params.ddconfig that can be read ({error})") from error


def _check_taming(path: Path, found: dict[str, Any], config: TokenizerConfig) -> None:
    """See that a taming configuration is that of the weights."""
    model = config.model
    expected: dict[str, Any] = {
        "double_z": False,
        "in_channels": config.channels,
        "out_ch": config.channels,
        "ch": model.channels[0],
        "ch_mult": [channels // model.channels[0] for channels in model.channels],
        "num_res_blocks": model.blocks,
        "z_channels": model.latent_dim,
        "n_embed": config.quantizer.codebook_size,
        "embed_dim": config.quantizer.code_dim,
    }
    side, listed = found.get("resolution"), found.get("attn_resolutions")
    if isinstance(side, int) and isinstance(listed, list):
        sides = [side // 2**level for level in range(len(model.multipliers))]
        found = {**found, "attn_resolutions": [side for side in sides if side in listed]}
        expected["attn_resolutions"] = [sides[level] for level in model.attention_levels]
    _agree(path, found, expected)


def _vqmodel(folder: Path, keys: Mapping[str, Any]) -> Foreign:
    """A diffusers VQModel with its config.json."""
    path = folder / _VQMODEL
    groups = keys.get("norm_num_groups", 32)
    if keys.get("_class_name", "VQModel") != "VQModel":
        raise UserError(f"{path}: _class_name is {keys['_class_name']}, expected VQModel")
    if not isinstance(groups, int):
        raise UserError(f"{path}: norm_num_groups is {groups}, expected a number")
    files = [folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.bin"]
    found = read_checkpoint(next((file for file in files if file.exists()), files[0]))
    older = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(_OLDER)})\.")
    tensors = {older.sub(lambda m: f"{m[1]}.{_OLDER[m[2]]}.", name): tensor for name, tensor in found.items()}
    if keys.get("mid_block_add_attention", True):
        return Foreign(str(folder), DIFFUSERS, tensors, groups)
    tensors, attention = without_attention(tensors)
    return Foreign(str(folder), DIFFUSERS, tensors, groups, attention=attention)


def _check_vqmodel(path: Path, found: Mapping[str, Any], config: TokenizerConfig) -> None:
    """See that a VQModel's config.json says what the weights say, and nothing that is not in our architecture."""
    # An attention that adds nothing may stand for none.
    expected = {**diffusers_config(config), "mid_block_add_attention": found.get("mid_block_add_attention", True)}
    if found.get("vq_embed_dim", 0) is None:
        found = {**found, "vq_embed_dim": found.get("latent_channels", config.model.latent_dim)}
    for key in found:
        if key not in expected and key not in _FREE and not key.startswith("_"):
            raise UserError(f"{path}: {key} is not a key that vqgen knows")
    _agree(path, found, {"act_fn": "silu", "norm_type": "group", **expected})


# ---- the program ----


def load(config: ConvertConfig) -> tuple[Tokenizer, str, list[str]]:
    """The tokenizer in `--input`, whose it was, and the names of tensors left out of it.

    Raises `UserError` naming the first parameter that vqgen's architecture has no place for.
    """
    path = config.input
    if path is None:
        raise UsageError("--input is needed; --help lists all options")
    if not path.exists():
        raise UserError(f"--input: {path} does not exist")
    if not path.is_dir():
        return _load_file(path, config)
    if (path / DESCRIPTION).exists():
        _expect(config, "vqgen")
        if config.size:
            raise UsageError(f"--size: {path} says its own; leave the option out")
        return Tokenizer.load(path), "vqgen", []
    if not (path / _VQMODEL).exists():
        raise UserError(f"--input: {path} holds neither {DESCRIPTION} (vqgen) nor {_VQMODEL} (diffusers)")
    _expect(config, "diffusers")
    keys = read_json(path / _VQMODEL)
    tokenizer = _vqmodel(path, keys).tokenizer(_size(config, keys.get("sample_size")))
    _check_vqmodel(path / _VQMODEL, keys, tokenizer.config)
    return tokenizer, "diffusers", []


def _load_file(path: Path, config: ConvertConfig) -> tuple[Tokenizer, str, list[str]]:
    """As `load`, for a file of taming-transformers or LlamaGen."""
    tensors = read_checkpoint(path)
    starts = {"encoder.down.": TAMING, "encoder.conv_blocks.": LLAMAGEN}
    names = next((names for start, names in starts.items() for name in tensors if name.startswith(start)), None)
    if names is None:
        first = next(iter(tensors), "no tensor")
        raise UserError(f"--input: {path} is neither of taming-transformers nor of LlamaGen; it begins with {first}")
    _expect(config, names.project)
    keys = {} if config.taming_config is None else _taming_config(config.taming_config)
    gumbel = names is TAMING and "quantize.proj.weight" in tensors
    tensors = folded_gumbel(tensors, str(path)) if gumbel else tensors
    foreign = Foreign(str(path), names, tensors, dropout=keys.get("dropout", 0.0), gumbel=gumbel)
    tokenizer = foreign.tokenizer(_size(config, keys.get("resolution")))
    if config.taming_config is not None:
        _check_taming(config.taming_config, keys, tokenizer.config)
    return tokenizer, names.project, foreign.left_out()


def _expect(config: ConvertConfig, kind: str) -> None:
    """See that --input is of the kind that the options are for."""
    if config.from_ not in ("auto", kind):
        raise UsageError(f"--from: found {config.from_}, but {config.input} is of {kind}")
    if config.to == kind:
        raise UsageError(f"--to: {config.input} is of {kind} already")
    if config.taming_config is not None and kind != "taming":
        raise UsageError(f"--taming-config: {config.input} is of {kind}; leave the option out")


def _size(config: ConvertConfig, said: Any) -> list[int]:
    """Height and width of the images: as asked for, or else as the files say."""
    size = config.size or ([said, said] if isinstance(said, int) else said)
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return size
    raise UsageError(f"--size: {config.input} does not say the size of its images; give --size HEIGHT WIDTH")


def save(tokenizer: Tokenizer, to: Literal["vqgen", "diffusers"], output: Path, where: str) -> None:
    """Write a tokenizer as the folder `output`, all or nothing; `where` names the tokenizer in errors."""
    keys, tensors = to_diffusers(tokenizer, where) if to == "diffusers" else ({}, {})
    with atomic_path(output) as temporary:
        temporary.mkdir()
        if to == "vqgen":
            tokenizer.save(temporary)
        else:
            write_tensors(temporary / f"{_WEIGHTS}.safetensors", tensors)
            write_json(temporary / _VQMODEL, keys)


def run(config: ConvertConfig) -> None:
    """Convert tokenizers of taming-transformers, LlamaGen and diffusers to a model folder, or one to diffusers."""
    output = config.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {output} is there already; choose another folder")
    tokenizer, kind, left_out = load(config)
    save(tokenizer, config.to, output, str(config.input))
    if left_out:
        groups = sorted({name.partition(".")[0] + "." if name.startswith("loss.") else name for name in left_out})
        plural = "s" * (len(left_out) > 1)
        print(f"left out {len(left_out)} tensor{plural} that only training needs: {', '.join(groups)}")
    (height, width), (rows, columns) = tokenizer.config.image_size, tokenizer.grid
    weights = sum(tensor.numel() for tensor in tokenizer.inference_state().values())
    print(
        f"{output}: from {kind} to {config.to}, {weights / 1e6:.1f} million weights, "
        f"images of {height}x{width} as {rows}x{columns} codes of {tokenizer.codebook_size}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return command("vqgen-convert", ConvertConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
