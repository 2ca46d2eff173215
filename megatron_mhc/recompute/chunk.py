"""Model chunks that drop and replay: the blocks one is cut into, and the block that is open."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron_mhc.chunk import ModelChunk
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.recompute import inventory, plan
from megatron_mhc.recompute.block import Block
from megatron_mhc.recompute.sublayer import DroppingSubLayer
from megatron_mhc.schedule.plans import passes_in_flight
from megatron_mhc.sublayer import attention, mlp

if TYPE_CHECKING:
    from megatron_mhc.hyper_connection import HyperConnectionModule
    from megatron_mhc.layer import BetweenStreams

logger = logging.getLogger(__name__)


class DroppingChunk(ModelChunk):
    """A ModelChunk cut into blocks.

    Blocks start and end inside a chunk, so none crosses a pipeline stage; the chunk's output, which the
    pipeline sends, belongs to no block.
    """

    sublayers: list[DroppingSubLayer]  # type: ignore[assignment]
    keeps_streams = False

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.blocks: list[int] = []  # their sizes; planned when the first streams come
        self._starts: set[int] = set()
        self._open: Block | None = None
        self._next = 0  # the sub-layer that the open block expects
        self._latest: ref[Block] | None = None

    def sublayer(
        self,
        layer: BetweenStreams,
        connection: HyperConnectionModule,
        f: Callable[..., Tensor],
        position: int,
    ) -> DroppingSubLayer:
        if f is attention:
            norm, dropped_by_megatron = layer.input_layernorm, layer.recompute_input_layernorm
            inside = (
                inventory.delta(self.config)
                if hasattr(layer.self_attention, "gated_delta_rule")
                else inventory.attention(self.config, connection.norm is not None)
            )
        elif f is mlp:
            norm, dropped_by_megatron = layer.pre_mlp_layernorm, layer.recompute_pre_mlp_layernorm
            inside = inventory.mlp(self.config, layer.is_moe_layer, connection.norm is not None)
        else:
            norm, dropped_by_megatron, inside = layer.norm, False, inventory.mamba(self.config)
        kept = None if isinstance(norm, IdentityOp) or dropped_by_megatron else norm
        return DroppingSubLayer(connection, f, self, position, norm=kept, inside=inside)

    def use(self, blocks: list[int]) -> None:
        """Cut the chunk into blocks of these sizes, from the next forward pass on."""
        if sum(blocks) != self.size or min(blocks) < 1:
            raise ValueError(f"blocks of {blocks} sub-layers do not make {self.size}")
        self.blocks, self._starts = blocks, {sum(blocks[:k]) for k in range(len(blocks))}

    def block_at(self, position: int, streams: Tensor) -> Block | None:
        """The block of the sub-layer at `position`; None where nothing is dropped, as in evaluation.

        Raises:
            RuntimeError: the chunk's sub-layers do not run in order.
        """
        if not torch.is_grad_enabled():
            self._open = None
            return None
        if not self.blocks:
            self._plan(streams)
        if position in self._starts:
            self._open, self._next = Block(streams), position
        if self._open is None or self._next != position:
            raise RuntimeError(
                f"{flag('recompute_layer_num')}: sub-layer {position} of a model chunk ran out of order; "
                "blocks need all layers of a chunk, one after the other"
            )
        self._next = position + 1
        return self._open

    def passed(self, position: int, block: Block, output: Tensor) -> None:
        """The sub-layer at `position` is done: close the block if it was its last."""
        if position + 1 == self.size or position + 1 in self._starts:
            self._close(block, output)

    def leave(self, streams: Tensor) -> None:
        """The chunk's last sub-layer reads `streams` and runs outside of blocks: close the one before it."""
        if self._open is not None and torch.is_grad_enabled():
            self._close(self._open, streams)

    @contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """Around a part of a forward pass: an exception lets the open block go."""
        try:
            yield
        except BaseException:
            self._open = None
            raise

    def _close(self, block: Block, output: Tensor) -> None:
        if output.requires_grad:
            block.close(output)
        self._open, self._latest = None, ref(block)

    def take_latest(self) -> Block | None:
        """The last block of the forward pass that has just ended, once."""
        latest, self._latest = self._latest, None
        return None if latest is None else latest()

    def _plan(self, streams: Tensor) -> None:
        if len(self.sublayers) != self.size:
            raise RuntimeError(
                f"{flag('recompute_layer_num')}: {len(self.sublayers)} sub-layers of {self.size} were built"
            )
        bytes_ = self.sublayer_bytes(streams)
        held = held_on_this_rank(self.config, self.mhc)
        self.use(plan.choose(self.mhc.recompute_layer_num, bytes_, held))
        whole = plan.without_replay(self.sublayer_bytes(streams, replayed=False), held)
        most = plan.peak(bytes_, self.blocks, held)
        rule = plan.closed_form(self.mhc.num_residual_streams, self.size)
        log_single_rank(
            logger,
            logging.INFO,
            f"mHC recompute ({flag('recompute_layer_num')} {self.mhc.recompute_layer_num}): a chunk's "
            f"{self.size} sub-layers in blocks of {', '.join(map(str, self.blocks))} (Eq. (20) for equal "
            f"blocks: {rule:.1f}); with {held} in flight it saves {(whole - most) / plan.GIB:.3f} GiB, "
            f"{100 * (whole - most) / whole:.0f} % of the layers' activations",
        )

    def sublayer_bytes(self, streams: Tensor, replayed: bool = True) -> list[plan.SubLayerBytes]:
        """Bytes of each sub-layer of a pass with these streams: [s, b, n*C]."""
        tokens, n = streams.shape[0] * streams.shape[1], self.mhc.num_residual_streams
        again, rows = self.mhc.recompute_coefficients, sum(self.mhc.parts.values())
        return [
            inventory.sublayer(
                streams.nbytes // n,
                tokens,
                n,
                rows=rows,
                norm=sublayer.has_norm,
                inside=sublayer.inside,
                replayed=replayed,
                coefficients=again,
            )
            for sublayer in self.sublayers
        ]


def held_on_this_rank(config: TransformerConfig, mhc: MHCConfig) -> int:
    """Passes of model chunks whose activations this rank holds at once."""
    if not parallel_state.model_parallel_is_initialized():
        return 1
    try:
        micro_batches = get_num_microbatches()
    except AttributeError:  # a training loop without Megatron's calculator
        micro_batches = None
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return passes_in_flight(config, mhc, rank, micro_batches)
