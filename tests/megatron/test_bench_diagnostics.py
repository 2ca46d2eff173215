"""scripts/bench/diagnostics.py on the CPU: it runs, and its shares follow from its times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_shares_follow_from_the_times(tmp_path):
    out = tmp_path / "diagnostics.json"
    command = [sys.executable, str(ROOT / "scripts/bench/diagnostics.py"), "--cpu", "--out", str(out)]
    command += "--layers 2 --hidden 32 --heads 2 --sequence 32 --micro-batches 2 --warmup 1".split()
    command += "--repeats 9 --limit 0 --interval 50".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    added = found["logged_ms"] - found["plain_ms"]
    assert found["repeats"] == 3  # --limit 0
    assert found["share_at_50_percent"] == pytest.approx(added / 50 / found["plain_ms"] * 100)
    assert found["step_for_half_a_percent_ms"] == pytest.approx(added / 50 / 0.005)
