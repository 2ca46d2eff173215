"""Where a backward pass starts: edges of the autograd graph, or None where nothing asks for a gradient.

Edges, not tensors: what has been sent need not stay. None is the rule on a first stage that trains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge


def edge_of(tensor: Tensor) -> GradientEdge | None:
    """The edge that a tensor's gradient goes into; None for a constant."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def backward(pairs: Iterable[tuple[GradientEdge | None, Tensor | None]]) -> None:
    """Go backward from all edges at once, each with its gradient; pairs that lack one are left out."""
    wanted = [(edge, gradient) for edge, gradient in pairs if edge is not None and gradient is not None]
    if wanted:
        torch.autograd.backward([edge for edge, _ in wanted], [gradient for _, gradient in wanted])
