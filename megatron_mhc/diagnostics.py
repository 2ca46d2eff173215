"""How far a stack of mHC layers amplifies its streams: the paper's Amax gain, single and composite.

Matrices are multiplied per token and their gains averaged afterwards; an average of matrices has a
smaller gain than the matrices. Row i of a mapping says what output stream i reads.

    H [T, n, n]  mapping of one sub-layer; T tokens, n streams
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

from torch import Tensor, nn

from megatron_mhc.hyper_connection import HyperConnectionModule


def amax_gain(m: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute row sum (forward) and column sum (backward) of each matrix.

    Args:
        m: [..., n, n], one H_res or a composite.

    Returns:
        forward [...], by how much m can scale a signal that is equal in all streams; backward [...], the
        same for a gradient.

    Source: the Amax gain of arXiv 2512.24880, max_i |sum_j M_ij| and max_j |sum_i M_ij|.
    """
    return m.sum(dim=-1).abs().amax(dim=-1), m.sum(dim=-2).abs().amax(dim=-1)


def composite(h_res: Sequence[Tensor]) -> Tensor:
    """The mapping of consecutive sub-layers together, H_last ... H_first.

    Args:
        h_res: mappings [T, n, n] of the same tokens, in the order in which the sub-layers run.

    Returns:
        [T, n, n] fp64.

    Raises:
        ValueError: no mapping.

    Source: arXiv 2512.24880 Eq. (4).
    """
    if not h_res:
        raise ValueError("composite of no mappings: capture those of at least one sub-layer")
    return reduce(lambda product, h: h.double() @ product, h_res[1:], h_res[0].double())


@contextmanager
def capture_h_res(model: nn.Module | Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the H_res of every sub-layer that runs inside the `with` block, in order.

    Meant for evaluation: recomputation in a backward pass would run, and collect, a layer twice.

    Args:
        model: a model, or the list of model chunks that Megatron returns; may be wrapped.

    Yields:
        a list that grows by one detached [T, n, n] per sub-layer and forward pass.

    Raises:
        ValueError: a model without mHC.
    """
    chunks = [model] if isinstance(model, nn.Module) else model
    connections = [m for chunk in chunks for m in chunk.modules() if isinstance(m, HyperConnectionModule)]
    if not connections:
        raise ValueError(
            "the model has no mHC connections: build it with --spec megatron_mhc.specs gpt_mhc_spec"
        )
    captured: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        captured.append(output[1].h_res.detach())

    handles = [connection.register_forward_hook(hook) for connection in connections]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()
