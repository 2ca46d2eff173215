"""What the tests of this folder make of known losses, and of programs that fail."""

import json
import subprocess
import sys

import pytest
import torch

from multi_gpu.conftest import NCCL, ROOT

if NCCL:
    pytest.skip("asks for a device, before which ranks must fork", allow_module_level=True)

from multi_gpu import curves, resume
from multi_gpu import supervise as supervisor


def losses_of(**far):
    """Losses of one GPU's runs, each step of them as far from the first run's as `far` says."""
    names = {way.replace(" ", "_").replace("-", "_"): way for way in curves.WAYS}
    return {way: [2.0 + far.get(name, 0.0), 1.0 - far.get(name, 0.0)] for name, way in names.items()}


def test_a_curve_may_be_as_far_from_one_gpu_as_the_noise_allows():
    noise = dict(micro_batches_reversed=1e-3, micro_batches_halved=2e-3, rounded_once_more=5e-4)
    alone = losses_of(**noise, a_micro_batch_twice=0.05)
    found = curves.noise_of(alone)
    assert found["noise"] == pytest.approx(2e-3) and found["tolerance"] == pytest.approx(6e-3)
    assert found["ok"]
    near, far = ([loss + by for loss in alone["plain"]] for by in (0.005, 0.007))
    assert curves.compared(near, alone)["ok"] and not curves.compared(far, alone)["ok"]
    assert not curves.compared([2.0, float("nan")], alone)["ok"]


def test_a_tolerance_that_hides_a_fault_is_no_tolerance():
    alone = losses_of(micro_batches_halved=0.5, a_micro_batch_twice=0.01)
    found = curves.noise_of(alone)
    assert found["tolerance"] == curves.MOST and not found["ok"]
    assert curves.noise_of(losses_of(a_micro_batch_twice=0.01))["tolerance"] == curves.LEAST


def test_ways_of_one_gpu_take_the_same_micro_batches_but_one():
    batch = torch.arange(4 * 2 * 3).view(4, 2, 3)
    whole = sorted(batch.flatten(0, 1).tolist())
    for way in (curves.PLAIN, *curves.NOISE):
        assert sorted(curves.batch_of(batch, way).flatten(0, 1).tolist()) == whole
    assert curves.batch_of(batch, curves.HALVED).shape == (8, 1, 3)
    other = curves.batch_of(batch, curves.CONTROL)
    assert torch.equal(other[0], other[1]) and torch.equal(other[1:], batch[:-1])


@pytest.mark.parametrize("forward", [True, False])
def test_rounding_once_more_moves_a_number_to_its_neighbour(forward):
    x = torch.linspace(1, 1.9, 1000, dtype=torch.bfloat16, requires_grad=True)
    y = curves._Rounded.apply(x, forward, torch.Generator().manual_seed(0))
    y.backward(x.detach())
    moved, still = (y, x.grad) if forward else (x.grad, y)
    assert torch.equal(still, x)
    steps = ((moved - x).float() * 2**7).abs()  # of bf16 between 1 and 2
    assert steps.max() == 1 and 0.2 < (steps > 0).float().mean() < 0.8


def test_a_job_that_went_on_has_all_losses_behind_its_checkpoint():
    unbroken = {step: 1.0 for step in range(1, 11)}
    assert resume.worst({6: 1.0, 7: 1.01, 8: 1.0}, unbroken, 5, 8) == pytest.approx(0.01)
    for losses in ({6: 1.0, 7: 1.0}, {5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}, {6: 1.0, 7: 1.0, 8: float("nan")}, {}):
        assert resume.worst(losses, unbroken, 5, 8) == float("inf")
    assert resume.worst({6: 1.0, 7: 1.0, 8: 1.0}, {}, 5, 8) == float("inf")


def test_jobs_side_by_side_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,6,7,8")
    assert resume.pairs_of_gpus() == ["2,3", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SystemExit, match="two GPUs"):
        resume.pairs_of_gpus()


RUN = """
import os, sys, time
from pathlib import Path
from benchmarks.harness import Report
found = Report(Path(sys.argv[1]), "parity", {}, limit=1)
for name in "abc":
    if not found.wanted("parity", name):
        continue
    if name == "a":
        time.sleep(600)
    if name == "b":
        os._exit(7)
    found.add("parity", name, {"ok": True})
"""


def test_a_row_that_hangs_and_one_that_dies_do_not_keep_the_others_from_running(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", RUN, str(out)]
    assert supervisor.supervise(command, out, limit=200, cwd=ROOT) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert "failed" in rows["a"] and "failed" in rows["b"] and rows["c"]["ok"]


def test_what_fails_outside_of_the_rows_is_not_tried_again(tmp_path):
    calls = tmp_path / "calls"
    command = ["bash", "-c", f"echo x >> {calls}; exit 3"]
    assert supervisor.supervise(command, tmp_path / "out.json", limit=60) == 3
    assert calls.read_text().count("x") == 1


def test_the_limit_ends_what_runs(tmp_path):
    started = subprocess.Popen
    running = []
    supervisor.subprocess.Popen = lambda command, **_: running.append(started(command)) or running[0]
    try:
        assert supervisor.supervise(["sleep", "600"], tmp_path / "out.json", limit=0.2) == 124
    finally:
        supervisor.subprocess.Popen = started
    assert running[0].returncode == -15
