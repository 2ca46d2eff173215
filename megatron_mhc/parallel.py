"""What tensor, sequence, context, expert and pipeline parallelism ask of mHC.

Mapping parameters are replicated over TP. Every reduction is one that Megatron already performs:

    TP            inputs are replicated, so gradients are equal on all ranks: nothing to reduce
    TP + SP       each rank sees its tokens: `sequence_parallel` marks them, and
                  finalize_model_grads sums them over TP
    CP, DP, EP    ordinary non-expert parameters: DDP reduces over the data x context group
    PP, VPP       a layer lives on one stage: nothing to reduce
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc import refusals
from megatron_mhc.config import MHCConfig

_DATA_PARALLEL = "megatron.core.distributed.distributed_data_parallel"  # where its forward pre-hooks are made


def mark_replicated(module: nn.Module, config: TransformerConfig) -> None:
    """Mark a module's parameters as replicated over TP, to be summed over it under sequence parallel."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def gather_parameters(module: nn.Module) -> None:
    """Have what gathers a module's parameters just before it runs (--overlap-param-gather) do so now."""
    for hook in module._forward_pre_hooks.values():
        if hook.__module__ == _DATA_PARALLEL:
            hook(module, ())


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
