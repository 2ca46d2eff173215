"""--mhc-norm folded: loss and gradients of the same model with its norms apart, in one process, in float64.

There the two differ by rounding alone: apart, the layer input is rounded to the streams' dtype on the way.
"""

import functools

import pytest
import torch
from graphed_steps import PREPROCESS, full, local, te
from graphed_steps import compare as compare_graphed
from harness import Layout, build, differences, iterate, reference
from layout_cases import UNIFORM, selective
from megatron.core.distributed import distributed_data_parallel

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.pipeline import engine

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
    "mtp_between_streams": (ONE, "mtp2", folded(mtp="multistream"), {}),
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


SLOW = ("mtp_moe", "tp2_sp_moe", "pp2_mla", "full_recompute")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES]
)
def test_folded_matches_apart(run_ranks, case):
    layout, kind, mhc, overrides = CASES[case]
    world = 1 if layout == ONE else 2
    apart = MHCConfig(mtp=mhc.mtp)
    result = run_ranks(world, compare, layout, kind, mhc, overrides, reference(kind, apart))[0]
    error, name = result.worst
    assert result.loss <= 1e-10
    assert error <= 1e-10, name


def gathered_late(kind):
    """The loss where hooks bring norms their weights, as those of DDP do (--overlap-param-gather)."""
    ONE.initialize()
    config = ONE.config(kind)
    chunks = build(ONE, config, kind, folded())

    def gather(weight, values, *_):
        weight.data.copy_(values)

    for module in chunks[0].modules():
        if isinstance(module, HyperConnectionModule):
            weight = module.norm.read().weight
            hook = functools.partial(gather, weight, weight.data.clone())
            hook.__module__ = distributed_data_parallel.__name__
            module.norm.owner.register_forward_pre_hook(hook)
            weight.data.fill_(float("nan"))
    return iterate(chunks, config)


def test_a_weight_is_gathered_before_pre_reads_it(run_ranks):
    assert run_ranks(1, gathered_late, "moe")[0] == pytest.approx(reference("moe", APART).loss, rel=1e-10)


class Wrapper(torch.nn.Module):
    def __init__(self, to_wrap):
        super().__init__()
        self.to_wrap = to_wrap

    def forward(self, *args):
        return self.to_wrap(*args)


def replaced(replacement):
    """The loss where something took a norm's place after the model was built."""
    ONE.initialize()
    config = ONE.config("dense")
    chunks = build(ONE, config, "dense", folded())
    layer = chunks[0].module.decoder.layers[1]
    layer.input_layernorm = replacement(layer.input_layernorm)
    return iterate(chunks, config)


def test_a_norm_may_be_wrapped_and_is_missed_where_it_was_replaced(run_ranks):
    """By an adapter; and by a norm that `pre` would not read, of its own output."""
    assert run_ranks(1, replaced, Wrapper)[0] == pytest.approx(reference("dense", APART).loss, rel=1e-10)

    def another():
        with pytest.raises(ValueError, match="the weight of the input_layernorm that the layer was built"):
            replaced(lambda norm: torch.nn.RMSNorm(norm.weight.shape, norm.eps, dtype=norm.weight.dtype))

    run_ranks(1, another)


@pytest.mark.parametrize(
    "kind, graphed",
    [("dense", te()), ("moe_shared", te(*PREPROCESS))]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("dense", full()), ("mla", local()))],
)
def test_graphs_hold_the_bits_of_steps_without(run_ranks, kind, graphed):
    compare_graphed(run_ranks, 1, ONE, kind, folded(), graphed)
