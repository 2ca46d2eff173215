"""Stand-ins for apex and Transformer Engine in plain torch, as far as Megatron's GPT and Adam use them.

They have the shapes of the real ones: fused optimizers with one step count a group, norms inside linear
layers, extra state in every module. `install_apex` and `install_transformer_engine` put them where an
import finds them.
"""

from __future__ import annotations

import contextlib
import math
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_mhc.testing.adam import PlainAdam


def module(name: str, **contents: Any) -> types.ModuleType:
    """Make `name` importable, and an attribute of its parent."""
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, made)
    return made


class FusedAdam(PlainAdam):
    pass


class FusedSGD(torch.optim.SGD):
    pass


def applier(op: Any, overflow: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
    return op(lists, *args)


def l2norm(lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    return torch.stack([t.float().norm() for t in lists[0]]).norm().view(1), None


def scale(lists: list[list[Tensor]], factor: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


class FusedLayerNormAffineFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, normalized_shape, eps):
        output, mean, rstd = torch.native_layer_norm(input, normalized_shape, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.shape = normalized_shape
        return output

    @staticmethod
    def backward(ctx, gradient):
        input, weight, bias, mean, rstd = ctx.saved_tensors
        gradients = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), input, ctx.shape, mean, rstd, weight, bias, [True, True, True]
        )
        return *gradients, None, None


def install_apex() -> None:
    module("apex")
    module("apex.optimizers", FusedAdam=FusedAdam, FusedSGD=FusedSGD)
    module("apex.multi_tensor_apply", multi_tensor_applier=applier)
    module("apex.normalization")
    module("apex.normalization.fused_layer_norm", FusedLayerNormAffineFunction=FusedLayerNormAffineFunction)
    module("amp_C", multi_tensor_l2norm=l2norm, multi_tensor_scale=scale)


class WithState(nn.Module):
    """As Transformer Engine's modules: an extra state, which is empty without FP8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert state is None or state.numel() == 0, "another module's extra state"


class Norm(WithState):
    """LayerNorm or RMSNorm, by `kind`."""

    kind = "LayerNorm"

    def __init__(
        self,
        normalized_shape: int,
        eps: float,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = torch.full((normalized_shape,), 0.0 if zero_centered_gamma else 1.0, dtype=params_dtype)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros_like(start)) if self.kind == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight + self.zero_centered_gamma, self.bias, self.eps)


class RMSNorm(Norm):
    kind = "RMSNorm"


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class Linear(WithState):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        init_method: Any,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ):
        super().__init__()
        self.parallel_mode, self.return_bias, self.use_bias = parallel_mode, return_bias, bias
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=params_dtype)) if bias else None
        if init_method is not None:
            init_method(self.weight)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        if self.return_bias:
            return F.linear(x, self.weight), self.bias
        return F.linear(x, self.weight, self.bias)


class LayerNormLinear(Linear):
    def __init__(
        self,
        *args: Any,
        eps: float,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        sequence_parallel: bool = False,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        start = torch.full((self.in_features,), float(not zero_centered_gamma), dtype=self.weight.dtype)
        of_linear, self._parameters = self._parameters, {}
        self.layer_norm_weight = nn.Parameter(start)
        self.layer_norm_bias = nn.Parameter(torch.zeros_like(start)) if normalization == "LayerNorm" else None
        for parameter in self.parameters():
            parameter.sequence_parallel = sequence_parallel
        self._parameters |= of_linear

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        weight = self.layer_norm_weight + self.zero_centered_gamma
        return super().forward(norm(x, weight, self.layer_norm_bias, self.eps))


class DotProductAttention(nn.Module):
    def __init__(self, num_attention_heads: int, kv_channels: Any, **_: Any):
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> Tensor:
        # [s, b, heads, d]
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
        return (weights @ v).permute(2, 0, 1, 3).flatten(2)


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def install_transformer_engine() -> None:
    module("transformer_engine", __version__="1.8.0")
    parts = (Linear, LayerNormLinear, DotProductAttention, RMSNorm)
    module("transformer_engine.pytorch", LayerNorm=Norm, **{part.__name__: part for part in parts})
    quiet = contextlib.nullcontext
    fp8 = dict(FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=quiet, fp8_model_init=quiet)
    module("transformer_engine.pytorch.fp8", **fp8)
    module("transformer_engine.common")
    module("transformer_engine.common.recipe", DelayedScaling=type("DelayedScaling", (), {}))
    recompute = dict(activation_recompute_forward=quiet, CudaRNGStatesTracker=object)
    module("transformer_engine.pytorch.distributed", **recompute)
    module("transformer_engine.pytorch.cpp_extensions", cast_to_fp8=None)
    module("transformer_engine.pytorch.float8_tensor", Float8Tensor=type("Float8Tensor", (), {}))
    module(
        "transformer_engine.pytorch.optimizers",
        FusedAdam=FusedAdam,
        FusedSGD=FusedSGD,
        multi_tensor_applier=applier,
        multi_tensor_l2norm=l2norm,
        multi_tensor_scale=scale,
        multi_tensor_scale_tensor=scale,
    )
