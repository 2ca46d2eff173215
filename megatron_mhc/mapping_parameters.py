"""Modules whose parameters are those of mappings: replicated over TP, and in a precision of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mhc.checkpoint import take_or_refuse
from megatron_mhc.checkpoint_parts import InParts, in_shards
from megatron_mhc.config import MHCConfig


class MappingProjection(nn.Module):
    """Holds phi transposed; calling it returns `weight: [rows, columns]`.

    Called rather than read, so that a data-parallel wrapper that gathers parameters just before a
    module runs (--overlap-param-gather) sees the use.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: Any):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=device))

    def forward(self) -> Tensor:
        return self.weight


class MappingParameters(MegatronModule):
    """Base of modules whose parameters keep their own precision and are replicated over TP.

    Float16Module, `.half()` and `.bfloat16()` convert every parameter below them; mapping parameters
    stay fp32 (fp64 where params_dtype is fp64), because a Sinkhorn projection of bf16 logits loses
    its row sums. Without `own_precision` they are as the model's other parameters.
    """

    own_precision = True

    def __init__(self, config: TransformerConfig, mhc: MHCConfig):
        super().__init__(config=config)
        self.mhc = mhc
        own = torch.float64 if config.params_dtype == torch.float64 else torch.float32
        self.dtype = own if self.own_precision else config.params_dtype
        self.device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        _holders.add(self)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        _holders.add(self)  # a copy is built without `__init__`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not self.own_precision:
            return super()._apply(fn, recurse)

        def keep_dtype(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        entries = self.state_dict()
        if isinstance(self, InParts) and self.parts and prefix + self.whole in state_dict:
            entries = {name: value for name, value in entries.items() if name not in self.parts}
            entries[self.whole] = getattr(self, self.whole)
        take_or_refuse(self.mhc, state_dict, prefix, entries.items())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Any:
        entries = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return in_shards(self, entries, prefix)

    def scalar(self, value: float) -> nn.Parameter:
        """A trainable [1] tensor; one-dimensional, so Megatron applies no weight decay to it."""
        return nn.Parameter(torch.full((1,), value, dtype=self.dtype, device=self.device))


_holders: WeakSet[nn.Module] = WeakSet()
_MARK = "mhc_trained_beside_mappings"


def hold(module: nn.Module) -> None:
    """Count a module's parameters as those of mappings, for `are_ours`: a contraction that a library made."""
    _holders.add(module)


def are_ours(parameters: Iterable[Tensor]) -> bool:
    """Whether some of an optimizer's parameters are of mappings, or marked as beside such."""
    own = {id(parameter) for holder in _holders for parameter in holder.parameters()}
    return any(id(parameter) in own or hasattr(parameter, _MARK) for parameter in parameters)


def mark(parameters: Iterable[Tensor]) -> None:
    """Have `are_ours` know tensors that an optimizer has in the place of a model's parameters."""
    for parameter in parameters:
        setattr(parameter, _MARK, True)
