"""The mHC operations: `reference` defines them in plain torch, the other files run them by Triton or CUDA.

pre.py, post_res.py    forward kernels, and the gradient of f
boundary.py            post_res and the next connection's projection in one
ends.py                one hidden state to n streams, and back
split.py               post_res in two parts, on two pipeline stages
replay.py              several connections from their coefficients, for recompute
mapping_backward.py    the gradients of the coefficients, per token
pre_backward.py        the gradients of the streams and of the mapping parameters
hopper/                pre.py and pre_backward.py again, in CUDA for H100 and H200
sinkhorn.py            H_res in registers
autocast.py            products in their own dtype, whatever torch.autocast says
deferred.py, link.py   autograd over all of them, and what connections in a row share
library.py             both again as ops of torch.library, which torch.compile traces
"""

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.ops import reference

HOPPER = (9, 0, 132)  # an H100: compute capability, multiprocessors
# Channels per SM that `hopper` accepts, half of what an SM can hold. A launch ends only if all blocks of a
# row of tokens run at once. So two concurrent launches both fit, and neither waits for the other's SMs.
_HOPPER_CHANNELS = 64
_HOPPER_ITERATIONS = 64  # a block keeps a few numbers of each in shared memory, beside its ring of tiles
_HAS_TRITON = find_spec("triton") is not None


def _once(fn: Callable[[], Any]) -> Callable[[], Any]:
    """fn, asked once; torch.compile asks it too, instead of tracing through it."""
    cached = functools.cache(fn)
    return torch.compiler.assume_constant_result(lambda: cached())


@_once
def _gpu() -> tuple[int, int, int] | None:
    """As `HOPPER`, of the device that is current at the first call, which initialises CUDA."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found.major, found.minor, found.multi_processor_count


@_once
def _has_cuda_bindings() -> bool:
    from megatron_mhc.ops.hopper.compile import installed

    return installed()


def triton_obstacle(mhc: MHCConfig, width: int, dtype: torch.dtype, device_type: str) -> str | None:
    """Why the Triton kernels cannot serve these streams of `width` channels, or None if they can."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the streams are on {device_type}"
    if not _HAS_TRITON:
        return "triton is not installed"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the streams are {dtype}"
    if mhc.num_residual_streams not in (1, 2, 4, 8):
        return f"{flag('num_residual_streams')} {mhc.num_residual_streams} is not 1, 2, 4 or 8"
    if width % 16:
        return f"--hidden-size {width} is no multiple of 16"
    for name, needed in (("h_res", "sinkhorn"), ("h_pre", "dynamic"), ("h_post", "dynamic")):
        if getattr(mhc, name) != needed:
            return f"{flag(name)} is {getattr(mhc, name)}"
    return None


def hopper_obstacle(
    mhc: MHCConfig,
    width: int,
    dtype: torch.dtype,
    device_type: str,
    gpu: tuple[int, int, int] | None = None,
) -> str | None:
    """The same of the kernels for Hopper; gpu: as `HOPPER`, the current device by default."""
    if device_type != "cuda":
        return f"the streams are on {device_type}"
    if obstacle := triton_obstacle(mhc, width, dtype, device_type):  # post_res stays Triton's
        return obstacle
    if dtype != torch.bfloat16:
        return f"the streams are {dtype}, not {torch.bfloat16}"
    if mhc.num_residual_streams != 4:
        return f"{flag('num_residual_streams')} {mhc.num_residual_streams} is not 4"
    if mhc.sinkhorn_iterations > _HOPPER_ITERATIONS:
        return f"{flag('sinkhorn_iterations')} {mhc.sinkhorn_iterations} is more than {_HOPPER_ITERATIONS}"
    gpu = gpu or _gpu()
    if gpu is None:
        return "there is no CUDA device"
    major, minor, multiprocessors = gpu
    if (major, minor) != HOPPER[:2]:
        return f"the GPU's compute capability is {major}.{minor}, not 9.0 (H100, H200)"
    if width > multiprocessors * _HOPPER_CHANNELS:
        return f"--hidden-size {width} is more than {multiprocessors} multiprocessors can take"
    return None if _has_cuda_bindings() else "cuda-bindings is not installed"


def choose_backend(
    mhc: MHCConfig,
    width: int,
    dtype: torch.dtype,
    device_type: str,
    gpu: tuple[int, int, int] | None = None,
) -> str:
    """`hopper`, `triton` or `reference`, as `--mhc-backend` says.

    `auto` takes on CUDA what can serve, hopper before triton. Under `hopper`, post_res by itself is Triton's.

    Args:
        gpu: as `HOPPER`, the current CUDA device by default.

    Raises:
        ValueError: kernels were asked for that cannot serve.
    """
    if mhc.backend == "reference" or (mhc.backend == "auto" and device_type != "cuda"):
        return "reference"
    if mhc.backend == "auto":
        if hopper_obstacle(mhc, width, dtype, device_type, gpu) is None:
            return "hopper"
        return "reference" if triton_obstacle(mhc, width, dtype, device_type) else "triton"
    if mhc.backend == "hopper":
        obstacle = hopper_obstacle(mhc, width, dtype, device_type, gpu)
    else:
        obstacle = triton_obstacle(mhc, width, dtype, device_type)
    if obstacle is None:
        return mhc.backend
    raise ValueError(
        f"{flag('backend')} {mhc.backend}: {obstacle}; use {flag('backend')} auto or change that"
    )


def pre_kernels(hopper: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`pre_forward` and `pre_backward`, Hopper's or Triton's; each takes what the other's partner saved."""
    if hopper:
        from megatron_mhc.ops.hopper.pre import pre_forward
        from megatron_mhc.ops.hopper.pre_backward import pre_backward

        return pre_forward, pre_backward
    from megatron_mhc.ops import pre
    from megatron_mhc.ops import pre_backward as backward

    return pre.pre_forward, backward.pre_backward


def _ends(mhc: MHCConfig, x: Tensor) -> Any:
    """Whose `expand` and `contract` serve x: [..., C]; torch.compile makes kernels of the reference's."""
    compiling = torch.compiler.is_compiling()
    if compiling or choose_backend(mhc, x.shape[-1], x.dtype, x.device.type) == "reference":
        return reference
    from megatron_mhc.ops import ends

    return ends


def expand(hidden_states: Tensor, mhc: MHCConfig) -> Tensor:
    """Copy [..., C] into n streams [..., n*C], stream outer and channel inner."""
    return _ends(mhc, hidden_states).expand(hidden_states, mhc.num_residual_streams)


def contract(x: Tensor, mhc: MHCConfig) -> Tensor:
    """Reduce the streams [T, n, C] to [T, C] as `--mhc-contract` mean or sum says."""
    return _ends(mhc, x).contract(x, mhc.contract)
