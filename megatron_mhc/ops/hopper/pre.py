"""pre, forward, on Hopper: one read of the streams, or of what post_res makes them of (pre.cu)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.hopper.compile import (
    AHEAD,
    SHARED,
    Layout,
    Source,
    kernel,
    layout,
    loads,
    multiprocessors,
    tensor_map,
)
from megatron_mhc.ops.options import Options

WIDEST = 256
WARPS = dict(PROJECTING=8, AGGREGATING=3, FINISHING=4)  # and one that loads
THREADS = 32 * (sum(WARPS.values()) + 1)
TILE = 16  # tokens
ATOMS = 9  # that hold what a block tells its group of a token
PART = TILE * ATOMS * 4  # floats of a tile
MOST_STAGES = 10  # tiles of a block's ring
MOST_LOADS = 8  # of a lane at once; more cost registers
F_SLOTS = 3  # tiles of f on their way; at least as many of x fit beside them at any width
SOURCE = Source(
    Path(__file__).with_suffix(".cu"), THREADS=THREADS, ATOMS=ATOMS, PART=PART, F_SLOTS=F_SLOTS, **WARPS
)


def pre_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """`megatron_mhc.ops.triton.pre.pre_forward` of x: [T, 4, C] bf16.

    Source: arXiv 2512.24880 Eqs. (14)-(19).
    """
    T, n, C = x.shape
    f32: dict[str, Any] = dict(device=x.device, dtype=torch.float32)
    out = x.new_empty(T, C)
    saved, mappings = torch.empty(T, 25, **f32), torch.empty(T, 24, **f32)
    if T == 0:
        return out, saved, mappings
    cut = layout(T, C, WIDEST, multiprocessors(x.device), TILE, options.reserved_sms)
    boxes = (tensor_map(x, cut.width, n, TILE),) * 3  # of which the last two are not looked at
    results = out, saved, mappings
    _launch(cut, T, boxes, (None, None), weight, bias, alphas, results, options, MIX=0)
    return results


def post_res_pre(
    x: Tensor,
    f: Tensor,
    before: Tensor,
    f_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x' of `post_res_forward`, and `pre_forward` of x', by one read of x and f.

    The bits are those of the two one after the other.

    Args:
        before: [T, 24] fp32, mappings of the connection that writes x'; the rest is of the one that reads.

    Source: arXiv 2512.24880 Eqs. (3), (14)-(19).
    """
    T, n, C = x.shape
    f32: dict[str, Any] = dict(device=x.device, dtype=torch.float32)
    streams, out = torch.empty_like(x), x.new_empty(T, C)
    results = out, torch.empty(T, 25, **f32), torch.empty(T, 24, **f32)
    if T == 0:
        return streams, *results
    cut = layout(T, C, WIDEST, multiprocessors(x.device), TILE, options.reserved_sms)
    boxes = tuple(tensor_map(t, cut.width, each, TILE) for t, each in ((x, n), (f, 1), (streams, n)))
    _launch(cut, T, boxes, (f_bias, before), weight, bias, alphas, results, options, MIX=1)
    return streams, *results


def memory(width: int, *, mix: bool) -> tuple[int, int]:
    """Shared bytes of a block, and the tiles that its ring holds in them."""
    region = TILE * width * 2
    stage = 4 * region + TILE * 4 * 4  # with h_pre
    rest = 2 * WARPS["PROJECTING"] * TILE * ATOMS * 3 * 4  # sums
    rest += WARPS["FINISHING"] * 8 * 16 * 4  # logits
    if mix:  # with the coefficients; f and its bias
        stage, rest = stage + TILE * 24 * 4, rest + F_SLOTS * region + width * 2
    stages = min(MOST_STAGES, (SHARED - rest) // stage)
    return stages * stage + rest, stages


def _launch(
    cut: Layout,
    tokens: int,
    boxes: tuple[Any, ...],
    mixing: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    bias: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
    options: Options,
    *,
    MIX: int,
) -> None:
    device = weight.device
    shared, stages = memory(cut.width, mix=bool(MIX))
    defines = cut.defines(results[0].shape[1], TILE, stages)
    defines |= dict(ITERATIONS=options.iterations, V4=int(options.deepseek_v4), MIX=MIX)
    defines["LOADS"] = loads(cut.slices, 2, MOST_LOADS)
    compiled = kernel(SOURCE, device.index, shared, **defines)
    blocks = cut.groups * cut.slices
    floats = (blocks * defines["EXCHANGE"] + AHEAD) * PART
    parts, ticket = torch.zeros(floats + 4, device=device, dtype=torch.float32).split([floats, 4])
    compiled.launch(
        blocks, device,
        *boxes, *mixing, weight, bias, *alphas, *results, parts, ticket,
        tokens, cut.groups, options.norm_eps,
    )  # fmt: skip
