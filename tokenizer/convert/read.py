"""Read tokenizers of other projects: checkpoint files, and the configurations beside them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vqgen.artifact import DESCRIPTION, read_tensors, refuse_non_finite, unpickle
from vqgen.errors import UsageError, UserError
from vqgen.files import read_json
from vqgen.files.yaml_text import read_yaml
from vqgen.tokenizer.model import Tokenizer
from vqgen.tokenizer.options import TokenizerConfig

from .options import ConvertConfig
from .weights import (
    DIFFUSERS,
    LLAMAGEN,
    TAMING,
    Foreign,
    code_dim_of,
    diffusers_config,
    folded_gumbel,
    vqgan_of,
    without_attention,
)

VQMODEL_CONFIG = "config.json"
VQMODEL_WEIGHTS = "diffusion_pytorch_model"
# Keys of a VQModel's config.json that change neither codes nor reconstructions.
_IGNORED_KEYS = ("sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast")
# Names of attention layers in older versions of diffusers.
_OLDER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# ---- files ----


class _Placeholder:
    """Takes the place of an object in a checkpoint and discards its state."""

    def __new__(cls, *_: Any) -> "_Placeholder":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Classes in such files beside tensors and plain values: Lightning's callbacks and hyper-parameters, numpy's numbers in
# schedules, LlamaGen's options. None of them is imported, so none of their code runs.
_REPLACED_CLASSES: dict[str, type] = {
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _Placeholder,
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping": _Placeholder,
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "numpy.core.multiarray.scalar": _Placeholder,
    "numpy._core.multiarray.scalar": _Placeholder,
    "numpy.dtype": _Placeholder,
    "argparse.Namespace": _Placeholder,
}


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file of `torch.save` or safetensors; averaged weights are preferred.

    No code in the file is run. Raises `UserError` where it contains objects of other classes, is damaged, or contains
    no state dict.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    found = read_tensors(path) if path.suffix == ".safetensors" else _unpickled(path)
    refuse_non_finite(found, path)
    return found


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a file of `torch.save`; see `read_checkpoint`."""
    try:
        found = unpickle(path, [(kind, name) for name, kind in _REPLACED_CLASSES.items()])
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise any error
        text = str(error)
        if refused := re.search(r"GLOBAL (\S+)", text):
            raise UserError(f"{path} contains {refused[1]}, which weights do not need; it was not loaded") from error
        reason = text.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        raise UserError(f"{path} is not a complete file of torch.save ({reason.splitlines()[0][:150]})") from error
    for key in ("ema", "state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path} contains no state dict")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, expected a tensor")
    return {str(name): value for name, value in found.items()}


def _agree(where: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `UserError` where a configuration disagrees with the weights."""
    for key, value in expected.items():
        # Python's True is 1.
        if key in found and (found[key] != value or isinstance(found[key], bool) != isinstance(value, bool)):
            raise UserError(f"{where}: {key} is {found[key]}, expected {value} for these weights")


# ---- configurations of each project ----


def taming_params(path: Path) -> Mapping[str, Any]:
    """Read `model.params` of a taming configuration. Raises `UserError`."""
    try:
        params = read_yaml(path)["model"]["params"]
        if not isinstance(params, Mapping):
            raise TypeError(f"params is {params}")
        return params
    except UserError as error:
        raise UserError(f"--taming-config: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"--taming-config: {path} has no readable model.params ({error})") from error


def _taming_keys(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """`ddconfig` among the parameters of a VQModel, with `dropout`, and with `n_embed` and `embed_dim` of the model."""
    try:
        codebook = {key: params[key] for key in ("n_embed", "embed_dim") if key in params}
        return {**params["ddconfig"], **codebook, "dropout": float(params["ddconfig"].get("dropout", 0))}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--taming-config: {path} has no readable ddconfig of a VQModel ({error})") from error


def _check_taming(path: Path, found: dict[str, Any], config: TokenizerConfig) -> None:
    """Raise `UserError` where a taming configuration disagrees with the weights."""
    model = vqgan_of(config)
    expected: dict[str, Any] = {
        **{"double_z": False, "tanh_out": False, "give_pre_end": False, "use_linear_attn": False},
        "resamp_with_conv": True,
        "in_channels": config.channels,
        "out_ch": config.channels,
        "ch": model.channels[0],
        "ch_mult": [channels // model.channels[0] for channels in model.channels],
        "num_res_blocks": model.blocks,
        "z_channels": model.latent_dim,
        "n_embed": config.quantizer.codebook_size,
        "embed_dim": code_dim_of(config),
    }
    side, listed = found.get("resolution"), found.get("attn_resolutions")
    if listed is not None and not isinstance(listed, list):
        raise UserError(f"{path}: attn_resolutions is {listed}, expected a list")
    if isinstance(side, int) and isinstance(listed, list):
        sides = [side // 2**level for level in range(len(model.multipliers))]
        found = {**found, "attn_resolutions": [side for side in sides if side in listed]}
        expected["attn_resolutions"] = [sides[level] for level in model.attention_levels]
    _agree(path, found, expected)


def _vqmodel(folder: Path, keys: Mapping[str, Any]) -> Foreign:
    """Read a diffusers VQModel whose config.json has these keys."""
    path = folder / VQMODEL_CONFIG
    groups = keys.get("norm_num_groups", 32)
    if keys.get("_class_name", "VQModel") != "VQModel":
        raise UserError(f"{path}: _class_name is {keys['_class_name']}, expected VQModel")
    if type(groups) is not int:
        raise UserError(f"{path}: norm_num_groups is {groups}, expected a number")
    if not isinstance(keys.get("mid_block_add_attention", True), bool):
        raise UserError(f"{path}: mid_block_add_attention is {keys['mid_block_add_attention']}, expected true or false")
    files = [folder / f"{VQMODEL_WEIGHTS}.safetensors", folder / f"{VQMODEL_WEIGHTS}.bin"]
    found = read_checkpoint(next((file for file in files if file.exists()), files[0]))
    older = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(_OLDER_NAMES)})\.")
    tensors = {older.sub(lambda m: f"{m[1]}.{_OLDER_NAMES[m[2]]}.", name): tensor for name, tensor in found.items()}
    if keys.get("mid_block_add_attention", True):
        return Foreign(str(folder), DIFFUSERS, tensors, groups)
    tensors, attention = without_attention(tensors)
    return Foreign(str(folder), DIFFUSERS, tensors, groups, attention=attention)


def _check_vqmodel(path: Path, found: Mapping[str, Any], config: TokenizerConfig) -> None:
    """Raise `UserError` where a VQModel's config.json disagrees with the weights or has unknown keys."""
    # An attention of zeros may represent a model without it.
    expected = {**diffusers_config(config), "mid_block_add_attention": found.get("mid_block_add_attention", True)}
    if found.get("vq_embed_dim", 0) is None:
        found = {**found, "vq_embed_dim": found.get("latent_channels", config.model.latent_dim)}
    for key in found:
        if key not in expected and key not in _IGNORED_KEYS and not key.startswith("_"):
            raise UserError(f"{path}: {key} is not a key that vqgen knows")
    _agree(path, found, {"act_fn": "silu", "norm_type": "group", **expected})


# ---- the input of a conversion ----


def read_input(config: ConvertConfig) -> dict[str, Tensor] | None:
    """Read the tensors of `--input` where it is a file; None where it is a folder. Raises `UserError`."""
    if config.input is None:
        raise UsageError("--input is required; --help lists all options")
    if not config.input.exists():
        raise UserError(f"--input: {config.input} does not exist")
    return None if config.input.is_dir() else read_checkpoint(config.input)


def load(config: ConvertConfig, tensors: Mapping[str, Tensor] | None) -> tuple[Tokenizer, str, list[str]]:
    """Load the tokenizer in `--input`; return it, its project, and the names of tensors left out of it.

    `tensors` is what `read_input` returned. Raises `UserError` naming the first parameter that does not exist in
    vqgen's architecture.
    """
    path = config.input
    assert path is not None
    if tensors is not None:
        return _load_file(path, config, tensors)
    if (path / DESCRIPTION).exists():
        expect(config, "vqgen")
        if config.size:
            raise UsageError(f"--size: {path} contains its own; leave the option out")
        return Tokenizer.load(path), "vqgen", []
    if not (path / VQMODEL_CONFIG).exists():
        raise UserError(f"--input: {path} contains neither {DESCRIPTION} (vqgen) nor {VQMODEL_CONFIG} (diffusers)")
    expect(config, "diffusers")
    keys = read_json(path / VQMODEL_CONFIG)
    tokenizer = _vqmodel(path, keys).tokenizer(_size(config, keys.get("sample_size")))
    _check_vqmodel(path / VQMODEL_CONFIG, keys, tokenizer.config)
    return tokenizer, "diffusers", []


def _load_file(path: Path, config: ConvertConfig, tensors: Mapping[str, Tensor]) -> tuple[Tokenizer, str, list[str]]:
    """Load the tensors of a file of taming-transformers or LlamaGen; see `load`."""
    starts = {"encoder.down.": TAMING, "encoder.conv_blocks.": LLAMAGEN}
    names = next((names for start, names in starts.items() for name in tensors if name.startswith(start)), None)
    if "layers.0.attention.wqkv.weight" in tensors:
        text = "LlamaGen's GPT: its rotary positions have two dimensions, those of a Llama of transformers have one"
        raise UserError(f"--input: {path} is {text}, so it cannot be converted; its tokenizer (vq_ds16_c2i.pt) can")
    if names is None:
        first = next(iter(tensors), "no tensor")
        raise UserError(f"--input: {path} is not of taming-transformers or LlamaGen; its first tensor is {first}")
    expect(config, names.project)
    if names is TAMING:
        params = None if config.taming_config is None else taming_params(config.taming_config)
        return load_taming(config, str(path), tensors, params)
    foreign = Foreign(str(path), names, tensors, unit=_unit(config, tensors))
    return foreign.tokenizer(_size(config, None)), names.project, foreign.left_out()


def load_taming(
    config: ConvertConfig, where: str, tensors: Mapping[str, Tensor], params: Mapping[str, Any] | None
) -> tuple[Tokenizer, str, list[str]]:
    """Load a VQModel or GumbelVQ of taming-transformers with these parameters in `--taming-config`; see `load`.

    `where` names the tensors in errors.
    """
    keys = {} if params is None else _taming_keys(config.taming_config or Path(), params)
    gumbel = "quantize.proj.weight" in tensors
    tensors = folded_gumbel(tensors, where) if gumbel else tensors
    foreign = Foreign(where, TAMING, tensors, dropout=keys.get("dropout", 0.0), gumbel=gumbel)
    tokenizer = foreign.tokenizer(_size(config, keys.get("resolution")))
    if config.taming_config is not None:
        _check_taming(config.taming_config, keys, tokenizer.config)
    return tokenizer, "taming", foreign.left_out()


def expect(config: ConvertConfig, kind: str) -> None:
    """Raise `UsageError` where the options do not apply to an --input of this kind."""
    if config.from_ not in ("auto", kind):
        raise UsageError(f"--from: found {config.from_}, but {config.input} is of {kind}")
    if config.to == kind:
        raise UsageError(f"--to: {config.input} is of {kind} already")
    if config.taming_config is not None and kind != "taming":
        raise UsageError(f"--taming-config: {config.input} is of {kind}; leave the option out")
    if config.codebook_l2_norm is not None and kind != "llamagen":
        raise UsageError(f"--codebook-l2-norm: {config.input} is of {kind}; leave the option out")


def _unit(config: ConvertConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model of LlamaGen compares latents and codes on the unit sphere. Raises `UsageError` where that is not
    said: the options in its checkpoints are not those of the model."""
    if config.codebook_l2_norm is not None:
        return config.codebook_l2_norm
    codes = tensors.get("quantize.embedding.weight")  # where it is missing, that is said later
    if codes is None or ((codes.float().norm(dim=-1) - 1).abs() < 1e-5).all():  # the same codes and images either way
        return True
    text = "does not say whether it was trained with codebook_l2_norm; give true (LlamaGen's default) or false"
    raise UsageError(f"--codebook-l2-norm: {config.input} {text}")


def _size(config: ConvertConfig, said: Any) -> list[int]:
    """Return height and width of the images: --size, or else what the files say."""
    size = config.size or ([said, said] if isinstance(said, int) else said)
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return size
    raise UsageError(f"--size: {config.input} does not say the size of its images; give --size HEIGHT WIDTH")
