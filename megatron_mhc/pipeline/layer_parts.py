"""The parts of a MoE layer and of its mHC that lie in different nodes, whoever runs the nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_mhc.layer import HyperConnectionTransformerLayer
from megatron_mhc.ops import reference
from megatron_mhc.releases import release
from megatron_mhc.sublayer import Visit

_AFTER_MLP = release().after_mlp


def route(
    layer: HyperConnectionTransformerLayer, layer_input: Tensor, kwargs: Mapping[str, Any], how: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a MoE layer does in front of the dispatch, with layer_input: [s, b, C].

    Args:
        kwargs: packed_seq_params and padding_mask, of the layer's forward.
        how: the flag that asks for nodes.

    Returns:
        the permuted tokens and their probabilities, and the shared experts' output if there are any.

    Raises:
        ValueError: packed samples, which MoELayer routes one by one.
    """
    if getattr(kwargs.get("packed_seq_params"), "tokens_per_sample", None) is not None:
        raise ValueError(f"{how} does not route packed samples one by one: drop it, or do not pack them")
    padding = kwargs.get("padding_mask")
    if padding is not None:
        padding = padding.transpose(0, 1).bool()  # as MoELayer.forward has it
    norm = layer._forward_pre_mlp_layernorm(layer_input)
    if isinstance(norm, tuple):  # --fused-residual-rmsnorm: with the residual, which here are the streams
        norm, _ = norm
    shared = layer.mlp.shared_experts_compute(norm)
    probs, routing = layer.mlp.route(norm, padding)
    hidden, probs = layer.mlp.preprocess(norm, probs, routing)
    return hidden, probs, shared


def join(
    layer: HyperConnectionTransformerLayer, combined: Tensor, shared: Tensor | None, residual: Tensor
) -> Tensor:
    """The F of a MoE layer, [s, b, C], of what the combine brought.

    Args:
        residual: what Megatron is told of as such; nobody adds it.
    """
    output = layer.mlp.postprocess(combined, shared)
    return getattr(layer, _AFTER_MLP)((output, None), residual)


def kept(layer: HyperConnectionTransformerLayer) -> Iterable[Any]:
    """What the dispatcher keeps from one node to a later one, tensors among it."""
    return vars(layer.mlp.token_dispatcher).values()


def crossing(visit: Visit) -> tuple[Tensor, ...]:
    """What post_res, and the next layer, read of the attention's node, F aside."""
    mappings = visit.mappings
    handed_on = () if visit.handed_on is None else (visit.handed_on,)
    if isinstance(mappings, reference.Coefficients):
        return visit.streams, mappings.h_post, mappings.h_res, *handed_on
    return *mappings.take_tunnel(), *handed_on  # the tunnel's gradients post_res hands through for pre


def cross(visit: Visit, leaves: Sequence[Tensor]) -> None:
    """Let post_res, and the next layer, read the leaves that stand for `crossing`."""
    mappings = visit.mappings
    if visit.handed_on is not None:
        *leaves, visit.handed_on = leaves
    if isinstance(mappings, reference.Coefficients):
        visit.streams, h_post, h_res = leaves
        visit.mappings = mappings._replace(h_post=h_post, h_res=h_res)
    else:
        mappings.put_back(tuple(leaves))


def read_by_post_res(visit: Visit) -> tuple[Tensor, ...]:
    """The mappings' own tensors that post_res, or its backward, reads."""
    mappings = visit.mappings
    return tuple(mappings) if isinstance(mappings, reference.Coefficients) else mappings.read_by_post_res()
