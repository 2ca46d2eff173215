"""A model's first step of each kind goes by way of the hosts, as under NCCL; here both ways are gloo."""

import pytest
import torch
from harness import Layout, build, iterate
from harness import ps as parallel_state
from pipeline import gradients, interleaved

from megatron_mhc.pipeline import comm, engine, loading
from megatron_mhc.pipeline.step import observers

TRAIN, EVALUATE = "train", "evaluate"
KINDS = (TRAIN, TRAIN, EVALUATE, EVALUATE, TRAIN)


def steps(layout, kind, mhc, pends):
    """Of every step: (its transport, most messages that were leaving, loss, gradients)."""
    if pends:
        loading.pends_on_device = lambda backend: True
    layout.initialize()
    config = layout.config(kind, num_layers=2 * layout.pp * (layout.vpp or 1))
    chunks = build(layout, config, kind, mhc)
    transports, found = [], []
    observers[:] = [lambda op, step: transports.append(step.transport)]
    for what in KINDS:
        only = what == EVALUATE
        with torch.set_grad_enabled(not only):
            loss = iterate(
                chunks, config, count=4 * layout.ep, schedule=engine.forward_backward, forward_only=only
            )
        last = transports[-1]
        by_hosts = isinstance(last, comm.HostTransport)
        channels = comm.channels_of(parallel_state.get_pipeline_model_parallel_group())
        assert last.channels is (channels.hosts if by_hosts else channels)
        found.append((by_hosts, last.most_leaving, comm.most_on_host(last.plan), loss, gradients(chunks)))
    return found


DENSE, MOE = ("dense", Layout(pp=2, vpp=2)), ("moe", Layout(pp=2, ep=2))


@pytest.mark.parametrize(
    "kind, layout, schedule, boundary",
    [
        (*DENSE, "interleaved", "whole"),
        (*DENSE, "fused", "split"),
        (*MOE, "fused", "whole"),
        pytest.param(*MOE, "interleaved", "split", marks=pytest.mark.slow),
        pytest.param(*DENSE, "interleaved", "split", marks=pytest.mark.slow),
        pytest.param(*DENSE, "fused", "whole", marks=pytest.mark.slow),
        pytest.param(*MOE, "interleaved", "whole", marks=pytest.mark.slow),
        pytest.param(*MOE, "fused", "split", marks=pytest.mark.slow),
    ],
)
def test_the_first_step_of_each_kind_is_the_same_by_way_of_the_hosts(
    run_ranks, monkeypatch, kind, layout, schedule, boundary
):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    mhc = interleaved(boundary, schedule)
    usual, ours = (
        run_ranks(layout.pp * layout.ep, steps, layout, kind, mhc, pends) for pends in (False, True)
    )
    for mine, expected in zip(ours, usual, strict=True):
        assert [step[0] for step in mine] == [True, False, True, False, False]
        assert not any(step[0] for step in expected)
        for (by_hosts, leaving, most, loss, found), same in zip(mine, expected, strict=True):
            assert leaving <= most + 1 or not by_hosts
            assert loss == same[3] and found.keys() == same[4].keys()
            assert all(torch.equal(found[name], same[4][name]) for name in found)


def refused(mhc):
    loading.pends_on_device = lambda backend: True
    layout = Layout(pp=2)
    layout.initialize()
    config = layout.config("dense", num_layers=4)
    with pytest.raises(
        ValueError, match="CUDA_DEVICE_MAX_CONNECTIONS=1.*export CUDA_DEVICE_MAX_CONNECTIONS=32"
    ):
        build(layout, config, "dense", mhc)


def test_a_model_is_not_built_with_one_hardware_queue(run_ranks, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    run_ranks(2, refused, interleaved())
