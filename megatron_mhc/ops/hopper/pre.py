"""pre, forward, on Hopper: one read of the streams, or of what post_res makes them of (pre.cu)."""

import functools
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.hopper.compile import AHEAD, SHARED, Source, kernel, layout, loads, multiprocessors
from megatron_mhc.ops.hopper.launch import Box, raw_stream
from megatron_mhc.ops.hopper.norm import Kind, define, kind
from megatron_mhc.ops.options import Handed, Options, ReadNorm
from megatron_mhc.ops.triton.post_res import streams_like

WIDEST = 256
WARPS = dict(PROJECTING=8, AGGREGATING=3, FINISHING=4)  # and one that loads
THREADS = 32 * (sum(WARPS.values()) + 1)
TILE = 16  # tokens
ATOMS = {False: 9, True: 12}  # that hold what a block tells its group of a token; with a norm
MOST_STAGES = 10  # tiles of a block's ring
MOST_LOADS = 8  # of a lane at once; more cost registers
F_SLOTS = 3  # tiles of f on their way; at least as many of x fit beside them at any width
SOURCE = Source(Path(__file__).with_suffix(".cu"), THREADS=THREADS, F_SLOTS=F_SLOTS, **WARPS)


def pre_forward(
    x: Tensor,
    weight: Tensor,
    affine: Tensor,
    options: Options,
    norm: ReadNorm | None = None,
    handed: Handed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`megatron_mhc.ops.triton.pre.pre_forward` of x: [T, 4, C] bf16.

    Source: arXiv 2512.24880 Eqs. (14)-(19).
    """
    T, _, C = x.shape
    out = x.new_empty((T, C))
    saved, mappings, norm_saved = _made_of(x, norm)
    if T:
        device = x.get_device()
        how = device, multiprocessors(device), raw_stream(device), get_ident()
        plan = _plan(T, C, options, False, norm and kind(norm), handed is not None, *how)
        more = (*(() if norm is None else (norm.weight, norm_saved)), *(handed or ()))
        # The last two maps are not looked at.
        plan.launch((x, x, x), (None, None, weight, affine, out, saved, mappings, *more))
    return out, saved, mappings, norm_saved


def _made_of(x: Tensor, norm: ReadNorm | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Room for `saved`, the coefficients and `norm_saved`."""
    T = x.shape[0]
    saved, mappings = (x.new_empty((T, rows), dtype=torch.float32) for rows in (25, 24))
    return saved, mappings, None if norm is None else x.new_empty((T, 5), dtype=torch.float32)


def post_res_pre(
    x: Tensor,
    f: Tensor,
    before: Tensor,
    f_bias: Tensor | None,
    weight: Tensor,
    affine: Tensor,
    options: Options,
    norm: ReadNorm | None = None,
    handed: Handed | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """x' of `post_res_forward`, and `pre_forward` of x', by one read of x and f.

    The bits are those of the two one after the other. Where f is [s, b, C], so is the layer input, and x' is
    [s, b, 4*C].

    Args:
        before: [T, 24] fp32, mappings of the connection that writes x'; the rest is of the one that reads.
        handed: its h_pre is that of `before`.

    Source: arXiv 2512.24880 Eqs. (3), (14)-(19).
    """
    T, _, C = x.shape
    streams, out = streams_like(x, f), torch.empty_like(f)
    saved, mappings, norm_saved = _made_of(x, norm)
    if T:
        device = x.get_device()
        how = device, multiprocessors(device), raw_stream(device), get_ident()
        plan = _plan(T, C, options, True, norm and kind(norm), handed is not None, *how)
        more = (*(() if norm is None else (norm.weight, norm_saved)), *(handed or ()))
        plan.launch((x, f, streams), (f_bias, before, weight, affine, out, saved, mappings, *more))
    return streams, out, saved, mappings, norm_saved


def memory(width: int, *, mix: bool, norm: bool) -> tuple[int, int]:
    """Shared bytes of a block, and the tiles that its ring holds in them."""
    region = TILE * width * 2
    stage = 4 * region + TILE * 4 * 4  # with h_pre
    # Sums: of the projection, and the squares; with a norm <x_i, x_j>, each warp's of half the tokens.
    rest = 2 * WARPS["PROJECTING"] * (TILE * 24 + TILE // 2 * 10 if norm else TILE * 27) * 4
    rest += WARPS["FINISHING"] * 8 * 16 * 4  # logits
    if mix:  # with the coefficients; f and its bias
        stage, rest = stage + TILE * 24 * 4, rest + F_SLOTS * region + width * 2
    stages = min(MOST_STAGES, (SHARED - rest) // stage)
    return stages * stage + rest, stages


@functools.lru_cache(maxsize=64)
def _plan(
    T: int,
    C: int,
    options: Options,
    mix: bool,
    norm: Kind | None,
    previous: bool,
    device: int,
    sms: int,
    stream: int,
    thread: int,
) -> Any:
    """The `launch.Plan` of the current stream and thread.

    Args:
        mix: of `post_res_pre`. previous: with weights that are handed on.
    """
    cut = layout(T, C, WIDEST, sms, TILE, options.reserved_sms)
    folds = norm is not None
    shared, stages = memory(cut.width, mix=mix, norm=folds)
    atoms, part = ATOMS[folds], TILE * ATOMS[folds] * 4  # floats of a tile
    defines = cut.defines(C, TILE, stages) | dict(ATOMS=atoms, PART=part, NORM=define(norm))
    defines |= dict(ITERATIONS=options.iterations, V4=int(options.deepseek_v4), MIX=int(mix))
    defines["PREVIOUS"] = int(previous)
    defines["LOADS"] = loads(cut.slices, 2, MOST_LOADS)
    defines |= dict(QUAD_LOADS=2 * loads(cut.slices, 2, MOST_LOADS // 2), FIFTH_LOADS=loads(cut.slices, 4, 4))
    blocks = cut.groups * cut.slices
    streams, f = Box(T, 4, C, cut.width, 4, TILE), Box(T, 1, C, cut.width, 1, TILE)
    return kernel(SOURCE, device, shared, **defines).plan(
        blocks,
        (streams, f, streams) if mix else (streams,) * 3,
        ((blocks * defines["EXCHANGE"] + AHEAD) * part, 4),  # parts, ticket
        (*(() if norm is None else (norm.eps, norm.offset)), T, cut.groups, options.norm_eps),
    )
