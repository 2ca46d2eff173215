"""Messages pushed into the receiver's memory, which processes of one host stand in for: whole training steps.

What GPUs do beside this (streams, copy engines) is in tests/multi_gpu/test_push.py.
"""

import pytest
from harness import Layout
from pipeline import cases, check

PUSH = dict(pipeline_transport="push")


@pytest.mark.parametrize("vpp", [None, 3])
def test_two_stages(run_ranks, vpp):
    several = cases((3,), **PUSH) + cases((2,), streams=(1,), **PUSH)
    several += cases((8,), boundaries=("split",), **PUSH)
    check(run_ranks, 2, Layout(pp=2, vpp=vpp), "dense", several, 6, overrides=dict(num_layers=6))


def test_four_stages(run_ranks):
    check(run_ranks, 4, Layout(pp=4, vpp=3), "dense", cases((5,), **PUSH))


def test_experts_on_two_ranks(run_ranks):
    overrides = dict(num_layers=8)
    several = cases((6,), **PUSH)
    check(run_ranks, 4, Layout(pp=2, vpp=2, ep=2), "moe_shared", several, 8, overrides=overrides)


def test_replayed_streams(run_ranks):
    several = cases((3,), recompute_layer_num="2", **PUSH)
    several += cases((3,), recompute_layer_num="auto", recompute_coefficients=True, **PUSH)
    check(run_ranks, 2, Layout(pp=2, vpp=3), "dense", several, 6, overrides=dict(num_layers=6))
