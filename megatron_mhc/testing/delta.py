"""Megatron's gated delta net on a CPU: plain torch for the three operations that it takes from `fla`.

B sequences of S tokens, H heads of widths K and V, D channels; any floating-point dtype, float64 included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its length in the last dimension."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, **_: Any
) -> tuple[Tensor, None]:
    """x [B, S, D] with each channel convolved over the tokens in front, weight [D, W], and SiLU of it."""
    assert activation in ("silu", "swish")
    channels, size = weight.shape
    padded = F.pad(x.transpose(1, 2), (size - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels)).transpose(1, 2), None


def chunk_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """The rule, token after token: S = e^g S + k (beta (v - (e^g S)^T k))^T, and out = S^T q / sqrt(K).

    Args:
        q, k: [B, S, H, K].
        v: [B, S, H, V].
        g, beta: [B, S, H], logarithm of the decay and rate of the update.

    Returns:
        [B, S, H, V], and None for the last state.
    """
    state = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1])
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        found = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        update = (v[:, t] - found) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * update[:, :, None]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / q.shape[-1] ** 0.5)
    return torch.stack(out, 1), None


class LocalDeltaNet(GatedDeltaNet):
    """Megatron's module, whose projections say of which parts TP takes its share.

    Args:
        norm: builder of its output norm, for which Megatron's takes no function.
    """

    def __init__(self, config: TransformerConfig, *args: Any, norm: Callable[..., nn.Module], **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.out_norm = norm(config=config, hidden_size=self.value_head_dim, eps=config.layernorm_epsilon)
        convolved = [self.qk_dim, self.qk_dim, self.v_dim]
        heads = self.num_value_heads  # of beta and alpha, behind the gate
        self.in_proj.weight.sections = [*convolved, self.v_dim, heads, heads]
        self.conv1d.weight.sections = convolved  # type: ignore[assignment]


def use_torch() -> None:
    """Have Megatron's gated delta nets take the operations above for fla's."""
    operations: dict[str, Any] = dict(l2norm=l2norm, causal_conv1d=causal_conv1d)
    operations |= dict(chunk_gated_delta_rule=chunk_gated_delta_rule, HAVE_FLA=True)
    for kind in GatedDeltaNet.__mro__:  # in 0.19 of two modules
        module = sys.modules[kind.__module__]
        if module.__name__.startswith("megatron.core.ssm"):
            vars(module).update({name: value for name, value in operations.items() if name in vars(module)})
