"""Run one interior pipeline rank's program on one GPU, with copies over PCIe in place of its neighbours.

    python scripts/bench/pipeline.py --out runs/pipeline [--pp 8 --vpp 2 --microbatches 16 --layers 2]
        [--runs "megatron whole,fused split"] [--limit 120] [--trace "fused split"] [--share 0.125]
        [--exchange wait] [--pad]
    python scripts/bench/pipeline.py --out runs/pipeline --cpu       # tiny, without CUDA: checks the script

A message that is received is copied from pinned host memory as soon as its receive is posted, a message
that is sent is copied to it; an expert all-to-all is a copy of the tokens, or of a --share of them (NVLink is
faster than PCIe), to the host and back; with --exchange wait it waits for as long, and messages have the link
for themselves. With --pad every expert gets the same number of tokens, and the host need not wait for it. So
what is measured is this rank's order, streams and overlap. What is not: neighbours that are late, NCCL's use
of SMs, and the fabric.

The simulator is told what was measured apart from the step: operations in phases, from steps without messages
on one stream; the host's own time; the link, alone (`standins.Link`). Written to --out: results.json, after
every run (pipeline_model.py simulates again from it); events.json, all that one step of each kind noted; to
--pictures, or there too: timeline_*.png of CUDA events, and trace_*.png and .json.gz of one more step under
torch.profiler, after all that is timed. The same command again does the runs that are not in results.json.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import gzip
import json
import statistics
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


LATER = ("runs", "out", "pictures", "limit", "trace")  # may differ where results are gone on with
ORDERS = ("megatron whole", "interleaved whole", "interleaved split", "fused whole", "fused split")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(pp=8, rank=3, vpp=2, microbatches=16, layers=2, streams=4, hidden=2560, heads=32, ffn=7680)
    sizes |= dict(experts=8, expert_ffn=1536, topk=2, sequence=4096, micro_batch=1, steps=10, warmup=3)
    for name, default in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--dense", action="store_true", help="no experts, so no all-to-all")
    parser.add_argument("--backend", default="auto", help="--mhc-backend")
    parser.add_argument("--replay", default="off", help="--mhc-recompute-layer-num")
    parser.add_argument(
        "--no-te", action="store_true", help="Megatron's local layers, without flash attention"
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--runs", default=",".join(ORDERS), help="order and boundary, with commas between")
    parser.add_argument("--limit", type=int, default=0, help="seconds of a run, 0: none")
    parser.add_argument("--trace", default="", help="runs of which torch.profiler sees one more step")
    parser.add_argument("--share", type=float, default=1.0, help="of the tokens that all-to-alls copy")
    parser.add_argument("--exchange", choices=("copy", "wait"), default="copy", help="for all-to-alls")
    parser.add_argument("--pad", action="store_true", help="experts drop tokens, and pad, to equal numbers")
    parser.add_argument("--pictures", help="folder; default --out")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    if args.cpu:
        tiny = dict(pp=4, rank=1, vpp=2, microbatches=4, layers=2, hidden=32, heads=4, ffn=64, experts=4)
        tiny |= dict(expert_ffn=32, sequence=16, steps=2, warmup=1)
        for name, value in tiny.items():
            setattr(args, name, value)
        args.no_te = True
    args.runs, args.trace = args.runs.split(","), [name for name in args.trace.split(",") if name]
    if unknown := {*args.runs, *args.trace} - set(ORDERS):
        raise ValueError(f"no run {unknown.pop()}: choose of {', '.join(ORDERS)}")
    if not 0 < args.rank < args.pp - 1:
        raise ValueError(f"--rank {args.rank}: an interior rank of {args.pp} is 1 to {args.pp - 2}")
    return args


ARGS = arguments()
if ARGS.cpu:
    from megatron_mhc.testing import cpu

    cpu.install()
    cpu.patch_megatron()
    cpu.use_local_modules()
import timeline  # noqa: E402
from interior_rank import build  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from pipeline_model import (  # noqa: E402
    PARTS,
    from_one_step,
    kind,
    own_streams,
    plan_of,
    program_of,
    simulated,
    unhurried,
)
from standins import Copies, Exchange, Link, LoopTransport, cycles_per_ms  # noqa: E402
from timeline import DEVICE, Log, Mark, TimedStreams, synchronize  # noqa: E402
from timeline_picture import draw, draw_trace  # noqa: E402

from megatron_mhc import MHCConfig  # noqa: E402
from megatron_mhc.pipeline import fused  # noqa: E402
from megatron_mhc.pipeline.megatron_order import WAIT_SENT  # noqa: E402
from megatron_mhc.pipeline.nodes import packed_width  # noqa: E402
from megatron_mhc.pipeline.step import Step, observers  # noqa: E402
from megatron_mhc.pipeline.streams import HostStreams  # noqa: E402

DTYPE = torch.float32 if ARGS.cpu else torch.bfloat16


def message_shapes() -> dict[str, tuple[int, ...]]:
    tokens = ARGS.sequence, ARGS.micro_batch
    wide = (*tokens, ARGS.streams * ARGS.hidden)
    narrow = (*tokens, packed_width(ARGS.hidden, ARGS.streams, DTYPE))
    return {"streams": wide, "mixed": wide, "d_streams": wide, "write": narrow, "d_write": narrow}


class Bench:
    """Runs steps of one program in several ways."""

    def __init__(self, order: str, boundary: str):
        self.order, self.boundary = order, boundary
        schedule = "interleaved" if order == "megatron" else order
        mhc = MHCConfig(
            num_residual_streams=ARGS.streams,
            pipeline_schedule=schedule,
            pp_boundary=boundary,
            backend=ARGS.backend,
            recompute_layer_num=ARGS.replay,
        )
        torch.manual_seed(1)
        self.config, self.chunks = build(mhc, ARGS, DTYPE)
        self.plan = plan_of(vars(ARGS), order, boundary)
        self.program = program_of(self.plan, order, ARGS.rank)
        self.copies = Exchange.copies
        # By priority; every new stream would take memory of its own.
        self.timed: dict[bool, TimedStreams] = {}
        self.mask = torch.ones(ARGS.sequence, ARGS.sequence, dtype=torch.bool, device=DEVICE).triu(1)[
            None, None
        ]

    def forward_step(self, iterator: Any, model: Any) -> Any:
        return model(None, None, self.mask if ARGS.no_te else None), None

    def streams(self, log: Log, priority: bool) -> TimedStreams:
        if priority not in self.timed:
            self.timed[priority] = TimedStreams(log, priority)
        self.timed[priority].log = log
        return self.timed[priority]

    def step(self, log: Log, *, copy: bool, exchange: bool, serial: bool, priority: bool) -> float:
        """One step; returns its milliseconds."""
        cuda = DEVICE.type == "cuda" and not serial
        streams = self.streams(log, priority) if cuda and self.plan.fused else HostStreams()
        bench = self

        def transport(step: Any, sizes: tuple[int, int]) -> LoopTransport:
            late = bench.order == "megatron"
            made = (bench.plan, ARGS.rank, None, message_shapes(), DTYPE, DEVICE, streams)
            return LoopTransport(*made, copies=bench.copies, log=log, copy=copy, late=late)

        kind = fused.FusedStep if self.plan.fused else Step

        def wait_sent(step: Any, op: Any) -> None:
            step.transport.wait_sent(op.message)

        make = type("BenchStep", (kind,), {"_transport": transport, f"_{WAIT_SENT}": wait_sent})
        groups = ProcessGroupCollection.use_mpu_process_groups()
        run = make(
            self.plan,
            ARGS.rank,
            self.chunks,
            [None] * ARGS.vpp,
            self.forward_step,
            groups,
            (ARGS.sequence, ARGS.micro_batch),
            collect_non_loss_data=False,
            first_val_step=None,
        )
        run.program = self.program
        for chunk in self.chunks:
            chunk.zero_grad(set_to_none=True)
        Exchange.active, Exchange.log = exchange, log
        observers[:] = [log.observe]
        synchronize()
        begin = log.origin = Mark()
        run.run()
        if cuda:  # the step ends when all of its streams have
            for stream in (self.copies.inward, self.copies.outward):
                torch.cuda.current_stream().wait_stream(stream)
        end = Mark()
        synchronize()
        return end.since(begin)

    def steps(
        self, steps: int, warmup: int, alone: bool = False, **how: Any
    ) -> tuple[list[float], list[Log]]:
        how = dict(copy=True, exchange=True, serial=False, priority=True) | how
        times, logs = [], []
        for at in range(warmup + steps):
            log = Log(alone)
            took = self.step(log, **how)
            if at >= warmup:
                times.append(took)
                logs.append(log)
        return times, logs


def run(order: str, boundary: str, report: dict[str, Any], pictures: Path) -> dict[str, Any]:
    """All that is measured of one program; what its steps noted is under "events"."""
    bench = Bench(order, boundary)
    few = max(1, ARGS.steps - 1), 1
    cuda = DEVICE.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps, logs = bench.steps(ARGS.steps, ARGS.warmup)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    still, still_logs = bench.steps(*few, copy=False)
    quiet = still if ARGS.dense else bench.steps(*few, copy=False, exchange=False)[0]
    _, serial = bench.steps(*few, copy=False, serial=True)
    _, alone = bench.steps(*few, alone=True)
    noted = {"step": logs, "without messages": still_logs, "on one stream": serial, "host alone": alone}
    written = {name: [timeline.raw(log) for log in some] for name, some in noted.items()}
    ahead = [step for some in own_streams(order) for step in written[some]]
    inputs = unhurried(timeline.inputs(serial, alone, kind), ahead)
    name = f"{order} {boundary}"
    models = simulated(report, name, inputs)
    full, without, bare = map(statistics.median, (steps, still, quiet))
    volume = sum(end.since(start) for _, start, end in logs[-1].copies)
    found = {
        "step": full,
        "exposed messages": full - without,
        "messages": volume,
        "hidden": 1 - (full - without) / volume,
        "exposed all-to-all": without - bare,
        **dict(zip(PARTS, (without, bare), strict=True)),
        "simulated": models["simulated"],
        "simulated / measured": models["simulated"] / full,
        "other models": {name: models[name] for name in models if name != "simulated"},
        "operations": timeline.medians(serial, kind),
        "message": timeline.moved(logs),
        "steps": {"step": steps, **dict(zip(PARTS, (still, quiet), strict=True))},
        "inputs": inputs,
    }
    found["events"] = {name: some[-1] for name, some in written.items()}
    found |= from_one_step(report, name, inputs, steps, written["step"][-1])
    if cuda:
        found["peak GiB"] = peak
    if order == "fused" and boundary == "whole":
        found["combine end to post end"] = timeline.latencies(logs)
        slower, normal = bench.steps(*few, priority=False)
        found["step, normal priority"] = statistics.median(slower)
        found["combine end to post end, normal priority"] = timeline.latencies(normal)
    draw(logs[-1], pictures / f"timeline_{order}_{boundary}.png", f"{order}, {boundary}")
    return found


def profile(order: str, boundary: str, path: Path) -> None:
    """Draw one step as torch.profiler sees it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    bench = Bench(order, boundary)
    how = dict(copy=True, exchange=True, serial=False, priority=True)
    bench.step(Log(), **how)
    kind = ProfilerActivity.CUDA if DEVICE.type == "cuda" else ProfilerActivity.CPU
    with profiler(activities=[kind]) as recorded:
        bench.step(Log(), **how)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        path.with_suffix(".json.gz").write_bytes(gzip.compress(trace.read_bytes()))
        draw_trace(trace, path, f"{order}, {boundary}: one step's middle, torch.profiler")


def main() -> None:
    out, pictures = Path(ARGS.out), Path(ARGS.pictures or ARGS.out)
    for folder in (out, pictures):
        folder.mkdir(parents=True, exist_ok=True)
    file = out / "results.json"
    about = {k: v for k, v in vars(ARGS).items() if k not in LATER}
    results: dict[str, Any] = {"arguments": about, "device": torch.cuda.get_device_name(), "runs": {}}
    if file.exists() and (old := json.loads(file.read_text()))["arguments"] == about:
        results = old
    log = out / "events.json"
    events: dict[str, Any] = json.loads(log.read_text()) if log.exists() and results["runs"] else {}
    dist.init_process_group(
        "gloo" if ARGS.cpu else "nccl", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    Exchange.copies, Exchange.share, Exchange.how = Copies(), ARGS.share, ARGS.exchange
    if "link" not in results:
        results["link"] = measure_link()
    Exchange.cycles = int(sum(results["link"]["alone"]["exchange"].values()) * cycles_per_ms())
    for name in (name for name in ARGS.runs if name not in results["runs"]):
        results["runs"][name] = {"failed": "the process ended in its midst"}
        write(file, results)
        if ARGS.limit:
            faulthandler.dump_traceback_later(ARGS.limit, exit=True)
        try:
            found = run(*name.split(), results, pictures)
            events[name] = found.pop("events")
            results["runs"][name] = found
        except (RuntimeError, ValueError, AssertionError, torch.OutOfMemoryError):
            results["runs"][name] = {"failed": traceback.format_exc()}
        faulthandler.cancel_dump_traceback_later()
        write(file, results)
        log.write_text(json.dumps(events, separators=(",", ":")) + "\n")
        shown = {k: round(v, 3) for k, v in results["runs"][name].items() if isinstance(v, float)}
        print(f"{name:20} {shown or results['runs'][name]}", flush=True)
        clean()
    for name in ARGS.trace:
        if ARGS.limit:
            faulthandler.dump_traceback_later(ARGS.limit, exit=True)
        profile(*name.split(), pictures / f"trace_{name.replace(' ', '_')}.png")
        faulthandler.cancel_dump_traceback_later()
        clean()
    dist.destroy_process_group()
    if failed := [name for name, found in results["runs"].items() if "failed" in found]:
        raise SystemExit(f"failed: {', '.join(failed)}")


def write(file: Path, results: dict[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n")


def measure_link() -> dict[str, Any]:
    rows = int(ARGS.share * ARGS.sequence * ARGS.micro_batch * ARGS.topk)
    found = Link(Exchange.copies, message_shapes(), rows, ARGS.hidden, DTYPE).measured()
    clean()
    return found


def clean() -> None:
    """Give back the memory of the last run."""
    observers.clear()
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
