"""Sub-layers that drop what mHC adds to memory, block by block, and replay it in backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from megatron_mhc.config import flag
from megatron_mhc.ops import autocast, reference
from megatron_mhc.parallel import gather_layer
from megatron_mhc.recompute.block import (
    Block,
    Emptied,
    Replayed,
    Slot,
    StreamSlots,
    owns_storage,
    saving,
    storage_key,
    stream_of,
    used_on,
)
from megatron_mhc.sublayer import Call, Left, SubLayer, Visit

if TYPE_CHECKING:
    from megatron_mhc.hyper_connection import Mappings
    from megatron_mhc.layer import BetweenStreams
    from megatron_mhc.ops.options import ReadNorm
    from megatron_mhc.recompute.chunk import DroppingChunk


class DroppingSubLayer(SubLayer):
    """A SubLayer whose streams and layer inputs are dropped and replayed; the results are the same bits.

    Args:
        norm: that of F, where it is a module of its own whose output Megatron keeps.
        inside: bytes per token that F saves, see `inventory`.
    """

    chunk: DroppingChunk

    def __init__(self, *args: Any, norm: nn.Module | None, inside: int):
        super().__init__(*args)
        self.has_norm, self.inside = norm is not None, inside
        if norm is not None:
            norm.register_forward_hook(_see_norm)

    # Storages are emptied and hooks set, of which a compiled graph would know nothing.
    @torch.compiler.disable
    def pre(self, streams: Tensor, h_pre: Tensor | None = None) -> Visit:
        block = self.chunk.block_at(self.position, streams)
        if block is None:
            return super().pre(streams, h_pre)
        with self.chunk.abandoned_on_error():
            dropped = Dropped(self, block, streams, h_pre)
            with dropped.slots.reading():
                layer_input, mappings = self.connection(streams, h_pre)
            dropped.takes_bias = not isinstance(mappings, reference.Coefficients)
            visit = Visit(streams, layer_input, mappings, dropped, self.connection.handed_on(mappings))
            visit.read_by_f(layer_input)
        return visit

    def run(self, layer: BetweenStreams, visit: Visit, call: Call) -> Tensor:
        with self.chunk.abandoned_on_error():
            return super().run(layer, visit, call)

    @torch.compiler.disable
    def post_res(self, visit: Visit, f: Tensor, work_ahead: bool = True) -> Tensor:
        dropped = visit.left
        if not isinstance(dropped, Dropped):
            return super().post_res(visit, f, work_ahead)
        with self.chunk.abandoned_on_error():
            with dropped.slots.writing():
                output = super().post_res(visit, f, work_ahead)
            dropped.drop(visit, f, output)
            self.chunk.passed(self.position, dropped.block, output)
        return output

    def let_go(self, visit: Visit) -> None:
        # A leaf lives as long as its graph, so its storage is emptied; the replay fills a slot, not the leaf.
        dropped = visit.left
        if isinstance(dropped, Dropped) and dropped.slot is not None:
            if storage_key(visit.layer_input) != storage_key(visit.streams):
                Emptied(visit.streams)

    def leave(self, streams: Tensor, h_pre: Tensor | None = None) -> tuple[Visit, Tensor, Tensor]:
        self.chunk.leave(streams)  # what the two gradients of a split pipeline boundary need is kept
        return super().leave(streams, h_pre)

    def read_again(self, x: Tensor, h_pre: Tensor, out: Tensor) -> None:
        """Write the layer input of the streams x: [s, b, n*C] into out: [s, b, C], by the reference."""
        x = reference.by_token(x, self.connection.mhc.num_residual_streams)
        norm = None if self.connection.norm is None else self.connection.norm.read()
        out.copy_(reference.pre(x, h_pre, norm).view(out.shape))

    def write_again(
        self, x: Tensor, f: Tensor, coefficients: reference.Coefficients | Tensor, f_bias: Tensor | None
    ) -> Tensor:
        """`post_res` from coefficients alone; f_bias: [C], what the Triton operation added to f."""
        s, b, width = f.shape
        x, f = reference.by_token(x, self.connection.mhc.num_residual_streams), f.reshape(s * b, width)
        if isinstance(coefficients, reference.Coefficients):
            mixed = self.connection.write(x, f, coefficients)
        else:
            from megatron_mhc.ops.triton.post_res import post_res_forward  # imports triton

            parts = self.connection.options.form.parts
            mixed = post_res_forward(x, f.contiguous(), coefficients, f_bias, parts=parts)
        return reference.in_sequence(mixed, s, b)


def coefficients_of(mappings: Mappings) -> reference.Coefficients | Tensor:
    """What a replay needs, detached; [T, n*n + 2n] of the Triton operations."""
    if isinstance(mappings, reference.Coefficients):
        return reference.Coefficients(*(h.detach() for h in mappings))
    return mappings.coefficients


def folded_norm(mappings: Mappings) -> tuple[ReadNorm | None, Tensor | None]:
    """The norm that kernels folded into `pre`, if any, and what they kept of it."""
    if isinstance(mappings, reference.Coefficients):
        return None, None
    return mappings.norm, mappings.norm_saved


@torch.compiler.disable
def _see_norm(norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the norm in front of F."""
    if isinstance(output, tuple):  # --fused-residual-rmsnorm: with its input
        output = output[0]
    dropped = Left.on(inputs[0])
    if isinstance(dropped, Dropped) and isinstance(output, Tensor):
        dropped.norm, dropped.norm_output = norm, output


class Dropped(Left):
    """What one visit of a sub-layer drops, and its replay; a `Replayed` of its block."""

    def __init__(
        self, sublayer: DroppingSubLayer, block: Block, streams: Tensor, h_pre: Tensor | None = None
    ):
        super().__init__()
        self.sublayer, self.block = sublayer, block
        self.autocast = autocast.state(streams.device.type)
        self.norm: nn.Module | None = None
        self.norm_output: Tensor | None = None
        self.coefficients: reference.Coefficients | Tensor | None = None
        self.folded: tuple[ReadNorm | None, Tensor | None] = None, None
        self.f: Tensor | None = None
        # [s*b, n], what the sub-layer in front handed on; it stays, being n numbers of a token.
        self.h_pre = None if h_pre is None else h_pre.detach().requires_grad_(h_pre.requires_grad)
        self.needs_grad = streams.requires_grad
        self.stream = stream_of(streams)  # on which the backward pass of `pre` and F will run too
        self.emptied: Emptied | None = None
        self.emptied_norm: Emptied | None = None
        self.refilled: list[Tensor] = []
        connection = sublayer.connection
        self.coefficients_again = connection.mhc.recompute_coefficients
        self.slots = StreamSlots(block, everything=self.coefficients_again)
        self.slot: ref[Slot] | None = None
        if self.coefficients_again:
            self.slots.keep(list(connection.parameters()))
            if connection.norm is not None:
                self.slots.keep([connection.norm.read().weight])
            if h_pre is not None:
                self.slots.keep([h_pre])
        if block.sublayers:
            self.slot = self.slots.drop(streams)
        else:
            self.slots.keep([streams])

    def drop(self, visit: Visit, f: Tensor, output: Tensor) -> None:
        """Let the streams go, and empty what F has read, unless no gradient will ask for it."""
        layer_input, norm_output = visit.layer_input, self.norm_output
        self.f = f.detach()
        if not self.coefficients_again:
            self.coefficients = coefficients_of(visit.mappings)
            self.folded = folded_norm(visit.mappings)
        if output.requires_grad:
            held = {storage_key(f), storage_key(output), *self.slots.dropped()}
            if self.block.first is not None:
                held.add(storage_key(self.block.first))
            if owns_storage(layer_input) and storage_key(layer_input) not in held:
                held.add(storage_key(layer_input))
                self.emptied = Emptied(layer_input)
            if norm_output is not None and self.emptied is not None:
                if owns_storage(norm_output) and storage_key(norm_output) not in held:
                    self.emptied_norm = Emptied(norm_output)
        self.norm_output = None
        del layer_input.mhc_left  # type: ignore[attr-defined]  # F's graph would keep all of this alive
        self.slots.close()
        self.block.sublayers.append(self)

    def replay(self, x: Tensor, behind: Sequence[Replayed]) -> tuple[int, Tensor | None]:
        """See `block.Replayed`."""
        self._gather()
        if isinstance(self.coefficients, Tensor):
            return self._replay_row(x, behind)
        self._put_back(x)
        target = None if self.emptied is None else self.emptied.refill()
        coefficients: reference.Coefficients | Tensor
        if self.coefficients is None:
            coefficients = self._read_all(x, target)
        else:
            coefficients = self.coefficients
            if target is not None:
                read_with = coefficients.h_pre if self.h_pre is None else self.h_pre.detach()
                self.sublayer.read_again(x, read_with, target)
        self._finish(target)
        assert self.f is not None
        return 1, self.sublayer.write_again(x, self.f, coefficients, self.bias) if behind else None

    def _replay_row(self, x: Tensor, behind: Sequence[Replayed]) -> tuple[int, Tensor | None]:
        """As many connections as one launch takes, from the coefficients that they kept."""
        from megatron_mhc.ops.triton import replay  # imports triton

        row, n = [self], self.sublayer.connection.mhc.num_residual_streams
        for sublayer in behind[: replay.at_once(n) - 1]:
            if not isinstance(sublayer, Dropped) or not isinstance(sublayer.coefficients, Tensor):
                break
            sublayer._gather()
            row.append(sublayer)
        s, b, _ = x.shape
        width = x.shape[-1] // n
        targets = [None if one.emptied is None else one.emptied.refill() for one in row]
        kept = []
        for one, target in zip(row, targets, strict=True):
            assert isinstance(one.coefficients, Tensor) and one.f is not None
            f = one.f.reshape(s * b, width).contiguous()
            given = None if one.h_pre is None else one.h_pre.detach()
            out = None if target is None else target.view(s * b, width)
            kept.append(replay.Connection(one.coefficients, f, out, one.bias, *one.folded, given))
        more = len(behind) >= len(row)
        parts = self.sublayer.connection.options.form.parts
        between = replay.replay(x.view(s * b, n, width), kept, behind=more, parts=parts)
        streams = [x, *(t.view(x.shape) for t in between)]
        for one, its, target in zip(row, streams, targets, strict=False):
            one._put_back(its)
            one._finish(target)
        return len(row), streams[-1] if more else None

    def _gather(self) -> None:
        """Have what the replay reads of the layer's parameters, whose own backward pass may be far."""
        if self.sublayer.layer is not None:
            gather_layer(self.sublayer.layer)

    def _put_back(self, x: Tensor) -> None:
        """Put the streams where the forward pass has dropped them."""
        if self.slot is not None and (slot := self.slot()) is not None:
            slot.tensor = x
            self.refilled.append(x)

    def _finish(self, layer_input: Tensor | None) -> None:
        """Bring the norm's output back from the layer input, and keep all from use by other streams."""
        if layer_input is not None:
            self.refilled.append(layer_input)
            if self.emptied_norm is not None:
                self._norm(layer_input, self.emptied_norm.refill())
        for tensor in self.refilled:
            used_on(self.stream, tensor)

    def _read_all(self, x: Tensor, target: Tensor | None) -> reference.Coefficients | Tensor:
        """Run `pre` as in the forward pass, and put what it saves where that pass had dropped it."""
        saved: list[Tensor] = []
        keep = saving(lambda tensor: saved.append(tensor.detach()))
        with torch.enable_grad(), autocast.within(self.autocast, x.device.type), keep:
            x = x.detach().requires_grad_(self.needs_grad)
            layer_input, mappings = self.sublayer.connection.forward(x, self.h_pre)  # without its hooks
        if len(saved) != len(self.slots.read):
            raise RuntimeError(
                f"{flag('recompute_coefficients')}: the replay of pre saved {len(saved)} tensors, its "
                f"forward pass {len(self.slots.read)}; was the model changed between forward and backward?"
            )
        for place, tensor in zip(self.slots.read, saved, strict=True):
            if place is not None and (slot := place()) is not None and slot.tensor is None:
                slot.tensor = tensor
                self.refilled.append(tensor)
        if target is not None:
            target.copy_(layer_input)
        return coefficients_of(mappings)

    def _norm(self, layer_input: Tensor, output: Tensor) -> None:
        assert self.norm is not None
        # A norm may take another kernel where no gradient is asked for, with other bits.
        with torch.enable_grad(), autocast.within(self.autocast, layer_input.device.type):
            again = self.norm(layer_input.detach().requires_grad_())
        output.copy_(again[0] if isinstance(again, tuple) else again)
        self.refilled.append(output)

    def kept(self) -> list[Tensor]:
        """See `block.Replayed`."""
        coefficients = self.coefficients
        if coefficients is None:
            return [] if self.f is None else [self.f]
        parts = coefficients if isinstance(coefficients, reference.Coefficients) else (coefficients,)
        return [t for t in (self.f, *parts, self.folded[1], self.h_pre) if isinstance(t, Tensor)]

    def restored(self) -> list[Tensor]:
        """See `block.Replayed`."""
        return self.refilled
