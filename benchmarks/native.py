"""Connections in a row of Megatron's own mHC, F the identity: providers for `kernels`.

They need Megatron's branch dev in front of the path: PYTHONPATH=<its checkout>:$PWD.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def in_a_row(drawn: list[Tensor], count: int, fused: bool = False, backend: str | None = None) -> Any:
    """`kernels.Connections` of Megatron's module.

    Args:
        drawn: streams [T, n, C], phi and affine.
        fused: --use-fused-mhc. backend: of `megatron_mhc.native.accelerate`; None to leave the module alone.
    """
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.hyper_connection import (  # type: ignore[import-not-found]
        HyperConnectionModule,
    )

    from benchmarks.kernels import Connections
    from megatron_mhc.native import accelerate

    x, weight, affine = drawn
    tokens, n, width = x.shape
    config: Any = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=1,
        hidden_dropout=0.0,
        enable_hyper_connections=True,  # type: ignore[call-arg]
        num_residual_streams=n,
        use_fused_mhc=fused,
    )
    row = torch.nn.ModuleList(HyperConnectionModule(config, at + 1) for at in range(count)).cuda()
    names = ("bias", "alpha_pre", "alpha_post", "alpha_res")
    with torch.no_grad():
        for connection in row:
            connection.mapping_proj.weight.copy_(weight)
            for name, value in zip(names, affine.split([len(weight), 1, 1, 1]), strict=True):
                getattr(connection, name).copy_(value)
    if backend is not None:
        accelerate(row, backend)
    leaf = x.detach().view(tokens, 1, n * width).requires_grad_()

    def forward(streams: Tensor) -> Tensor:
        for connection in row:
            layer_input, h_res, h_post, residual = connection(streams)
            streams = connection.fused_h_res_h_post_bda(
                h_res, residual, h_post, (layer_input, None), 0.0, True, False
            )
        return streams

    parameters = [p for c in row for p in (c.mapping_proj.weight, *(getattr(c, name) for name in names))]
    return Connections(forward, [leaf, *parameters], lambda streams: row[0](streams)[0])


PROVIDERS = {
    "Megatron's own, torch.compile": in_a_row,
    "Megatron's own, --use-fused-mhc": functools.partial(in_a_row, fused=True),
    "Megatron's own, accelerated by hopper": functools.partial(in_a_row, backend="hopper"),
    "Megatron's own, accelerated by triton": functools.partial(in_a_row, backend="triton"),
}
ON_CPU = {"Megatron's own": in_a_row}
