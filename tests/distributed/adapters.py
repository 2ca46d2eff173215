"""Parameter-efficient training, in the manner of Megatron-Bridge's PEFT: adapters, and what is frozen.

A linear layer is wrapped: its own output, plus that of a product of two narrow ones. Everything that is not
named is frozen.
"""

from __future__ import annotations

import re
from typing import Any

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megatron_mhc.testing.parameters import fill, global_parameters

RANK = 4
MAPPINGS, ADAPTERS = "hyper_connection", "adapter"


class Adapter(MegatronModule):
    """B(A(x)) of the shape of a linear layer of Megatron's, split over TP as that is."""

    def __init__(self, base: ColumnParallelLinear | RowParallelLinear):
        super().__init__(base.config)
        options: dict[str, Any] = dict(config=base.config, bias=False, init_method=nn.init.xavier_normal_)
        row = isinstance(base, RowParallelLinear)
        if row:
            self.linear_in = RowParallelLinear(
                base.input_size, RANK, input_is_parallel=True, skip_bias_add=True, **options
            )
        else:
            self.linear_in = ColumnParallelLinear(base.input_size, RANK, gather_output=True, **options)
        # Gate and up projection lie one after the other, each of them split.
        stride = 1 if row else base.weight.partition_stride
        self.linear_out = ColumnParallelLinear(
            RANK, base.output_size, gather_output=row, stride=stride, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(self.linear_in(x)[0])[0]


class Adapted(MegatronModule):
    """A linear layer and its adapter."""

    def __init__(self, base: ColumnParallelLinear | RowParallelLinear):
        super().__init__(base.config)
        self.to_wrap, self.adapter = base, Adapter(base)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = self.to_wrap(x, *args, **kwargs)
        return output + self.adapter(x), bias


def adapt(chunks: list[Any]) -> None:
    """Wrap the linear layers of attention and of dense MLPs."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for part in (layer.self_attention, layer.mlp):
                for name, module in list(part.named_children()):
                    if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                        setattr(part, name, Adapted(module))


def train_alone(*patterns: str, chunks: list[Any]) -> None:
    """Adapt if adapters are named, fill, and freeze what no pattern names; `weights` of `gpt.build`."""
    if ADAPTERS in patterns:
        adapt(chunks)
    fill(chunks)
    for name, parameter in global_parameters(chunks):
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))
