"""Megatron's combined 1F1B of layers between streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
