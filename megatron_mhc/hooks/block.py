"""What is made of an mHC block's submodules: the options of its config, and plain layers of MTP.

Where a block is handed a target of --spec, that makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_mhc.carried import SpecOfBlock, StreamsBlockSubmodules, remember


def remember_when_built(get_submodules: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_block_submodules`, which a block calls with its own config and the spec it is built from."""

    def get_and_remember(config: Any, spec: Any, vp_stage: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(spec, SpecOfBlock):
            spec = spec.of_block(config, vp_stage)
        submodules = get_submodules(config, spec, vp_stage, *args, **kwargs)
        if isinstance(submodules, StreamsBlockSubmodules) and submodules.mhc is not None:
            remember(config, submodules.mhc)
        return submodules

    return get_and_remember


def predict_by_plain_layers(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_gpt_mtp_block_spec_for_backend`, which builds on the spec of the decoder's last layer.

    Layers of multi-token prediction read what is contracted: one with mHC would expand it a second time.
    """

    def make_plain(config: Any, spec: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(spec, StreamsBlockSubmodules) and spec.plain_layer is not None:
            spec = TransformerBlockSubmodules(layer_specs=[spec.plain_layer])
        return make(config, spec, *args, **kwargs)

    return make_plain
