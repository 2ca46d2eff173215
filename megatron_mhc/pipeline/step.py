"""Runs the program of one pipeline rank on Megatron's model chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_mhc import recompute
from megatron_mhc.backend import Backend
from megatron_mhc.chunk import Runner, chunk_of
from megatron_mhc.handed_on import alone_width
from megatron_mhc.ops import packed
from megatron_mhc.ops.autocast import outside
from megatron_mhc.pipeline import links
from megatron_mhc.pipeline.comm import GroupTransport, HostTransport, channels_of
from megatron_mhc.pipeline.edges import backward, edge_of
from megatron_mhc.pipeline.gradients import GradientSync
from megatron_mhc.pipeline.loading import first_of_its_kind
from megatron_mhc.pipeline.nodes import StageEntry, StageExit
from megatron_mhc.pipeline.push import PushTransport
from megatron_mhc.pipeline.streams import streams_for
from megatron_mhc.pipeline.transport import Transport
from megatron_mhc.schedule.program import (
    HEAD,
    SPLIT,
    TAIL,
    Message,
    Op,
    Plan,
    build_program,
)

# Called with every operation of every step as it is run, and with the step; for tests and profilers.
observers: list[Callable[[Op, Step], None]] = []


class Step:
    """All micro-batches of one step on one rank.

    Nothing that outlives `run` refers to the step, nor does it to itself: it lets go of the data iterators
    when its caller does, since those may have processes that somebody waits for at exit.

    Args:
        chunks: the rank's model chunks, wrapped as Megatron's training wraps them.
        sizes: (sequence length, micro-batch size).
        See `engine.forward_backward` for the others.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        chunks: list[torch.nn.Module],
        iterators: list[Any],
        forward_step_func: Callable[..., Any],
        groups: ProcessGroupCollection,
        sizes: tuple[int, int],
        *,
        collect_non_loss_data: bool,
        first_val_step: bool | None,
    ):
        self.plan, self.rank, self.chunks, self.iterators = plan, rank, chunks, iterators
        self.forward_step_func, self.groups = forward_step_func, groups
        self.collect_non_loss_data, self.first_val_step = collect_non_loss_data, first_val_step
        self.config = get_model_config(chunks[0])
        self.backend = Backend(self.config.mhc)  # of the streams that arrive
        self.program = build_program(plan, rank)
        self.at = 0
        self.transport = self._transport(sizes)
        self.sync = GradientSync(plan, rank, chunks, self.config)
        self.reports: list[Any] = []
        self.num_tokens = torch.zeros([], dtype=torch.int, device=self.transport.device)
        self.received: dict[Message, Tensor] = {}
        self.to_send: dict[Message, Tensor] = {}
        # By (micro-batch, stage), from its forward to its backward:
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.entries: dict[tuple[int, int], StageEntry] = {}
        self.exits: dict[tuple[int, int], StageExit] = {}
        self.outputs: dict[tuple[int, int], Any] = {}  # a loss, or the edge of what was sent, see edges.py
        self.blocks: dict[tuple[int, int], Any] = {}  # what `recompute` dropped

    def _transport(self, sizes: tuple[int, int]) -> Transport:
        config, (sequence, batch) = self.config, sizes
        tokens = sequence // self.groups.cp.size()
        if config.sequence_parallel:
            tokens //= self.groups.tp.size()
        dtype = config.pipeline_dtype
        n, split = config.mhc.num_residual_streams, self.plan.boundary == SPLIT
        written = n * (1 + config.mhc.reads_previous)  # coefficients: h_post, and h_pre if that is handed on
        wide: tuple[int, ...] = (tokens, batch, n * config.hidden_size)
        alone: tuple[int, ...] = (*wide[:2], wide[2] if split else alone_width(config, config.mhc))
        narrow: tuple[int, ...] = (*wide[:2], packed.width(config.hidden_size, written, dtype))
        shapes = {"streams": alone, "mixed": wide, "d_streams": alone, "write": narrow, "d_write": narrow}
        device = torch.empty(0, device="cuda").device  # the current one; a stage may have no parameters
        pp, plan = self.groups.pp, self.plan
        how = (shapes, dtype, device, streams_for(device, dist.get_backend(pp)))
        if links.choose(pp, self.config.mhc).pushes:
            return PushTransport(plan, self.rank, links.pool_of(pp), *how)
        channels = channels_of(pp)
        kind = (channels.ranks, plan.forward_only, plan.fused, plan.boundary, wide, dtype)
        if channels.hosts is not None and first_of_its_kind(self.chunks[0], kind):
            return HostTransport(plan, self.rank, channels.hosts, *how)
        return GroupTransport(plan, self.rank, channels, *how)

    def run(self) -> None:
        """Run the program, and wait until all messages have left."""
        try:
            with self.sync:
                while self.at < len(self.program):
                    self._advance()
            self.transport.drain()
        except BaseException:
            self.transport.abandon()
            raise
        finally:
            self.exits.clear()  # after an error they would call back

    def _advance(self) -> Op:
        op = self.program[self.at]
        self.at += 1
        for observer in observers:
            observer(op, self)
        getattr(self, f"_{op.kind}")(op)  # by name: a table of bound methods would keep the step alive
        return op

    def _post(self, op: Op) -> None:
        self.transport.post(op.message)

    def _wait(self, op: Op) -> None:
        self.received[op.message] = self.transport.wait(op.message)

    def _send(self, op: Op) -> None:
        self.transport.sweep()
        self.transport.send(op.message, self.to_send.pop(op.message))

    def _replay(self, op: Op) -> None:
        recompute.replay(self.blocks.pop(op[2:4]))

    # Forward

    def _forward(self, op: Op) -> None:
        if op.what == TAIL:
            return  # the forward step that is under way continues, see `_early`
        plan, (microbatch, stage) = self.plan, op[2:4]
        key, last = (microbatch, stage), stage == plan.stages - 1
        leaves = None if last or plan.boundary != SPLIT else StageExit(lambda u: self._early(op, u))
        output = self.forward_step(key, leaves)
        if leaves is not None and self.program[self.at - 1] != op._replace(what=TAIL):
            raise RuntimeError(f"stage {stage} ended without reaching its last MLP")
        if not last:
            self.put(Message("write" if leaves else "streams", microbatch, stage), output)
        if plan.forward_only:
            if stage > 0 and plan.boundary != SPLIT:
                self.transport.release(Message("streams", microbatch, stage - 1))
            return
        if plan.replay:
            self.blocks[key] = recompute.handle(self.chunks[stage // plan.pp])
        if leaves is not None:
            self.exits[key] = leaves
        else:
            self.outputs[key] = output if last else edge_of(output)

    def forward_step(self, key: tuple[int, int], runner: Runner | None = None) -> Tensor:
        """Megatron's forward step of a chunk, its layers run by `runner`, None for in order.

        Returns:
            what the chunk sends, or the loss of the last stage.
        """
        plan, (microbatch, stage) = self.plan, key
        chunk = stage // plan.pp
        self.sync.before_forward()
        layers = chunk_of(self.chunks[chunk])
        with contextlib.nullcontext() if runner is None or layers is None else layers.run_by(runner):
            output, tokens = schedules.forward_step(
                self.forward_step_func,
                self.iterators[chunk],
                self.chunks[chunk],
                plan.microbatches,
                self._enter(key),
                self.reports,
                self.config,
                cp_group_size=self.groups.cp.size(),
                collect_non_loss_data=self.collect_non_loss_data,
                is_first_microbatch=schedules.check_first_val_step(
                    self.first_val_step, plan.forward_only, microbatch == 0
                ),
                current_microbatch=microbatch,
                vp_stage=chunk if plan.vpp > 1 else None,
                is_last_stage=stage == plan.stages - 1,
            )
        self.num_tokens += tokens
        return output

    def _early(self, head: Op, u: Tensor) -> None:
        """The last layer calls it before its MLP: run the program up to that point."""
        self.put(Message("mixed", head.microbatch, head.stage), u)
        with outside(self.transport.device.type):  # of the forward's torch.autocast
            while self._advance() != head._replace(what=TAIL):
                pass

    def _enter(self, key: tuple[int, int]) -> Tensor | None:
        """The streams that a chunk starts from, a leaf whose gradient is wanted; None on the first stage."""
        microbatch, stage = key
        if stage == 0:
            return None
        if self.plan.boundary == SPLIT:
            u = self.received.pop(Message("mixed", microbatch, stage - 1))
            written = self.received.pop(Message("write", microbatch, stage - 1))
            entry = StageEntry(u, written, self.config.hidden_size, self.backend)
            self.transport.release(Message("mixed", microbatch, stage - 1))
            streams = entry.streams
            if not self.plan.forward_only:
                self.entries[key] = entry
        else:
            streams = self.received.pop(Message("streams", microbatch, stage - 1))
        if not self.plan.forward_only:
            self.inputs[key] = streams.requires_grad_()
        return streams

    # Backward

    def _backward(self, op: Op) -> None:
        key = op[2:4]
        with self.backward_step(key, first=op.what != HEAD, last=op.what != TAIL):
            if op.what == TAIL:
                df, dh_post = self.arrived_write(key)
                self.received[self._from_next("dh_post", key)] = dh_post
                self.exits[key].backward_mlp(df)
            elif op.what == HEAD:
                dx, dh_post = (self.received.pop(self._from_next(n, key)) for n in ("d_streams", "dh_post"))
                self.exits.pop(key).backward_rest(dx, dh_post)
            else:
                output = self.outputs.pop(key)
                if isinstance(output, Tensor):
                    self.backward_loss(output)
                else:
                    backward([(output, self.received.pop(self._from_next("d_streams", key)))])

    @contextlib.contextmanager
    def backward_step(self, key: tuple[int, int], first: bool, last: bool) -> Iterator[None]:
        """Around a part of a chunk's backward: timers, the first part's and the last part's bookkeeping."""
        with self.timed_backward():
            if first:
                self.sync.before_backward()
            yield
            if last:
                self._leave_backward(key)
                self.end_backward(key)

    def end_backward(self, key: tuple[int, int]) -> None:
        """A chunk's backward is done, and what it sends is there."""
        self.sync.after_backward()

    @contextlib.contextmanager
    def timed_backward(self) -> Iterator[None]:
        timers = self.config.timers
        if timers is not None:
            timers("backward-compute", log_level=2).start()
        yield
        if timers is not None:
            timers("backward-compute").stop()

    def arrived_write(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """df: [s, b, C] and dh_post: [s*b, n] that the next stage sent; see `SubLayer.leave`."""
        message = self.received.pop(self._from_next("d_write", key))
        df, dh_post = packed.unpack(message, self.config.hidden_size)
        return df.reshape(*message.shape[:2], df.shape[1]), dh_post

    def backward_loss(self, loss: Tensor) -> None:
        """Go backward from the loss of the last stage, scaled as Megatron does."""
        scale = self.config.grad_scale_func
        loss = loss if scale is None else scale(loss)
        if loss.requires_grad:
            torch.autograd.backward(loss)

    def _from_next(self, name: str, key: tuple[int, int]) -> Message:
        return Message(name, key[0], key[1] + 1)

    def _leave_backward(self, key: tuple[int, int]) -> None:
        """Hand on the gradient of a chunk's streams, and let go of what its backward has read."""
        plan, (microbatch, stage) = self.plan, key
        if (streams := self.inputs.pop(key, None)) is not None:
            dx = streams.grad if streams.grad is not None else torch.zeros_like(streams)
            if (entry := self.entries.pop(key, None)) is not None:
                dx, d_write = entry.gradients(dx)
                self.put(Message("d_write", microbatch, stage), d_write)
            self.put(Message("d_streams", microbatch, stage), dx)
            if plan.boundary != SPLIT:
                self.transport.release(Message("streams", microbatch, stage - 1))
        if stage < plan.stages - 1:
            self.transport.release(self._from_next("d_streams", key))

    def put(self, message: Message, tensor: Tensor) -> None:
        """Keep a tensor for its SEND."""
        self.to_send[message] = self.transport.kept(tensor)


def layers_of(chunk: Any) -> Any:
    """The transformer layers of a wrapped model chunk."""
    return get_attr_wrapped_model(chunk, "decoder", return_model_obj=True).decoder.layers
