"""Which operations run: what --mhc-backend says, checked against what the kernels can serve."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_mhc import ops
from megatron_mhc.config import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "options, width, dtype, device, backend",
    [
        ({}, 4096, BF16, "cuda", "triton"),
        ({}, 4096, torch.float32, "cuda", "triton"),
        ({}, 4096, BF16, "cpu", "reference"),
        ({}, 4100, BF16, "cuda", "reference"),
        ({}, 4096, torch.float64, "cuda", "reference"),
        (dict(backend="reference"), 4096, BF16, "cuda", "reference"),
        (dict(h_res="identity"), 4096, BF16, "cuda", "reference"),
        (dict(h_pre="fixed"), 4096, BF16, "cuda", "reference"),
        (dict(num_residual_streams=2), 4096, BF16, "cuda", "triton"),
        (dict(num_residual_streams=3), 4096, BF16, "cuda", "reference"),
        (dict(num_residual_streams=8), 4096, torch.float16, "cuda", "triton"),
        (dict(preset="deepseek_v4"), 4096, BF16, "cuda", "triton"),
    ],
)
def test_backend_follows_the_option_and_the_streams(options, width, dtype, device, backend):
    assert ops.choose_backend(MHCConfig(**options), width, dtype, device) == backend


@pytest.mark.parametrize(
    "options, width, dtype, words",
    [
        (dict(num_residual_streams=3), 4096, BF16, "--mhc-num-residual-streams 3 is not 1, 2, 4 or 8"),
        ({}, 4100, BF16, "--hidden-size 4100 is no multiple of 16"),
        ({}, 4096, torch.float64, "the streams are torch.float64"),
        (dict(h_res="unconstrained"), 4096, BF16, "--mhc-h-res is unconstrained"),
    ],
)
def test_triton_where_it_cannot_serve_is_refused(options, width, dtype, words):
    with pytest.raises(ValueError) as error:
        ops.choose_backend(MHCConfig(backend="triton", **options), width, dtype, "cuda")
    assert words in str(error.value) and "--mhc-backend auto" in str(error.value)


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the streams are on cpu"):
        ops.choose_backend(MHCConfig(backend="triton"), 64, BF16, "cpu")


def test_triton_for_a_width_it_cannot_serve_is_refused_when_the_layer_is_built():
    config = TransformerConfig(
        num_layers=1, hidden_size=20, num_attention_heads=2, use_cpu_initialization=True
    )
    with pytest.raises(ValueError, match="--hidden-size 20 is no multiple of 16"):
        HyperConnectionModule(config, MHCConfig(backend="triton"), 0)
    HyperConnectionModule(config, MHCConfig(), 0)
