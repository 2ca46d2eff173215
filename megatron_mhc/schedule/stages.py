"""Which decoder layers each pipeline stage holds; stage = model chunk * pp + rank, in the model's order.

And which of the layers are MoE.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any


def layer_counts(config: Any) -> tuple[int, ...]:
    """Number of decoder layers of each stage, of a TransformerConfig."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    stages = [divmod(stage, pp) for stage in range(pp * (vpp or 1))]
    if (custom := config.pipeline_model_parallel_layout) is not None:
        # Not by get_num_layers_to_build, which then counts this process's rank, whatever rank it is given.
        return tuple(custom.layout[rank][chunk].count(LayerType.decoder) for chunk, rank in stages)
    return tuple(get_num_layers_to_build(config, chunk if vpp else None, rank) for chunk, rank in stages)


def layers_of_rank(config: Any, rank: int) -> list[range]:
    """The 0-based layers of each model chunk of a pipeline rank."""
    edges = [0, *accumulate(layer_counts(config))]
    stages = [range(*ends) for ends in pairwise(edges)]
    return stages[rank :: config.pipeline_model_parallel_size]


def with_experts(frequency: int | list[int], layers: int) -> list[bool]:
    """Which decoder layers are MoE, by --moe-layer-freq: the first of so many, or those that a list marks."""
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(layers)]
    return [bool(marked) for marked in frequency]
