"""The gated residual of Qwen4-Exp in every layout and setting, compared with one process."""

import functools

import pytest
import test_checkpoint as checkpoints
import test_hybrid as hybrids
import torch
from harness import Layout, build, compare, global_parameters, iterate, reference
from layout_cases import CORE, UNIFORM
from test_recompute_parity import count_replays

from megatron_mhc import MHCConfig
from megatron_mhc.chunk import chunk_of
from megatron_mhc.diagnostics import Sampler
from megatron_mhc.pipeline import engine
from megatron_mhc.testing.parameters import gradient

ERROR = 1e-10
RANK = 8


def gated(n=4, **options):
    return MHCConfig(preset="qwen4_exp", num_residual_streams=n, gated_rank=RANK, **options)


def check(run_ranks, world, layout, kind, mhc, overrides=None):
    """Loss and every gradient, against one process with the same n."""
    expected = reference(kind, gated(mhc.num_residual_streams))
    result = run_ranks(world, compare, layout, kind, mhc, expected, overrides)[0]
    assert result.loss <= ERROR
    assert result.worst[0] <= ERROR, result.worst


FAST = {("tp2_sp", "dense"), ("pp2", "moe"), ("pp2_vpp2", "dense"), ("ep2", "moe")}
CASES = [
    pytest.param(layout, kind, n, marks=() if (layout, kind) in FAST else pytest.mark.slow)
    for layout, (ranks, _, *kinds) in CORE.items()
    for kind in kinds
    for n in (2, 4)
    if kind
]


@pytest.mark.parametrize("layout, kind, n", CASES)
def test_gated_layout_matches_single_process(run_ranks, layout, kind, n):
    ranks, sizes, *_ = CORE[layout]
    check(run_ranks, ranks, sizes, kind, gated(n))


def unmark(parameter, name):
    if "hyper_connection" in name or "contraction" in name:
        parameter.sequence_parallel = False


def test_unreduced_gradients_of_the_gates_are_noticed(run_ranks):
    layout, expected = Layout(tp=2, sp=True), reference("dense", gated())
    result = run_ranks(2, compare, layout, "dense", gated(), expected, None, unmark)[0]
    wrong = {name for name, error in result.gradients.items() if error > 1e-3}
    ours = {name for name in expected.gradients if "hyper_connection" in name or "contraction" in name}
    assert wrong == ours and len(ours) == 4 * 2 * 4 + 3
