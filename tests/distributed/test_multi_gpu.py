"""scripts/bench/multi_gpu.py under gloo, and what NCCL alone would punish: the order of first messages."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Layout, ps

from megatron_mhc.pipeline import comm
from megatron_mhc.pipeline.program import POST, SEND, Plan, build_program, channel

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"tp2", "tp2_sp", "pp2", "pp2_vpp2", "ep2", "dp_distributed_optimizer"}
SCHEDULES = {"megatron", "interleaved-whole", "interleaved-split", "fused-whole", "fused-split"}


def launch(out, *arguments, timeout=280):
    """Run the script on two processes; returns its rows by section and name."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megatron_mhc.testing.cpu", "scripts/bench/multi_gpu.py", "--tiny", "--out", str(out)]
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # torchrun then ends its ranks
        process.wait(timeout=30)
    assert process.returncode == 0, "\n".join(output.splitlines()[-60:])
    rows = json.loads(out.read_text())["rows"]
    return {(row["section"], row["name"]): row for row in rows}, output


def test_parity_through_the_script(tmp_path):
    rows, output = launch(tmp_path / "out.json", "--only", "parity", "--streams", "4")
    names = [name.split(", ") for _, name in rows]
    assert {layout for layout, *_ in names} == LAYOUTS
    for kind in ("dense", "moe"):
        assert {name[-1] for name in names if name[:2] == ["pp2_vpp2", kind]} == SCHEDULES
    for name, row in rows.items():
        assert row["loss"] <= 1e-5 and row["gradients"] <= 1e-5 and row["ok"], name
        assert f"| {name[1]} |" in output
    # Not compared with themselves: another order of summation leaves its trace.
    assert all(row["gradients"] > 0 for (_, name), row in rows.items() if name.startswith("tp2"))


@pytest.mark.slow
def test_curves_and_measurement_through_the_script(tmp_path):
    out = tmp_path / "out.json"
    rows, _ = launch(out, "--only", "curves,measure,profile", "--streams", "4")
    curves = {name: row for (section, name), row in rows.items() if section == "curves"}
    assert {name.split(", ")[0] for name in curves} == LAYOUTS - {"tp2"}
    assert all(row["ok"] and row["last"] < row["first"] for row in curves.values())
    measured = {name: row for (section, name), row in rows.items() if section == "measure"}
    assert {name.split(", ")[-1] for name in measured} == SCHEDULES | {"-"}
    for name, row in measured.items():
        assert row["step"] > 0
        if name.startswith("pp2"):
            assert 0 < row["simulated"] and 0 <= row["simulated p2p"] < row["simulated"]
            kinds = {key.split()[0] for key in row["operations"]}
            assert kinds == {"forward", "backward"}
    assert {name for section, name in rows if section == "profile"} == set(measured)


@pytest.mark.slow
@pytest.mark.timeout(540)  # one of its jobs waits for a minute for a rank that says nothing
def test_resume_through_the_script(tmp_path):
    rows, _ = launch(tmp_path / "out.json", "--only", "resume", timeout=500)
    assert rows["resume", "two ranks, one, two"]["error"] <= 1e-5
    assert rows["resume", "rank 1 killed"]["names rank 1"]
    assert rows["resume", "resumed"]["error"] <= 1e-5
    assert "pipeline rank 1 (global rank 1) has failed" in rows["resume", "rank 1 silent"]["messages"][0]


# A message's first use of a link waits, on the host, for the other end: so does NCCL.

PLANS = [
    Plan(pp, vpp, microbatches, boundary=boundary, fused=fused, layers=2)
    for pp, vpp, microbatches in ((2, 1, 2), (2, 2, 4), (2, 3, 5), (3, 2, 6), (4, 2, 8))
    for boundary, fused in itertools.product(("whole", "split"), (False, True))
]


def first_uses(plan, rank):
    """The links of a rank in the order of their first message."""
    used = [channel(plan, op.message) for op in build_program(plan, rank) if op.kind in (POST, SEND)]
    return list(dict.fromkeys(used))


def meet(orders):
    """Whether ranks that wait for each other on every link in turn all come to their end."""
    left = [list(order) for order in orders]
    while any(left):
        ready = [
            link
            for rank, mine in enumerate(left)
            for link in mine[:1]
            if all(left[end][:1] == [link] for end in link[1:])
        ]
        if not ready:
            return False
        for end in ready[0][1:]:
            left[end].pop(0)
    return True


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_links_are_all_that_programs_use(plan):
    for rank in range(plan.pp):
        assert set(first_uses(plan, rank)) <= set(comm.links(plan.pp))


def test_programs_alone_may_wait_for_ever_on_their_first_messages():
    plan = Plan(2, 2, 4, ahead=2)
    assert not meet([first_uses(plan, rank) for rank in range(2)])


def connect(layout):
    """The links that this rank connects when the channels are made, in order."""
    layout.initialize()
    used, send, recv = [], comm.dist.send, comm.dist.recv

    def note(function, sends):
        def noted(tensor, peer, group):
            used.append((group.group_desc, sends, peer))
            return function(tensor, peer, group=group)

        return noted

    comm.dist.send, comm.dist.recv = note(send, True), note(recv, False)
    comm.channels_of(ps.get_pipeline_model_parallel_group())
    return used


@pytest.mark.parametrize("pp", [2, 4])
def test_channels_are_connected_in_one_order_by_all_ranks(run_ranks, pp):
    orders = []
    for rank, used in enumerate(run_ranks(pp, connect, Layout(pp=pp))):
        names = [desc.removeprefix("MHC_PIPELINE_").lower() for desc, *_ in used]
        ends = [(rank, peer) if sends else (peer, rank) for _, sends, peer in used]
        orders.append([(name, *pair) for name, pair in zip(names, ends, strict=True)])
        assert orders[-1] == [link for link in comm.links(pp) if rank in link[1:]]
    assert meet(orders)
