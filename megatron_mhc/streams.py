"""Where the model's one hidden state becomes n streams, and where the streams become one again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from megatron_mhc import initial
from megatron_mhc.backend import Backend
from megatron_mhc.checkpoint import take_or_refuse
from megatron_mhc.checkpoint_keys import compare_arithmetic, decode_arithmetic, encode_arithmetic
from megatron_mhc.checkpoint_parts import in_shards
from megatron_mhc.config import MHCConfig, flag
from megatron_mhc.contraction import Contraction, build
from megatron_mhc.gated import ExitMixer
from megatron_mhc.handed_on import taken
from megatron_mhc.mapping_parameters import MappingParameters, MappingProjection
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
    decoder, also where that stage holds no layer. The norm keeps its parameters under `norm.`, and a
    contraction that was supplied under `contraction.`, so every mHC checkpoint is known by a key that a
    plain model lacks (`checkpoint_keys`).

    Args:
        norm: the final norm, which is dropped where the contraction replaces it.
        contraction: what builds the contraction of `--mhc-contract library`, see `contraction.build`; that of
            `mixer` comes from here.
        hands_on: the output carries the streams to what predicts further tokens, see `take_streams`.

    Raises:
        ValueError: a contraction that is none, or beside another `--mhc-contract`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mhc: MHCConfig,
        norm: nn.Module,
        contraction: Contraction | None = None,
        hands_on: bool = False,
    ):
        super().__init__()
        self.hands_on = hands_on
        self.mhc = mhc
        self.backend = Backend(mhc)
        self.config, self.width = config, config.hidden_size
        check_contraction(mhc, contraction)
        contraction = ExitMixer if mhc.contract == "mixer" else contraction
        supplied = None if contraction is None else build(contraction, config, mhc)
        replaced = getattr(supplied, "replaces_norm", False)
        if replaced and mhc.load_dense:
            raise ValueError(
                f"{flag('load_dense')}: the contraction replaces the final norm, and a plain checkpoint has "
                f"one: drop {flag('load_dense')}, or set replaces_norm = False"
            )
        # In this order, by which optimizers know parameters.
        self.norm = None if replaced else norm
        self.head = ContractHead(config, mhc) if mhc.contract == "learned_head" else None
        self.contraction = supplied
        # A norm's output has the dtype of what reads it.
        self.out_dtype = config.params_dtype if config.fp32_residual_connection else None

    def forward(self, streams: Tensor) -> Tensor:
        streams, h_pre = taken(streams, self.config, self.mhc, "final norm")
        s, b, _ = streams.shape
        x = streams.view(s * b, self.mhc.num_residual_streams, self.width)
        if self.contraction is not None:
            hidden = self.contraction(streams)
        elif self.mhc.contract == "h_pre":
            assert h_pre is not None
            hidden = reference.pre(x, h_pre)
        else:
            hidden = self.backend.contract(x) if self.head is None else self.head(x)
        if self.norm is None:
            return hidden if self.out_dtype is None else hidden.to(self.out_dtype)
        normed = self.norm(hidden.view(s, b, self.width))
        if not self.hands_on or _is_inference():
            return normed
        # What Megatron's block does to the output of a norm, and a tensor that is no view stays itself there.
        normed = make_viewless_tensor(normed, requires_grad=normed.requires_grad, keep_graph=True)
        normed.mhc_streams = streams
        return normed

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
        """What Megatron makes of a module without this method, and our parts' shards as FSDP2 cuts them."""
        groups = dict(
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group")
            or parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        state = self.state_dict(keep_vars=True)
        shared = {name: value for name, value in state.items() if not name.startswith("contraction.")}
        entries = make_sharded_tensors_for_checkpoint(shared, prefix, {}, sharded_offsets, **groups)
        if self.head is not None:
            in_shards(self.head, entries, prefix + "head.")
        if self.contraction is not None:
            theirs = sharded_state_dict_default(
                self.contraction, prefix + "contraction.", sharded_offsets, metadata, groups["tp_group"]
            )
            if not hasattr(self.contraction, "sharded_state_dict"):
                in_shards(self.contraction, theirs, prefix + "contraction.")
            entries.update(theirs)
        return entries

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(prefix + name in state_dict for name in self._own_entries()):
            # Megatron-Bridge deletes extra states once `dist_checkpointing.load` has compared them.
            state_dict.setdefault(prefix + "_extra_state", self.get_extra_state())
        # A plain checkpoint keeps the norm one level higher; Transformer Engine's has an extra state too.
        parameters: dict[str, Any] = {} if self.norm is None else dict(self.norm.named_parameters())
        if self.norm is not None and any(prefix + name in state_dict for name in parameters):
            for name in self.norm.state_dict():
                if prefix + name in state_dict:
                    state_dict[prefix + "norm." + name] = state_dict.pop(prefix + name)
        if self.contraction is not None:
            entries = self.contraction.state_dict().items()
            tensors = [(name, value) for name, value in entries if isinstance(value, Tensor)]
            take_or_refuse(self.mhc, state_dict, prefix + "contraction.", tensors)
        take_or_refuse(self.mhc, state_dict, prefix, [("_extra_state", self.get_extra_state())])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_entries(self) -> list[str]:
        """Names of which a checkpoint of this model has some, and a plain one has none."""
        norm: Any = () if self.norm is None else dict(self.norm.named_parameters())
        theirs: Any = () if self.contraction is None else self.contraction.state_dict()
        return [f"norm.{name}" for name in norm] + [f"contraction.{name}" for name in theirs]


def check_contraction(mhc: MHCConfig, contraction: Contraction | None) -> None:
    """Raise ValueError where `--mhc-contract` and what was supplied do not go together."""
    if contraction is None and mhc.contract == "library":
        raise ValueError(
            f"{flag('contract')} library, and this model was given no contraction: have your own --spec call "
            "wrap_block_spec or wrap_hybrid_spec with contraction=..., or give mean, sum or learned_head"
        )
    if contraction is not None and mhc.contract != "library":
        raise ValueError(
            f"contraction= with {flag('contract')} {mhc.contract}: give {flag('contract')} library, which "
            "checkpoints then say, or drop contraction="
        )


def contract_norm_builder(
    norm: Callable[..., nn.Module],
    mhc: MHCConfig,
    contraction: Contraction | None = None,
    hands_on: bool = False,
) -> Callable[..., nn.Module]:
    """Wrap the builder of a block's final norm so that it builds a ContractNorm around it.

    Raises:
        ValueError: see `check_contraction`.
    """
    check_contraction(mhc, contraction)

    def build(*, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:
        own_norm = norm(config=config, hidden_size=hidden_size, eps=eps)
        return ContractNorm(config, mhc, own_norm, contraction, hands_on)

    return build


def reads_streams(config: TransformerConfig, mhc: MHCConfig) -> bool:
    """Whether this model's layers of multi-token prediction read the streams."""
    return bool(config.mtp_num_layers) and mhc.mtp == "multistream"


def take_streams(hidden_states: Tensor) -> Tensor:
    """The streams [s, b, n*C] that came with a decoder's output [s, b, C], which lets go of them.

    Raises:
        RuntimeError: none came.
    """
    streams = vars(hidden_states).pop("mhc_streams", None)
    if streams is None:
        raise RuntimeError(
            "--mhc-mtp multistream: the decoder's output came without its streams: something between the "
            "decoder and its layers of multi-token prediction has replaced the tensor; use --mhc-mtp single"
        )
    return streams


def _is_inference() -> bool:
    from megatron.core.inference.utils import InferenceMode  # 0.17 has none, and hands nothing on

    return bool(InferenceMode.is_active())
