"""--use-torch-fsdp2: the mapping parameters of a model chunk are a unit of their own.

A unit has parameters of one dtype, and mapping parameters are fp32 where the layers' are bf16. They are few:
a connection has 96 C for n = 4, a layer 12 C*C. Kernels read those of the next connection, and backward
passes those of the preceding. So this unit is gathered as the model's forward pass begins, and FSDP2 lets it
go as the backward pass ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from megatron_mhc.mapping_parameters import MappingParameters
from megatron_mhc.refusals import FSDP2, refuse


def shard_mappings_first(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap `TorchFullyShardedDataParallel.__init__`, which shards what is not yet sharded."""
    signature = inspect.signature(init)

    def init_around_mappings(*args: Any, **kwargs: Any) -> None:
        asked = signature.bind(*args, **kwargs).arguments
        module, group = asked["module"], asked.get("process_group")
        group = group or parallel_state.get_data_parallel_group(with_context_parallel=True)
        if owners := [m for m in module.modules() if _has_own(m)]:
            refuse(FSDP2, asked["config"])
            _shard(module, owners, group)
        init(*args, **kwargs)

    return init_around_mappings


def _has_own(module: nn.Module) -> bool:
    return isinstance(module, MappingParameters) and next(module.parameters(), None) is not None


def _shard(root: nn.Module, owners: list[nn.Module], group: Any) -> None:
    said = {name: vars(parameter) for name, parameter in root.named_parameters()}
    theirs = [(owner, set(owner._forward_pre_hooks), set(owner._forward_hooks)) for owner in owners]
    fully_shard(owners, mesh=DeviceMesh.from_group(group, "cuda"), reshard_after_forward=False)
    for name, parameter in root.named_parameters():
        vars(parameter).update(said[name])  # new ones, which lack what Megatron has noted on them
    for owner, before, behind in theirs:
        # Its hooks would gather as the first connection runs; a recompute runs some of them only, and a hook
        # hands a connection other tensors than those on which kernels left their work.
        for hooks, kept in ((owner._forward_pre_hooks, before), (owner._forward_hooks, behind)):
            for key in set(hooks) - kept:
                del hooks[key]
    first: Any = owners[0]
    assert isinstance(first, FSDPModule)

    def gather(*_: Any) -> None:
        first.unshard()

    def let_go(*_: Any) -> None:
        if not torch.is_grad_enabled():  # no backward pass follows
            first.reshard()

    root.register_forward_pre_hook(gather)
    root.register_forward_hook(let_go)
