"""Multi-token prediction: where the streams end, and layers that read them (`--mhc-mtp multistream`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_mhc.mtp import MultistreamPredictionLayer, between_streams, predict
from megatron_mhc.training_doors import predicts


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


def contract_beside_prediction(has_norm: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `TransformerBlock.has_final_layernorm_in_this_stage`, which looks for the decoder's last layer.

    Stages exchange streams, so the decoder ends where they are first read as one: on the stage that predicts
    further tokens, though it may hold no decoder layer.
    """

    def has_it(self: Any) -> Any:
        config = self.config
        if getattr(config, "mhc", None) is None or not config.mtp_num_layers:
            return has_norm(self)
        here = predicts(config, self.vp_stage)
        return self.submodules.layer_norm and self.post_layer_norm and here

    return has_it
