"""A causal LM for fast decoding: joined projections, a static key-value cache, attention for one query.

It computes what the given transformers model does (Llama, Qwen3 or GPT-2) at a lower cost per token: masks, positions
and cache objects are not built for every token and layer, and one projection replaces three.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from threading import local
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .graphs import StaticSteps

Norm = Callable[[Tensor], Tensor]
ROWS = 64
"""Most rows of one product on a CPU."""


class _Product:
    """Products with one weight, which is packed for oneDNN where that is faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.packed: Tensor | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
            with suppress(AttributeError, RuntimeError):  # another torch, a processor without such products
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def product(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def sum(self, x: Tensor, y: Tensor) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(y, x, self.packed, self.bias, "add")
        return torch.addmm(x, y, self.weight.t()) if self.bias is None else x + self.product(y)


@cache
def _step(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> int:
    """Find n such that on one thread of a CPU a row has the same bits at every multiple of n rows up to `ROWS`, in
    products with a weight of `shape` and in what is computed of each number in them.

    Kernels differ in the order of their sums and at the ends of arrays, which are no full vector.
    """
    random = torch.Generator().manual_seed(0)
    outer, inner = shape
    # Each sum is 0 but for its rounding: in others the order shows in one of 10,000 numbers rounded to bfloat16.
    half = torch.randn(outer + ROWS, inner // 2, generator=random).to(dtype)
    order = torch.randperm(inner, generator=random)
    both = torch.cat([half, half, half.new_zeros(len(half), inner % 2)], 1)
    both[:outer, : inner // 2] *= -1
    weight, y = both[:, order].split([outer, ROWS])
    made = _Product(weight.contiguous(), half.new_zeros(outer) if biased else None)
    x = half.new_zeros(ROWS, outer)

    def same(n: int) -> bool:
        parts = slice(n), slice(ROWS - n, ROWS)
        products = all(torch.equal(made.product(y[part]), product[part]) for part in parts)
        return products and all(torch.equal(made.sum(x[part], y[part]), total[part]) for part in parts)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product, total = made.product(y), made.sum(x, y)
        fits = [n for n in (1, 16) if n * outer % 64 == n * inner % 64 == 0]  # elements of two vectors of bfloat16
        return next((n for n in fits if all(same(rows) for rows in range(n, ROWS, n))), ROWS)
    finally:
        torch.set_num_threads(threads)


class Linear(_Product):
    """y = x W^T + b on (N, in), for a weight (out, in).

    In bfloat16 on a CPU oneDNN packs the weight into blocks for every product, which at few rows costs as much as the
    product. Here it is packed once, by the operators of frozen compiled graphs where torch has them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight, bias)
        outer, inner = weight.shape
        self.step = _step((outer, inner), bias is not None, weight.dtype) if weight.device.type == "cpu" else 1
        """On one thread of a CPU the bits of a row do not depend on the others where N is a multiple of this."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._by_rows(self.product, x)

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x + linear(y) in one pass."""
        return self._by_rows(self.sum, x, y)

    def _by_rows(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Apply `function` to at most `ROWS` rows at a time on a CPU."""
        if len(inputs[0]) <= ROWS or self.weight.device.type != "cpu":
            return function(*inputs)
        return torch.cat([function(*part) for part in zip(*(x.split(ROWS) for x in inputs), strict=True)])


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


def _norm(module: nn.Module) -> Norm:
    """Return layer norm (GPT-2) or RMS norm (others) as a function."""
    if isinstance(module, nn.LayerNorm):
        return lambda x: F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.device.type != "cpu":
        return lambda x: F.rms_norm(x, weight.shape, weight, module.variance_epsilon)  # type: ignore[arg-type]
    epsilon = torch.full((), module.variance_epsilon, device=weight.device)  # type: ignore[arg-type]

    def rms_norm(x: Tensor) -> Tensor:  # F.rms_norm is 25 % slower on CPUs
        full = x.float()
        size = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        scale = torch.addcmul(epsilon, size, size, value=1 / x.shape[-1]).rsqrt_()
        return (full * scale * weight).to(x.dtype)

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


def _llama_block(layer: Any) -> Block:
    """A block from one of Llama or Qwen3."""
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        _norm(layer.input_layernorm),
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        Linear(attention.o_proj.weight.data),
        _norm(layer.post_attention_layernorm),
        _joined(mlp.gate_proj, mlp.up_proj),
        Linear(mlp.down_proj.weight.data),
    )


class _Batch(local):
    """The sequences that a thread feeds: each thread has its own."""

    def __init__(self) -> None:
        self.cache: list[Tensor] = []
        """Keys and values of each block (2, rows, positions, heads, d)."""
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

    def __init__(self, model: PreTrainedModel, positions: int, graphs: bool = True) -> None:
        config = model.config
        if config.model_type not in ("llama", "qwen3", "gpt2"):
            raise ValueError(f"no decoder for a {config.model_type}; expected llama, qwen3 or gpt2")
        self.model, self.positions = model, positions
        self.graphs = graphs and model.device.type == "cuda"
        self.heads = config.num_attention_heads
        if getattr(config, "num_key_value_heads", self.heads) != self.heads:
            raise ValueError("no decoder for grouped heads; num_key_value_heads must equal num_attention_heads")
        inner: Any = model  # its submodules have no declared types
        self._head: Tensor = inner.get_output_embeddings().weight.data
        self._heads_of: dict[tuple[int, int], Linear] = {}
        ids = torch.arange(positions, device=model.device)[None]
        if config.model_type == "gpt2":
            self.gated, self._activation = False, ACT2FN[config.activation_function]
            self._blocks = [_gpt2_block(layer) for layer in inner.transformer.h]
            self._tokens: Tensor = inner.transformer.wte.weight.data
            self._positions: Tensor | None = inner.transformer.wpe(ids[0]).detach()
            self._last_norm, self._rotations = _norm(inner.transformer.ln_f), None
        else:
            self.gated, self._activation = True, ACT2FN[config.hidden_act]
            self._blocks = [_llama_block(layer) for layer in inner.model.layers]
            self._tokens, self._positions = inner.model.embed_tokens.weight.data, None
            self._last_norm = _norm(inner.model.norm)
            cos, sin = (part[0, :, None] for part in inner.model.rotary_emb(self._head, ids))
            half = sin.shape[-1] // 2
            # With swapped halves times this, transformers' rotate_half(x) * sin.
            self._rotations = cos, torch.cat([-sin[..., :half], sin[..., half:]], -1)
        self._batch = _Batch()

    def step(self, allowed: Iterable[tuple[int, int]]) -> int:
        """On one thread of a CPU the logits of a row do not depend on the others where `start` gets a multiple of
        this; `allowed` are the ranges of ids that `feed` gets."""
        blocks = [linear for block in self._blocks for linear in (block.qkv, block.out, block.up, block.down)]
        return max(linear.step for linear in [*blocks, *map(self._head_of, allowed)])

    def _head_of(self, ids: tuple[int, int]) -> Linear:
        """The rows of the output layer for a range of ids; there is one range for each depth of codes."""
        if ids not in self._heads_of:
            self._heads_of[ids] = Linear(self._head[slice(*ids)])
        return self._heads_of[ids]

    def start(self, rows: int) -> None:
        """Begin a batch of `rows` sequences."""
        batch = self._batch
        if rows != batch.rows:
            batch.cache, batch.steps = [], None  # free the former cache first
            width = self._blocks[0].out.weight.shape[1] // self.heads
            shape = (2, rows, self.positions, self.heads, width)
            batch.cache = [self._head.new_zeros(shape) for _ in self._blocks]
            batch.steps = StaticSteps(self, batch.cache) if self.graphs else None
        elif batch.steps:
            for both in batch.cache:  # masked positions count as 0 times what is there: it must be finite
                both.zero_()
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
        mask = None  # a single token sees all
        if count > 1:
            mask = torch.ones(count, last, dtype=torch.bool, device=x.device).tril(first)
        rotation = None if self._rotations is None else [table[first:last] for table in self._rotations]
        for block, (keys, values) in zip(self._blocks, batch.cache, strict=True):
            qkv = block.qkv(block.before_attention(x)).view(rows, count, 3 * self.heads, -1)
            q, k, v = self._heads(block, qkv, rotation)
            keys[:, first:last] = k
            values[:, first:last] = v
            seen = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys[:, :last].transpose(1, 2), values[:, :last].transpose(1, 2), mask
            )
            x = self._rest(block, x, seen)
        return self._head_of(ids)(self._last_norm(x.view(rows, count, -1)[:, -1])).float()

    def _rest(self, block: Block, x: Tensor, seen: Tensor) -> Tensor:
        """Finish a block: x (rows * T, dim) and what attention has seen (rows, heads, T, d) -> (rows * T, dim)."""
        x = block.out.added(x, seen.transpose(1, 2).reshape(x.shape))
        inner = block.up(block.before_mlp(x))
        if self.gated:
            gate, inner = inner.chunk(2, -1)
            inner = self._activation(gate).mul_(inner)
        else:
            inner = self._activation(inner)
        return block.down.added(x, inner)

    def _heads(self, block: Block, qkv: Tensor, rotation: Sequence[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, T, 3 * heads, d) -> queries, keys, values, each (rows, T, heads, d), with rotary positions.

        `rotation` are the rows of `_rotations` at the T positions, where the model has them.
        """
        qk, v = qkv[:, :, : 2 * self.heads], qkv[:, :, 2 * self.heads :]
        if block.norms is not None:
            qk = torch.cat([norm(part) for norm, part in zip(block.norms, qk.chunk(2, 2), strict=True)], 2)
        if rotation is not None:
            cos, sin = rotation
            qk = torch.addcmul(qk * cos, qk.roll(qk.shape[-1] // 2, -1), sin)
        q, k = qk.chunk(2, 2)
        return q, k, v
