"""pre, backward, on Hopper: one read of the streams and their gradient (pre_backward.cu)."""

from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.hopper.compile import (
    AHEAD,
    BOX,
    SHARED,
    kernel,
    layout,
    loads,
    multiprocessors,
    tensor_map,
)
from megatron_mhc.ops.link import Written

WIDEST = 128
TILE = 8  # tokens
MOST_STAGES = 20  # tiles of a block's ring
F_SLOTS = 4  # tiles of f on their way
MOST_LOADS = 14  # of a lane at once
MIDDLE = 3  # warps
FEW = 32  # slices, up to which a warp prepares two tokens at a time: more take more registers
PART = TILE * 8 * 4  # floats that a block tells its group of a tile
COEFFICIENTS = TILE * 17 * 4  # and that the group knows of it then


def pre_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor,
    dl: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    saved: Tensor,
    *,
    iterations: int,
    deepseek_v4: bool,
    written: Written | None = None,
    f_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`megatron_mhc.ops.pre_backward.pre_backward` of x, g: [T, 4, C] and f, dl: [T, C] bf16."""
    T, n, C = x.shape
    f32: dict[str, Any] = dict(device=x.device, dtype=torch.float32)
    dx, d_weight = torch.empty_like(x), torch.empty(24, n * C, **f32)
    d_bias, d_alphas = torch.empty(24, **f32), torch.empty(3, **f32)
    if T == 0:
        return dx, d_weight.zero_(), d_bias.zero_(), d_alphas.zero_()
    if written is None:
        writer, df = (saved, bias, alphas[1]), dl  # neither read nor written
    else:
        writer, df = written.saved, torch.empty_like(dl)
        written.fill(dx, df)
    cut = layout(T, C, WIDEST, multiprocessors(x.device), TILE)
    shared, stages = memory(cut.width, iterations)
    compiled = kernel(
        "pre_backward", x.device.index, 512, shared,
        BT=TILE, C=C, CW=cut.width, STAGES=stages, F_SLOTS=F_SLOTS, ITERATIONS=iterations,
        V4=int(deepseek_v4), DF=int(written is not None),
        LOADS=loads(cut.slices, 4, MOST_LOADS), TOGETHER=2 if cut.slices <= FEW else 1,
    )  # fmt: skip
    blocks, slots = cut.groups * cut.slices, cut.groups * 2 * stages
    sizes = [(slots * cut.slices + AHEAD) * PART, slots * COEFFICIENTS, 2 + 8 * cut.slices]
    parts, coefficients, counts = torch.zeros(sum(sizes), **f32).split(sizes)
    partial = torch.empty(MIDDLE * blocks, 48, **f32)
    compiled.launch(
        blocks, x.device,
        *(tensor_map(t, cut.width, 1, TILE) for t in (x, g, f, dl, dx, df)),
        f_bias, weight, bias, *alphas, saved, *writer,
        d_weight, d_bias, d_alphas,
        parts, coefficients, partial, counts, T, cut.groups,
    )  # fmt: skip
    return dx, d_weight, d_bias, d_alphas


def memory(width: int, iterations: int) -> tuple[int, int]:
    """Shared bytes of a block, and the tiles that its ring holds in them."""
    region = TILE * width * 2
    stage = 9 * region + 512
    rest = F_SLOTS * region + 4 * TILE * 52 * 4  # f, coefficients of four tiles
    rest += ((width // BOX - 1) * TILE + 1) * BOX * 2  # f's bias, a row of each box
    rest += MIDDLE * 2 * 4 * (52 + 16 + 8 * iterations)  # STAGING of middle.cuh, of two tokens a warp
    stages = min(MOST_STAGES, (SHARED - rest) // stage)
    return stages * stage + rest, stages
