"""Quantizers, latents and states for the tests of quantizers."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqgen.tokenizer.quantizers import QUANTIZERS
from vqgen.tokenizer.quantizers.base import Quantizer
from vqgen.tokenizer.quantizers.options import QuantizerConfig


def quantizer_options(quantizer: str = "vq", code_dim: int | None = None, **options: Any) -> QuantizerConfig:
    """Options of a kind of quantizer; `code_dim` only counts for kinds that have it."""
    kind = QUANTIZERS[quantizer]
    if code_dim is not None and "code_dim" in {field.name for field in dataclasses.fields(kind)}:
        options["code_dim"] = code_dim
    return kind(**options)


def latents(batch: int = 2, dim: int = 6, height: int = 3, width: int = 5, seed: int = 1, scale: float = 1) -> Tensor:
    """Normally distributed latents (B, D, h, w)."""
    return scale * torch.randn(batch, dim, height, width, generator=torch.Generator().manual_seed(seed))


def flat(z: Tensor) -> Tensor:
    """Latents (B, D, h, w) as vectors (B*h*w, D)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def pass_through(quantizer: Quantizer, width: int) -> None:
    """Make the linear maps of a quantizer of `width` channels the identity, where they keep the dimension."""
    for layer in (quantizer.project_in, quantizer.project_out):
        if layer.in_channels == layer.out_channels == width:
            layer.weight.data = torch.eye(width)[:, :, None, None]
            assert layer.bias is not None
            layer.bias.data.zero_()


def same_under_autocast(quantizer: Quantizer, z: Tensor) -> None:
    """Assert that bf16 autocast changes nothing, bit for bit, random noise included."""
    codes = quantizer.encode(z)
    torch.manual_seed(5)
    expected = quantizer(z)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(z)
        assert torch.equal(out.codes, codes) and torch.equal(quantizer.encode(z), codes)
        assert torch.equal(out.z_q, expected.z_q) and torch.equal(out.loss, expected.loss)
        assert quantizer.decode(codes).dtype == torch.float32
        # z_q has the data type of the latents, the loss stays in float32.
        half = quantizer(z.bfloat16())
    assert half.z_q.dtype == torch.bfloat16 and half.loss.dtype == torch.float32


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return out
