"""When the data-parallel wrappers of the model chunks may reduce gradients and gather parameters."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

from torch import nn

from megatron_mhc.schedule.program import Plan


class GradientSync:
    """Megatron's rules for overlapping data-parallel communication with a pipeline step.

    Used as a context around the step. Of its config it reads no_sync_func, grad_sync_func and
    param_sync_func, each a function or one for every chunk; evaluation uses none of them.

    A chunk's gradients are complete after the backward of its last micro-batch. Without grad_sync_func the
    wrappers reduce them by themselves as they come; with it (--overlap-grad-reduce without
    --no-align-grad-reduce) all ranks of the pipeline start at about the same time, a rank r steps after the
    chunk is complete.
    """

    def __init__(self, plan: Plan, rank: int, chunks: list[nn.Module], config: Any):
        self.rank, self.chunks = rank, chunks
        self.active = not plan.forward_only
        self.forward_order, self.backward_order = plan.forward_order(), plan.backward_order()
        self.last_microbatch = plan.microbatches - 1
        self.no_sync = config.no_sync_func
        self.grad_sync = self._per_chunk(config.grad_sync_func)
        self.param_sync = self._per_chunk(config.param_sync_func)
        self.forwards = self.backwards = 0
        self.synchronized: set[int] = set()
        self._held: contextlib.ExitStack | None = None

    def _per_chunk(self, function: Any) -> list[Any] | None:
        if function is None or not self.active:
            return None
        return function if isinstance(function, list) else [function] * len(self.chunks)

    def __enter__(self) -> GradientSync:
        if self.active:
            self._hold()
        if self.param_sync is not None:
            for chunk in range(min(2, len(self.chunks))):
                self.param_sync[chunk](self.chunks[chunk].parameters())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()
        if error is None and self.grad_sync is not None:
            for chunk in range(len(self.chunks)):
                if chunk not in self.synchronized:
                    self._start(chunk)

    def before_forward(self) -> None:
        """Gather the parameters of the chunk after next, on all ranks at once."""
        at = self.forwards + self.rank
        self.forwards += 1
        if self.param_sync is None or at >= len(self.forward_order):
            return
        microbatch, chunk = self.forward_order[at]
        if microbatch == 0 and 1 < chunk + 1 < len(self.chunks):
            self.param_sync[chunk + 1](self.chunks[chunk + 1].parameters())

    def before_backward(self) -> None:
        microbatch, chunk = self.backward_order[self.backwards]
        if self.grad_sync is None and microbatch == self.last_microbatch:
            self._release()
            self.synchronized.add(chunk)

    def after_backward(self) -> None:
        at = self.backwards - self.rank
        self.backwards += 1
        if self.grad_sync is not None and at >= 0:
            microbatch, chunk = self.backward_order[at]
            if microbatch == self.last_microbatch:
                self._release()
                self._start(chunk)
        self._hold()

    def _start(self, chunk: int) -> None:
        assert self.grad_sync is not None
        self.grad_sync[chunk](self.chunks[chunk].parameters())
        self.synchronized.add(chunk)

    def _hold(self) -> None:
        if self._held is not None:
            return
        self._held = contextlib.ExitStack()
        functions = self.no_sync if isinstance(self.no_sync, list) else [self.no_sync]
        for function in functions:
            if function is not None:
                self._held.enter_context(function())

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
