"""Where the model's one hidden state becomes n streams, and where the streams become one again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_mhc import initial
from megatron_mhc.backend import Backend
from megatron_mhc.checkpoint import take_or_refuse
from megatron_mhc.checkpoint_keys import compare_arithmetic, decode_arithmetic, encode_arithmetic
from megatron_mhc.checkpoint_parts import in_shards
from megatron_mhc.config import MHCConfig
from megatron_mhc.hyper_connection import MappingParameters, MappingProjection, check_width
from megatron_mhc.ops import reference
from megatron_mhc.parallel import mark_replicated


class ContractHead(MappingParameters):
    """Learned weighted sum of the streams (`--mhc-contract learned_head`).

    Parameters (fp32): `mapping_proj.weight [n, n*C]`, `bias [n]`, `alpha [1]`; they start at equal
    weights, which the final norm makes the same as the mean; under `--mhc-init mean_read` near 1/n.
    """

    def __init__(self, config: TransformerConfig, mhc: MHCConfig):
        super().__init__(config, mhc)
        n = mhc.num_residual_streams
        self.mapping_proj = MappingProjection(n, n * config.hidden_size, self.dtype, self.device)
        self.bias = nn.Parameter(torch.zeros(n, dtype=self.dtype, device=self.device))
        self.alpha = self.scalar(mhc.init_gating_factor)
        if mhc.init == "mean_read":
            nn.init.constant_(self.bias, initial.mean_read_logit(n))
            if config.perform_initialization:
                initial.draw_phi(self.mapping_proj.weight, mhc, config.init_method_std)
        mark_replicated(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Reduce x: [T, n, C] to [T, C]."""
        return reference.learned_head(
            x,
            self.mapping_proj(),
            self.alpha,
            self.bias,
            norm_eps=self.mhc.norm_eps,
            deepseek_v4=self.mhc.has_deepseek_form,
        )


class ContractNorm(nn.Module):
    """Contracts the streams [s, b, n*C] to [s, b, C] and applies the model's final norm.

    It takes the place of the block's final norm, which Megatron builds on the stage that ends the
    decoder, also where that stage holds no layer. The norm keeps its parameters under `norm.`, so
    every mHC checkpoint is known by a key that a plain model lacks (`checkpoint_keys`).
    """

    def __init__(self, config: TransformerConfig, mhc: MHCConfig, norm: nn.Module):
        super().__init__()
        self.mhc = mhc
        self.backend = Backend(mhc)
        self.width = config.hidden_size
        self.norm = norm
        self.head = ContractHead(config, mhc) if mhc.contract == "learned_head" else None

    def forward(self, streams: Tensor) -> Tensor:
        n = self.mhc.num_residual_streams
        check_width(streams, n * self.width, "final norm")
        s, b, _ = streams.shape
        x = streams.view(s * b, n, self.width)
        hidden = self.backend.contract(x) if self.head is None else self.head(x)
        return self.norm(hidden.view(s, b, self.width))

    def get_extra_state(self) -> Tensor:
        """The arithmetic that the weights were trained under, as JSON bytes."""
        return encode_arithmetic(self.mhc)

    def set_extra_state(self, state: Any) -> None:
        """Compare a checkpoint's arithmetic with this model's.

        Raises:
            ValueError: naming the first flag whose value differs, and the value to give.
        """
        compare_arithmetic(decode_arithmetic(state), self.mhc)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What Megatron makes of a module without this method, and the head's shards as FSDP2 cuts them."""
        groups = dict(
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        entries = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {}, sharded_offsets, **groups
        )
        return entries if self.head is None else in_shards(self.head, entries, prefix + "head.")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + "norm." + name in state_dict for name, _ in self.norm.named_parameters()):
            # Megatron-Bridge deletes extra states once `dist_checkpointing.load` has compared them.
            state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        # A plain checkpoint keeps the norm one level higher; Transformer Engine's has an extra state too.
        if any(prefix + name in state_dict for name, _ in self.norm.named_parameters()):
            for name in self.norm.state_dict():
                if prefix + name in state_dict:
                    state_dict[prefix + "norm." + name] = state_dict.pop(prefix + name)
        take_or_refuse(self.mhc, state_dict, prefix, [("_extra_state", self.get_extra_state())])
        super()._load_from_state_dict(state_dict, prefix, *args)


def contract_norm_builder(norm: Callable[..., nn.Module], mhc: MHCConfig) -> Callable[..., nn.Module]:
    """Wrap the builder of a block's final norm so that it builds a ContractNorm around it."""

    def build(*, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:
        return ContractNorm(config, mhc, norm(config=config, hidden_size=hidden_size, eps=eps))

    return build
