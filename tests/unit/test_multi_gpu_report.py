"""What scripts/bench/multi_gpu.py makes of known kernels and losses, and of a run that was killed."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))
import multi_gpu_curves as curves  # noqa: E402
import multi_gpu_measure as measure  # noqa: E402
import multi_gpu_report as report  # noqa: E402
import multi_gpu_resume as resume  # noqa: E402
import multi_gpu_supervise as supervisor  # noqa: E402
import multi_gpu_trace as trace  # noqa: E402

SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def write(path, events, base=5_000_000):
    """A trace of (name, start, end) in microseconds, as torch.profiler exports it."""
    kernels = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": start, "dur": end - start, "args": {"stream": 7}}
        for name, start, end in events
    ]
    others = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 99_000},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    path.write_text(json.dumps({"baseTimeNanoseconds": base, "traceEvents": others + kernels}))
    return path


# Microseconds. Compute 0-10 ms (two kernels that overlap) and 14-20; p2p 5-13 and 19-22; all-reduce 24-25.
EVENTS = [
    ("gemm", 0, 6_000),
    ("gemm", 4_000, 10_000),
    (SEND, 5_000, 13_000),
    ("gemm", 14_000, 20_000),
    (SEND, 19_000, 22_000),
    (REDUCE, 24_000, 25_000),
]


def test_exposed_communication_of_known_kernels(tmp_path):
    kernels = trace.read_trace(write(tmp_path / "trace.json", EVENTS), pp=2, ep=1)
    assert kernels[0].start == pytest.approx(5.0)  # ms: the base counts
    found = trace.summary(kernels)
    expected = {
        "whole": 25,
        "idle": 3,  # 13-14 and 22-24
        "compute": 16,
        "p2p": 11,
        "exposed p2p": 5,  # 10-13 and 20-22
        "all-to-all": 0,
        "exposed all-to-all": 0,
        "collectives": 1,
        "exposed collectives": 1,
        "without compute": 9,
    }
    assert found == pytest.approx(expected)


def test_kernels_that_take_longest_are_those_that_compute(tmp_path):
    kernels = trace.read_trace(write(tmp_path / "trace.json", [*EVENTS, ("norm", 30_000, 31_000)]), 2, 1)
    assert trace.longest([kernels, kernels[:1]], most=1) == {"gemm": pytest.approx((2.0, 12.0))}
    assert list(trace.longest([kernels])) == ["gemm", "norm"]


def test_a_message_between_stages_and_an_all_to_all_are_told_apart():
    assert trace.kind_of("void cutlass::gemm_nccl", {}, 2, 2) == "compute"
    assert trace.kind_of(SEND, {}, pp=2, ep=1) == "p2p"
    assert trace.kind_of(SEND, {}, pp=1, ep=2) == "all-to-all"
    assert trace.kind_of(SEND, {"Collective name": "all_to_allv"}, 2, 2) == "all-to-all"
    assert trace.kind_of(SEND, {"Collective name": "recv"}, 2, 2) == "p2p"
    assert trace.kind_of(SEND, {"Process Group Description": "MHC_PIPELINE_FORWARD"}, 2, 2) == "p2p"
    with pytest.raises(ValueError, match="profile the host too"):
        trace.kind_of(SEND, {}, pp=2, ep=2)


@pytest.mark.parametrize(
    "spans, others, left",
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(2, 3), (5, 12)], [(0, 2), (3, 5)]),
        ([(0, 4), (6, 10)], [(3, 7)], [(0, 3), (7, 10)]),
        ([(0, 2), (4, 6), (8, 9)], [(1, 5), (8, 20)], [(0, 1), (5, 6)]),
    ],
)
def test_what_is_left_of_spans(spans, others, left):
    assert trace.minus(spans, others) == left


def test_the_picture_of_two_ranks(tmp_path):
    ranks = [trace.read_trace(write(tmp_path / "trace.json", EVENTS, base), 2, 1) for base in (0, 1_000_000)]
    trace.draw(ranks, tmp_path / "picture.png", "two ranks")
    assert (tmp_path / "picture.png").stat().st_size > 5000


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)


def test_a_killed_run_is_gone_on_with(alone, tmp_path):
    path = tmp_path / "out.json"
    first = report.Report(path, {"layers": "2"})
    assert first.wanted("parity", "tp2")
    first.add("parity", "tp2", {"loss": 1e-7, "ok": True})
    assert first.wanted("parity", "pp2")  # and here it is killed
    again = report.Report(path, {"layers": "2"})
    assert not again.wanted("parity", "tp2")
    assert not again.wanted("parity", "pp2")
    assert again.wanted("parity", "ep2")
    again.add("parity", "ep2", {"loss": 1e-3, "ok": False})
    assert again.bad() == ["parity: pp2", "parity: ep2"]
    assert {row["name"] for row in json.loads(path.read_text())["rows"]} == {"tp2", "pp2", "ep2"}
    table = again.tables()
    assert "| tp2 | 1.0e-07 | yes |" in table and "| ep2 | 1.0e-03 | **NO** |" in table


def test_what_a_row_had_when_it_was_killed_is_kept(alone, tmp_path):
    path = tmp_path / "out.json"
    first = report.Report(path, {"layers": "2"})
    assert first.wanted("measure", "pp2")
    first.note("measure", "pp2", {"step": 350.0})  # and here it is killed
    again = report.Report(path, {"layers": "2"})
    assert again.row("measure", "pp2")["step"] == 350 and again.bad() == ["measure: pp2"]


def options_of(**given):
    names = dict(layouts=[], schedules=["fused-split", "megatron"], widths=[2560, 4096], streams=[4, 1])
    return argparse.Namespace(**(names | given))


def test_rows_to_measure_come_in_the_order_in_which_they_were_asked_for():
    titles = [case.title for case in measure.cases(options_of(), 2)]
    assert titles[:4] == [
        "pp2_vpp2, C=2560, n=4, fused-split",
        "pp2_vpp2, C=2560, n=4, megatron",
        "ep2, C=2560, n=4, -",
        "pp2_vpp2, C=4096, n=4, fused-split",
    ]
    assert len(titles) == 12 and all("n=1" in title for title in titles[6:])
    one = options_of(layouts=["pp2_vpp2"], schedules=["megatron"], widths=[4096], streams=[1])
    assert [case.title for case in measure.cases(one, 2)] == ["pp2_vpp2, C=4096, n=1, megatron"]


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


def test_rows_of_another_machine_do_not_mix(alone, tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    first = report.Report(path, {"layers": "2"})
    first.wanted("parity", "tp2")
    with pytest.raises(ValueError, match="settings .*give another file"):
        report.Report(path, {"layers": "3"})
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    with pytest.raises(ValueError, match="environment .*give another file"):
        report.Report(path, {"layers": "2"})


RUN = """
import os, sys, time
from pathlib import Path
from megatron_mhc.testing import cpu
cpu.install()
import multi_gpu_report as report
found = report.Report(Path(sys.argv[1]), {}, limit=1)
for name in "abc":
    if not found.wanted("parity", name):
        continue
    if name == "a":
        time.sleep(600)
    if name == "b":
        os._exit(7)
    found.add("parity", name, {"ok": True})
"""


def test_a_row_that_hangs_and_one_that_dies_do_not_keep_the_others_from_running(alone, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(report.__file__).parent))
    out = tmp_path / "out.json"
    assert supervisor.supervise([sys.executable, "-c", RUN, str(out)], out, limit=200) == 0
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
    supervisor.subprocess.Popen = lambda command: running.append(started(command)) or running[0]
    try:
        assert supervisor.supervise(["sleep", "600"], tmp_path / "out.json", limit=0.2) == 124
    finally:
        supervisor.subprocess.Popen = started
    assert running[0].returncode == -15
