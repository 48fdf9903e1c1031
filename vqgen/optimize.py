"""AdamW, its learning-rate schedule, and the averaged weights that are validated and saved."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import get_scheduler

from .errors import UsageError


@dataclass
class OptimizerConfig:
    """AdamW, its schedule and the averaging of weights."""

    lr: float = 3e-4
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    lr_warmup: int = 100
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Weight decay of matrices and convolutions; biases, norms and codebooks have none."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's square."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 = no clipping."""
    ema_decay: float = 0.999
    """Decay of the averaged weights that are validated and saved; it rises to this over the first steps."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "grad_clip", "lr_warmup"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected at least 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')}: found {getattr(self, name)}, expected 0 <= value < 1")


def optimizer_for(model: nn.Module, config: OptimizerConfig, steps: int) -> tuple[torch.optim.AdamW, Any]:
    """AdamW with decay on matrices and convolutions alone, and its schedule over `steps`."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if p.ndim >= 2 and "codebook" not in n]
    plain = [p for n, p in trained if p.ndim < 2 or "codebook" in n]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    warmup = min(config.lr_warmup, steps)
    return optimizer, get_scheduler(config.lr_schedule, optimizer, warmup, steps)


def averaged(model: nn.Module) -> AveragedModel:
    """A copy of `model` that follows it as an exponential average, buffers included."""
    average = AveragedModel(model, use_buffers=True)
    return average.requires_grad_(False).eval()


def update_average(average: AveragedModel, model: nn.Module, decay: float, step: int) -> None:
    """One update after step `step`; the decay rises with the steps, or the start would weigh for too long."""
    average.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))
    average.update_parameters(model)
