"""The rules by which a run names what is wrong with itself and how to mend it.

Each rule reads rows of `metrics.jsonl` (oldest first) and returns a `Finding` or nothing; a healthy run says nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a short name, what was measured, and what to change."""

    name: str
    measured: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.measured}; {self.remedy}"


def _last(rows: Sequence[Row], key: str, count: int) -> list[float]:
    """The newest `count` numbers under `key`; fewer where there are not so many."""
    return [row[key] for row in rows if isinstance(row.get(key), (int, float))][-count:]


def codebook_collapse(rows: Sequence[Row], reachable: int) -> Finding | None:
    """Two validations in a row with under a quarter of the codes in use, or a perplexity under 5 % of them.

    Args:
        reachable: the codebook size, or the number of held-out positions where that is smaller.
    """
    used, perplexity = _last(rows, "heldout/codes_used", 2), _last(rows, "heldout/perplexity", 2)
    if len(used) < 2 or len(perplexity) < 2:
        return None
    if max(used) < 0.25 * reachable or max(perplexity) < 0.05 * reachable:
        return Finding(
            "codebook collapse",
            f"{used[-1]:.0f} of {reachable} codes in use on held-out images, perplexity {perplexity[-1]:.0f}",
            "use --codebook ema --l2-normalize --kmeans-start with --code-dim 8, --revive-after 100, "
            "or a smaller --codebook-size",
        )
    return None


def pinned_discriminator(rows: Sequence[Row]) -> Finding | None:
    """Five logged means in a row at a bound of the hinge loss: near 0 (it always wins) or near 1 (it says nothing)."""
    losses = _last(rows, "train/discriminator", 5)
    if len(losses) < 5:
        return None
    if max(losses) < 0.02:
        return Finding(
            "discriminator pinned",
            f"its hinge loss is {losses[-1]:.3f}: it tells every reconstruction from its original",
            "lower --gan-lr, raise --gan-start, or lower --gan-weight",
        )
    if all(abs(loss - 1) < 0.002 for loss in losses):
        return Finding(
            "discriminator pinned",
            f"its hinge loss stays at {losses[-1]:.3f}: it has not learned to tell anything",
            "raise --gan-lr or --gan-width",
        )
    return None


def overfitting(rows: Sequence[Row]) -> Finding | None:
    """The held-out loss rose at three validations in a row, to 1 % over its best, while the training loss fell.

    The training loss is the mean since the validation before: single rows of it are noise.
    """
    heldout, train, since = [], [], []
    for row in rows:
        since += _last([row], "train/loss", 1)
        for loss in _last([row], "heldout/nats_per_token", 1):
            heldout.append(loss)
            train.append(sum(since) / len(since) if since else train[-1] if train else math.nan)
            since = []
    if len(heldout) < 4:
        return None
    rising = heldout[-4] < heldout[-3] < heldout[-2] < heldout[-1]
    if rising and heldout[-1] > 1.01 * min(heldout) and train[-1] < train[-4]:
        return Finding(
            "prior overfits",
            f"held-out {heldout[-1]:.3f} nats per token after a best of {min(heldout):.3f}, training {train[-1]:.3f}",
            "use more images or --views with --flip, raise --dropout or --weight-decay, or a smaller --dim",
        )
    return None


def non_finite_origin(model: nn.Module, replay: Callable[[], Any]) -> str:
    """Where NaN or infinity begins: the first module, in order of execution, whose output is not finite.

    Args:
        replay: runs the failing forward pass of `model` again.

    Falls back to the first parameter with such a gradient, where the forward pass is finite.
    """
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            return f"the weights {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if not found and isinstance(first, Tensor) and not torch.isfinite(first).all():
                found.append(name)

        return hook

    # A module's own hook comes after those of its parts: what it adds to their outputs is told apart from them.
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            replay()
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"the output of {found[0]}"
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name}"
    return "the loss itself"
