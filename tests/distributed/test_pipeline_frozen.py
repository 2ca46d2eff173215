"""Models of which a part is trained: stages and pieces of layers that no gradient passes through."""

import pytest
import torch
from harness import Layout
from pipeline import BOUNDARIES, ERROR, SCHEDULES, compare_partly_trained, interleaved
from thinned import each_value

TRAINED = {
    "second_half": [r"layers\.[23]\.", "final_layernorm", "output_layer"],
    "output_alone": ["output_layer"],
    "mlps_alone": [r"layers\.\d\.mlp\."],
    "mappings_alone": ["hyper_connection"],
    # Streams and mappings of stage 0 carry no gradient, what its last MLP writes does.
    "last_mlp_of_stage_0": [r"layers\.1\.mlp\."],
    "attention_of_stage_1": [r"layers\.3\.self_attention\."],
}


def check(run_ranks, layout, kind, mhc, trained, world=2, error=ERROR, **settings):
    result = compare_partly_trained(run_ranks, world, layout, kind, mhc, TRAINED[trained], **settings)
    assert result.loss <= error
    worst, name = result.worst
    assert worst <= error, name


WAYS = ("interleaved", "whole"), ("fused", "split"), ("interleaved", "split"), ("fused", "whole")


@pytest.mark.parametrize(
    "trained, way", each_value(TRAINED, WAYS, also=[("last_mlp_of_stage_0", ("interleaved", "split"))])
)
def test_what_is_trained_gets_its_gradients(run_ranks, trained, way):
    schedule, boundary = way
    check(run_ranks, Layout(pp=2), "dense", interleaved(boundary, schedule), trained)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("layers", [pytest.param("2", marks=pytest.mark.slow), "auto"])
def test_with_replay_on_virtual_stages(run_ranks, layers, schedule, boundary):
    """Of four stages the first two train nothing; the first of them has no gradient to pass on."""
    mhc = interleaved(boundary, schedule, recompute_layer_num=layers)
    check(run_ranks, Layout(pp=2, vpp=2), "moe_shared", mhc, "second_half")


@pytest.mark.parametrize(
    "schedule, trained",
    [
        ("interleaved", "last_mlp_of_stage_0"),
        ("fused", "second_half"),
        pytest.param("interleaved", "second_half", marks=pytest.mark.slow),
        pytest.param("fused", "last_mlp_of_stage_0", marks=pytest.mark.slow),
    ],
)
def test_by_kernels(run_ranks, schedule, trained):
    mhc = interleaved("split", schedule, backend="triton", sinkhorn_iterations=2)
    small = dict(params_dtype=torch.float32, pipeline_dtype=torch.float32, count=2)
    check(run_ranks, Layout(pp=2), "dense", mhc, trained, error=1e-4, **small)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_beside_overlapped_gradient_reduction(run_ranks, schedule):
    """Wrappers of chunks without gradients have nothing to reduce."""
    mhc, layout = interleaved("whole", schedule), Layout(pp=2, vpp=2)
    check(run_ranks, layout, "dense", mhc, "second_half", world=4, ddp=dict(overlap_grad_reduce=True))
