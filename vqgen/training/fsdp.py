"""FSDP: weights, gradients and optimizer state sharded over the processes, as configured in Accelerate.

Checkpoints and model folders hold full tensors: a run can be resumed with other processes, sharded or not.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from vqgen.errors import UsageError

Tree = TypeVar("Tree")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether models are sharded over the processes."""
    # Not `distributed_type`: Accelerate resets it when an optimizer is prepared.
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def configure_fsdp(accelerator: Accelerator) -> None:
    """Complete Accelerate's FSDP settings, if there are any. Raises `UsageError` for FSDP version 1."""
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate enables FSDP on accelerators only; torch supports CPUs.
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
    if not is_sharded(accelerator):
        return  # one process
    plugin = cast(FullyShardedDataParallelPlugin, state.fsdp_plugin)
    if plugin.fsdp_version != 2:
        raise UsageError(f"accelerate: found fsdp_version {plugin.fsdp_version}; configure FSDP with fsdp_version: 2")
    plugin.cpu_ram_efficient_loading = False  # every process initialises the weights from the seed
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    # Gradients are reduced in float32, as without sharding.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)


def forget_former_run() -> None:
    """Let another run of this Python process choose its precision: Accelerate keeps that of the first.

    It also keeps FSDP as the kind of the processes, but not its settings.
    """
    AcceleratorState._reset_state()
    state = PartialState()
    if state.distributed_type == DistributedType.FSDP:
        state.distributed_type = DistributedType.MULTI_GPU


def units(accelerator: Accelerator, names: Sequence[str]) -> None:
    """Set the class names of the modules that FSDP shards one by one, unless Accelerate's configuration names some."""
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin and not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = list(names)


def shard(accelerator: Accelerator, module: nn.Module) -> None:
    """Shard a module that has no optimizer; `Accelerator.prepare` does it for those that have one."""
    if is_sharded(accelerator):
        fsdp2_prepare_model(accelerator, module)


def reshard(module: nn.Module) -> None:
    """Free the weights gathered by a forward pass without a backward pass, which would miss later updates."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full_tensors(tree: Tree, host: bool = False) -> Tree:
    """Replace every sharded tensor of a tree by the full one. A collective: all processes must call it.

    With `host` the full ones are on the CPU: a device then holds one of them at a time.
    """

    def full(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        return value.full_tensor().cpu() if host else value.full_tensor()

    return tree_map(full, tree)


def local_shards(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """This process's shards, which can be changed in place; a tensor that is not sharded is returned itself."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def sharded_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor as `like` is sharded; return it unchanged where `like` is not or has another shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_module(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load full tensors into a module, sharded or not."""
    own = module.state_dict()
    module.load_state_dict({k: sharded_like(v, own[k]) if k in own else v for k, v in tensors.items()})


def load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Load full tensors into an optimizer, sharded or not, or into anything else with a state."""
    if hasattr(optimizer, "param_groups") and "state" in saved:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shards = {
            index: {name: sharded_like(v, parameters[index]) if torch.is_tensor(v) else v for name, v in state.items()}
            for index, state in saved["state"].items()
        }
        saved = {**saved, "state": shards}
    optimizer.load_state_dict(saved)
