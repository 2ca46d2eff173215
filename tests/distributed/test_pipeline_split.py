"""The split boundary by kernels, in Triton's interpreter, on two ranks, against one process in float64."""

import pytest
import torch
from harness import Layout
from pipeline import compare_all, interleaved, reference_of

from megatron_mhc import MHCConfig
from megatron_mhc.ops.triton import stage_ends

KERNELS = ("mix", "write", "write_backward")
LAYERS, COUNT, ITERATIONS = 2, 2, 2
LOSS, ERROR = 1e-5, 1e-4  # of fp32; see `differences`


def counted(layout, kind, mhc, expected):
    """This rank's comparison, and how often it called each kernel."""
    ran = dict.fromkeys(KERNELS, 0)

    def count(name, function):
        def call(*args):
            ran[name] += 1
            return function(*args)

        return call

    for name in KERNELS:
        setattr(stage_ends, name, count(name, getattr(stage_ends, name)))
    overrides = dict(num_layers=LAYERS, params_dtype=torch.float32, pipeline_dtype=torch.float32)
    return compare_all(layout, kind, [(mhc, COUNT * layout.ep, expected)], overrides)[0], ran


CASES = {
    "interleaved": ("dense", "interleaved", {}),
    "fused": ("biased", "fused", {}),  # the MLP's bias is in f before f leaves
    "fused-moe": ("moe_shared", "fused", {}),
    "replayed": ("dense", "interleaved", dict(recompute_layer_num="1")),
    "replayed-coefficients": ("dense", "fused", dict(recompute_layer_num="1", recompute_coefficients=True)),
    "single-pass": ("dense", "fused", dict(read="previous")),
    "deepseek": ("dense", "fused", dict(preset="deepseek_v4")),
    "hy_v4": ("dense", "interleaved", dict(preset="hy_v4", recompute_layer_num="1")),
}


# What `interleaved` shows, `replayed` shows too.
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "interleaved" else []) for case in CASES]
)
def test_kernels_at_both_ends_match_one_process(run_ranks, case):
    kind, schedule, options = CASES[case]
    mhc = interleaved("split", schedule, backend="triton", sinkhorn_iterations=ITERATIONS, **options)
    plain = MHCConfig(preset=mhc.preset, read=mhc.read, sinkhorn_iterations=ITERATIONS)
    expected = reference_of(kind, plain, COUNT, LAYERS)
    (result, first), (_, second) = run_ranks(2, counted, Layout(pp=2), kind, mhc, expected)
    error, name = result.worst
    print(result.loss, error, name)
    assert result.loss <= LOSS
    assert error <= ERROR, name
    # Rank 0 sends the streams of its last layer, rank 1 receives them.
    assert first == dict(mix=COUNT, write=0, write_backward=0)
    assert second == dict(mix=0, write=COUNT, write_backward=COUNT)
