"""What is made of an mHC block's submodules: the options of its config, and plain layers of MTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_mhc.carried import StreamsBlockSubmodules, remember


def remember_when_built(get_submodules: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_block_submodules`, which a block calls with its own config and the spec it is built from."""

    def get_and_remember(config: Any, spec: Any, *args: Any, **kwargs: Any) -> Any:
        submodules = get_submodules(config, spec, *args, **kwargs)
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
