"""Gains and composites against products and sums written out in float64."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import amax_gain, capture_h_res, composite
from megatron_mhc.hyper_connection import HyperConnectionModule

T, N, C = 5, 4, 8


def matrices(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(T, N, N, generator=generator) for _ in range(count)]


def by_hand(h_res: list[torch.Tensor], token: int) -> list[list[float]]:
    """H_last ... H_first of one token: stream i of the output from stream j of the input."""
    product = [[float(i == j) for j in range(N)] for i in range(N)]
    for h in h_res:
        m = h[token].double().tolist()
        product = [[sum(m[i][k] * product[k][j] for k in range(N)) for j in range(N)] for i in range(N)]
    return product


def test_composite_matches_products_by_hand():
    h_res = matrices(6)
    expected = torch.tensor([by_hand(h_res, t) for t in range(T)], dtype=torch.float64)
    torch.testing.assert_close(composite(h_res), expected, rtol=1e-12, atol=1e-12)


def test_composite_is_what_the_streams_go_through():
    h_res, x = matrices(3), torch.randn(T, N, C, dtype=torch.float64)
    mixed = x
    for h in h_res:
        mixed = h.double() @ mixed
    torch.testing.assert_close(composite(h_res) @ x, mixed)


def test_amax_gain_matches_sums_by_hand():
    (m,) = matrices(1)
    forward, backward = amax_gain(m.double())
    for t in range(T):
        rows = m[t].double().tolist()
        assert forward[t].item() == pytest.approx(max(abs(sum(row)) for row in rows))
        assert backward[t].item() == pytest.approx(
            max(abs(sum(column)) for column in zip(*rows, strict=True))
        )


def test_a_signed_matrix_keeps_the_absolute_value_outside_the_sum():
    forward, backward = amax_gain(torch.tensor([[1.0, -1.0], [-2.0, -1.0]]))
    assert (forward.item(), backward.item()) == (3.0, 2.0)


def connections(count: int) -> nn.ModuleList:
    config = TransformerConfig(
        num_layers=count, hidden_size=C, num_attention_heads=1, use_cpu_initialization=True
    )
    torch.manual_seed(1)
    mhc = MHCConfig(num_residual_streams=N, init_gating_factor=1.0)
    modules = nn.ModuleList(HyperConnectionModule(config, mhc, i) for i in range(count))
    for module in modules:
        nn.init.normal_(module.mapping_proj.weight)
    return modules


def test_captured_mappings_match_the_coefficients_in_order():
    modules = connections(3)
    streams = torch.randn(T, 1, N * C)
    with torch.no_grad():
        expected = [module(streams)[1].h_res for module in modules]
        with capture_h_res(modules) as captured:
            for module in modules:
                module(streams)
        modules[0](streams)  # after the block: not collected
    assert len(captured) == 3
    for got, want in zip(captured, expected, strict=True):
        assert got.shape == (T, N, N)
        assert torch.equal(got, want)
    forward, _ = amax_gain(composite(captured))
    torch.testing.assert_close(forward, torch.ones_like(forward), rtol=0, atol=1e-5)


def test_a_list_of_chunks_is_captured_like_one_model():
    modules = connections(2)
    streams = torch.randn(T, 1, N * C)
    with torch.no_grad(), capture_h_res([modules[0], modules[1]]) as captured:
        modules[1](streams)
        modules[0](streams)
    assert len(captured) == 2


def test_a_model_without_mhc_is_refused():
    with pytest.raises(ValueError, match="no mHC connections"), capture_h_res(nn.Linear(2, 2)):
        pass


def test_composite_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        composite([])
