"""Which kernels serve a connection: what `--mhc-backend` says, checked against what the back ends can do."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.ops import reference

if TYPE_CHECKING:
    from megatron_mhc.ops.kernels import Kernels

H100 = (9, 0, 132)  # compute capability, SMs
_HAS_TRITON = find_spec("triton") is not None


class Backend:
    """The kernels of one connection or of one end of the streams, chosen once for each kind of streams."""

    def __init__(self, mhc: MHCConfig):
        self.mhc = mhc
        self._chosen: dict[tuple[int, torch.dtype, str], Kernels | None] = {}

    def kernels(self, x: Tensor, width: int) -> Kernels | None:
        """The kernels for streams like x, of `width` channels; None for the reference.

        Raises:
            ValueError: see `choose`.
        """
        if torch.compiler.is_compiling():  # a graph is traced once, and would guard the dict
            return _named(choose(self.mhc, width, x.dtype, x.device.type))
        return self.kernels_of(width, x.dtype, x.device.type)

    def kernels_of(self, width: int, dtype: torch.dtype, device_type: str) -> Kernels | None:
        """As `kernels`, of streams that are not there yet."""
        kind = width, dtype, device_type
        if kind not in self._chosen:
            self._chosen[kind] = _named(choose(self.mhc, *kind))
        return self._chosen[kind]

    def expand(self, hidden_states: Tensor) -> Tensor:
        """Copy [..., C] into n streams [..., n*C], stream outer and channel inner."""
        return self._ends(hidden_states).expand(hidden_states, self.mhc.num_residual_streams)

    def contract(self, x: Tensor) -> Tensor:
        """Reduce the streams [T, n, C] to [T, C] as `--mhc-contract` mean or sum says."""
        return self._ends(x).contract(x, self.mhc.contract)

    def _ends(self, x: Tensor) -> Any:
        # torch.compile makes kernels of the reference's.
        if torch.compiler.is_compiling() or self.kernels(x, x.shape[-1]) is None:
            return reference
        from megatron_mhc.ops.triton import expand_contract  # imports triton, which a CPU may lack

        return expand_contract


def choose(
    mhc: MHCConfig,
    width: int,
    dtype: torch.dtype,
    device_type: str,
    gpu: tuple[int, int, int] | None = None,
) -> str:
    """`hopper`, `triton` or `reference`, as `--mhc-backend` says.

    `auto` takes on CUDA what can serve, hopper before triton. Under `hopper`, post_res by itself is Triton's.

    Args:
        gpu: as `H100`, the current CUDA device by default.

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


def device_type() -> str:
    """Of the device that this process computes on."""
    if not torch.cuda.is_available():
        return "cpu"
    return torch.empty(0, device=torch.cuda.current_device()).device.type


def folds_norm(backend: str) -> bool:
    """Whether the kernels of a back end compute the RMSNorm between `pre` and F."""
    kernels = _named(backend)
    return kernels is not None and kernels.folds_norm


def why_norms_apart(config: Any, mhc: MHCConfig, backend: str | None = None) -> str | None:
    """Why the norms of a model run by themselves, or None where `pre` computes those that it can.

    Args:
        backend: as `choose` says; None for any that can.
    """
    if mhc.norm != "auto":
        return f"{flag('norm')} is apart" if mhc.norm == "apart" else None
    if config.normalization != "RMSNorm":
        return f"--normalization is {config.normalization}"
    if config.fp8 or config.fp4:
        return "linears take FP8 or FP4 from the norm inside them"
    if config.fp32_residual_connection:
        return "--fp32-residual-connection asks for a norm that also rounds to the dtype of F"
    return None if backend is None or folds_norm(backend) else f"{backend} has no kernels for it"


def norms_in_words(config: Any, mhc: MHCConfig, backend: str) -> str:
    """What `--mhc-norm` comes to, for the log and the doctor; backend: as in `why_norms_apart`."""
    if mhc.is_gated:
        return "none, since the read normalises the streams"
    if (why := why_norms_apart(config, mhc, backend)) is not None:
        return f"apart, since {why}" if mhc.norm == "auto" else "apart"
    asked = config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or [])
    return "folded into pre" + ", so --recompute-modules layernorm finds nothing of it" * asked


def triton_obstacle(mhc: MHCConfig, width: int, dtype: torch.dtype, device_type: str) -> str | None:
    """Why the Triton kernels cannot serve these streams of `width` channels, or None if they can."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the streams are on {device_type}"
    if mhc.is_gated:
        return f"{flag('preset')} is {mhc.preset}"
    if not _HAS_TRITON:
        return "triton is not installed"
    from megatron_mhc.ops.kernels import TRITON

    if obstacle := _obstacle(TRITON, mhc, dtype):
        return obstacle
    if width % 16:
        return f"--hidden-size {width} is no multiple of 16"
    return f"{flag('h_res')} is unconstrained" if mhc.is_hc else None


def hopper_obstacle(
    mhc: MHCConfig,
    width: int,
    dtype: torch.dtype,
    device_type: str,
    gpu: tuple[int, int, int] | None = None,
) -> str | None:
    """Why the Hopper kernels cannot serve them, or None; gpu: like `H100`, by default the current device."""
    if device_type != "cuda":
        return f"the streams are on {device_type}"
    if obstacle := triton_obstacle(mhc, width, dtype, device_type):  # post_res stays Triton's
        return obstacle
    from megatron_mhc.ops.kernels import HOPPER

    if obstacle := _obstacle(HOPPER, mhc, dtype):
        return obstacle
    for name, needed in (("h_res", "sinkhorn"), ("h_pre", "dynamic"), ("h_post", "dynamic")):
        if getattr(mhc, name) != needed:
            return f"{flag(name)} is {getattr(mhc, name)}"
    gpu = gpu or _gpu()
    if gpu is None:
        return "there is no CUDA device"
    major, minor, sms = gpu
    if (major, minor) != H100[:2]:
        return f"the GPU's compute capability is {major}.{minor}, not 9.0 (H100, H200)"
    if HOPPER.channels_per_sm is not None and width > sms * HOPPER.channels_per_sm:
        return f"--hidden-size {width} is more than {sms} SMs can take"
    return None if _has_cuda_bindings() else "cuda-bindings is not installed"


def _obstacle(kernels: Kernels, mhc: MHCConfig, dtype: torch.dtype) -> str | None:
    n, most = mhc.num_residual_streams, kernels.max_iterations
    if dtype not in kernels.dtypes:
        return f"the streams are {dtype}, not {_either(kernels.dtypes)}"
    if n not in kernels.streams:
        return f"{flag('num_residual_streams')} {n} is not {_either(kernels.streams)}"
    if most is not None and mhc.sinkhorn_iterations > most:
        return f"{flag('sinkhorn_iterations')} {mhc.sinkhorn_iterations} is more than {most}"
    return None


def _either(values: tuple[Any, ...]) -> str:
    *first, last = [f"{value}" for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _named(backend: str) -> Kernels | None:
    if backend == "reference":
        return None
    from megatron_mhc.ops.kernels import BY_NAME

    return BY_NAME[backend]


def _once(fn: Callable[[], Any]) -> Callable[[], Any]:
    """fn, asked once; torch.compile asks it too, instead of tracing through it."""
    cached = functools.cache(fn)
    return torch.compiler.assume_constant_result(lambda: cached())


@_once
def _gpu() -> tuple[int, int, int] | None:
    """Like `H100`, for the device that is current at the first call; that call initialises CUDA."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return found.major, found.minor, found.multi_processor_count


@_once
def _has_cuda_bindings() -> bool:
    from megatron_mhc.ops.hopper.compile import installed

    return installed()
