"""pre, backward, on Hopper: one read of the streams and their gradient (pre_backward.cu)."""

import functools
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.ops.hopper.compile import AHEAD, SHARED, Source, kernel, layout, loads, multiprocessors
from megatron_mhc.ops.hopper.launch import BOX, Box, raw_stream
from megatron_mhc.ops.hopper.norm import Kind, define, kind
from megatron_mhc.ops.options import HandedBack, Options, ReadNorm

WIDEST = 128
WARPS = dict(DX=8, DOTS=2, MIDDLE=3)  # and three: fetch, load, store
THREADS = 32 * (sum(WARPS.values()) + 3)
TILE = 8  # tokens
MOST_STAGES = 20  # tiles of a block's ring
F_SLOTS = 4  # tiles of f on their way
MOST_LOADS = 14  # of a lane at once
FEW = 32  # slices, up to which a warp prepares two tokens at a time: more take more registers
ATOMS = 8  # that hold what a block tells its group of a token
PART = TILE * ATOMS * 4  # floats of a tile
COEFFICIENT_ATOMS = 17  # that hold what the group knows of a token then
FETCHED = 4  # tiles whose coefficients are in shared memory
TOKEN_FLOATS = 52  # there, from one token to the next
SOURCE = Source(
    Path(__file__).with_suffix(".cu"), THREADS=THREADS, ATOMS=ATOMS, PART=PART, F_SLOTS=F_SLOTS,
    COEFFICIENT_ATOMS=COEFFICIENT_ATOMS, FETCHED=FETCHED, TOKEN_FLOATS=TOKEN_FLOATS, **WARPS,
)  # fmt: skip


def pre_backward(
    x: Tensor,
    g: Tensor,
    f: Tensor,
    dl: Tensor,
    weight: Tensor,
    affine: Tensor,
    saved: Tensor,
    options: Options,
    *,
    writer: tuple[Tensor, Tensor] | None = None,
    f_bias: Tensor | None = None,
    norm: ReadNorm | None = None,
    norm_saved: Tensor | None = None,
    with_dphi: bool = True,
    handed: HandedBack | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """`megatron_mhc.ops.triton.pre_backward.pre_backward` of bf16; f and dl may be [s, b, C] too."""
    T, _, C = x.shape
    dx = torch.empty_like(x)
    d_weight, d_affine = torch.empty_like(weight) if with_dphi else None, torch.empty_like(affine)
    d_norm = None if norm is None else torch.empty_like(norm.weight)
    if T == 0:
        d_weight, d_norm = (None if t is None else t.zero_() for t in (d_weight, d_norm))
        return dx, d_weight, d_affine.zero_(), None, d_norm
    df = None if writer is None else torch.empty_like(dl)
    unused = (saved, affine)  # neither read nor, as dl, written
    device = x.get_device()
    how = device, multiprocessors(device), raw_stream(device), get_ident()
    plan = _plan(T, C, options, df is not None, norm and kind(norm), handed is not None, *how, with_dphi)
    more = (*(() if norm is None else (norm.weight, norm_saved, d_norm)), *(handed or ()))
    plan.launch(
        (x, g, f, dl, dx, dl if df is None else df),
        (f_bias, weight, affine, saved, *(writer or unused), d_weight, d_affine, *more),
    )
    return dx, d_weight, d_affine, df, d_norm


@functools.lru_cache(maxsize=64)
def _plan(
    T: int,
    C: int,
    options: Options,
    with_df: bool,
    norm: Kind | None,
    previous: bool,
    device: int,
    sms: int,
    stream: int,
    thread: int,
    with_dphi: bool = True,
) -> Any:
    """The `launch.Plan` of the current stream and thread; previous: as in `pre`."""
    cut = layout(T, C, WIDEST, sms, TILE, options.reserved_sms)
    shared, stages = memory(cut.width, options.iterations, norm=norm is not None)
    defines = cut.defines(C, TILE, stages) | dict(NORM=define(norm), DPHI=int(with_dphi))
    defines |= dict(ITERATIONS=options.iterations, V4=int(options.deepseek_v4), DF=int(with_df))
    defines["PREVIOUS"] = int(previous)
    defines |= dict(LOADS=loads(cut.slices, 4, MOST_LOADS), TOGETHER=2 if cut.slices <= FEW else 1)
    blocks, slots = cut.groups * cut.slices, cut.groups * defines["EXCHANGE"]
    streams, f = Box(T, 4, C, cut.width, 1, TILE), Box(T, 1, C, cut.width, 1, TILE)
    return kernel(SOURCE, device, shared, **defines).plan(
        blocks,
        (streams, streams, f, f, streams, f),
        (
            (slots * cut.slices + AHEAD) * PART,
            slots * TILE * COEFFICIENT_ATOMS * 4,
            WARPS["MIDDLE"] * blocks * 48,  # partial, which need not be zero
            2 + WARPS["DX"] * cut.slices,
            *(() if norm is None else (C,)),  # norm_sums, which need not be zero
        ),
        (*(() if norm is None else (norm.offset,)), T, cut.groups),
    )


def memory(width: int, iterations: int, *, norm: bool) -> tuple[int, int]:
    """Shared bytes of a block, and the tiles that its ring holds in them."""
    region = TILE * width * 2
    stage = 9 * region + 512
    rest = F_SLOTS * region + FETCHED * TILE * TOKEN_FLOATS * 4  # f, coefficients
    rest += 2 * region * norm  # u
    rest += ((width // BOX - 1) * TILE + 1) * BOX * 2  # f's bias, a row of each box
    rest += WARPS["MIDDLE"] * 2 * 4 * (TOKEN_FLOATS + 16 + 8 * iterations)  # two tokens a warp of `middle`
    stages = min(MOST_STAGES, (SHARED - rest) // stage)
    return stages * stage + rest, stages
