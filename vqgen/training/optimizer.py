"""AdamW, Muon and the averaged weights that are validated and saved."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vqgen.devices import precision_of

from .fsdp import local_shards
from .options import OptimizerConfig
from .schedule import Plan

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024)."""
LEAST_SIDE = 32
"""Matrices with a smaller side, such as the last convolution, are left to AdamW: they gain nothing from Muon."""


def orthogonalised(matrices: Tensor) -> Tensor:
    """Approximate U V^T of the singular value decomposition of each matrix (N, r, c), by five Newton-Schulz iterations.

    Singular values of the result lie between 0.7 and 1.2. Computed in bfloat16 where the hardware supports it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if precision_of("auto", matrices.device) == "bf16" else matrices.float()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for parameter groups with `muon` set, AdamW for the others.

    The Nesterov momentum of each matrix is orthogonalised and scaled by 0.2 sqrt(max(rows, columns)), so that the
    update has the size of AdamW's and `lr` and decoupled `weight_decay` need no change (Liu et al. 2025, eq. 4). A
    convolution is treated as the matrix (out, in * height * width). `torch.optim.Muon` is the same for matrices only.
    Rounding depends on the hardware: all processes of a run, and an exact resume, need machines of one kind.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        settings = {"lr": lr, "betas": betas, "momentum": 0.95, "eps": 1e-8, "weight_decay": 0.0}
        # With `fused` torch moves the step counts to the device of the parameters when a state is loaded.
        super().__init__(groups, settings | {"fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                (self._muon if group["muon"] else self._adamw)(group, trained)
        return loss

    def _muon(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        updates: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in trained:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            matrix = p.grad.lerp(momentum, group["momentum"]).flatten(1)  # type: ignore[union-attr]
            updates[matrix.shape].append((p, matrix))  # type: ignore[index]
        for shape, same in updates.items():  # matrices of one shape in one batch
            size = 0.2 * max(shape) ** 0.5
            for (p, _), update in zip(same, orthogonalised(torch.stack([m for _, m in same])), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * size)

    def _adamw(self, group: dict[str, Any], trained: list[nn.Parameter]) -> None:
        for p in trained:
            if not self.state[p]:
                means = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), device=p.device), **means}
        states = [self.state[p] for p in trained]
        adamw(
            trained,  # type: ignore[arg-type]
            [p.grad for p in trained],  # type: ignore[misc]
            *([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq")),
            state_steps=[s["step"] for s in states],
            **{name: group[name] for name in ("lr", "weight_decay", "eps", "fused")},
            **dict(zip(("beta1", "beta2"), group["betas"])),
            **{"amsgrad": False, "maximize": False, "max_exp_avg_sqs": []},
        )


def optimizer_for(model: nn.Module, config: OptimizerConfig, plan: Plan) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """The optimizer of `model` and its schedule over the steps of `plan`.

    Codebooks (`codebook_parameters()` of a module), biases and norms have no weight decay. Muon updates neither
    codebooks nor embeddings nor output heads: their rows are used one by one and share no directions.
    """
    codebooks, heads = set[int](), set[int]()
    for module in model.modules():
        codebooks |= {id(p) for p in getattr(module, "codebook_parameters", list)()}
        head = getattr(module, "get_output_embeddings", lambda: None)()
        for part in (module if isinstance(module, nn.Embedding) else None, head):
            heads |= {id(p) for p in part.parameters()} if part is not None else set()
    groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
    for p in model.parameters():
        if p.requires_grad:
            matrix = p.ndim >= 2 and id(p) not in codebooks
            wide = matrix and min(p.flatten(1).shape) >= LEAST_SIDE and id(p) not in heads
            groups[config.weight_decay if matrix else 0.0, wide and config.optimizer == "muon"].append(p)
    parameters = [{"params": ps, "weight_decay": decay, "muon": muon} for (decay, muon), ps in groups.items()]
    betas = (config.beta1, config.beta2)
    make = Muon if config.optimizer == "muon" else partial(torch.optim.AdamW, fused=True)
    optimizer = make(parameters, lr=config.lr, betas=betas)
    return optimizer, LambdaLR(optimizer, lambda step: plan.learning_rate(config, step))


def averaged(model: nn.Module) -> AveragedModel:
    """A copy of `model` for an exponential moving average of its weights and buffers."""
    return AveragedModel(model, use_buffers=True).requires_grad_(False).eval()


def update_average(average: AveragedModel, model: nn.Module, decay: float, step: int) -> None:
    """Update the average after step `step` (0 is the first); the decay rises from 0.1 to `decay` over early steps."""
    update, first = get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step))), not average.n_averaged
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    # `update_parameters` copies its counter to the device for each kind of tensor, which waits for the device.
    for mean, value in zip(_tensors(average.module), _tensors(model), strict=True):
        for group, tensor in zip(kinds[mean.dtype], (mean, value)):
            group.append(tensor.detach())
    for means, values in kinds.values():
        own, new = local_shards(means), local_shards(values)
        if not first:
            update(own, new, average.n_averaged)
            continue
        for mean, value in zip(own, new):
            mean.copy_(value)
    average.n_averaged += 1


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    """Parameters and buffers."""
    return itertools.chain(module.parameters(), module.buffers())
