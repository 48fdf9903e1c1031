"""Detection of NaN and infinity in losses, gradient norms and weights."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .fsdp import full_tensors

_NEVER = 2**62


REMEDY = "a lower --lr, a longer --lr-warmup or --precision fp32"


class NonFinite(Exception):
    """A loss, a gradient norm or a weight is NaN or infinite; the message names it and the step."""


class FiniteCheck:
    """Records, on the device, at which step a scalar was first NaN or infinite.

    Reading the record waits for the device: several processes and accelerators do so only in `check`, and raise
    together. One process on the CPU has nothing to wait for and checks in `record`, before the weights are updated.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.immediate = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self._first: dict[tuple[str, ...], Tensor] = {}  # names of scalars -> first non-finite step of each

    def record(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Record the named scalars of step `step` (1 is the first)."""
        finite = torch.isfinite(torch.stack([value.detach().float() for value in terms.values()]))
        first, names = torch.where(finite, _NEVER, step), tuple(terms)
        self._first[names] = torch.minimum(first, self._first.get(names, first))
        if self.immediate:
            self.check()

    def check(self) -> None:
        """Raise `NonFinite` naming the scalars that were non-finite first, in any process, since the last check."""
        if not self._first:
            return
        names = [name for group in self._first for name in group]
        first = self.accelerator.gather(torch.cat(list(self._first.values()))[None])
        self._first.clear()
        steps: list[int] = first.amin(dim=0).tolist()  # type: ignore[union-attr]
        if min(steps) < _NEVER:
            found = dict.fromkeys(name for name, step in zip(names, steps) if step == min(steps))
            raise NonFinite(f"{', '.join(found)} at step {min(steps)}")


def non_finite(modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the first tensor of any module that holds NaN or infinity; None where all are finite."""
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not full_tensors(torch.isfinite(tensor).all()):
                return f"{name}.{key}"
    return None
