"""Loss curves of training in bf16 on two ranks: as near to one rank's as its own noise allows."""

import pytest

from multi_gpu.conftest import NCCL

LAYOUTS = {"tp2", "tp2_sp", "pp2", "pp2_vpp2", "ep2", "dp_distributed_optimizer"}
SCHEDULES = {"megatron", "interleaved-whole", "interleaved-split", "fused-whole", "fused-split"}
SLOW = () if NCCL else (pytest.mark.slow,)


@pytest.mark.parametrize("section", [pytest.param("curves", marks=SLOW)])
@pytest.mark.timeout(600)
def test_curves_are_within_the_noise(report, section):
    curves = {name: row for (_, name), row in report("multi_gpu.worker", section, limit=560).items()}
    assert {name.split(", ")[0] for name in curves} == LAYOUTS | {"one GPU"}
    assert {name.split(", ")[-1] for name in curves if name.startswith("pp2_vpp2, dense")} == SCHEDULES
    assert all(row["last"] < row["first"] for row in curves.values())
    for name in ("one GPU, dense, n=4, -", "one GPU, moe, n=4, -"):
        assert 0 < curves[name]["noise"] <= curves[name]["tolerance"] < curves[name]["control"]
