"""The back ends: for each, its kernels for `pre` and what those can do. post_res by itself is Triton's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mhc.ops.hopper import pre as hopper_pre
from megatron_mhc.ops.hopper import pre_backward as hopper_pre_backward
from megatron_mhc.ops.triton import post_res_project, pre, pre_backward


class Kernels(NamedTuple):
    """One back end.

    What one back end's `pre_forward` saves, the other's `pre_backward` takes.

    Args:
        name: of --mhc-backend.
        pre_forward: (x, weight, affine, options, norm, handed) -> layer input, saved, coefficients,
            norm_saved.
        pre_backward: (x, g, f, dl, weight, affine, saved, options, writer, f_bias, norm, norm_saved,
            with_dphi, handed) -> dx, d_weight, d_affine, df of the writer, d_norm_weight.
        dtypes, streams: of x, and its n.
        max_iterations: of Sinkhorn-Knopp.
        channels_per_sm: most of C for each SM of the GPU.
        post_res_project: post_res, and for the next connection its projection, in other bits.
        post_res_pre: post_res, and for the next connection all of its `pre`, in the same bits.
        folds_norm: takes `norm`, the RMSNorm between `pre` and F.
        takes_projection: `pre_forward` takes the `parts` that post_res_project made.
        takes_dh_post: `pre_backward` takes dh_post instead of f.
        takes_other_f: f may have another dtype than x.
        reserves_sms: looks at `Options.reserved_sms`.
        reads_previous: takes `handed`, the weights of another connection to read with.
    """

    name: str
    pre_forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    pre_backward: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]]
    dtypes: tuple[torch.dtype, ...]
    streams: tuple[int, ...]
    max_iterations: int | None = None
    channels_per_sm: int | None = None
    post_res_project: Callable[..., tuple[Tensor, Tensor, Tensor | None]] | None = None
    post_res_pre: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] | None = None
    folds_norm: bool = False
    takes_projection: bool = True
    takes_dh_post: bool = True
    takes_other_f: bool = True
    reserves_sms: bool = False
    reads_previous: bool = False

    def backward_of(self, x: Tensor, f: Tensor | None) -> Kernels:
        """Whose `pre_backward` serves x and f, None where dh_post came instead."""
        serves = self.takes_dh_post if f is None else self.takes_other_f or f.dtype == x.dtype
        return self if serves else TRITON


TRITON = Kernels(
    name="triton",
    pre_forward=pre.pre_forward,
    pre_backward=pre_backward.pre_backward,
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    streams=(1, 2, 3, 4, 8),
    post_res_project=post_res_project.post_res_project,
    folds_norm=True,
    reads_previous=True,
)
HOPPER = Kernels(
    name="hopper",
    pre_forward=hopper_pre.pre_forward,
    pre_backward=hopper_pre_backward.pre_backward,
    dtypes=(torch.bfloat16,),
    streams=(4,),
    max_iterations=64,  # a block keeps a few numbers of each in shared memory, besides its ring of tiles
    # Half of what an SM can hold. A launch ends only if all blocks of a row of tokens run at once. So two
    # concurrent launches both fit, and neither waits for the other's SMs.
    channels_per_sm=64,
    post_res_pre=hopper_pre.post_res_pre,
    folds_norm=True,
    reads_previous=True,
    takes_projection=False,
    takes_dh_post=False,
    takes_other_f=False,
    reserves_sms=True,
)
BY_NAME = {kernels.name: kernels for kernels in (TRITON, HOPPER)}
