"""Megatron's CUDA graphs: which part of a layer one holds, and what crosses its edge.

    local                whole layers; of a MoETransformerLayer's router and what follows its experts, F alone
    transformer_engine   whole layers, or the parts that --cuda-graph-modules names, one graph a layer
    full_iteration       forward and backward passes of a step: no edge

A graph holds a sub-layer from `pre` to `post_res`, or nothing of it. One that ends at the router's experts
holds the MLP's `pre`; what its `post_res` needs behind the edge crosses as tensors, for a graph hands out
nothing else. Where an edge lies between two connections, neither works ahead for the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.transformer.cuda_graphs import delete_cuda_graphs
from megatron.core.transformer.module import GraphableMegatronModule
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron_mhc.layer import HyperConnectionTransformerLayer


class Held(NamedTuple):
    """What of a layer its graph holds: all of a sub-layer, or the MLP's up to its experts."""

    attention: bool = False
    mlp: bool = False
    router: bool = False

    @staticmethod
    def of(layer: HyperConnectionTransformerLayer) -> Held:
        config = layer.config
        if config.cuda_graph_impl == "local":
            whole = hasattr(layer, "cudagraph_manager")
            return Held(whole, whole)
        if config.cuda_graph_impl != "transformer_engine":
            return Held()
        from megatron.core.transformer.enums import CudaGraphModule  # 0.17 has none

        modules = config.cuda_graph_modules
        if not modules:
            return Held(True, True)
        return Held(
            CudaGraphModule.attn in modules,
            (CudaGraphModule.moe if layer.is_moe_layer else CudaGraphModule.mlp) in modules,
            layer.is_moe_layer and CudaGraphModule.moe_router in modules,
        )


class GraphEdge(GraphableMegatronModule):
    """Stands between TransformerLayer and what replays its graph: takes ours out of what comes of it."""

    eager: bool  # without graphs, while `eagerly` asks for it

    def _te_cuda_graph_replay(self, *args: Any, crossed: list[Tensor] | None = None, **kwargs: Any) -> Any:
        """Replay the graph.

        Args:
            crossed: where the last output goes, a tuple of tensors that Megatron knows nothing of.
        """
        outputs = super()._te_cuda_graph_replay(*args, **kwargs)
        if crossed is None:
            return outputs
        *outputs, ours = outputs
        crossed += ours
        return outputs


@contextmanager
def eagerly(model: nn.Module | Sequence[nn.Module]) -> Iterator[None]:
    """Run a model, or its chunks, and any step, without graphs, in which no hook is called."""
    chunks = [model] if isinstance(model, nn.Module) else model
    layers = [(m, m.eager) for chunk in chunks for m in chunk.modules() if isinstance(m, GraphEdge)]
    try:
        for layer, _ in layers:
            layer.eager = True
        with _without_whole_steps():
            yield
    finally:
        for layer, before in layers:
            layer.eager = before


@contextmanager
def _without_whole_steps() -> Iterator[None]:
    """Hide full_iteration's graphs, with the results that they write, and count no step towards a capture."""
    wrapper = FullCudaGraphWrapper
    tables: list[dict[str, Any]] = [wrapper.cuda_graph, wrapper.result, wrapper.curr_iteration]
    kept = [table.copy() for table in tables]
    try:
        wrapper.cuda_graph.update(dict.fromkeys(wrapper.cuda_graph))
        wrapper.curr_iteration.update(dict.fromkeys(wrapper.curr_iteration, -math.inf))
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.update(before)


def release() -> None:
    """Delete the graphs of models that are gone: NCCL destroys no group whose collectives a graph holds."""
    for table in (FullCudaGraphWrapper.cuda_graph, FullCudaGraphWrapper.result):
        table.update(dict.fromkeys(table))
    delete_cuda_graphs()  # of local, and collects what is gone
