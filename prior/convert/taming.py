"""Priors of taming-transformers: the minGPT of a Net2NetTransformer as a GPT-2, with the tokenizer of its checkpoint.

The checkpoint has the tensors of both models, but neither heads nor condition: these are in the YAML file of its run
(`configs/*-project.yaml`). A class or start token is an id of minGPT's one vocabulary, whose first ids are the codes
(`taming/models/cond_transformer.py`); here these rows of the embedding become the ids after the codes.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vqgen.artifact import fingerprint
from vqgen.errors import UsageError, UserError
from vqgen.files import as_record, atomic_path
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.model import Prior
from vqgen.prior.options import PriorConfig
from vqgen.prior.parts.part import Classes
from vqgen.prior.vocabulary import Vocabulary
from vqgen.tokenizer.convert.options import ConvertConfig
from vqgen.tokenizer.convert.read import expect, load_taming, taming_params
from vqgen.tokenizer.model import Tokenizer

GPT, FIRST_STAGE = "transformer.", "first_stage_model."
_QKV = ("attn.query", "attn.key", "attn.value")
_LINEAR = {"attn.c_attn": _QKV, "attn.c_proj": ("attn.proj",), "mlp.c_fc": ("mlp.0",), "mlp.c_proj": ("mlp.2",)}
_NORMS = {"ln_1": ("ln1",), "ln_2": ("ln2",)}

_Count = Annotated[int, Interval(ge=1, le=2**24)]


@dataclass(frozen=True)
class _Transformer:
    """`transformer_config.params`, with taming's defaults."""

    vocab_size: _Count
    block_size: _Count
    n_layer: Annotated[int, Interval(ge=1, le=1024)] = 12
    n_head: Annotated[int, Interval(ge=1, le=1024)] = 8
    n_embd: Annotated[int, Interval(ge=1, le=2**16)] = 256
    resid_pdrop: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    n_unmasked: Annotated[int, Ge(0)] = 0


@dataclass(frozen=True)
class _TransformerConfig:
    params: _Transformer
    target: str = "taming.modules.transformer.mingpt.GPT"


@dataclass(frozen=True)
class _Stage:
    target: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Net2Net:
    """`model.params` of a Net2NetTransformer, as far as it decides what is computed."""

    transformer_config: _TransformerConfig
    first_stage_config: _Stage
    cond_stage_config: _Stage | str
    permuter_config: _Stage | None = None
    cond_stage_key: str = "depth"
    pkeep: float = 1.0
    sos_token: Annotated[int, Ge(0)] = 0
    unconditional: bool = False


def holds_prior(tensors: Mapping[str, Tensor]) -> bool:
    """Whether tensors are those of a Net2NetTransformer."""
    return any(name.startswith(GPT) for name in tensors)


@dataclass(frozen=True)
class _Condition:
    """The token in front of the codes."""

    classes: int
    """Number of classes, 0 for an unconditional model."""
    start: int | None
    """Id of the start token of an unconditional model."""


def _condition(path: Path, about: _Net2Net) -> _Condition:
    """Read the condition of a model. Raises `UserError` for any but a class or none."""
    stage = about.cond_stage_config
    target, params = (stage, {}) if isinstance(stage, str) else (stage.target, stage.params)
    kind = target.rpartition(".")[2]
    if about.unconditional or target == "__is_unconditional__" or kind == "SOSProvider":
        start = params.get("sos_token", about.sos_token)
        if type(start) is not int or start < 0:
            raise UserError(f"--taming-config: {path}: sos_token is {start}, expected the id of the start token")
        return _Condition(0, start)
    if kind == "Labelator":
        count = params.get("n_classes")
        if type(count) is not int or not 1 <= count <= 2**24:
            raise UserError(f"--taming-config: {path}: n_classes is {count}, expected the number of classes")
        return _Condition(count, None)
    found = f"is conditioned on {about.cond_stage_key} by {target}"
    raise UserError(f"--taming-config: {path} {found}; only class-conditional and unconditional priors are converted")


def _check(path: Path, about: _Net2Net) -> None:
    """Raise `UserError` for a model that is no causal GPT over codes in raster order."""
    gpt, permuter = about.transformer_config, about.permuter_config
    found = {
        "transformer_config": "" if gpt.target.endswith(".mingpt.GPT") else gpt.target,
        "n_unmasked": gpt.params.n_unmasked if gpt.params.n_unmasked > 1 else "",
        "permuter_config": "" if permuter is None or permuter.target.endswith(".Identity") else permuter.target,
        "pkeep": "" if about.pkeep > 0 else about.pkeep,
    }
    for key, value in found.items():
        if value != "":
            wanted = "only causal minGPTs that draw codes one after another in raster order are converted"
            raise UserError(f"--taming-config: {path}: {key} is {value}; {wanted}")


def _layers(count: int) -> Iterator[tuple[str, list[str], bool]]:
    """Each layer of GPT-2 but the embeddings and the head, those of minGPT that it contains, and whether they are
    linear: weights of GPT-2 are (in, out), those of minGPT (out, in)."""
    for layer in range(count):
        for ours, theirs in {**_NORMS, **_LINEAR}.items():
            names = [f"{GPT}blocks.{layer}.{name}" for name in theirs]
            yield f"transformer.h.{layer}.{ours}", names, ours in _LINEAR
    yield "transformer.ln_f", [f"{GPT}ln_f"], False


class _Tensors:
    """The tensors of a checkpoint, each of which has to be taken or is an error."""

    def __init__(self, where: Path, tensors: Mapping[str, Tensor]) -> None:
        self.where, self.tensors, self.taken = where, tensors, set[str]()

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of a name in float32. Raises `UserError` where it is missing or of another shape or type."""
        if name not in self.tensors:
            raise UserError(f"{self.where}: {name} is missing")
        self.taken.add(name)
        value = self.tensors[name]
        if value.shape != shape or not value.is_floating_point():
            found, wanted = ("x".join(map(str, sizes)) or "a single number" for sizes in (value.shape, shape))
            raise UserError(f"{self.where}: {name} is {found} ({value.dtype}), the configuration says {wanted} (float)")
        return value.float()

    def refuse_others(self) -> None:
        """Raise `UserError` for a tensor that was not taken: it would change what the model computes."""
        for name in self.tensors:
            if name not in self.taken and not name.startswith(FIRST_STAGE):
                hint = (
                    "; priors conditioned on images are not converted" if name.startswith("cond_stage_model.") else ""
                )
                raise UserError(f"{self.where}: {name} does not exist in a prior of vqgen{hint}")


def _weights(tensors: _Tensors, gpt: _Transformer, prior: Prior, start: int | None) -> dict[str, Tensor]:
    """The weights of a GPT-2, see `load_prior`; `start` is the id of the start token, None for classes."""
    dim, codes, positions = gpt.n_embd, prior.vocabulary.size, prior.backbone.config.max_position_embeddings
    # Taken first: its shape confirms the block size, of which masks below have the square.
    table = tensors.take(f"{GPT}pos_emb", 1, gpt.block_size, dim)[0, :positions]
    state: dict[str, Tensor] = {}
    for ours, theirs, linear in _layers(gpt.n_layer):
        hidden = {"mlp.c_fc": (4 * dim, dim), "mlp.c_proj": (dim, 4 * dim)}
        shape = next((size for name, size in hidden.items() if ours.endswith(name)), (dim, dim) if linear else (dim,))
        weight = torch.cat([tensors.take(f"{name}.weight", *shape) for name in theirs])
        state[f"{ours}.weight"] = weight.t().contiguous() if linear else weight
        state[f"{ours}.bias"] = torch.cat([tensors.take(f"{name}.bias", shape[0]) for name in theirs])
    for layer in range(gpt.n_layer):
        name, shape = f"{GPT}blocks.{layer}.attn.mask", (1, 1, gpt.block_size, gpt.block_size)
        if name in tensors.tensors and not (mask := tensors.take(name, *shape)).equal(torch.ones_like(mask).tril()):
            raise UserError(f"{tensors.where}: {name} is not causal; only causal priors are converted")
    # The last code of an image is no input, so a block of one position less than prefix and codes has all that is read.
    state["transformer.wpe.weight"] = torch.cat([table, table.new_zeros(positions - len(table), dim)])
    rows, head = (tensors.take(f"{GPT}{name}.weight", gpt.vocab_size, dim) for name in ("tok_emb", "head"))
    null = rows.new_zeros(1, dim) if start is None else rows[start][None]
    state["transformer.wte.weight"] = torch.cat([rows[:codes], rows[: prior.conditioning.classes.count], null])
    state["lm_head.weight"] = torch.cat([head[:codes], head.new_zeros(prior.conditioning.size - codes, dim)])
    return state


def load_prior(config: ConvertConfig, tensors: Mapping[str, Tensor]) -> tuple[Prior, Tokenizer, list[str]]:
    """Load a Net2NetTransformer; return its prior, its tokenizer, and the names of tensors left out of that.

    The embedding of a class is the row of its id, that of null the row of the start token; a class-conditional model
    never learned a null, whose row is zero. Output rows of ids after the codes are zero: a backbone "mingpt" predicts
    codes alone, as here every target is a code. Raises `UserError` naming the tensor, or the key of the YAML file,
    that does not fit.
    """
    path = config.input or Path()
    expect(config, "taming")
    if config.to != "vqgen":
        raise UsageError(f"--to: {path} has a prior; a VQModel of {config.to} is a tokenizer alone")
    if config.taming_config is None:
        text = f"{path} has a prior, and does not say its heads and classes; give the -project.yaml of its run"
        raise UsageError(f"--taming-config: {text}")
    params = taming_params(config.taming_config)
    try:
        about = as_record(config.taming_config, dict(params), _Net2Net)
    except UserError as error:
        raise UserError(f"--taming-config: {error}") from error
    _check(config.taming_config, about)
    condition, gpt = _condition(config.taming_config, about), about.transformer_config.params
    own = {name.removeprefix(FIRST_STAGE): value for name, value in tensors.items() if name.startswith(FIRST_STAGE)}
    tokenizer, _, left_out = load_taming(config, f"{path} ({FIRST_STAGE}*)", own, about.first_stage_config.params)
    mark = fingerprint(tokenizer.inference_state())
    vocabulary = Vocabulary(tokenizer.codebook_size, 1, tokenizer.grid)
    least = {
        "vocab_size": max(vocabulary.size, condition.classes, (condition.start or 0) + 1),
        "block_size": vocabulary.length,
    }
    for key, count in least.items():
        if getattr(gpt, key) < count:
            text = f"{key} is {getattr(gpt, key)}, its classes and {tokenizer.grid[0]}x{tokenizer.grid[1]} codes"
            raise UserError(f"--taming-config: {config.taming_config}: {text} of {vocabulary.size} need {count}")
    if gpt.n_embd % gpt.n_head:
        text = f"n_head is {gpt.n_head}, which does not divide n_embd {gpt.n_embd}"
        raise UserError(f"--taming-config: {config.taming_config}: {text}")
    shape = PriorConfig("mingpt", gpt.n_embd, gpt.n_layer, gpt.n_head, 4 * gpt.n_embd, gpt.resid_pdrop)
    conditioning = Conditioning(vocabulary, [Classes(condition.classes, dropout=0.0)])
    image_shape = (tokenizer.config.channels, *tokenizer.config.image_size)
    with torch.device("meta"):  # wrong sizes could allocate any amount of memory, and no weight stays as it is made
        prior = Prior(shape, conditioning, image_shape, mark)
    found = _Tensors(path, tensors)
    state = _weights(found, gpt, prior, condition.start)
    found.refuse_others()
    prior.backbone.load_state_dict(state, assign=True)
    return prior.eval(), tokenizer, left_out


def save_prior(prior: Prior, tokenizer: Tokenizer, output: Path) -> None:
    """Write a prior with its tokenizer as the model folder `output`, atomically."""
    with tempfile.TemporaryDirectory() as scratch, atomic_path(output) as folder:
        tokenizer.save(Path(scratch))
        prior.save(folder, Path(scratch))
