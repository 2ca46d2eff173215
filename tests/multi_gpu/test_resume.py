"""Checkpoints between two ranks and one, and a rank that is killed or silent in the midst of a step."""

import pytest

from multi_gpu.conftest import NCCL

SLOW = () if NCCL else (pytest.mark.slow,)


@pytest.mark.parametrize("module", [pytest.param("multi_gpu.resume", marks=SLOW)])
@pytest.mark.timeout(600)  # one of its jobs waits for a minute for a rank that says nothing
def test_what_was_saved_is_gone_on_with(report, module):
    rows = {name: row for (_, name), row in report(module, limit=560, torchrun=False).items()}
    for name, until in (("on one rank", 8), ("on two ranks again", 10), ("resumed", 10)):
        assert rows[name]["error"] <= (5e-3 if NCCL else 1e-5) and rows[name]["last step"] == until
    assert len(rows["unbroken"]["losses"]) == 10
    assert rows["rank 1 killed"]["names rank 1"]
    if not NCCL:  # over NCCL its watchdog may be first
        assert "pipeline rank 1 (global rank 1) has failed" in rows["rank 1 silent"]["messages"][0]
