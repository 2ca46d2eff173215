"""The RMSNorm in front of F: where `pre` computes it (--mhc-norm), or where there is none (qwen4_exp).

Its weight stays where Megatron has it, and so do its key in checkpoints, its group and its reductions:

    input_layernorm, pre_mlp_layernorm   modules of the layer (MLA, MoE, local ones): they pass their input on
    linear_qkv, linear_fc1               Transformer Engine's linears with a norm inside (dense layers): plain
                                         linears that own `layer_norm_weight` take their place
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_mhc.backend import H100, choose, device_type, folds_norm, why_norms_apart
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.ops.options import ReadNorm
from megatron_mhc.parallel import gather_parameters, streams_dtype

_LINEARS = {"self_attention": "linear_qkv", "mlp": "linear_fc1"}
_FIRST = ("linear_qkv", "in_proj", "linear_fc1")  # of an F, with or without a norm inside
_NORMS = {"self_attention": "input_layernorm", "mlp": "pre_mlp_layernorm"}


@dataclass(frozen=True)
class FoldedNorm:
    """The norm in front of one F, for that connection's `pre`.

    Args:
        layer, path: where the owner stands.
        owner: the module that has its weight, [C], as `name`.
        eps, zero_centered: see `ReadNorm`.
    """

    layer: nn.Module
    path: tuple[str, ...]
    owner: nn.Module
    name: str
    eps: float
    zero_centered: bool

    def read(self) -> ReadNorm:
        """The norm, with its weight gathered: `pre` runs ahead of the owner.

        Raises:
            ValueError: something that has not the owner inside, as an adapter has, took its place.
        """
        module: nn.Module | None = self.layer
        for name in self.path:
            module = None if module is None else module._modules.get(name)
        if module is not self.owner and all(module is not self.owner for module in self.layer.modules()):
            raise ValueError(
                f"{flag('norm')}: `pre` reads the {self.name} of the {'.'.join(self.path)} that the layer "
                f"was built with, and another stands there: wrap the first, or use {flag('norm')} apart"
            )
        gather_parameters(self.owner)
        return ReadNorm(getattr(self.owner, self.name), self.eps, self.zero_centered)


class PassesOn(IdentityOp):
    """Mixin of a norm whose output `pre` writes in place of its input.

    Megatron neither recomputes nor offloads the output of an IdentityOp, which here is F's own input.
    """


def fold(
    submodules: TransformerLayerSubmodules, config: TransformerConfig, mhc: MHCConfig
) -> TransformerLayerSubmodules:
    """A layer's submodules, whose norms leave their arithmetic to `pre` as `--mhc-norm` says.

    The gated residual has none, see `drop`.

    Raises:
        ValueError: `folded` where a norm cannot be.
    """
    if mhc.is_gated:
        return drop(submodules, _NORMS)
    if mhc.norm == "apart":
        return submodules
    where = (device_type(),) if mhc.backend == "auto" else ("cuda", H100)
    backend = choose(mhc, config.hidden_size, streams_dtype(config), *where)
    if why_norms_apart(config, mhc, backend) is not None:
        return submodules
    if mhc.norm == "folded" and backend != "reference" and not folds_norm(backend):
        _refuse(f"the kernels of {backend} compute no norm", f"{flag('backend')} triton")
    changed: dict[str, Any] = {}
    for f, name in _NORMS.items():
        module, norm = getattr(submodules, f), getattr(submodules, name)
        if _is_identity(module):
            continue
        if norm is not IdentityOp:
            changed[name] = functools.partial(_passing_on, norm, name, mhc)
        else:
            changed[f] = _without_norm(module, _LINEARS[f], config, mhc)
    return replace(submodules, **changed)


def fold_mixer(submodules: MambaLayerSubmodules, mhc: MHCConfig) -> MambaLayerSubmodules:
    """As `fold`, of a Mamba layer, whose norm is never folded into `pre`."""
    return drop(submodules, {"mixer": "norm"}) if mhc.is_gated else submodules


def drop(submodules: Any, norms: dict[str, str]) -> Any:
    """A layer's submodules without the norms in front of F, which a read that normalises does not need.

    Args:
        norms: by the name of F.

    Raises:
        ValueError: a norm inside of an F that cannot be taken out.
    """
    changed: dict[str, Any] = {}
    for f, name in norms.items():
        if not _is_identity(getattr(submodules, name)):
            changed[name] = IdentityOp
        elif not _is_identity(getattr(submodules, f)):
            changed[f] = _by_plain_linear(getattr(submodules, f))
    return replace(submodules, **changed)


def _by_plain_linear(spec: Any) -> Any:
    """The spec of an F, with a linear that has no norm in the place of Transformer Engine's that has one."""
    partly = isinstance(spec, functools.partial)
    inner: Any = spec.keywords.get("submodules") if partly else getattr(spec, "submodules", None)
    fused = getattr(extension, "TELayerNormColumnParallelLinear", None)
    found = [name for name in _FIRST if fused is not None and getattr(inner, name, None) is fused]
    if not found:
        return spec
    if partly and getattr(spec.func, "__self__", None) is not MLP:
        raise ValueError(
            f"{flag('preset')} qwen4_exp has no norm in front of F, and {_name(spec)} has one inside: drop "
            "--use-transformer-engine-op-fuser"
        )
    inner = replace(inner, **dict.fromkeys(found, extension.TEColumnParallelLinear))
    if partly:
        return functools.partial(spec.func, *spec.args, **{**spec.keywords, "submodules": inner})
    return replace(spec, submodules=inner)


def folded_in(layer: Any, f: str) -> FoldedNorm | None:
    """The norm of a built layer's F, if it is left to `pre`; that of a `mixer` never is."""
    if f not in _NORMS:
        return None
    norm: Any = getattr(layer, _NORMS[f])
    linear: Any = getattr(getattr(layer, f), _LINEARS[f], None)
    settings = layer.config.layernorm_epsilon, layer.config.layernorm_zero_centered_gamma
    if isinstance(norm, PassesOn):
        return FoldedNorm(layer, (_NORMS[f],), norm, "weight", *settings)
    if type(linear) is _linear():
        return FoldedNorm(layer, (f, _LINEARS[f]), linear, "layer_norm_weight", *settings)
    return None


def _refuse(why: str, instead: str) -> NoReturn:
    raise ValueError(f"{flag('norm')} folded: {why}; use {instead}, or {flag('norm')} auto or apart")


def _is_identity(spec: Any) -> bool:
    return spec is IdentityOp or getattr(spec, "module", None) is IdentityOp


def _passing_on(build: Callable[..., nn.Module], name: str, mhc: MHCConfig, **arguments: Any) -> nn.Module:
    """Build Megatron's norm, and have it pass its input on; keys, extra state and parameters stay its own."""
    norm = build(**arguments)
    kind: Any = type(norm)
    if kind in _rms_norms():
        norm.__class__ = _passing(kind)
    elif mhc.norm == "folded":
        _refuse(f"{name} is a {kind.__name__}", "torch's or Transformer Engine's RMSNorm")
    return norm


def _rms_norms() -> tuple[type, ...]:
    if not extension.HAVE_TE:
        return (nn.RMSNorm,)
    with_residual = getattr(extension, "TEFusedResidualRMSNorm", None)
    return nn.RMSNorm, extension.te.pytorch.RMSNorm, *([with_residual] if with_residual else [])


@functools.cache
def _passing(kind: type) -> type:
    return type(f"PassesOn{kind.__name__}", (PassesOn, kind), {})


def _without_norm(spec: Any, linear: str, config: TransformerConfig, mhc: MHCConfig) -> Any:
    """The spec of an F whose first linear has the norm inside, with one in its place that has none."""
    inner: Any = spec.keywords.get("submodules") if isinstance(spec, functools.partial) else None
    if isinstance(spec, ModuleSpec) and (spec.module is MLP or _is_attention(spec.module)):
        inner = spec.submodules
    elif inner is not None and getattr(spec.func, "__self__", None) is not MLP:  # a fused one has its own
        inner = None
    if not extension.HAVE_TE or getattr(inner, linear, None) is not extension.TELayerNormColumnParallelLinear:
        if mhc.norm == "folded":
            where = f"in front of {_name(spec)}, nor in a {linear} of it"
            _refuse(f"there is no norm that `pre` knows {where}", "Megatron's GPT layers")
        return spec
    if config.fp8 or config.fp4:
        _refuse(f"{linear} takes FP8 or FP4 from the norm inside it", "no --fp8-format or --fp4-format")
    inner = replace(inner, **{linear: _linear()})
    if isinstance(spec, ModuleSpec):
        return replace(spec, submodules=inner)
    return functools.partial(spec.func, *spec.args, **{**spec.keywords, "submodules": inner})


def _is_attention(module: Any) -> bool:
    return isinstance(module, type) and issubclass(module, SelfAttention)


def _name(spec: Any) -> str:
    spec = getattr(spec, "module", getattr(spec, "func", spec))
    return str(getattr(spec, "__qualname__", spec))


@functools.cache
def _linear() -> Any:
    """Of linears that own a norm's weight; a class that Megatron can make beside Transformer Engine alone."""
    if not extension.HAVE_TE:
        return nn.Identity

    class ColumnParallelLinearBehindNorm(extension.TEColumnParallelLinear):
        """TELayerNormColumnParallelLinear without the norm's arithmetic: parameters and keys, in order."""

        def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any):
            super().__init__(input_size, output_size, config=config, **kwargs)
            start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
            options = dict(dtype=config.params_dtype, device=self.weight.device)
            self.layer_norm_weight = nn.Parameter(torch.full((input_size,), start, **options))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            for name in list(self._parameters)[:-1]:  # an optimizer's state goes by their order
                self._parameters[name] = self._parameters.pop(name)

    return ColumnParallelLinearBehindNorm
