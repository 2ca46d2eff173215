"""--fp32-residual-connection: fp32 streams around a bf16 F."""

import functools

import pytest
import torch
from harness import Iteration, Layout, build, differences, iterate

from megatron_mhc import MHCConfig
from megatron_mhc.layer import HyperConnectionTransformerLayer
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import ranks


class Norm(torch.nn.RMSNorm):
    """Returns the dtype of its weight, as Transformer Engine's does and torch's does not."""

    def forward(self, x):
        out = torch.nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return out.to(self.weight.dtype)


BF16 = dict(params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, bf16=True)


def run(layout, kind, mhc, fp32=True, **settings):
    """One iteration: the loss, and the chunks with their gradients."""
    torch.nn.RMSNorm = Norm
    layout.initialize()
    config = layout.config(kind, fp32_residual_connection=fp32, **BF16, **settings)
    chunks = build(layout, config, kind, mhc)
    streams = torch.float32 if fp32 else torch.bfloat16

    def watch(layer, args, kwargs, output):
        assert output[0].dtype == streams
        assert kwargs.get("hidden_states", args[0] if args else None).dtype == streams

    def watch_f(module, args, output):
        assert output[0].dtype == torch.bfloat16

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, HyperConnectionTransformerLayer):
                module.register_forward_hook(watch, with_kwargs=True)
                module.self_attention.register_forward_hook(watch_f)
                module.mlp.register_forward_hook(watch_f)
    schedule = None if mhc.pipeline_schedule == "megatron" else engine.forward_backward
    return iterate(chunks, config, schedule=schedule), chunks


@functools.cache
def alone(kind, fp32=True, **options):
    return ranks.run_ranks(1, lambda: Iteration.of(*run(Layout(), kind, MHCConfig(**options), fp32)))[0]


def compare(layout, kind, mhc, settings=None, expected=None):
    found = run(layout, kind, mhc, **(settings or {}))
    return differences(*found, expected or alone(kind), torch.float32)


def schedule(name, **options):
    return MHCConfig(pipeline_schedule=name, **options)


PP2, PP2_VPP2 = Layout(pp=2), Layout(pp=2, vpp=2)
FOLDED = dict(norm="folded")
CASES = {
    "pp2": (2, PP2, "dense", MHCConfig()),
    "pp2_vpp2": (2, PP2_VPP2, "moe", MHCConfig()),
    "replay": (1, Layout(), "dense", MHCConfig(recompute_layer_num="2", recompute_coefficients=True)),
    "pp2_interleaved_split": (2, PP2, "dense", schedule("interleaved", pp_boundary="split")),
    "folded_pp2_replay": (2, PP2, "dense", MHCConfig(recompute_layer_num="2", **FOLDED)),
    "mtp_between_streams": (1, Layout(), "mtp2", MHCConfig(mtp="multistream", recompute_layer_num="2")),
    "pp2_vpp2_fused": (2, PP2_VPP2, "moe", schedule("fused", recompute_layer_num="auto")),
}


@pytest.mark.parametrize("case", CASES)
def test_layout_matches_single_process(run_ranks, case):
    world, layout, kind, mhc = CASES[case]
    expected = alone(kind, norm=mhc.norm, mtp=mhc.mtp)
    result = run_ranks(world, compare, layout, kind, mhc, None, expected)[0]
    error, name = result.worst
    assert result.loss <= 1e-6
    assert error <= 1e-5, name


def test_tensor_parallel_ranks_match_to_the_rounding_of_f(run_ranks):
    alone("dense")
    result = run_ranks(2, compare, Layout(tp=2, sp=True), "dense", MHCConfig())[0]
    error, name = result.worst
    assert result.loss <= 1e-3
    assert error <= 0.2, name


@pytest.mark.slow
def test_kernels_match_the_reference_to_the_rounding_of_f(run_ranks):
    few = dict(sinkhorn_iterations=5)
    expected = alone("dense", **few)
    result = run_ranks(1, compare, Layout(), "dense", MHCConfig(backend="triton", **few), None, expected)[0]
    error, name = result.worst
    assert result.loss <= 1e-3
    assert error <= 3e-2, name


def test_bf16_streams_give_another_loss():
    assert abs(alone("dense").loss - alone("dense", fp32=False).loss) > 1e-4
