"""What tensor, sequence, context, expert and pipeline parallelism ask of mHC.

Mapping parameters are replicated over TP. Every reduction is one that Megatron already performs:

    TP            inputs are replicated, so gradients are equal on all ranks: nothing to reduce
    TP + SP       each rank sees its tokens: `sequence_parallel` marks them, and
                  finalize_model_grads sums them over TP
    CP, DP, EP    ordinary non-expert parameters: DDP reduces over the data x context group
    PP, VPP       a layer lives on one stage: nothing to reduce
    FSDP          Megatron's gathers a layer's parameters, mapping parameters among them, as the layer runs;
                  for torch's, which takes parameters of one dtype, see `hooks/fsdp2.py`
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megatron_mhc import refusals
from megatron_mhc.config import MHCConfig

# Where forward hooks are made that gather parameters.
_DATA_PARALLEL = "megatron.core.distributed.distributed_data_parallel"
_MEGATRON_FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp"
_FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp_state"


def mark_replicated(module: nn.Module, config: TransformerConfig) -> None:
    """Mark a module's parameters as replicated over TP, to be summed over it under sequence parallel."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def gather_parameters(module: nn.Module) -> None:
    """Have what gathers a module's parameters just before it runs (--overlap-param-gather) do so now."""
    for hook in module._forward_pre_hooks.values():
        if _made_in(hook) in (_DATA_PARALLEL, _MEGATRON_FSDP):
            hook(module, ())


def is_gathered_alone(layer: nn.Module) -> bool:
    """Whether a layer has its parameters while it runs, and no longer: a unit of an FSDP."""
    return any(_made_in(hook) in (_MEGATRON_FSDP, _FSDP2) for hook in layer._forward_hooks.values())


def gather_layer(layer: nn.Module) -> None:
    """Gather the parameters of a layer that `is_gathered_alone`; its backward pass will let them go."""
    if not is_gathered_alone(layer):
        return
    if isinstance(layer, FSDPModule):
        layer.unshard()
    else:
        for module in layer.modules():  # --megatron-fsdp-enable-fine-grained-param-gather: each its own
            gather_parameters(module)


def _made_in(hook: Any) -> str | None:
    return getattr(hook, "__module__", None)


def streams_dtype(config: TransformerConfig) -> torch.dtype:
    """Of the streams: fp32 under --fp32-residual-connection, as the hidden states between stock's layers."""
    return torch.float32 if config.fp32_residual_connection else config.params_dtype


def validate(config: TransformerConfig, mhc: MHCConfig) -> None:
    """Refuse at build time what would fail later or train silently wrong.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    refusals.refuse(refusals.MODEL, config, mhc)


def validate_stages(config: TransformerConfig) -> None:
    """Refuse pipeline layouts whose first stage cannot expand or whose streams outlive the final norm.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    refusals.refuse(refusals.STAGES, config)
