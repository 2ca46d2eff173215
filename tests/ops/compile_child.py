"""Compiles the Triton kernels of one form for an H100, which need not be there: `test_forms` runs it.

python compile_child.py N PARTS ARITHMETIC DTYPE NORM
"""

import contextlib
import sys
import types

import torch
import triton
from ops_forms import inputs, norm_for, options_of
from triton.backends.compiler import GPUTarget

from megatron_mhc.ops.triton import replay, stage_ends
from megatron_mhc.ops.triton.post_res import post_backward, post_res_forward
from megatron_mhc.ops.triton.post_res_project import can_project, post_res_project
from megatron_mhc.ops.triton.pre import pre_forward
from megatron_mhc.ops.triton.pre_backward import pre_backward

H100 = types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device=None: 0,
)


def compile_all(n, parts, arithmetic, dtype, norm):
    """The names of the kernels that were compiled, none of which was launched."""
    names = []

    def compile_it(kernel, grid):
        def run(*args, **settings):
            names.append(kernel.fn.__name__)
            kernel.run(*args, grid=grid, warmup=True, **settings)

        return run

    triton.runtime.driver.set_active(H100)
    triton.runtime.jit.JITFunction.__getitem__ = compile_it
    torch.cuda.device_of = lambda x: contextlib.nullcontext()
    x, weight, affine, f = inputs(70, n, 256, dtype, parts)
    options, norm = options_of(arithmetic, parts, 2), norm_for(f, n, norm)
    y, saved, mappings, norm_saved = pre_forward(x, weight, affine, options, norm=norm)
    post_res_forward(x, f, mappings, f[0].clone(), parts=parts)
    post_backward(x, saved, affine, options.form)
    more = dict(norm=norm, norm_saved=norm_saved)
    given = f, weight, affine, saved, options
    pre_backward(x, x, f, *given, writer=(saved, affine), **more)
    pre_backward(x, x, None, *given, dh_post=torch.zeros(70, n), with_dphi=False, **more)
    stage_ends.mix(x, mappings, parts)
    if parts and can_project(x):
        post_res_project(x, f, mappings, weight, None, norm is not None, parts)
    row = [replay.Connection(mappings, f, y, None, norm, norm_saved)] * replay.at_once(n)
    replay.replay(x, row, True, parts)
    return names


if __name__ == "__main__":
    n, parts, arithmetic, dtype, norm = sys.argv[1:]
    print(*compile_all(int(n), int(parts), arithmetic, getattr(torch, dtype), norm == "True"))
