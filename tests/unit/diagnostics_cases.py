"""Connections of a few channels, and random samples of them."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics.sampler import Sample
from megatron_mhc.hyper_connection import HyperConnectionModule

T, N, C = 5, 4, 8


def config_of(mhc: MHCConfig, layers: int = 1, **settings) -> TransformerConfig:
    config = TransformerConfig(
        num_layers=layers, hidden_size=C, num_attention_heads=1, use_cpu_initialization=True, **settings
    )
    config.mhc = mhc
    return config


def connections(count: int, mhc: MHCConfig | None = None) -> nn.ModuleList:
    mhc = mhc or MHCConfig(num_residual_streams=N, init_gating_factor=1.0)
    torch.manual_seed(1)
    modules = nn.ModuleList(HyperConnectionModule(config_of(mhc), mhc, i) for i in range(count))
    for module in modules:
        if hasattr(module, "mapping_proj"):
            nn.init.normal_(module.mapping_proj.weight)
    return modules


def random_samples(layers: int, tokens: int = T, n: int = N) -> tuple[dict[int, Sample], list[torch.Tensor]]:
    """Samples of 2 * layers sub-layers, and the streams that each read."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    samples, streams = {}, []
    for i in range(2 * layers):
        x = randn(tokens, n, C)
        parts = {"pre": n, "post": n, "res": n * n}
        samples[i] = Sample(
            randn(tokens, n),
            randn(tokens, n),
            randn(tokens, n, n),
            x @ x.transpose(1, 2),
            {part: randn(tokens, size) for part, size in parts.items()},
            {part: randn(1) for part in parts},
        )
        streams.append(x)
    return samples, streams
