"""The mHC operations: `reference` defines them in plain torch, the other files run them by Triton.

pre.py, post_res.py    forward kernels, and the gradient of f
boundary.py            post_res and the next connection's projection in one
replay.py              several connections from their coefficients, for recompute
mapping_backward.py    the gradients of the coefficients, per token
pre_backward.py        the gradients of the streams and of the mapping parameters
sinkhorn.py            H_res in registers
deferred.py, link.py   autograd over all of them, and what connections in a row share
library.py             both again as ops of torch.library, which torch.compile traces
"""

import os
from importlib.util import find_spec

import torch

from megatron_mhc.config import MHCConfig, flag

_HAS_TRITON = find_spec("triton") is not None


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


def choose_backend(mhc: MHCConfig, width: int, dtype: torch.dtype, device_type: str) -> str:
    """`triton` or `reference`, as `--mhc-backend` says.

    `auto` takes Triton on CUDA wherever it can serve.

    Raises:
        ValueError: Triton was asked for and cannot serve.
    """
    if mhc.backend == "reference":
        return "reference"
    if mhc.backend == "auto" and device_type != "cuda":
        return "reference"
    obstacle = triton_obstacle(mhc, width, dtype, device_type)
    if obstacle is None:
        return "triton"
    if mhc.backend == "triton":
        raise ValueError(f"{flag('backend')} triton: {obstacle}; use {flag('backend')} auto or change that")
    return "reference"
