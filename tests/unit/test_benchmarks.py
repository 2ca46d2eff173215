"""The benchmarks: each of them at toy sizes on the CPU, what they make of known numbers, and all.sh."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mhc.pretrain_gpt  # noqa: F401  # once, not in every process that is forked
from benchmarks import harness, jobs, report, rows, step, trace
from megatron_mhc import doctor

# A process that imports PyTorch takes many times as long on a busy machine. Pytest's limit is the only one,
# and ends what hangs.
pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--turns", "1", "--steps", "2", "--warm-up", "1"]


def run(out, name, *arguments, on_cpu=False, status=0):
    """Run a benchmark at toy sizes; its report."""
    command = [sys.executable, *(["-m", "megatron_mhc.testing.cpu"] if on_cpu else [])]
    command += ["-m", f"benchmarks.{name}", "--tiny", "--out", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


def names(found):
    assert not any("failed" in row for row in found["rows"])
    return [row["name"] for row in found["rows"]]


def test_kernels(tmp_path):
    found, printed = run(
        tmp_path / "kernels.json", "kernels", "--only", "ops,forms,errors,norms", on_cpu=True
    )
    by_section: dict[str, list] = {}
    for row in found["rows"]:
        by_section.setdefault(row["section"], []).append(row)
    (ops,), (error, exact), norms = (by_section[name] for name in ("ops", "errors", "norms"))
    for row in by_section["forms' errors"]:  # of a single connection, whose h_pre nobody reads with
        assert all(0 < row[name] < 0.1 for name in ("streams", "x", "weight", "bias", "alpha_post"))
    assert [row["graph_us"] > 0 for row in by_section["forms"]] == [True] * 2
    assert [row["name"].partition(",")[2][:5] for row in norms] == [" norm"] * 2
    assert all(row["graph_us"] > 0 for row in norms)
    assert ops["graph_us"] > 0 and ops["host_us"] > 0 and ops["x floor"] > 0
    for name in ("streams", "x", "weight", "bias", "alpha_pre"):  # bf16, and not nothing
        assert 0 < error[name] < 0.05 and 0 < exact[name] < 0.05
    assert f"| {ops['name']} |" in printed and found["versions"]["torch"] and found["commit"]
    page = report.publish(tmp_path, tmp_path / "docs")
    text = page.read_text()
    assert found["commit"] in text and f"| {ops['name']} |" in text and "`kernels.json`" in text
    assert (page.with_suffix("") / "kernels.json").exists()


def test_steps_of_sides_that_take_turns_one_of_which_is_refused(tmp_path):
    out = tmp_path / "step.json"
    found, _ = run(out, "step", "--batches", "1", "--forms", "mhc,mhc/off/none", *QUICK, status=1)
    vanilla, mhc, refused = found["rows"]
    assert [row["name"] for row in found["rows"]] == [f"micro-batch 1, {n}" for n in FORMS]
    assert vanilla["loss"] and mhc["loss"] and mhc["host_ms_per_layer"] > 0
    assert mhc["wall_ms over vanilla, %"] == pytest.approx(100 * (mhc["wall_ms"] / vanilla["wall_ms"] - 1))
    assert len(mhc["steps_ms"]) == 2 and out.with_suffix(".png").exists()
    assert "--mhc-boundary: invalid choice: 'none'" in refused["failed"]


FORMS = ("vanilla", "mhc", "mhc/off/none")


@pytest.mark.slow
def test_steps_in_graphs(tmp_path):
    options = ["--batches", "1", "--forms", "mhc", "--graphs", "none,full_iteration"]
    found, _ = run(tmp_path / "step.json", "step", *options, "--micro-batches", "1", *QUICK, "--warm-up", "4")
    assert names(found) == 2 * [f"micro-batch 1, {n}" for n in FORMS[:2]]
    assert [row["section"] for row in found["rows"]][1::2] == ["llama-1b, one GPU" + g for g in GRAPHED]
    assert [row["loss"] for row in found["rows"][:2]] == [row["loss"] for row in found["rows"][2:]]


GRAPHED = ("", ", graphs full_iteration")


def test_memory(tmp_path):
    found, _ = run(tmp_path / "memory.json", "memory", on_cpu=True)
    assert "4 sub-layers, mHC, auto" in names(found)
    auto = next(row for row in found["rows"] if row["name"] == "4 sub-layers, mHC, auto")
    assert auto["estimate"] > 0 and sum(map(int, auto["blocks"].split(","))) == 4


def test_generating(tmp_path):
    found, _ = run(tmp_path / "decode.json", "decode", on_cpu=True)
    sections = dict.fromkeys(row["section"] for row in found["rows"])
    of_models, connections = names(found)[:6], names(found)[6:]
    assert of_models == [
        f"{what}, {form}" for what in ("batch 2", "batch 2", "16 tokens") for form in FORMS[:2]
    ]
    assert connections == ["1 tokens of 32, reference"] and len(sections) == 4
    for row in found["rows"][:6]:
        assert row["tokens_per_s"] > 0 and row["ms"] > 0 and row["host_ms"] > 0
    vanilla, mhc, *graphed = found["rows"][:4]
    assert mhc["ms over vanilla, %"] == pytest.approx(100 * (mhc["ms"] / vanilla["ms"] - 1))
    assert all(row["ok"] and row["error"] == 0 for row in graphed)


# Their jobs are those of `step`.
@pytest.mark.slow
def test_diagnostics(tmp_path):
    found, _ = run(tmp_path / "diagnostics.json", "diagnostics", *QUICK)
    assert names(found) == ["off", "between", "logged"]
    off, _, logged = found["rows"]
    assert logged["adds_ms"] == pytest.approx(logged["wall_ms"] - off["wall_ms"])


@pytest.mark.slow
def test_multi_gpu(tmp_path):
    found, _ = run(tmp_path / "multi.json", "multi_gpu", "--forms", "vanilla,fused/split", *QUICK)
    assert names(found) == ["vanilla", "fused/split"]
    assert all(row["wall_ms"] > 0 for row in found["rows"])


def test_recipes_are_those_of_the_examples():
    words = jobs.recipe("llama-1b", "mhc", TP=2)
    assert "--mhc-num-residual-streams" in words and "--sequence-parallel" in words and "--mock-data" in words
    assert not {"--save", "--load", "--tensorboard-dir", "--exit-signal-handler"} & set(words)
    with pytest.raises(ValueError, match="no model"):
        jobs.recipe("5b", "mhc")


@pytest.mark.parametrize(
    "model, tp, graphs", [("llama-1b", 1, "full_iteration"), ("llama-1b", 2, "none"), ("3b", 1, "none")]
)
def test_nothing_is_in_the_way_of_a_step_but_what_a_cpu_lacks(run_ranks, model, tp, graphs):
    options = argparse.Namespace(model=model, tp=tp, micro_batches=None, tiny=False)
    arguments = step.job("mhc/auto", 1, graphs, options).arguments
    torchrun = ["torchrun", "--nproc-per-node", str(tp), "-m", "megatron_mhc.pretrain_gpt"]
    said, _ = run_ranks(1, doctor.report, [*torchrun, *arguments])[0]
    in_the_way = said.partition("in the way\n")[2].strip().splitlines()
    assert in_the_way and all("No module named 'transformer_engine'" in line for line in in_the_way), said


# Reports


def test_a_killed_run_is_gone_on_with(tmp_path):
    path = tmp_path / "out.json"
    first = harness.Report(path, "step", {"layers": 2})
    assert first.wanted("a", "tp2")
    first.add("a", "tp2", {"loss": 1e-7, "ok": True})
    assert first.wanted("a", "pp2")  # and here it is killed
    again = harness.Report(path, "step", {"layers": 2})
    assert not again.wanted("a", "tp2") and not again.wanted("a", "pp2") and again.wanted("a", "ep2")
    again.add("a", "ep2", {"loss": 1e-3, "ok": False})
    assert again.bad() == ["a: pp2", "a: ep2"]
    table = rows.tables(again.rows)
    assert "| tp2 | 1.0e-07 | yes |" in table and "| ep2 | 1.0e-03 | **NO** |" in table
    with pytest.raises(ValueError, match="settings .*give another file"):
        harness.Report(path, "step", {"layers": 3})


def test_a_failure_is_a_row(tmp_path, capsys):
    found = harness.Report(tmp_path / "out.json", "step", {})
    found.run("a", "bad", lambda: {}["missing"])
    found.run("a", "good", lambda: {"ms": 1.0})
    assert found.rows[0]["failed"] == "KeyError: 'missing'" and found.rows[1]["ms"] == 1.0
    with pytest.raises(SystemExit, match="failed: a: bad"):
        found.end()


def test_rounds_that_are_apart_say_so():
    turns = iter([1.0, 2.0, 1.1, 2.0])
    found = harness.alternate({"a": lambda: [next(turns)], "b": lambda: [next(turns)]}, rounds=2)
    assert found["a"]["median"] == pytest.approx(1.05) and found["a"]["apart, %"] == pytest.approx(10)
    assert found["b"] == {"median": 2.0, "apart, %": 0.0}


def test_reports_of_two_commits_make_no_page(tmp_path):
    for name, commit in (("a", "1"), ("b", "2")):
        found = harness.Report(None, name, {}).head | {"rows": [], "commit": commit}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="commit 2, in a.json 1"):
        report.publish(tmp_path, tmp_path / "docs")


def test_reports_of_other_programs_are_taken_in(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"runs": [{"name": "x", "loss": 2.0, "ok": False}]}))
    report.adopt(tmp_path / "results.json", tmp_path / "losses.partial.json")
    found = json.loads((tmp_path / "losses.partial.json").read_text())
    assert found["benchmark"] == "losses" and found["rows"][0]["name"] == "x" and "failed" in found["rows"][0]


def test_pages_are_made_without_pytorch():
    """Whose import all.sh would wait for between any two pieces."""
    code = "import sys, benchmarks.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_an_answer_of_a_job_that_has_ended_counts(tmp_path):
    """It may answer and end between a look for its answer and one for its process."""
    job = jobs._Running.__new__(jobs._Running)
    job.job, job.folder = jobs.Job("a", [], ranks=1), tmp_path

    class Process:
        returncode = 0

        def poll(self):
            (tmp_path / "done_1_0").write_text("{}")
            return 0

    job.process = Process()
    assert job.wait("done_1", 10) == [{}]
    job.process.poll = lambda: 0
    (tmp_path / "log").write_text("ValueError: no")
    with pytest.raises(jobs.Failed, match="exit 0: ValueError: no"):
        job.wait("done_2", 10)


# all.sh, with a stand-in for Python that measures nothing

PYTHON = """#!/bin/bash
case "$*" in
    *benchmarks.report*) exec {python} "$@" ;;
    *benchmarks.kernels*errors*) echo "RuntimeError: no such kernel"; exit 3 ;;
esac
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then
        echo '{{"rows": [{{"section": "a", "name": "b", "ms": 1.0}}]}}' >"$2"
    fi
    shift
done
"""


@pytest.fixture
def all_sh(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)

    def call(*arguments):
        command = ["bash", str(ROOT / "benchmarks/all.sh"), *arguments]
        environment = os.environ | {"PYTHON": str(python), "GPUS": "1", "MHC_COMMIT": "abc"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return call


def test_a_piece_that_fails_does_not_end_the_others(all_sh, tmp_path):
    out = tmp_path / "out"
    done = all_sh("--out", str(out), "--only", "ops_2560,errors,step_tp2_b1,stages")
    assert done.returncode == 1 and "failed: errors" in done.stdout, done.stdout + done.stderr
    assert "step_tp2_b1: needs 2 GPUs, here are 1" in done.stdout
    assert {file.name for file in out.glob("*.json")} == {"ops_2560.json", "errors.json", "stages.json"}
    (row,) = json.loads((out / "errors.json").read_text())["rows"]
    assert row["failed"] == "exit 3: RuntimeError: no such kernel"
    before = (out / "ops_2560.json").stat().st_mtime_ns
    assert all_sh("--out", str(out), "--only", "ops_2560,errors", "--retry").returncode == 1
    assert (out / "ops_2560.json").stat().st_mtime_ns == before


def test_a_budget_leaves_pieces_for_the_next_call(all_sh, tmp_path):
    done = all_sh("--out", str(tmp_path / "out"), "--only", "ops_2560,rivals_4096", "--budget-minutes", "3")
    assert done.returncode == 2 and "left: rivals_4096" in done.stdout
    assert (tmp_path / "out/ops_2560.json").exists()


def test_pieces_are_listed_and_none_takes_ten_minutes(all_sh):
    lines = [line.split() for line in all_sh("--list").stdout.splitlines()[1:]]
    assert len(lines) > 20 and all(0 < int(minutes) < 10 for _, _, minutes, *_ in lines)
    assert all_sh("--out", "x", "--only", "nothing").returncode == 2


# Profiles of several GPUs

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
