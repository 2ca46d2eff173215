"""Selective recompute: drop what mHC adds to memory, and replay mHC alone in the backward pass.

    plan.py        sizes of the blocks, Eq. (20)      sublayer.py    the sub-layers that drop and replay
    inventory.py   what attention and MLP save         block.py       how tensors go and come back
    estimate.py    python -m megatron_mhc.recompute    chunk.py       a model chunk, cut into blocks
    full.py        Megatron's full recompute

A block is replayed once, by whatever comes first: the gradient of its output, or a schedule's `replay`.

    output = model_chunk(...)                  # forward pass of a micro-batch
    block = recompute.handle(model_chunk)      # right after it
    ...
    recompute.replay(block)                    # any time before its backward pass, on any CUDA stream
"""

from __future__ import annotations

from typing import Any

from megatron_mhc.recompute.block import Block

__all__ = ["Block", "handle", "replay"]


def handle(model_chunk: Any) -> Block | None:
    """The block that the backward pass of the forward pass just done will need first.

    Args:
        model_chunk: a model or one of its virtual stages, wrapped or not.

    Returns:
        for `replay`; None where nothing is dropped (recompute is off, an evaluation, a chunk without
        layers), and on a second call after one forward pass.
    """
    from megatron_mhc.chunk import chunk_of  # imports megatron
    from megatron_mhc.recompute.chunk import DroppingChunk

    chunk = chunk_of(model_chunk)
    return chunk.take_latest() if isinstance(chunk, DroppingChunk) else None


def replay(block: Block | None) -> None:
    """Bring back what a block has dropped, now and on the current CUDA stream.

    The backward pass then finds it there. Does nothing for None and for a block that was replayed before.
    """
    if block is not None:
        block.replay()
