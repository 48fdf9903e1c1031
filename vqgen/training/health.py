"""Rules that read rows of `metrics.jsonl` (oldest first), detect a failing run and name a remedy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One problem: a short name, the measured values, and what to change."""

    name: str
    measured: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.measured}; {self.remedy}"


def _last(rows: Sequence[Row], key: str, count: int) -> list[float]:
    """The newest `count` numbers under `key`, or as many as there are."""
    return [row[key] for row in rows if isinstance(row.get(key), (int, float))][-count:]


def _risen(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """Lowest mean of five consecutive numbers under `key` and median of the last five, if that is 2.5 times higher."""
    values = _last(rows, key, len(rows))
    means = [sum(values[i : i + 5]) / 5 for i in range(len(values) - 9)]
    now = sorted(values[-5:])[2] if means else 0.0
    return (min(means), now) if means and now > 2.5 * min(means) else None


def codebook_too_large(codes: int, vectors: int) -> Finding | None:
    """Fewer than 8 vectors (grid positions of all training images) per code: most codes can never be learned."""
    if vectors >= 8 * codes:
        return None
    fitting = 2 ** max(1, int(math.log2(max(vectors, 1) / 32)))
    text = f"{codes} codes for {vectors} positions in all training images, {vectors / codes:.2g} per code"
    return Finding("codebook too large", text, f"use --codebook-size {fitting}, or more images")


def codebook_collapse(rows: Sequence[Row], reachable: int, remedy: str, settled: int = 0) -> Finding | None:
    """Two consecutive validations with under 25 % of the codes in use, or a perplexity under 5 % of them.

    Args:
        reachable: the codebook size, or the number of held-out grid positions if smaller.
        settled: validations before this step are ignored, as unused codes have not been revived yet.
    """
    late = [row for row in rows if row.get("step", 0) >= settled]
    used, perplexity = _last(late, "heldout/codes_used", 2), _last(late, "heldout/perplexity", 2)
    collapsed = len(used) == len(perplexity) == 2 and (
        max(used) < 0.25 * reachable or max(perplexity) < 0.05 * reachable
    )
    if not collapsed:
        return None
    text = f"{used[-1]:.0f} of {reachable} codes in use on held-out images, perplexity {perplexity[-1]:.0f}"
    return Finding("codebook collapse", text, remedy)


def learning_rate_too_high(rows: Sequence[Row]) -> Finding | None:
    """Fast growth of the weights, or a reconstruction loss that is very high or rises.

    - The squared norm of the weights grows by over 3 % per step between two rows; healthy runs had at most 0.1 %.
    - The reconstruction loss exceeds 1.5 in a row. Images lie in [-1, 1], so a constant 0 has at most 1.
    - It has risen to 2.5 times its lowest value without an adversarial loss.
    """
    name, rates = "learning rate too high", _last(rows, "train/lr", len(rows))
    highest = f" (it has been {max(rates):.2g})" if rates else ""
    remedy = f"use a --lr of a tenth{highest}, or a longer --lr-warmup"
    step, norm = 0, 1.0
    for row in rows:
        for after in _last([row], "train/weight_growth", 1):
            if after <= 0:  # a norm is positive: the record is damaged
                continue
            growth = after / norm
            if growth * growth - 1 > 0.03 * max(1, row["step"] - step):  # `**` raises an error where it overflows
                text = f"the norm of the weights grew {growth:.2g}-fold from step {step} to step {row['step']}"
                return Finding(name, text, remedy)
            step, norm = row["step"], after
    worst = max(_last(rows, "train/reconstruction", len(rows)), default=0.0)
    if worst > 1.5:
        text = f"the reconstruction loss was {worst:.3g}, where a constant grey image has at most 1"
        return Finding(name, text, remedy)
    risen = _risen(rows, "train/reconstruction")
    if risen and not _last(rows, "train/adversarial", 1):
        return Finding(name, f"the reconstruction loss rose from {risen[0]:.3g} to {risen[1]:.3g}", remedy)
    return None


def adversary_dominates(rows: Sequence[Row]) -> Finding | None:
    """The adversarial loss outweighs the reconstruction loss.

    - In five consecutive rows the discriminator rates reconstructions as more real than originals.
    - The reconstruction loss has risen to 2.5 times its lowest value.
    - Two consecutive validations have a PSNR over 1.5 dB below the best and, where measured, an LPIPS no better.
    """
    adversarial = [row for row in rows if _last([row], "train/adversarial", 1)]
    if not adversarial:
        return None
    real, fake = (_last(adversarial, f"train/discriminator_{name}", 5) for name in ("real", "fake"))
    validations = [row for row in rows if _last([row], "heldout/psnr", 1)]
    best: Row = max(validations[:-2], key=lambda row: row["heldout/psnr"], default={})
    lpips = max(_last([best], "heldout/lpips", 1), default=-math.inf)
    risen = _risen(rows, "train/reconstruction")
    if len(real) == len(fake) == 5 and all(f - r > 0.02 for r, f in zip(real, fake)):
        text = f"the discriminator rates reconstructions ({fake[-1]:.2f}) as more real than originals ({real[-1]:.2f})"
    elif risen:
        text = f"the reconstruction loss rose from {risen[0]:.3g} to {risen[1]:.3g}"
    elif best and all(
        row["heldout/psnr"] < best["heldout/psnr"] - 1.5
        and max(_last([row], "heldout/lpips", 1), default=math.inf) >= lpips
        for row in validations[-2:]
    ):
        text = f"held-out PSNR fell from {best['heldout/psnr']:.1f} dB to {validations[-1]['heldout/psnr']:.1f} dB"
    else:
        return None
    remedy = "raise --gan-start so that reconstructions improve first, lower --gan-weight, and keep --gan-adaptive on"
    return Finding("adversarial loss dominates", text, remedy)


def pinned_discriminator(rows: Sequence[Row], loss: str = "hinge", blind: float = 1.0) -> Finding | None:
    """Five consecutive rows with a discriminator loss near 0 (it always wins) or near `blind` (it learns nothing).

    `blind` is the value of the loss named `loss` where every logit is 0.
    """
    losses = _last(rows, "train/discriminator", 5)
    if len(losses) < 5:
        return None
    if max(losses) < 0.02 * blind:
        text = f"its {loss} loss is {losses[-1]:.3f}: it separates all reconstructions from originals"
        remedy = "use --gan-augment color translation or --gan-lecam 0.01, lower --gan-lr, or raise --gan-start"
    elif all(abs(value - blind) < 0.002 * blind for value in losses):
        text = f"its {loss} loss stays at {losses[-1]:.3f} of {blind:.3f}: it separates nothing"
        remedy = "raise --gan-lr or --gan-width, or lower --gan-lecam"
    else:
        return None
    return Finding("discriminator pinned", text, remedy)


def overfitting(rows: Sequence[Row]) -> Finding | None:
    """The held-out loss rose at three consecutive validations, to 1 % above its best, while the training loss fell.

    The training loss is the mean since the previous validation, as single rows are noisy.
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
    if not (rising and heldout[-1] > 1.01 * min(heldout) and train[-1] < train[-4]):
        return None
    text = f"held-out {heldout[-1]:.3f} nats per token after a best of {min(heldout):.3f}, training {train[-1]:.3f}"
    remedy = "use more images or --views with --flip, raise --dropout or --weight-decay, or a smaller --dim"
    return Finding("prior overfits", text, remedy)


def non_finite_origin(model: nn.Module, replay: Callable[[], Any]) -> str:
    """Find the first module, in order of execution, whose output holds NaN or infinity.

    Non-finite weights are reported before outputs. Where `replay`, which repeats the failing forward pass, is finite,
    the first parameter in the order of backpropagation with a non-finite gradient is reported.
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

    # A module's hook runs after those of its children, so the innermost module is found.
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
