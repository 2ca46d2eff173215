"""The kernels for Hopper in the emulator: shapes, and what they write of them."""

import functools

import pytest
import torch
from emulator.launch import compiler
from ops_cases import COEFFICIENT, ON_GPU, STREAM, inputs, norm_like

from megatron_mhc.ops.hopper import pre, pre_backward
from megatron_mhc.ops.options import Options

MARKS = [
    pytest.mark.skipif(ON_GPU, reason="the GPU is there: test_hopper.py"),
    pytest.mark.skipif(compiler() is None, reason="the emulator needs g++"),
    pytest.mark.usefixtures("poisoned"),
]
BF16 = torch.bfloat16
WIDE = ("layer_input", "streams", "d x", "d f")

# (tokens, channels, blocks, channels a block at most): slices x groups of blocks
SHAPES = [
    (1, 16, 4, 64),  # 1 x 1
    (37, 80, 4, 64),  # 2 x 2
    (40, 192, 3, 64),  # 3 x 1
    (70, 144, 4, 128),  # 2 x 2, or 3 x 1
    (33, 272, 3, 256),  # 2 x 1, or 3 x 1
    (230, 48, 1, 64),  # more tiles than the rings have places
]
RINGS = (230, 128, 4, 64)  # 2 x 2, and that
SLICES = (200, 1088, 17, 64)  # more slices than a tile has tokens


def check(errors):
    print({name: f"{value:.1e}" for name, value in errors.items()})
    for name, value in errors.items():
        assert value <= (STREAM if name in WIDE else COEFFICIENT)[BF16], name


def everything(shape, v4=False, norm=None, **how):
    """What both kernels write, of one connection with a bias of f and a writer."""
    tokens, channels, *_ = shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    generator = torch.Generator().manual_seed(1)
    g, dl = (torch.randn(like.shape, generator=generator).to(BF16) for like in (x, f))
    options = Options(1e-6, 20, v4)
    *made, norm_saved = pre.pre_forward(x, weight, affine, options, norm=norm)
    more = dict(writer=(made[1], affine), f_bias=dl[0].clone(), norm=norm, norm_saved=norm_saved, **how)
    grads = pre_backward.pre_backward(x, g, f, dl, weight, affine, made[1], options, **more)
    return [t for t in (*made, norm_saved, *grads) if t is not None]


def mixed_and_read(shape, v4=False):
    """What the forward kernel writes behind the post_res of another connection: x, f, its mappings, that."""
    tokens, channels, *_ = shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    _, _, before, _ = pre.pre_forward(x, weight.flip(0), affine, Options(1e-6, 20, v4))
    return x, f, before, read_behind(shape, before, v4)


def read_behind(shape, before, v4=False, norm=None):
    """`mixed_and_read`, the mappings given."""
    tokens, channels, *_ = shape
    x, weight, affine, f = inputs(tokens, 4, channels, BF16)
    options = Options(1e-6, 20, v4)
    made = pre.post_res_pre(x, f, before, f[0].clone(), weight, affine, options, norm=norm)
    return [t for t in made if t is not None]


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a is b is None or (a.isfinite().all() and torch.equal(a, b))


def norm_of(shape, zero_centered=False, dtype=BF16):
    return norm_like(inputs(shape[0], 4, shape[1], BF16)[-1], zero_centered, dtype)


@functools.cache
def usual(shape, v4=False, folds=False):
    """`everything` in the first order that was tried."""
    return everything(shape, v4, norm_of(shape) if folds else None)


usual_mixed = functools.cache(mixed_and_read)
