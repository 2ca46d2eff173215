"""The contraction slot: what a library puts between the n streams and the model's output.

docs/contraction.md describes it to those who fill it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc.config import MHCConfig
from megatron_mhc.mapping_parameters import hold
from megatron_mhc.parallel import streams_dtype

# Called as (config=, mhc=); returns a module that maps streams [s, b, n*C] to [s, b, C], with `replaces_norm`
# true where the final norm is not to follow.
type Contraction = Callable[..., nn.Module] | ModuleSpec

_GIVE = (
    "give a class, a function or a ModuleSpec that builds a module from (config=, mhc=): docs/contraction.md"
)


def build(contraction: Contraction, config: TransformerConfig, mhc: MHCConfig) -> nn.Module:
    """Build a contraction, check it on a few zeros, and mark its parameters as replicated over TP.

    Args:
        contraction: called as (config=, mhc=).

    Returns:
        a module that maps streams [s, b, n*C] to [s, b, C].

    Raises:
        ValueError: it builds no module, one that returns another shape, or one that replaces the final norm
            and has no entry in a checkpoint, by which that is known for an mHC model's.
    """
    name = _name(contraction)
    made = contraction.module if isinstance(contraction, ModuleSpec) else contraction
    if isinstance(made, nn.Module) or not callable(made):
        raise ValueError(f"contraction={name}: {_GIVE}")
    given: dict[str, Any] = dict(config=config, mhc=mhc)
    if isinstance(contraction, ModuleSpec):
        more = {} if contraction.submodules is None else {"submodules": contraction.submodules}
        _check_arguments(name, made, {**contraction.params, **more, **given})
        module = build_module(contraction, **given)
    else:
        _check_arguments(name, made, given)
        module = contraction(**given)
    if not isinstance(module, nn.Module):
        raise ValueError(f"contraction={name} builds a {type(module).__name__}: {_GIVE}")
    _check_shape(name, module, config, mhc)
    if getattr(module, "replaces_norm", False) and not module.state_dict():
        raise ValueError(
            f"contraction={name} replaces the final norm and has no parameter and no persistent buffer, so "
            "no checkpoint would tell this model from a plain one: give it one, or replaces_norm = False"
        )
    for parameter in module.parameters():
        # Under sequence parallelism each rank sees its tokens; who splits a parameter knows what it sums.
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    hold(module)
    return module


def _name(contraction: Any) -> str:
    target = contraction.module if isinstance(contraction, ModuleSpec) else contraction
    return getattr(target, "__qualname__", None) or type(target).__name__


def _check_arguments(name: str, made: Any, given: dict[str, Any]) -> None:
    try:
        inspect.signature(made).bind(**given)
    except TypeError as error:
        raise ValueError(f"contraction={name} cannot be called so, {error}: {_GIVE}") from None


def _check_shape(name: str, module: nn.Module, config: TransformerConfig, mhc: MHCConfig) -> None:
    n, width = mhc.num_residual_streams, config.hidden_size
    device = next((p.device for p in module.parameters()), None)
    if device is None:
        device = torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())
    zeros = torch.zeros(2, 1, n * width, dtype=streams_dtype(config), device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        out = module(zeros)
    shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if shape != (2, 1, width):
        raise ValueError(
            f"contraction={name} makes {shape} of streams {(2, 1, n * width)}, [s, b, n*C] of {n} streams of "
            f"{width} channels: return [s, b, C], here {(2, 1, width)}"
        )
