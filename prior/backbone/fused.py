"""The training pass of a Llama on a CPU, in fewer passes over memory than the network of transformers.

Both compute the same but for rounding; `network.py` holds the plain version. Beside the matrix products a step consists
of small operations, each of which reads and writes whole activations. Here they are joined, forward and backward, and
computed in tiles that stay in a core's cache.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_TILE = 2**18
"""Elements of a tile."""
_CHANCES = 2**16
"""Dropout compares 16 random bits for each element."""


def fits(network: nn.Module) -> bool:
    """Whether `logits` computes what this network of transformers does: a Llama without grouped heads and biases."""
    config: Any = network.config
    return (
        config.model_type == "llama"
        and config.num_key_value_heads == config.num_attention_heads
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias or config.attention_dropout)
    )


def logits(network: Any, tokens: Tensor, dropout: float) -> Tensor:
    """Logits (B, T, V) of token ids (B, T), for training; matrix products in the number format of autocast.

    `dropout` is that of embeddings, attention output and feed-forward output; its share is rounded to 16 bits.
    """
    config, model, kind = network.config, network.model, tokens.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else network.dtype
    with torch.autocast(kind, enabled=False):
        embedded = F.embedding(tokens, model.embed_tokens.weight)  # not its hook, which is the plain dropout
        cos, sin = (t[0] for t in model.rotary_emb(embedded, torch.arange(tokens.shape[1])[None]))

        def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
            return F.linear(x, torch.cat([layer.weight.to(dtype) for layer in layers]))

        def add(stream: Tensor, branch: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
            kept, scale = _kept(branch, dropout)
            found = _AddNorm.apply(stream, branch, kept, scale, norm.weight, norm.variance_epsilon, dtype)
            return cast(tuple[Tensor, Tensor], found)

        norms = [layer.input_layernorm for layer in model.layers] + [model.norm]
        stream, normed = add(torch.zeros_like(embedded), embedded, norms[0])
        for layer, following in zip(model.layers, norms[1:], strict=True):
            own, mlp = layer.self_attn, layer.mlp
            qkv = linear(normed, own.q_proj, own.k_proj, own.v_proj)
            mixed = cast(Tensor, _Attention.apply(qkv, cos, sin, config.num_attention_heads))
            stream, normed = add(stream, linear(mixed, own.o_proj), layer.post_attention_layernorm)
            hidden = cast(Tensor, _Gated.apply(linear(normed, mlp.gate_proj), linear(normed, mlp.up_proj)))
            stream, normed = add(stream, linear(hidden, mlp.down_proj), following)
        return linear(normed, network.lm_head)


def _kept(like: Tensor, dropout: float) -> tuple[Tensor | None, float]:
    """What dropout keeps, 1 or 0 in int16 in the shape of `like`, and the factor on it; (None, 1) without dropout.

    Drawing four elements from 64 random bits takes a quarter of the time of `Tensor.bernoulli_`.
    """
    dropped = min(round(dropout * _CHANCES), _CHANCES - 1)
    if not dropped:
        return None, 1.0
    count = like.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(like.shape)
    return kept.ge_(dropped - _CHANCES // 2), _CHANCES / (_CHANCES - dropped)


def _tiles(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix that are a tile each."""
    step = _tile_rows(rows, columns)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _in_tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tiles of contiguous tensors of one shape."""
    return zip(*(tensor.view(-1).split(_TILE) for tensor in tensors), strict=True)


def _tile_rows(rows: int, columns: int) -> int:
    """Rows of the largest tile."""
    return min(rows, max(1, _TILE // columns))


class _AddNorm(torch.autograd.Function):
    """x + dropout(y), and its RMS norm (Zhang and Sennrich 2019) times the weight, in the number format `dtype`.

    x and y (..., D), `kept` 1 or 0 in the same shape or None, `scale` the factor on what is kept, weight (D,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        kept: Tensor | None,
        scale: float,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        size, count = x.shape[-1], x.numel() // x.shape[-1]
        total, normed = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
        rstd = x.new_empty(count, 1)
        inputs, branches, added, results = (t.view(count, size) for t in (x, y, total, normed))
        chosen = None if kept is None else kept.view(count, size)
        work = x.new_empty(2, _tile_rows(count, size), size)
        for rows in _tiles(count, size):
            stream, times = added[rows], rstd[rows]
            a, b = work[:, : len(stream)]
            if chosen is None:
                torch.add(inputs[rows], branches[rows], out=stream)
            else:
                torch.addcmul(inputs[rows], a.copy_(branches[rows]), b.copy_(chosen[rows]), value=scale, out=stream)
            torch.mean(torch.mul(stream, stream, out=a), -1, keepdim=True, out=times)
            torch.mul(stream, times.add_(eps).rsqrt_(), out=a)
            results[rows] = a.mul_(weight)
        ctx.save_for_backward(total, kept, weight, rstd)
        ctx.scale, ctx.branch = scale, y.dtype
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, kept, weight, rstd = ctx.saved_tensors
        size, count = total.shape[-1], len(rstd)
        to_x, to_y = torch.empty_like(total), torch.empty_like(total, dtype=ctx.branch)
        to_weight = torch.zeros_like(weight)
        added, results, branches = (t.view(count, size) for t in (total, to_x, to_y))
        outer, inner, chosen = (None if t is None else t.reshape(count, size) for t in (*grads, kept))
        work = total.new_empty(2, _tile_rows(count, size), size)
        for rows in _tiles(count, size):
            stream, times, result = added[rows], rstd[rows], results[rows]
            a, b = work[:, : len(stream)]
            if inner is None:
                result.zero_()
            else:
                # Of normed * weight, normed = stream * rstd: rstd * (g - normed * mean(g * normed)), g = grad * weight.
                torch.mul(stream, times, out=b).mul_(a.copy_(inner[rows]))
                to_weight += b.sum(0)
                dots = torch.mv(b, weight)[:, None].mul_(times).mul_(times)
                torch.mul(a.mul_(weight), times, out=result).addcmul_(stream, dots, value=-1 / size)
            if outer is not None:
                result.add_(outer[rows])
            if chosen is None:
                branches[rows] = result
            else:
                branches[rows] = torch.mul(result, b.copy_(chosen[rows]), out=b).mul_(ctx.scale)
        return to_x, to_y, None, None, to_weight, None, None


class _Gated(torch.autograd.Function):
    """SwiGLU (Shazeer 2020): gate and up (..., F) -> SiLU(gate) * up (..., F)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for g, u, result in _in_tiles(gate, up, out):
            torch.ops.aten.silu.out(g, out=result).mul_(u)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, given, of_gate, of_up in _in_tiles(gate, up, grads[0].contiguous(), to_gate, to_up):
            torch.ops.aten.silu.out(g, out=of_up).mul_(given)
            torch.ops.aten.silu_backward.grad_input(given * u, g, grad_input=of_gate)
        return to_gate, to_up


class _Attention(torch.autograd.Function):
    """Causal attention with rotary positions (Su et al. 2021): (B, T, 3 H d), cosines and sines (T, d) -> (B, T, H d).

    By batched products over a few sequences at a time.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        batch, length, width = len(qkv), qkv.shape[1], qkv.shape[2] // (3 * heads)
        size = heads * length * width
        # Rotated queries and keys, and values, in the order in which the products read them.
        packed = qkv.new_empty(3, batch, heads, length, width)
        weights = qkv.new_empty(batch, heads, length, length)
        out = qkv.new_empty(batch, length, heads, width)
        hidden = qkv.new_full((length, length), -torch.inf).triu_(1)
        rotate = _Rotation(cos, sin, (2, _tile_rows(batch, size), heads, length, width))
        for some in _tiles(batch, size):
            # A copy, as reading across heads from memory is slow.
            given = qkv[some].clone().view(-1, length, 3, heads, width).permute(2, 0, 3, 1, 4)
            kept = packed[:, some]
            kept[:2] = rotate(given[:2])
            kept[2] = given[2]
            q, k, v = kept.flatten(1, 2)
            scores = torch.baddbmm(hidden, q, k.mT, alpha=width**-0.5)
            p = torch.softmax(scores, -1, out=weights[some].flatten(0, 1))
            out[some] = _apart(p @ v, heads)
        ctx.save_for_backward(packed, weights, cos, sin)
        return out.view(batch, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed, weights, cos, sin = ctx.saved_tensors
        _, batch, heads, length, width = packed.shape
        out = packed.new_empty(batch, length, 3, heads, width)
        given = grads[0].reshape(batch, length, heads, width).transpose(1, 2)
        size = heads * length * width
        shape = (2, _tile_rows(batch, size), heads, length, width)
        work, rotate = packed.new_empty(shape).flatten(1, 2), _Rotation(cos, -sin, shape)
        for some in _tiles(batch, size):
            g, p = given[some].flatten(0, 1), weights[some].flatten(0, 1)
            q, k, v = packed[:, some].flatten(1, 2)
            result, back = out[some], work[:, : len(g)]
            result[:, :, 2] = _apart(p.mT @ g, heads)
            scores = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, p.dtype).mul_(width**-0.5)
            torch.bmm(scores, k, out=back[0])
            torch.bmm(scores.mT, q, out=back[1])
            result[:, :, :2] = rotate(back.unflatten(1, (-1, heads))).permute(1, 3, 0, 2, 4)
        return out.view(batch, length, -1), None, None, None


def _apart(rows: Tensor, heads: int) -> Tensor:
    """(n H, T, d) -> (n, T, H, d)."""
    return rows.view(-1, heads, *rows.shape[1:]).transpose(1, 2)


class _Rotation:
    """Rotates each pair of (2, n, H, T, d), element i and i + d / 2, by the angle of its position, at least in float32.

    `shape` is that of the largest tile.
    """

    def __init__(self, cos: Tensor, sin: Tensor, shape: tuple[int, ...]) -> None:
        self.cos, self.sins = cos, sin.chunk(2, -1)
        self.work, self.result = cos.new_empty(2, *shape)

    def __call__(self, x: Tensor) -> Tensor:
        given, out = (t[:, : x.shape[1]] for t in (self.work, self.result))
        torch.mul(given.copy_(x), self.cos, out=out)
        (first, second), (to_first, to_second) = given.chunk(2, -1), out.chunk(2, -1)
        to_first.addcmul_(second, self.sins[0], value=-1)
        to_second.addcmul_(first, self.sins[1])
        return out
