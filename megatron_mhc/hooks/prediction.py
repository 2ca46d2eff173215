"""Layers of multi-token prediction that read n streams (`--mhc-mtp multistream`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_mhc.mtp import MultistreamPredictionLayer, between_streams, predict


def build_between_streams(get_submodules: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_mtp_block_submodules`, which a block calls with the model's config; its decoder is built."""

    def get_wrapped(config: Any, spec: Any) -> Any:
        submodules = get_submodules(config, spec)
        mhc = getattr(config, "mhc", None)
        if mhc is None or mhc.mtp != "multistream":
            return submodules
        return between_streams(submodules, config, mhc)

    return get_wrapped


def run_between_streams(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `MultiTokenPredictionBlock.forward`, which has one tensor from depth to depth and for the loss."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        multistream = isinstance(self.layers[0], MultistreamPredictionLayer)
        return (predict if multistream else forward)(self, *args, **kwargs)

    return run
