"""pre, forward, on Hopper: one read of the streams (pre.cu)."""

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.hopper.compile import SHARED, TOKENS, kernel, layout, multiprocessors, tensor_map

WIDEST = 256
PROJECTING = 8  # warps
PART = TOKENS * 9 * 4  # floats that a block tells its group of a tile


def pre_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    *,
    norm_eps: float,
    iterations: int,
    deepseek_v4: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`megatron_mhc.ops.pre.pre_forward` of x: [T, 4, C] bf16.

    Source: arXiv 2512.24880 Eqs. (14)-(19).
    """
    T, n, C = x.shape
    f32: dict[str, Any] = dict(device=x.device, dtype=torch.float32)
    out = x.new_empty(T, C)
    saved, mappings = torch.empty(T, 25, **f32), torch.empty(T, 24, **f32)
    if T == 0:
        return out, saved, mappings
    cut = layout(T, C, WIDEST, multiprocessors(x.device))
    stage = n * TOKENS * cut.width * 2
    sums = 2 * PROJECTING * TOKENS * 27 * 4
    stages = min(10, (SHARED - sums) // stage)
    compiled = kernel(
        "pre", x.device.index, 512, stages * stage + sums,
        C=C, CW=cut.width, STAGES=stages, ITERATIONS=iterations, V4=int(deepseek_v4),
    )  # fmt: skip
    blocks = cut.groups * cut.slices
    parts, ticket = torch.zeros(blocks * 2 * stages * PART + 4, **f32).split([blocks * 2 * stages * PART, 4])
    compiled.launch(
        blocks, x.device,
        tensor_map(x), weight, bias, *alphas, out, saved, mappings, parts, ticket,
        T, cut.slices, cut.groups, norm_eps,
    )  # fmt: skip
    return out, saved, mappings
