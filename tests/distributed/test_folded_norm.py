"""--mhc-norm folded: loss and gradients of the same model with its norms apart, in one process, in float64.

There the two differ by rounding alone: apart, the layer input is rounded to the streams' dtype on the way.
"""

import graphed_steps
import pytest
import torch
from harness import Iteration, Layout, build, differences, global_parameters, iterate, reference
from layout_cases import UNIFORM, selective
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import gpt_layer_specs

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import ranks

APART = MHCConfig()
ONE, TP2_SP, PP2, PP2_VPP2 = Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2)
DP2 = Layout(distributed_optimizer=True)


def folded(**options):
    return MHCConfig(norm="folded", **options)


def run(layout, kind, mhc, overrides, ddp=None):
    layout.initialize()
    config = layout.config(kind, **overrides)
    chunks = build(layout, config, kind, mhc, ddp)
    connections = [m for chunk in chunks for m in chunk.modules() if isinstance(m, HyperConnectionModule)]
    assert connections and all(connection.norm is not None for connection in connections)
    schedule = None if mhc.pipeline_schedule == "megatron" else engine.forward_backward
    return iterate(chunks, config, schedule=schedule), chunks


def compare(layout, kind, mhc, overrides, expected):
    loss, chunks = run(layout, kind, mhc, overrides)
    return differences(loss, chunks, expected, torch.float64)


CASES = {
    "dense": (ONE, "dense", folded(), {}),
    "moe_shared": (ONE, "moe_shared", folded(), {}),
    "mla": (ONE, "mla", folded(), {}),
    "mtp_moe": (ONE, "mtp_moe", folded(), {}),
    "tp2_sp": (TP2_SP, "dense", folded(), {}),
    "tp2_sp_moe": (TP2_SP, "moe_shared", folded(), {}),
    "pp2_mla": (PP2, "mla", folded(), {}),
    "dp2": (DP2, "dense", folded(), {}),
    "replay": (ONE, "moe_shared", folded(recompute_layer_num="3"), {}),
    "replayed_coefficients": (ONE, "dense", folded(recompute_layer_num="3", recompute_coefficients=True), {}),
    "full_recompute": (ONE, "dense", folded(), UNIFORM),
    "megatrons_layernorm": (ONE, "moe_shared", folded(), selective("layernorm", "core_attn")),
    "split": (PP2, "dense", folded(pipeline_schedule="interleaved", pp_boundary="split"), {}),
    "fused": (PP2_VPP2, "moe_shared", folded(pipeline_schedule="fused", recompute_layer_num="auto"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_folded_matches_apart(run_ranks, case):
    layout, kind, mhc, overrides = CASES[case]
    expected = reference(kind, APART)
    result = run_ranks(
        max(2, layout.tp * layout.pp) if layout != ONE else 1, compare, layout, kind, mhc, overrides, expected
    )[0]
    error, name = result.worst
    assert result.loss <= 1e-10
    assert error <= 1e-10, name
