"""scripts/bench/train.py on the CPU: what it writes, and that its rows differ in nothing but mHC."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = "vanilla,reference/4,reference/4/auto,again"


def bench(out, *arguments):
    """Run it at toy sizes; {(model, ops, recompute): row}."""
    command = [
        sys.executable,
        "-m",
        "megatron_mhc.testing.cpu",
        str(ROOT / "scripts/bench/train.py"),
        "--tiny",
    ]
    command += ["--batches", "1", "--out", str(out), *arguments]
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
    rows = bench(out, "--models", "dense,moe_ep8", "--rows", ROWS)
    assert len(rows) == 8
    for model in ("dense", "moe_ep8"):
        vanilla, again = rows[model, "vanilla", "off"], rows[model, "again", "off"]
        mhc, replayed = rows[model, "reference", "off"], rows[model, "reference", "auto"]
        assert not any("failed" in row for row in (vanilla, again, mhc, replayed))
        assert vanilla["losses"] == again["losses"] and mhc["losses"] == replayed["losses"]
        assert vanilla["losses"][-1] < vanilla["losses"][0] - 0.2
        assert 0 < abs(mhc["loss"] - vanilla["loss"]) < 0.05
        base = (vanilla["wall_ms"] + again["wall_ms"]) / 2
        assert mhc["overhead_pct"]["wall_ms"] == pytest.approx(100 * (mhc["wall_ms"] / base - 1))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_run_adds_the_rows_that_are_missing(tmp_path):
    out = tmp_path / "train.json"
    before = bench(out, "--models", "dense", "--rows", "vanilla")
    after = bench(out, "--models", "dense", "--rows", "vanilla,reference/4")
    vanilla = ("dense", "vanilla", "off")
    assert after[vanilla]["wall_ms"] == before[vanilla]["wall_ms"]
    assert len(after) == 2 and after["dense", "reference", "off"]["overhead_pct"]["wall_ms"]


@pytest.mark.slow
def test_a_row_beyond_its_limit_is_named_and_the_rest_goes_on(tmp_path):
    out = tmp_path / "train.json"
    rows = bench(out, "--models", "dense", "--rows", "vanilla,reference/4", "--row-limit", "0.01")
    assert [row["failed"]["time"][0][:12] for row in rows.values()] == ["TimeoutError"] * 2
    rows = bench(out, "--models", "dense", "--rows", "vanilla,reference/4", "--limit", "0")
    assert all("failed" in row and "wall_ms" not in row for row in rows.values())
    rows = bench(out, "--models", "dense", "--rows", "vanilla,reference/4")
    assert all(row["wall_ms"] and not row["failed"] for row in rows.values())


@pytest.mark.parametrize(
    "row", ["vanilla/4", "triton", "triton/4/on", "compile/4/auto", "x/4", "triton/4/auto/5"]
)
def test_a_row_that_cannot_be_is_refused(monkeypatch, row):
    monkeypatch.syspath_prepend(str(ROOT / "scripts/bench"))
    train = pytest.importorskip("train")
    with pytest.raises(ValueError, match=f"--rows {row}: "):
        train.plan(argparse.Namespace(rows=[row], models=["dense"], batches=["4"]))


def test_reports_of_two_models_become_one_table_and_figure(tmp_path):
    head = {"device": "x", "versions": {}, "settings": {"layers": 2, "seq": 32, "micro_batches": 2}}
    row = {"batch": 1, "recompute": "off", "wall_ms": 2.0, "overhead_pct": {"wall_ms": 5.0}}
    paths = []
    for model in ("dense", "moe_ep8"):
        rows = [row | {"model": model, "ops": ops, "n": n} for ops, n in (("vanilla", None), ("fused", 4))]
        paths.append(tmp_path / f"{model}.json")
        paths[-1].write_text(json.dumps(head | {"rows": rows}))

    def call() -> subprocess.CompletedProcess:
        script, figure = ROOT / "scripts/bench/train_figure.py", tmp_path / "figure.png"
        return subprocess.run([sys.executable, script, figure, *paths], capture_output=True, text=True)

    done = call()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| 2.0 | +5.0 |") == 4 and "| moe_ep8 | 1 | 4 | fused | off |" in done.stdout
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    paths[1].write_text(json.dumps(head | {"device": "y", "rows": []}))
    assert "device y, in" in call().stderr
