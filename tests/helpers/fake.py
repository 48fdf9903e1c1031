"""Models on CUDA without values, by torch's fake tensors: they refuse to be mixed with the host's and to be read."""

from typing import TypeVar

import torch

M = TypeVar("M", bound=torch.nn.Module)


def without_values(model: M) -> M:
    """The model with tensors of CUDA in the place of its own; inside `FakeTensorMode`."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    tensors[name] = torch.nn.Parameter(fake) if isinstance(value, torch.nn.Parameter) else fake
    return model
