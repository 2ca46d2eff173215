"""One iteration in every layout and schedule on two ranks: loss and gradients of one rank's, in float32."""

import pytest

from multi_gpu.conftest import NCCL

LAYOUTS = {"tp2", "tp2_sp", "pp2", "pp2_vpp2", "ep2", "dp_distributed_optimizer"}
SCHEDULES = {"megatron", "interleaved-whole", "interleaved-split", "fused-whole", "fused-split"}


@pytest.mark.timeout(600)
def test_two_ranks_compute_what_one_does(report):
    streams = ("--streams", "4,1") if NCCL else ()
    rows = report("multi_gpu.worker", "parity", *streams, limit=560)
    assert rows.pop(("precision", "float32 products"))["ok"]
    rows = {name: row for name, row in rows.items() if "Megatron's router" not in name[1]}
    names = [name.split(", ") for _, name in rows]
    assert {layout for layout, *_ in names} == LAYOUTS
    for kind in ("dense", "moe"):
        assert {name[-1] for name in names if name[:2] == ["pp2_vpp2", kind]} == SCHEDULES
    for (_, name), row in rows.items():
        assert row["loss"] <= 1e-5 and row["gradients"] <= 1e-5, name
        assert row["one GPU reordered"] < 1e-5, name
        if ", moe, " in name:
            assert row["routed otherwise"] == 0 < row["of tokens"], name
            assert row["closest tie"] > 1e-5, name
    # Not compared with themselves: another order of summation leaves its trace.
    assert all(row["gradients"] > 0 for (_, name), row in rows.items() if name.startswith("tp2"))
    assert all(rows["parity", f"{name}, moe, n=4, -"]["scores"] > 0 for name in ("tp2_sp", "ep2"))


@pytest.mark.skipif(not NCCL, reason="on a CPU tests/distributed has it; MEGATRON_MHC_GPU_TESTS=nccl")
@pytest.mark.timeout(600)
def test_two_ranks_compute_what_one_does_in_float64(report):
    rows = report("multi_gpu.worker", "parity", "--dtype", "float64", limit=560)
    assert all(row["gradients"] <= 1e-10 for (section, _), row in rows.items() if section == "parity")
