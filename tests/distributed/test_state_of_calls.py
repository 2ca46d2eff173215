"""A forward pass, whole or ended by an exception, leaves layers, connections and the config as they were."""

from datetime import timedelta

import pytest
from harness import Layout, build, gpt, tokens
from held_state import state
from pipeline import interleaved
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.chunk import chunk_of
from megatron_mhc.pipeline import comm, engine


class Raised(Exception):
    pass


def nth(original, count):
    """`original`, which raises at its `count`-th call."""
    calls = []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == count:
            raise Raised
        return original(*args, **kwargs)

    return called


def run(layout, kind, mhc, where):
    comm.timeout_of = lambda group: timedelta(seconds=2)
    layout.initialize()
    config = layout.config(kind)
    chunks = build(layout, config, kind, mhc)
    schedule = dict(schedule=engine.forward_backward) if mhc.pipeline_schedule != "megatron" else {}

    def step():
        gpt.forward_backward(chunks, config, tokens(4), **schedule)

    step()
    before = state(chunks, config)
    step()
    assert state(chunks, config) == before
    chunk = chunk_of(chunks[-1])
    owner, name, count = {
        "F": (chunk.sublayers[1], "f", 2),
        "post_res": (chunk.sublayers[1].connection, "post_res", 2),
        "receive": (comm.GroupTransport, "wait", 3),
    }[where]
    own, original = name in vars(owner), getattr(owner, name)
    setattr(owner, name, nth(original, count))
    with pytest.raises((Raised, comm.PipelineError)):
        step()
    if own:
        setattr(owner, name, original)
    else:
        delattr(owner, name) if where != "receive" else setattr(owner, name, original)
    assert state(chunks, config) == before
    for model in chunks:
        assert chunk_of(model).runner is None and getattr(chunk_of(model), "_open", None) is None


@pytest.mark.parametrize("recompute", ["off", "2"])
@pytest.mark.parametrize("where", ["F", "post_res"])
def test_a_pass_in_order_leaves_nothing_behind(run_ranks, where, recompute):
    run_ranks(1, run, Layout(), "moe", MHCConfig(recompute_layer_num=recompute), where)


STEPS = ("interleaved", "whole"), ("interleaved", "split"), ("fused", "split")


@pytest.mark.parametrize(
    "step, where", each_value(STEPS, ["F", "receive", "post_res"], also=[(("fused", "split"), "receive")])
)
def test_a_pipeline_step_leaves_nothing_behind(run_ranks, step, where):
    schedule, boundary = step
    mhc = interleaved(boundary, schedule, recompute_layer_num="2")
    run_ranks(2, run, Layout(pp=2, vpp=2), "dense", mhc, where)
