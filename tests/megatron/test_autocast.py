"""A model of fp32 parameters under torch.autocast: F in bf16, mHC in fp32."""

import gpt
import pytest
import torch
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import capture_h_res, composite
from megatron_mhc.hyper_connection import HyperConnectionModule

LIVELY = dict(init="uniform", init_gating_factor=0.5, sinkhorn_iterations=2)
BACKENDS = ["reference", "triton"]


class CastingNorm(torch.nn.LayerNorm):
    """A norm whose bits depend on autocast, as Transformer Engine's do."""

    def forward(self, x):
        return super().forward(x).to(torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype)


def forward_backward(model, norm=None):
    """Loss and gradients; the forward pass under autocast, as under Megatron's enable_autocast."""
    for layer in model.decoder.layers if norm is not None else ():
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            getattr(layer, name).__class__ = norm
    inputs, labels = gpt.batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*inputs, labels=labels).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_go_through_the_composite_whose_rows_sum_to_one(run_ranks, backend):
    def check():
        model = gpt.build(MHCConfig(backend=backend), num_layers=2)
        first = x = torch.randn(gpt.SEQ, gpt.BATCH, 4 * 32)
        with torch.autocast("cpu", torch.bfloat16), capture_h_res(model) as h_res:
            for connection in [m for m in model.modules() if isinstance(m, HyperConnectionModule)]:
                layer_input, mappings = connection(x)
                assert layer_input.dtype == torch.float32
                x = connection.post_res(x, torch.zeros_like(layer_input, dtype=torch.bfloat16), mappings)
                assert x.dtype == torch.float32
            whole = composite(h_res)
        assert {h.dtype for h in h_res} == {torch.float32} and whole.dtype == torch.float64
        assert (whole.sum(-1) - 1).abs().max() <= 1e-6
        want = whole @ first.view(-1, 4, 32).double()
        assert (x.view(-1, 4, 32) - want).abs().max() <= 1e-5

    run_ranks(1, check)


OPTIONS = {
    "sinkhorn": {},
    "unconstrained": dict(h_res="unconstrained"),
    "triton": dict(backend="triton"),
}
REPLAYS = each_value(OPTIONS, ["kept", "replayed"], [CastingNorm, None], also=[("triton", "replayed", None)])


@pytest.mark.parametrize("options, coefficients, norm", REPLAYS)
def test_replay_matches_no_recompute_bit_for_bit(run_ranks, options, coefficients, norm):
    options, coefficients = OPTIONS[options], coefficients == "replayed"
    settings = dict(num_layers=2, normalization="LayerNorm" if norm else "RMSNorm")

    def compare():
        want = forward_backward(gpt.build(MHCConfig(**LIVELY | options), **settings), norm)
        again = dict(recompute_layer_num="3", recompute_coefficients=coefficients)
        gpt.same_bits(
            forward_backward(gpt.build(MHCConfig(**LIVELY | options | again), **settings), norm), want
        )

    run_ranks(1, compare)


def test_backends_agree(run_ranks):
    """With the same F in bf16, Triton's operations and the reference's differ by their rounding in fp32."""

    def compare():
        results = [
            forward_backward(gpt.build(MHCConfig(backend=b, **LIVELY), num_layers=1)) for b in BACKENDS
        ]
        (loss, gradients), (other, others) = results
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
        for name in gradients:
            scale = gradients[name].abs().max() + 1e-6
            assert (gradients[name] - others[name]).abs().max() <= 5e-3 * scale, name

    run_ranks(1, compare)
