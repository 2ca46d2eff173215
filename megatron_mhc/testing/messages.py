"""The messages of a pipeline step without a model: what every message holds follows from its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.pipeline.transport import Transport
from megatron_mhc.schedule.lanes import NAMES, NARROW, let_go
from megatron_mhc.schedule.program import COMPUTE, POST, SEND, WAIT, Message, Plan, build_program

_PERIOD = 241  # of what a message holds; every number is exact in bf16


def content(message: Message, step: int, like: tuple[tuple[int, ...], torch.dtype, torch.device]) -> Tensor:
    """What a message holds; neighbours in name, micro-batch, stage and step differ everywhere."""
    shape, dtype, device = like
    first = 7 * message.microbatch + 31 * message.stage + 89 * NAMES.index(message.name) + 3 * step
    numbers = torch.arange(torch.Size(shape).numel(), device=device)
    return ((numbers + first) % _PERIOD).to(dtype).view(shape)


def drive(
    plan: Plan,
    rank: int,
    transport: Transport,
    step: int,
    work: Callable[[Any], None] = lambda op: None,
) -> Tensor:
    """Run a rank's program with such messages.

    Args:
        work: called with every compute operation.

    Returns:
        how many messages were wrong when they came or when they were let go of, on the transport's device.
    """
    wrong = torch.zeros((), dtype=torch.int64, device=transport.device)
    program, ends = build_program(plan, rank), let_go(plan, build_program(plan, rank))
    received: dict[Message, Tensor] = {}

    def expected(message: Message) -> Tensor:
        return content(message, step, (transport.shapes[message.name], transport.dtype, transport.device))

    for at, op in enumerate(program):
        if op.kind == POST:
            transport.post(op.message)
        elif op.kind == WAIT:
            received[op.message] = transport.wait(op.message)
            wrong += (received[op.message] != expected(op.message)).any()
        elif op.kind == SEND:
            transport.sweep()
            transport.send(op.message, expected(op.message))
        elif op.kind in COMPUTE:
            work(op)
        for message in ends.get(at, ()):
            wrong += (received.pop(message) != expected(message)).any()
            if message.name not in NARROW:
                transport.release(message)
    transport.drain()
    return wrong
