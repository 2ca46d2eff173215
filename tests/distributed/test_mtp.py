"""`--mhc-mtp multistream`: loss and every gradient in parallel layouts, compared with a single process."""

import pytest
from harness import Layout, compare, reference

from megatron_mhc import MHCConfig

ERROR = 1e-10


def multistream(**options):
    return MHCConfig(mtp="multistream", **options)


def check(run_ranks, world, layout, kind, mhc, **overrides):
    expected = reference(kind, mhc)
    depths = {name for name in expected.gradients if name.startswith("mtp.")}
    assert sum("hyper_connection" in name for name in depths)
    result = run_ranks(world, compare, layout, kind, mhc, expected, overrides)[0]
    error, name = result.worst
    print(f"loss error {result.loss:.1e}, worst gradient error {error:.1e} ({name})")
    assert result.loss <= ERROR
    assert error <= ERROR, name


LAYOUTS = {
    "tp2": (2, Layout(tp=2), "mtp"),
    "tp2_sp": (2, Layout(tp=2, sp=True), "mtp2"),
    "pp2": (2, Layout(pp=2), "mtp2"),
    "pp2_vpp2": (2, Layout(pp=2, vpp=2), "mtp"),
    "ep2": (2, Layout(ep=2), "mtp_moe"),
    "dp2": (2, Layout(distributed_optimizer=True), "mtp"),
    "tp2_pp2_sp": (4, Layout(tp=2, pp=2, sp=True), "mtp2"),
}


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_matches_single_process(run_ranks, layout, streams):
    check(run_ranks, *LAYOUTS[layout], multistream(num_residual_streams=streams))
