"""A causal LM for fast decoding: joined projections and a static key-value cache.

It computes what the given transformers model does (Llama, Qwen3 or GPT-2) at a lower cost per token: masks, positions
and cache objects are not built for every token and layer, and one projection replaces three.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import local
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqgen.devices import growing_attention

from .attention import Fused, Products, attention_of
from .graphs import StaticSteps
from .linear import ROWS, Linear

if TYPE_CHECKING:  # takes seconds
    from transformers import PreTrainedModel

Norm = Callable[[Tensor], Tensor]


@dataclass
class Block:
    """One transformer block."""

    before_attention: Norm
    qkv: Linear
    norms: tuple[Norm, Norm] | None
    """Norms of the queries and keys of each head (Qwen3)."""
    out: Linear
    before_mlp: Norm
    up: Linear
    """Where `gated`, the rows of the gate, then those of the values."""
    down: Linear


def _norm(module: nn.Module, epsilon: float = 0) -> Norm:
    """Return layer norm (GPT-2) or RMS norm (others), which has this epsilon, as a function."""
    if isinstance(module, nn.LayerNorm):
        return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)
    weight = weight.detach().float()
    added = torch.full((), epsilon, device=weight.device)

    def rms_norm(x: Tensor) -> Tensor:  # F.rms_norm takes a third longer on CPUs
        full = x.float()
        size = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        scale = torch.addcmul(added, size, size, value=1 / x.shape[-1]).rsqrt_()
        return (full * scale).mul_(weight).to(x.dtype)

    return rms_norm


def _joined(*modules: nn.Module) -> Linear:
    """Join linear layers of the same input; their own weights become views of the result, so that memory is shared."""
    weight = torch.cat([module.weight.data for module in modules])  # type: ignore[misc]
    for module, part in zip(modules, weight.split([len(m.weight) for m in modules]), strict=True):  # type: ignore[arg-type]
        module.weight.data = part  # type: ignore[union-attr]
    return Linear(weight)


def _gpt2_block(layer: Any) -> Block:
    """A block from one of GPT-2, whose weights are (in, out)."""
    modules = layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj
    qkv, out, up, down = (Linear(module.weight.data.t(), module.bias.data) for module in modules)
    return Block(_norm(layer.ln_1), qkv, None, out, _norm(layer.ln_2), up, down)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name == "silu":
        return F.silu
    from transformers.activations import ACT2FN  # takes seconds

    return ACT2FN[name]


def _rotations(config: Any, positions: int, like: Tensor) -> list[Tensor]:
    """Cosine and signed sine (positions, 3 * heads, d) of rotary positions, as transformers has them.

    With swapped halves times the sine this is its rotate_half(x) * sin. Values are not turned.
    """
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise ValueError(f"no decoder for rotary positions of type {kind}")
    heads, width = config.num_attention_heads, config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(positions, dtype=torch.float32)[:, None, None] * (1 / frequencies)
    turned = torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)
    parts = (part.expand(-1, 2 * heads, -1) for part in turned)
    one, zero = (torch.full((positions, heads, width), of) for of in (1.0, 0.0))
    return [torch.cat(pair, 1).to(like) for pair in zip(parts, (one, zero), strict=True)]


def _llama_block(layer: Any, epsilon: float) -> Block:
    """A block from one of Llama or Qwen3."""
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        _norm(layer.input_layernorm, epsilon),
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        (_norm(attention.q_norm, epsilon), _norm(attention.k_norm, epsilon)) if hasattr(attention, "q_norm") else None,
        Linear(attention.o_proj.weight.data),
        _norm(layer.post_attention_layernorm, epsilon),
        _joined(mlp.gate_proj, mlp.up_proj),
        Linear(mlp.down_proj.weight.data),
    )


class _Batch(local):
    """The sequences that a thread feeds: each thread has its own."""

    def __init__(self) -> None:
        self.attentions: Sequence[Fused | Products] = []
        """Of each block, with its keys and values."""
        self.rows, self.fed = 0, 0
        self.steps: StaticSteps | None = None
        """Steps of single tokens on CUDA."""


class CachedTransformer:
    """Feeds tokens to a causal LM and keeps keys and values in a cache that every batch of a thread reuses.

    Args:
        model: a Llama, Qwen3 or GPT-2 of transformers, in evaluation mode. Its projections become views of joined ones.
        positions: size of the cache, the most tokens that are fed in one sequence.
        graphs: on CUDA, feed single tokens by CUDA graphs where they can be captured.
    """

    def __init__(self, model: "PreTrainedModel", positions: int, graphs: bool = True) -> None:
        config = model.config
        if config.model_type not in ("llama", "qwen3", "gpt2"):
            raise ValueError(f"no decoder for a {config.model_type}; expected llama, qwen3 or gpt2")
        self.model, self.positions = model, positions
        self.heads = config.num_attention_heads
        if getattr(config, "num_key_value_heads", self.heads) != self.heads:
            raise ValueError("no decoder for grouped heads; num_key_value_heads must equal num_attention_heads")
        inner: Any = model  # its submodules have no declared types
        self._head: Tensor = inner.get_output_embeddings().weight.data
        self.graphs = graphs and self._head.device.type == "cuda"
        self._heads_of: dict[tuple[int, int], Linear] = {}
        if config.model_type == "gpt2":
            self.gated, self._activation = False, _activation(config.activation_function)
            self._blocks = [_gpt2_block(layer) for layer in inner.transformer.h]
            self._tokens: Tensor = inner.transformer.wte.weight.data
            self._positions: Tensor | None = inner.transformer.wpe.weight.data[:positions]
            self._last_norm, self._rotations = _norm(inner.transformer.ln_f), None
        else:
            self.gated, self._activation = True, _activation(config.hidden_act)
            epsilon = config.rms_norm_eps
            self._blocks = [_llama_block(layer, epsilon) for layer in inner.model.layers.children()]
            self._tokens, self._positions = inner.model.embed_tokens.weight.data, None
            self._last_norm = _norm(inner.model.norm, epsilon)
            self._rotations = _rotations(config, positions, self._head)
        self._batch = _Batch()

    def step(self, allowed: Iterable[tuple[int, int]]) -> int:
        """On one thread of a CPU the logits of a row do not depend on the others where `start` gets a multiple of
        this; `allowed` are the ranges of ids that `feed` gets.

        The ends of arrays, which are no full vector, are computed in another way.
        """
        blocks = [linear for block in self._blocks for linear in (block.qkv, block.out, block.up, block.down)]
        sizes = {size for linear in [*blocks, *map(self._head_of, allowed)] for size in linear.weight.shape}
        # Elements of two vectors of bfloat16.
        return next(n for n in (1, 16, ROWS) if n == ROWS or all(n * size % 64 == 0 for size in sizes))

    def _head_of(self, ids: tuple[int, int]) -> Linear:
        """The rows of the output layer for a range of ids; there is one range for each depth of codes."""
        if ids not in self._heads_of:
            self._heads_of[ids] = Linear(self._head[slice(*ids)])
        return self._heads_of[ids]

    def start(self, rows: int) -> None:
        """Begin a batch of `rows` sequences."""
        batch = self._batch
        if rows != batch.rows:
            batch.attentions, batch.steps = [], None  # free the former cache first
            width = self._blocks[0].out.weight.shape[1] // self.heads
            kind = attention_of(self.heads, width, self._head.dtype, self._head.device)
            made = (kind(rows, self.positions, self.heads, width, self._head) for _ in self._blocks)
            batch.attentions = list(made)
            if self.graphs:
                batch.steps = StaticSteps(self, [attention.kept for attention in batch.attentions])
        elif batch.steps:
            for attention in batch.attentions:  # masked positions count as 0 times what is there: it must be finite
                attention.kept.zero_()
        batch.rows, batch.fed = rows, 0

    def feed(self, tokens: Tensor, allowed: tuple[int, int] | None = None) -> Tensor:
        """Feed the next tokens (rows, T); return the logits after the last one, float32 (rows, V).

        With `allowed` only those of the ids from its first to before its second. On CUDA the next call may overwrite
        the logits of a single token.
        """
        (rows, count), batch = tokens.shape, self._batch
        first, last = batch.fed, batch.fed + count
        if last > self.positions:
            raise ValueError(f"{last} tokens fed to a cache of {self.positions}")
        batch.fed = last
        ids = allowed or (0, len(self._head))
        if count == 1 and batch.steps and (logits := batch.steps.feed(tokens, first, ids)) is not None:
            return logits
        x = F.embedding(tokens, self._tokens)
        if self._positions is not None:
            x = x + self._positions[first:last]
        x = x.view(rows * count, -1)
        rotation = None if self._rotations is None else [part[first:last] for part in self._rotations]
        with growing_attention(x.device):
            for block, attention in zip(self._blocks, batch.attentions, strict=True):
                qkv = block.qkv(block.before_attention(x)).view(rows, count, 3 * self.heads, -1)
                x = self._rest(block, x, attention(self._heads(block, qkv, rotation), first))
        return self._head_of(ids)(self._last_norm(x.view(rows, count, -1)[:, -1])).float()

    def _heads(self, block: Block, qkv: Tensor, rotation: Sequence[Tensor] | None) -> Tensor:
        """Queries, keys and values (rows, T, 3 * heads, d), normed where the model does so, with rotary positions.

        `rotation` are the rows of `_rotations` at the T positions, where the model has them.
        """
        if block.norms is not None:
            q, k, v = qkv.chunk(3, 2)
            qkv = torch.cat([block.norms[0](q), block.norms[1](k), v], 2)
        if rotation is not None:
            cos, sin = rotation
            qkv = torch.addcmul(qkv * cos, qkv.roll(qkv.shape[-1] // 2, -1), sin)
        return qkv

    def _rest(self, block: Block, x: Tensor, seen: Tensor) -> Tensor:
        """Finish a block: x (rows * T, dim) and what attention has seen (rows, T, heads, d) -> (rows * T, dim)."""
        x = block.out.added(x, seen.reshape(x.shape))
        inner = block.up(block.before_mlp(x))
        if self.gated:
            gate, inner = inner.chunk(2, -1)
            inner = self._activation(gate).mul_(inner)
        else:
            inner = self._activation(inner)
        return block.down.added(x, inner)
