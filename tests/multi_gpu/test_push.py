"""Messages pushed over peer memory: what came, beside compute, with one hardware queue and with many."""

import pytest

from multi_gpu.conftest import NCCL

ROWS = 16  # schedules, boundaries and numbers of slots


@pytest.mark.parametrize("connections", ["32", pytest.param("1", marks=() if NCCL else pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_pushed_messages_are_right(report, monkeypatch, connections):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", connections)
    rows = report("multi_gpu.push")
    assert rows["transport", "chosen"]["kind"] == "push"
    found = [row for (section, _), row in rows.items() if section == "messages"]
    assert len(found) == ROWS and all(row["messages"] >= 60 and row["wrong"] == 0 for row in found)
    assert {row["slots at most"] for row in found} >= {1, 2}
    assert rows["beside", "compute"]["ok"]
