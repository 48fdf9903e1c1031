"""The backbone as a network of transformers."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from vqgen.prior.conditioning import Conditioning
from vqgen.prior.options import PriorConfig

from .config import backbone_config

if TYPE_CHECKING:  # takes seconds
    from transformers import PreTrainedModel


def _add_dropout(backbone: "PreTrainedModel", dropout: float) -> None:
    """Add dropout where GPT-2 has it, by forward hooks, which change no parameter names; GPT-2 is left as it is."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (F.dropout(output[0], dropout, module.training), *output[1:])
        return F.dropout(output, dropout, module.training)

    if dropout and backbone.config.model_type != "gpt2":
        backbone.get_input_embeddings().register_forward_hook(hook)
        for layer in backbone.model.layers:
            layer.self_attn.register_forward_hook(hook)
            layer.mlp.register_forward_hook(hook)


def network_of(config: PriorConfig, conditioning: Conditioning) -> "PreTrainedModel":
    """A backbone with random weights."""
    from transformers import AutoModelForCausalLM  # takes seconds

    network = AutoModelForCausalLM.from_config(
        backbone_config(config, conditioning), attn_implementation="sdpa", dtype=torch.float32
    )
    _add_dropout(network, config.dropout)
    return network


def attend_unmasked(network: "PreTrainedModel") -> None:
    """Use the attention "sdpa" of transformers without its mask: whole sequences are causal, never padded or packed.

    To see that it needs no mask transformers reads positions from the device in each pass. Compiled it cannot read them
    and always makes a mask, which keeps flash attention from being used.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("vqgen_causal", sdpa_attention_forward)
    network.set_attn_implementation("vqgen_causal")
