"""Megatron's combined 1F1B of layers between streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron_mhc.layer import HyperConnectionTransformerLayer


def cut_between_streams(build_callables: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `build_transformer_layer_callables`, which cuts a layer into the nodes of a schedule plan."""

    def build(layer: Any) -> Any:
        functions, weight_gradients = build_callables(layer)
        if isinstance(layer, HyperConnectionTransformerLayer):
            from megatron_mhc.pipeline.combined_nodes import LayerNodes

            functions = LayerNodes(layer, functions).functions()
        return functions, weight_gradients

    return build


def ask_embedding_gradient(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap `PreProcessNode.forward_impl`, behind which every node has to have a gradient to go backward with.

    A frozen embedding's output has none: mappings trained alone would end the first step with torch's error.
    """

    def embed(self: Any) -> Tensor:
        embedded = forward(self)
        mhc = getattr(self.chunk_state.model.config, "mhc", None) is not None
        return embedded if embedded.requires_grad or not mhc else embedded.detach().requires_grad_()

    return embed
