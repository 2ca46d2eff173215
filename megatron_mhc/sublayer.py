"""A sub-layer between the streams: a connection and its F, which is Megatron's attention, MLP or mixer.

streams -> pre -> Visit -> run -> f -> post_res -> streams
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor
from torch.nn import functional as F

from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import reference
from megatron_mhc.releases import release

if TYPE_CHECKING:
    from megatron_mhc.chunk import ModelChunk
    from megatron_mhc.hyper_connection import Mappings
    from megatron_mhc.layer import BetweenStreams, HyperConnectionTransformerLayer
    from megatron_mhc.mamba import HyperConnectionMambaLayer

_READ_BY_MLP = release().read_by_mlp


class Left:
    """What F leaves for its sub-layer's post_res.

    It travels on the layer input, which Megatron hands to a layer's norm, and on to its bias-dropout-add
    as the residual.
    """

    bias: Tensor | None = None  # [C], to be added to f
    takes_bias = True  # post_res can add it

    @staticmethod
    def on(layer_input: Tensor) -> Left | None:
        return None if torch.compiler.is_compiling() else getattr(layer_input, "mhc_left", None)


@dataclass
class Visit:
    """One micro-batch in one sub-layer, from `pre` to `post_res`.

    Args:
        streams: [s, b, n*C], as read; layer_input: [s, b, C]; mappings: what `post_res` applies.
        left: None if F has to be complete, with its bias.
        handed_on: [s*b, n], the weights that the next sub-layer reads with; None if it makes its own.
    """

    streams: Tensor
    layer_input: Tensor
    mappings: Mappings
    left: Left | None = None
    handed_on: Tensor | None = None

    def read_by_f(self, layer_input: Tensor) -> Tensor:
        """Let F read `layer_input`, on which `left` travels; returns it."""
        self.layer_input = layer_input
        if self.left is not None:
            layer_input.mhc_left = self.left  # type: ignore[attr-defined]
        return layer_input


@dataclass
class Call:
    """The arguments of a layer's forward behind the hidden states, and the context that attention returns."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Tensor | None = None


def attention(layer: HyperConnectionTransformerLayer, layer_input: Tensor, call: Call) -> Tensor:
    """Run a layer's norm and attention on [s, b, C]."""
    f, call.context = layer._forward_attention(layer_input, *call.args, **call.kwargs)
    return f


def mlp(layer: HyperConnectionTransformerLayer, layer_input: Tensor, call: Call) -> Tensor:
    """Run a layer's norm and MLP or MoE on [s, b, C]."""
    return layer._forward_mlp(
        layer_input,
        call.kwargs.get("inference_context"),
        **{name: call.kwargs.get(name) for name in _READ_BY_MLP},
    )


def mixer(layer: HyperConnectionMambaLayer, layer_input: Tensor, call: Call) -> Tensor:
    """Run a MambaLayer's norm and mixer on [s, b, C]."""
    return MambaLayer.forward(layer, layer_input, *call.args, **call.kwargs)


class SubLayer:
    """A connection and its F in a model chunk; no module, so the layer keeps the connection's parameters.

    Args:
        f: `attention`, `mlp` or `mixer`.
        position: in the chunk.

    Attributes:
        layer: whose F it is.
        read_in, written_in: the layer in whose CUDA graph `pre` and `post_res` run; None for in none.

    Source: arXiv 2512.24880 Eq. (3).
    """

    def __init__(
        self, connection: HyperConnectionModule, f: Callable[..., Tensor], chunk: ModelChunk, position: int
    ):
        self.connection, self.f, self.chunk, self.position = connection, f, chunk, position
        self.layer: BetweenStreams | None = None
        self.read_in: BetweenStreams | None = None
        self.written_in: BetweenStreams | None = None

    def pre(self, streams: Tensor, h_pre: Tensor | None = None) -> Visit:
        """Read the layer input from streams: [s, b, n*C].

        Args:
            h_pre: what the sub-layer in front has `handed_on`.
        """
        layer_input, mappings = self.connection(streams, h_pre)
        visit = Visit(streams, layer_input, mappings, handed_on=self.connection.handed_on(mappings))
        if not torch.compiler.is_compiling() and not isinstance(mappings, reference.Coefficients):
            visit.left = Left()
            visit.read_by_f(layer_input)
        return visit

    def run(self, layer: BetweenStreams, visit: Visit, call: Call) -> Tensor:
        """F of the layer input: [s, b, C]."""
        return self.f(layer, visit.layer_input, call)

    def post_res(self, visit: Visit, f: Tensor, work_ahead: bool = True) -> Tensor:
        """Mix the streams and write f: [s, b, C] into them; returns [s, b, n*C].

        Args:
            work_ahead: the next sub-layer reads what this returns, as it is.
        """
        bias = None if visit.left is None else visit.left.bias
        next_pre = None
        grad = torch.is_grad_enabled()
        # Without gradients in evaluation and generation alone: a checkpoint's forward is cut by its replay.
        if work_ahead and (grad or not self.connection.training):
            next_pre = self.chunk.next_pre(self, visit.streams, visit.handed_on)
        one_node = self.chunk.keeps_streams or not grad
        return self.connection.post_res(visit.streams, f, visit.mappings, bias, next_pre, one_node)

    def let_go(self, visit: Visit) -> None:
        """Free the streams that `visit` has read, if they are dropped; for who holds them to the backward."""

    def leave(self, streams: Tensor, h_pre: Tensor | None = None) -> tuple[Visit, Tensor, Tensor]:
        """`pre` where a pipeline stage ends inside this sub-layer.

        Returns:
            the visit, u = H_res x: [s, b, n*C] and h_post: [s*b, n], which `post_res` elsewhere needs; behind
            h_post what is `handed_on`, if that is: [s*b, 2*n].
        """
        layer_input, mappings = self.connection(streams, h_pre)
        visit = Visit(streams, layer_input, mappings, handed_on=self.connection.handed_on(mappings))
        u, written = self.connection.mix(streams, mappings)
        if visit.handed_on is not None:
            written = torch.cat([written, visit.handed_on], dim=1)
        return visit, u, written

    def arrived(self, layer_input: Tensor, *crossed: Tensor) -> Visit:
        """The visit of what left a CUDA graph that holds this `pre` alone, see `read_across`."""
        streams, mappings = self.connection.arrived(*crossed)
        return Visit(streams, layer_input, mappings, handed_on=self.connection.handed_on(mappings))


def bias_dropout(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Megatron's bias-dropout-add without the add, which post_res does.

    Without dropout it leaves the bias to post_res too, if post_res can add one.
    """

    def apply(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
        output, bias = output_with_bias
        dropout = training and prob > 0
        if bias is not None:
            left = None if dropout else Left.on(residual)
            if left is not None and left.takes_bias and output.dtype == bias.dtype:
                left.bias = bias
            else:
                output = output + bias
        return F.dropout(output, p=prob, training=training)

    return apply
