"""Model chunks: the sub-layers of one, in order, and who runs its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.modules import module as hooked

from megatron_mhc.config import MHCConfig
from megatron_mhc.parallel import is_gathered_alone
from megatron_mhc.sublayer import Call, SubLayer, attention, mlp

if TYPE_CHECKING:
    from megatron_mhc.hyper_connection import HyperConnectionModule
    from megatron_mhc.layer import BetweenStreams
    from megatron_mhc.ops.autograd import NextPre


class Runner(Protocol):
    """Runs the layers of a model chunk in a forward pass; `layer.InOrder` is the plain one."""

    def run(self, layer: BetweenStreams, hidden_states: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """A layer's forward: hidden states and context."""


class ModelChunk:
    """What the layers of one model chunk join when they are built.

    Args:
        size: number of its sub-layers, once all are built.
        each: number of sub-layers of a layer.
    """

    keeps_streams = True  # in the graph, from the sub-layer that writes them on

    def __init__(self, config: TransformerConfig, mhc: MHCConfig, size: int, each: int):
        self.config, self.mhc, self.size, self.each = config, mhc, size, each
        self.sublayers: list[SubLayer] = []
        self.last: BetweenStreams | None = None  # of its layers
        self.runner: Runner | None = None  # None: in order
        # A checkpoint of a whole layer cuts the graph between connections.
        self._works_ahead = mhc.boundary in ("auto", "fused") and config.recompute_granularity != "full"

    def add(self, layer: BetweenStreams) -> tuple[SubLayer, ...]:
        """Take in the next layer; returns its sub-layers."""
        first, self.last = len(self.sublayers), layer
        added = tuple(
            self.sublayer(layer, connection, f, first + at)
            for at, (connection, f) in enumerate(layer.parts())
        )
        for sublayer in added:
            sublayer.layer = layer
            if sublayer.f is attention and layer.held.attention:
                sublayer.read_in = sublayer.written_in = layer
            if sublayer.f is mlp and (layer.held.mlp or layer.held.router):
                sublayer.read_in = layer
            if sublayer.f is mlp and layer.held.mlp:
                sublayer.written_in = layer
        self.sublayers += added
        return added

    def sublayer(
        self,
        layer: BetweenStreams,
        connection: HyperConnectionModule,
        f: Callable[..., Tensor],
        position: int,
    ) -> SubLayer:
        return SubLayer(connection, f, self, position)

    def next_pre(self, sublayer: SubLayer, streams: Tensor, handed_on: Tensor | None) -> NextPre | None:
        """The next connection's `pre`, if this sub-layer computes it ahead; of a `Visit` of it."""
        behind = sublayer.position + 1
        if not self._works_ahead or behind == len(self.sublayers):
            return None
        follows = self.sublayers[behind]
        if follows.read_in is not sublayer.written_in:
            return None
        # An FSDP gathers its parameters when that layer runs, and hands it another tensor of the streams.
        if follows.layer is not sublayer.layer and follows.layer and is_gathered_alone(follows.layer):
            return None
        # A compiled graph works nothing ahead, and asks for no mode.
        eager = not torch.compiler.is_compiling()
        if eager and torch.is_inference_mode_enabled() and _watched(sublayer, follows):
            return None
        return follows.connection.next_pre(streams, handed_on)

    def is_last(self, sublayer: SubLayer) -> bool:
        return sublayer.position == len(self.sublayers) - 1

    @contextmanager
    def run_by(self, runner: Runner) -> Iterator[None]:
        """Have `runner` run the layers inside the block."""
        before, self.runner = self.runner, runner
        try:
            with self.abandoned_on_error():
                yield
        finally:
            self.runner = before

    def abandoned_on_error(self) -> AbstractContextManager[None]:
        """Around a part of a forward pass, which an exception may end."""
        return nullcontext()


def _watched(writes: SubLayer, reads: SubLayer) -> bool:
    """Whether hooks of modules see the streams on the way, of whose writes inference mode keeps no count."""
    hooks = [reads.connection._forward_pre_hooks]
    if writes.layer is not reads.layer and writes.layer is not None and reads.layer is not None:
        hooks += [writes.layer._forward_hooks, reads.layer._forward_pre_hooks]
    return any(hooks) or bool(hooked._global_forward_hooks or hooked._global_forward_pre_hooks)


class ModelChunks:
    """Makes a ModelChunk for every model chunk that is built from one block spec.

    Args:
        layers: number of layers of one chunk.
        kind: class of the chunks.
        reserved_sms: that their kernels leave to others, see `ops.options.Options`.
        each: number of sub-layers of a layer: 2, of a hybrid stack's layers 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mhc: MHCConfig,
        layers: int,
        kind: type[ModelChunk] = ModelChunk,
        reserved_sms: int = 0,
        each: int = 2,
    ):
        self.config, self.mhc, self.size, self.kind = config, mhc, each * layers, kind
        self.each = each
        self.reserved_sms = reserved_sms
        self._current: ModelChunk | None = None
        self._next = 0  # number of the layer that continues the current chunk

    def __deepcopy__(self, memo: Any) -> ModelChunks:
        return self  # Megatron copies specs (--mla-down-proj-fusion) of layers that join one chunk

    def of(self, layer: BetweenStreams) -> ModelChunk:
        """The chunk of a layer that is being built; a spec's layers are built in order."""
        chunk = self._current
        if chunk is None or layer.layer_number != self._next or len(chunk.sublayers) == self.size:
            chunk = self.kind(self.config, self.mhc, self.size, self.each)
        self._current, self._next = chunk, layer.layer_number + 1
        return chunk


def chunk_of(model: Any) -> ModelChunk | None:
    """The ModelChunk of a model or of one of its virtual stages, wrapped or not; None without layers.

    Layers of multi-token prediction have chunks of their own, which no schedule runs.
    """
    for module in model.modules():
        chunk = getattr(module, "chunk", None)
        if isinstance(chunk, ModelChunk) and not getattr(module, "is_mtp_layer", False):
            return chunk
    return None
