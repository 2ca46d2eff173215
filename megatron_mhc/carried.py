"""How a built model carries its mHC options, so that no copy of a config makes it look like a plain one.

Megatron's pipeline sees a config and no model, so `config.mhc` holds the options at run time. A copy made by
`dataclasses.replace`, or field by field, has lost them; the block's submodules have not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc.config import MHCConfig
from megatron_mhc.refusals import ONE_MODEL, refuse


@dataclass
class StreamsBlockSubmodules(TransformerBlockSubmodules):
    """The submodules of a block, maybe of no layer at all, whose model has these mHC options.

    Args:
        plain_layer: Megatron's spec of its last layer, of which frameworks build the layers of multi-token
            prediction.
    """

    mhc: MHCConfig | None = None
    plain_layer: ModuleSpec | None = None


class StreamsModule(nn.Module):
    """A module of layers, maybe of none at all, whose model has these mHC options."""

    mhc: MHCConfig


class SpecOfBlock:
    """What stands for a block's spec, and makes it when the block is built."""

    def of_block(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        """The submodules of a block of this config and virtual stage."""
        raise NotImplementedError


def remember(config: Any, mhc: MHCConfig) -> None:
    """Put the options on a config.

    Raises:
        ValueError: it has others.
    """
    refuse(ONE_MODEL, config, mhc)
    config.mhc = mhc


def options_of(model: Any, config: Any) -> MHCConfig | None:
    """The mHC options of a model, or of the list of its chunks; None of a plain one.

    Args:
        config: the model's, or a copy, which gets what it has lost.
    """
    if (mhc := getattr(config, "mhc", None)) is not None:
        return mhc
    for chunk in [model] if isinstance(model, nn.Module) else model:
        for module in chunk.modules():
            submodules = getattr(module, "submodules", None)
            carrier = module if isinstance(module, StreamsModule) else submodules
            if isinstance(carrier, (StreamsModule, StreamsBlockSubmodules)):
                config.mhc = carrier.mhc
                return carrier.mhc
    return None
