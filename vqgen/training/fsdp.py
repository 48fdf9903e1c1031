"""FSDP: weights, gradients and optimizer state shared out over the processes, as Accelerate's configuration asks.

Checkpoints and model folders hold whole tensors, so that a run may go on with another number of processes, sharded or
not.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from vqgen.errors import UsageError

Tree = TypeVar("Tree")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether models are shared out over the processes."""
    # Not `distributed_type`: Accelerate forgets it as soon as an optimizer is prepared.
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def _plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    return cast(FullyShardedDataParallelPlugin, accelerator.state.fsdp_plugin)


def configure_fsdp(accelerator: Accelerator) -> None:
    """Complete Accelerate's FSDP settings where it was started with them. Raises `UsageError` for version 1."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on GPUs and the like; torch does on CPUs, too.
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if not is_sharded(accelerator):
        return  # one process, which holds everything
    plugin = _plugin(accelerator)
    if plugin.fsdp_version != 2:
        raise UsageError(f"accelerate: found fsdp_version {plugin.fsdp_version}; configure FSDP with fsdp_version: 2")
    plugin.cpu_ram_efficient_loading = False  # every process makes the first weights itself, from the seed
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    # Gradients are summed in float32, as without sharding.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)


def units(accelerator: Accelerator, names: Sequence[str]) -> None:
    """Weights are gathered a module of these class names at a time, unless the configuration names others."""
    if is_sharded(accelerator) and not _plugin(accelerator).transformer_cls_names_to_wrap:
        _plugin(accelerator).transformer_cls_names_to_wrap = list(names)


def shard(accelerator: Accelerator, module: nn.Module) -> None:
    """Share out a module that is not trained, as `Accelerator.prepare` does those that are."""
    if is_sharded(accelerator):
        fsdp2_prepare_model(accelerator, module)


def reshard(module: nn.Module) -> None:
    """Let go of weights that a forward pass without a backward pass gathered: they would not see later updates."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensors(tree: Tree) -> Tree:
    """The same with whole tensors for shares of them. All processes must call it alike."""
    return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, tree)


def own_shares(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's shares, to be changed in place; of tensors that are not sharded, themselves."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def shared_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as this process's share, where `like` is one of that shape; else as it is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_module(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """`load_state_dict` of whole tensors."""
    own = module.state_dict()
    module.load_state_dict({k: shared_out(v, own[k]) if k in own else v for k, v in tensors.items()})


def load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors, for an optimizer or anything else with a state."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is not None and "state" in saved:
        parameters = [p for group in groups for p in group["params"]]
        shares = {
            index: {name: shared_out(v, parameters[index]) if torch.is_tensor(v) else v for name, v in state.items()}
            for index, state in saved["state"].items()
        }
        saved = {**saved, "state": shares}
    optimizer.load_state_dict(saved)
