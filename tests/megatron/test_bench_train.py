"""scripts/bench/train.py on the CPU: what it writes, and that its rows differ in nothing but mHC."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(out, *arguments):
    """Run it at toy sizes; {(model, ops, recompute): row}."""
    command = [
        sys.executable,
        "-m",
        "megatron_mhc.testing.cpu",
        str(ROOT / "scripts/bench/train.py"),
        "--tiny",
    ]
    command += ["--batches", "1", "--n", "4", "--out", str(out), *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    return {(row["model"], row["ops"], row["recompute"]): row for row in rows}


def test_rows_share_seeds_and_tokens_and_differ_by_mhc(tmp_path):
    out = tmp_path / "train.json"
    rows = bench(out, "--models", "dense,moe_ep8", "--ops", "vanilla,reference,again")
    assert len(rows) == 8
    for model in ("dense", "moe_ep8"):
        vanilla, again = rows[model, "vanilla", "off"], rows[model, "again", "off"]
        mhc, replayed = rows[model, "reference", "off"], rows[model, "reference", "auto"]
        assert not any("failed" in row for row in (vanilla, again, mhc, replayed))
        assert vanilla["losses"] == again["losses"] and mhc["losses"] == replayed["losses"]
        assert vanilla["losses"][-1] < vanilla["losses"][0] - 0.2
        assert 0 < abs(mhc["loss"] - vanilla["loss"]) < 0.05
        assert mhc["overhead_pct"]["wall_ms"] == 100 * (mhc["wall_ms"] / vanilla["wall_ms"] - 1)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_run_adds_the_rows_that_are_missing(tmp_path):
    out = tmp_path / "train.json"
    before = bench(out, "--models", "dense", "--ops", "vanilla")
    after = bench(out, "--models", "dense", "--ops", "vanilla,reference", "--recompute", "off")
    vanilla = ("dense", "vanilla", "off")
    assert after[vanilla]["wall_ms"] == before[vanilla]["wall_ms"]
    assert len(after) == 2 and after["dense", "reference", "off"]["overhead_pct"]["wall_ms"]
