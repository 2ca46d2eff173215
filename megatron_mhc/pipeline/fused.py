"""The engine for fused programs: the forward of one micro-batch and the backward of another, node by node.

The forward is Megatron's own forward step: its layers call back before each node (`NodeByNode`), and the
program runs on until that node's turn. The backward is a chain of pieces that `Tape` cut the forward into,
so it fits between the nodes of any forward.

Delayed weight gradients (`DelayedWeights`) wait for the next communication of their chunk's backward and run
beside it:

    experts                       the dispatch's all-to-all
    attention, shared experts     the combine's all-to-all of the layer below
    the rest; all of dense ones   the chunk's last message, d_streams

Only then is the chunk's backward done for the data-parallel wrapper.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_mhc import recompute
from megatron_mhc.ops.autocast import outside
from megatron_mhc.pipeline.buffers import own_buffers
from megatron_mhc.pipeline.delayed_weights import DelayedWeights
from megatron_mhc.pipeline.edges import edge_of
from megatron_mhc.pipeline.layer_nodes import NodeByNode, Tape
from megatron_mhc.pipeline.step import Step, layers_of
from megatron_mhc.schedule.program import BACKWARD, FORWARD, SPLIT, Message, Op
from megatron_mhc.schedule.streams import A2A_STREAM, COMPUTE_STREAM, stream_of


class FusedStep(Step):
    """A training step of a fused program; see `Step`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tapes: dict[tuple[int, int], Tape] = {}
        self.sent_from: dict[Message, str] = {}  # the stream that computed a message
        self.delayed: list[DelayedWeights] = []  # of each chunk, where there are any
        if self.config.delay_wgrad_compute:
            self.delayed = [DelayedWeights(chunk, self.transport.streams) for chunk in self.chunks]

    def run(self) -> None:
        with own_buffers():
            super().run()
        for weights in self.delayed:
            weights.check_computed()

    def _wait(self, op: Op) -> None:
        # On the stream of what needs it: the compute stream must not wait for what an all-to-all reads.
        kind = BACKWARD if op.message.backward else FORWARD
        consumer = next(later for later in self.program[self.at :] if later.kind == kind)
        with self.transport.streams.on(self._stream(consumer)):
            super()._wait(op)

    def _send(self, op: Op) -> None:
        with self.transport.streams.on(self.sent_from.pop(op.message, COMPUTE_STREAM)):
            super()._send(op)
        if self.delayed and op.what == "d_streams":
            with self.timed_backward():
                self._end_delayed(op.stage)

    def end_backward(self, key: tuple[int, int]) -> None:
        if not self.delayed:
            super().end_backward(key)
        elif key[1] == 0:  # no message to wait for
            self._end_delayed(0)

    def _end_delayed(self, stage: int) -> None:
        """Compute what a chunk's backward has left, before the wrapper is told that it is done."""
        self.delayed[stage // self.plan.pp].compute()
        self.sync.after_backward()

    def _stream(self, op: Op) -> str:
        layer = layers_of(self.chunks[op.stage // self.plan.pp])[op.layer]
        return stream_of(op.what, layer.is_moe_layer)

    def _forward(self, op: Op) -> None:
        if op.layer > 0 or op.what != "attention":
            return  # the forward step that is under way continues, see `reach`
        plan, (microbatch, stage) = self.plan, op[2:4]
        key, last = (microbatch, stage), stage == plan.stages - 1
        layers = layers_of(self.chunks[stage // plan.pp])
        tape = Tape(self.transport.streams)
        split = plan.boundary == SPLIT and not last
        nodes = NodeByNode(tape, lambda *where: self._reach(key, *where), len(layers), split=split, last=last)
        output = self.forward_step(key, nodes)
        nodes.finish()
        if not last:
            message = Message("write" if split else "streams", microbatch, stage)
            self.put(message, output)
            self.sent_from[message] = nodes.stream
            if not split:
                tape.end(edge_of(output))
        if plan.replay:
            self.blocks[key] = recompute.handle(self.chunks[stage // plan.pp])
        self.tapes[key] = tape
        if last:
            self.outputs[key] = output

    def _reach(self, key: tuple[int, int], layer: int, node: str, mixed: Tensor | None) -> None:
        """A layer calls it before each of its nodes: run the program up to that node."""
        if mixed is not None:
            self.put(Message("mixed", *key), mixed)
        until = Op(FORWARD, node, *key, layer)
        if layer == 0 and node == "attention":
            return  # it started the forward step
        with outside(self.transport.device.type):  # of the forward's torch.autocast
            while (op := self._advance()) != until:
                if op.kind == FORWARD:
                    raise RuntimeError(f"the model reached {until} where the program has {op}")

    def _backward(self, op: Op) -> None:
        key, node = op[2:4], (op.layer, op.what)
        tape = self.tapes[key]
        top = len(layers_of(self.chunks[op.stage // self.plan.pp])) - 1
        cut = self.plan.boundary == SPLIT and op.stage < self.plan.stages - 1
        starts = op.layer == top and op.what == ("combine" if cut else "post")
        ends = op.layer == 0 and op.what == "attention"
        with self.backward_step(key, first=starts, last=ends), tape.on(self._stream(op)):
            if starts and cut:
                df, tape.dh_post = self.arrived_write(key)
                tape.seed([df])
            elif starts and key in self.outputs:
                self.backward_loss(self.outputs.pop(key))
            elif starts:
                tape.seed([self.received.pop(self._from_next("d_streams", key))])
            if op.layer == top and op.what == "attention" and cut:
                tape.seed_early(self.received.pop(self._from_next("d_streams", key)))
            tape.backward(node)
        if ends:
            del self.tapes[key]
        if self.delayed and self._stream(op) == A2A_STREAM:
            with self.timed_backward():
                self.delayed[op.stage // self.plan.pp].compute()
