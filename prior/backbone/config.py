"""The transformers configuration of a backbone. transformers is imported where there is no way around it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqgen.errors import UserError
from vqgen.files import read_json
from vqgen.prior.conditioning import Conditioning
from vqgen.prior.options import PriorConfig

if TYPE_CHECKING:  # takes seconds
    from transformers import PreTrainedConfig

_DEFAULTS = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "use_cache": True,
}
"""Defaults of transformers that a `config.json` of Llama and Qwen3 states."""


def settings_of(config: PriorConfig, conditioning: Conditioning) -> dict[str, Any]:
    """What the transformers configuration of a prior of this size has that is not transformers' default."""
    heads, hidden, dropout = config.heads, config.hidden, config.dropout
    if config.model_type == "gpt2":
        own = {"n_inner": hidden, "embd_pdrop": dropout, "resid_pdrop": dropout, "attn_pdrop": 0.0}
        own["activation_function"] = "gelu" if config.backbone == "mingpt" else "gelu_new"
    else:
        own = {"intermediate_size": hidden, "num_key_value_heads": heads, "head_dim": config.dim // heads}
    return {
        "model_type": config.model_type,
        "vocab_size": conditioning.size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "max_position_embeddings": conditioning.length + conditioning.vocabulary.length,
        "bos_token_id": conditioning.null,
        "eos_token_id": None,  # every sequence has the same length
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **own,
    }


def backbone_config(config: PriorConfig, conditioning: Conditioning) -> "PreTrainedConfig":
    """The transformers configuration of a prior of this size."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**settings_of(config, conditioning))


def plain_config(config: PriorConfig, conditioning: Conditioning) -> dict[str, Any] | None:
    """What `config.json` of a Llama or Qwen3 holds, without what describes its writer; None for others."""
    own = {
        "llama": {"mlp_bias": False, "pretraining_tp": 1},
        "qwen3": {
            "layer_types": ["full_attention"] * config.layers,
            "max_window_layers": 28,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    }
    if config.model_type not in own:
        return None
    return {**_DEFAULTS, **own[config.model_type], **settings_of(config, conditioning)}


WRITER = {"architectures", "dtype", "transformers_version"}
"""Keys of `config.json` that describe its writer, not the network."""


def compare(path: Path, config: PriorConfig, conditioning: Conditioning) -> None:
    """Raise `UserError` where `config.json` describes another network than `vqgen.json`, which has the others."""
    written, known = read_json(path), plain_config(config, conditioning)
    if known is not None and {**written, **dict.fromkeys(WRITER)} == {**known, **dict.fromkeys(WRITER)}:
        return  # as `Prior.save` writes it; this needs no import of transformers
    from transformers import AutoConfig

    own = backbone_config(config, conditioning)
    expected = own.to_dict()
    # First what is written: transformers makes lists as long as numbers in it say.
    for key in expected.keys() & written.keys() - WRITER:
        _refuse_unequal(path, key, written[key], expected[key])
    try:
        stated = AutoConfig.for_model(**written).to_dict()
    except Exception as error:  # transformers raises errors of several types
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no transformers configuration ({reason}); restore the file") from error
    for key in expected.keys() - WRITER:
        _refuse_unequal(path, key, stated.get(key), expected[key])


def _refuse_unequal(path: Path, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise UserError(f"{path} has {key} {found!r}, vqgen.json needs {wanted!r}; restore the file")
