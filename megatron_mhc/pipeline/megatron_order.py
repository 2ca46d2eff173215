"""Megatron's own interleaved order as a program, to compare with; nothing runs it but the simulator."""

from __future__ import annotations

from megatron_mhc.schedule.program import (
    ALL,
    BACKWARD,
    FORWARD,
    POST,
    REPLAY,
    SEND,
    SPLIT,
    WAIT,
    Message,
    Op,
    Plan,
    inputs,
    outputs,
)

WAIT_SENT = "wait_sent"  # the compute stream waits until a message has left


def megatron_programs(plan: Plan) -> list[list[Op]]:
    """Megatron 0.19's interleaved order with overlapped p2p, as its defaults run it.

    Each step of warm-up and cool-down ends in a blocking exchange. In the steady state receives are posted
    one step ahead, but the compute stream waits for every forward send, whose buffer it frees.

    Raises:
        ValueError: settings that it does not have.
    """
    if plan.fused or plan.boundary == SPLIT or plan.forward_only:
        raise ValueError("Megatron's order is unfused training with whole messages")
    return [megatron_program(plan, rank) for rank in range(plan.pp)]


def megatron_program(plan: Plan, rank: int) -> list[Op]:
    """The program of one rank, see `megatron_programs`."""
    up, down = plan.forward_order(), plan.backward_order()

    def place(order: list[tuple[int, int]], at: int) -> tuple[int, int]:
        return order[at][0], order[at][1] * plan.pp + rank

    def ops(kind: str, messages: list[Message]) -> list[Op]:
        return [Op(kind, *message) for message in messages]

    def arriving(order: list[tuple[int, int]], at: int, backward: bool) -> list[Message]:
        """What the exchange behind step `at` receives: the next step's input, or the ring's."""
        if rank != (plan.pp - 1 if backward else 0):
            return inputs(plan, *place(order, at + 1), backward) if at + 1 < plan.chunks else []
        if at < plan.pp - 1 or at + 1 >= plan.chunks:
            return []
        # The rank where the ring closes takes what the other end made in the step that lines up with this.
        microbatch, chunk = order[at - (plan.pp - 1)]
        chunk += -1 if backward else 1
        return inputs(plan, microbatch, chunk * plan.pp + rank, backward) if 0 <= chunk < plan.vpp else []

    warm, total = plan.warmup(rank), plan.chunks
    program: list[Op] = []
    first = inputs(plan, *place(up, 0))
    program += ops(POST, first) + ops(WAIT, first)
    pending: set[Message] = set()  # posted and not yet waited for
    for at in range(total + warm if warm < total else 2 * total):
        f, b = at if at < total else None, at - warm if at >= warm else None
        steady = f is not None and b is not None
        if f is not None:
            program += ops(WAIT, [m for m in inputs(plan, *place(up, f)) if m in pending])
            program.append(Op(FORWARD, ALL, *place(up, f)))
            sent, got = outputs(plan, *place(up, f)), arriving(up, f, False)
            program += ops(SEND, sent) + ops(POST, got) + ops(WAIT_SENT, sent)
            pending |= set(got) if steady else set()
            program += [] if steady else ops(WAIT, got)
            if f == warm - 1 and warm < total:
                ahead = inputs(plan, *place(down, 0), True)
                program += ops(POST, ahead)
                pending |= set(ahead)
        if b is not None and 0 <= b < total:
            need = inputs(plan, *place(down, b), True)
            if f is None and b == 0:  # everything was warm-up
                program += ops(POST, need)
                pending |= set(need)
            program += ops(WAIT, [m for m in need if m in pending])
            program += [Op(REPLAY, ALL, *place(down, b))] if plan.replay else []
            program.append(Op(BACKWARD, ALL, *place(down, b)))
            sent, got = outputs(plan, *place(down, b), True), arriving(down, b, True)
            program += ops(SEND, sent) + ops(POST, got)
            pending |= set(got) if steady else set()
            program += [] if steady else ops(WAIT_SENT, sent) + ops(WAIT, got)
    return program
