"""The weights of a backbone without its network."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


class StoredBackbone(nn.Module):
    """The parameters of a Llama or Qwen3 under their names, without the network.

    This is what decoding with a cache needs. The networks of transformers take longer to import than 64 images to draw.
    `config` is of `plain_config`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        for name, shape in _shapes(self.config).items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape)))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("lm_head")


def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a Llama or Qwen3 without biases and grouped heads."""
    dim, hidden, inner = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    block: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (inner, dim) for name in "qkv"}
    block |= {"self_attn.o_proj": (dim, inner), "mlp.down_proj": (dim, hidden)}
    block |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (hidden, dim))
    block |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (dim,))
    if config.model_type == "qwen3":
        block |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (config.head_dim,))
    found = {
        f"model.layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in block.items()
    }
    found |= dict.fromkeys(("model.embed_tokens", "lm_head"), (config.vocab_size, dim))
    return {f"{name}.weight": shape for name, shape in (found | {"model.norm": (dim,)}).items()}
