"""Step time of pipeline and expert parallelism, beside the simulator's, and what a profiled step shows.

Times come before profiles: after its first use the profiler slows launches. A step is forward, backward and
the reduction of gradients, without an optimizer, in bf16 on Transformer Engine's layers where it is
installed. The simulator gets this machine's medians: of every compute operation, from steps that run on one
stream, and of a message of each size on an idle link.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import multi_gpu_trace as trace
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from multi_gpu_parity import HAVE_TE, MEGATRON, NONE, ON_GPU, mhc_of, schedule_of, schedules_of, switch
from multi_gpu_report import Report, Row
from timeline import Log, Mark, Measured, medians, synchronize
from torch.profiler import ProfilerActivity, profile

from megatron_mhc.pipeline import engine
from megatron_mhc.pipeline import step as pipeline_step
from megatron_mhc.pipeline.comm import channels_of
from megatron_mhc.pipeline.megatron_order import megatron_program
from megatron_mhc.pipeline.nodes import packed_width
from megatron_mhc.pipeline.simulate import simulate
from megatron_mhc.pipeline.step import observers
from megatron_mhc.pipeline.streams import HostStreams
from megatron_mhc.schedule.plans import plan_for
from megatron_mhc.schedule.program import ALL_TO_ALL, COMPUTE, Op, Plan, build_program
from megatron_mhc.testing import gpt
from megatron_mhc.testing.gpt import Layout, Sizes

EXPERTS, TOP_K = 8, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: experts are there where they lie on several ranks, so that all-to-alls cross the links."""

    name: str
    layout: Layout
    width: int
    n: int
    schedule: str

    @property
    def title(self) -> str:
        return f"{self.name}, C={self.width}, n={self.n}, {self.schedule}"

    @property
    def file(self) -> str:
        return self.title.replace(", ", "_").replace("=", "")

    @property
    def kind(self) -> str:
        return "moe" if self.layout.ep > 1 else "dense"


def cases(options: argparse.Namespace, world: int) -> list[Case]:
    pipeline, experts = Layout(pp=2, vpp=2, ep=world // 2), Layout(ep=world)
    name = "pp2_vpp2" + (f"_ep{pipeline.ep}" if pipeline.ep > 1 else "")
    return [
        Case(label, layout, width, n, schedule)
        for n in options.streams
        for width in options.widths
        for label, layout in ((name, pipeline), (f"ep{world}", experts))
        if not options.layouts or label in options.layouts
        for schedule in schedules_of(layout, options)
    ]


class Bench:
    """The model of a case, and its steps."""

    def __init__(self, case: Case, options: argparse.Namespace):
        self.case, layout, width = case, case.layout, case.width
        switch(layout)
        heads = max(1, width // 128)
        settings: dict[str, Any] = dict(
            num_layers=options.layers * (4 if layout.pp > 1 else 2),
            hidden_size=width,
            ffn_hidden_size=3 * width,
            num_attention_heads=heads,
            num_query_groups=heads,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_cpu_initialization=not ON_GPU,
            bias_activation_fusion=ON_GPU,
            apply_rope_fusion=HAVE_TE,
        )
        if case.kind == "moe":
            experts = layout.ep * max(1, EXPERTS // layout.ep)
            settings |= dict(num_moe_experts=experts, moe_router_topk=TOP_K)
            settings |= dict(moe_ffn_hidden_size=max(32, 3 * width // 5 // 128 * 128))
            settings |= dict(moe_grouped_gemm=HAVE_TE)
        self.config = layout.config(case.kind, **settings)
        self.sizes = Sizes(options.sequence, options.micro_batch, 1024)
        how: dict[str, Any] = dict(sizes=self.sizes, te=HAVE_TE, weights=lambda chunks: None)
        self.chunks = gpt.build(layout, self.config, case.kind, mhc_of(case.schedule, case.n, options), **how)
        self.count = options.microbatches
        self.batch = gpt.tokens(self.count * parallel_state.get_data_parallel_world_size(), 0, self.sizes)
        self.batch = self.batch.to("cuda")

    def step(self, schedule: Any = None, batch: Any = None) -> None:
        schedule = schedule or schedule_of(self.case.schedule)
        batch = self.batch if batch is None else batch
        gpt.forward_backward(self.chunks, self.config, batch, schedule=schedule, masked=not HAVE_TE)

    def first_step(self, schedule: Any = None) -> None:
        """A step of few micro-batches; under the plugin's schedules its messages go by way of the hosts."""
        few = min(self.count, 2 * self.case.layout.pp) * parallel_state.get_data_parallel_world_size()
        self.step(schedule, self.batch[:few])

    def times(self, options: argparse.Namespace) -> list[float]:
        """Milliseconds of the slowest rank, for every step after the warm-up."""
        mine = []
        self.first_step()
        for _ in range(options.warmup + options.steps):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            dist.barrier()
            synchronize()
            begin = time.perf_counter()
            self.step()
            synchronize()
            mine.append(1e3 * (time.perf_counter() - begin))
        return [max(ranks) for ranks in zip(*everywhere(mine), strict=True)][options.warmup :]

    # What the simulator learns

    def plan(self) -> Plan:
        layout = self.case.layout
        if self.case.schedule == MEGATRON:
            return Plan(layout.pp, layout.vpp or 1, self.count)
        return plan_for(self.config, self.config.mhc, layout.pp, layout.vpp or 1, self.count)

    def costs(self, plan: Plan) -> Measured:
        """Medians of operations and messages on this machine; all ranks get the same."""
        key = dataclasses.replace(self.case, schedule=""), plan.boundary, plan.fused
        if key not in _costs:
            _costs[key] = self.measure_costs()
        return _costs[key]

    def measure_costs(self) -> Measured:
        mhc = self.config.mhc
        if self.case.schedule == MEGATRON:  # nothing watches its operations; the plugin's are the same
            self.config.mhc = dataclasses.replace(mhc, pipeline_schedule="interleaved")
        logs = []
        try:
            with on_one_stream():
                self.first_step(engine.forward_backward)
                for _ in range(2):
                    log = Log()
                    observers[:] = [log.observe]
                    self.step(engine.forward_backward)
                    synchronize()
                    logs.append(log)
        finally:
            self.config.mhc = mhc
            observers.clear()
        ops: dict[Any, float] = {}
        for part in everywhere(medians(logs[1:], _operation)):
            ops |= part  # data-parallel ranks have measured the same operations
        return Measured(ops, self.messages(), _operation)

    def messages(self) -> dict[str, float]:
        """Milliseconds of each kind of message, alone on its link."""
        n, width, dtype = self.case.n, self.case.width, self.config.pipeline_dtype
        wide, narrow = (
            self.transfer((self.sizes.sequence, self.sizes.micro_batch, columns), dtype)
            for columns in (n * width, packed_width(width, n, dtype))
        )
        return dict(streams=wide, mixed=wide, d_streams=wide, write=narrow, d_write=narrow)

    def transfer(self, shape: tuple[int, ...], dtype: torch.dtype, repeats: int = 5) -> float:
        """Median milliseconds of a message from the first stage to the second, as the second sees it."""
        group = parallel_state.get_pipeline_model_parallel_group()
        channels, rank = channels_of(group), group.rank()
        tensor = torch.zeros(shape, dtype=dtype, device="cuda")
        found = []
        for _ in range(repeats):
            dist.barrier()
            synchronize()
            marks = []
            for _ in range(2):  # the second begins when both ends are there
                if rank == 0:
                    dist.send(tensor, channels.ranks[1], group=channels.groups["forward"])
                elif rank == 1:
                    dist.recv(tensor, channels.ranks[0], group=channels.groups["forward"])
                marks.append(Mark())
            synchronize()
            found.append(marks[1].since(marks[0]))
        mine = statistics.median(found[1:]) if rank == 1 else None
        return next(value for value in everywhere(mine) if value is not None)

    def simulated(self) -> Row:
        """The simulator's step, how much of it messages cost, and a rank's mean time without compute."""
        plan = self.plan()
        costs = self.costs(plan)
        build = megatron_program if self.case.schedule == MEGATRON else build_program
        programs = [build(plan, rank) for rank in range(plan.pp)]
        step = simulate(plan, costs, programs).step
        quiet = Measured(costs.ops, dict.fromkeys(costs.messages, 0.0), _operation)
        still = simulate(plan, quiet, programs).step
        computing = [
            sum(costs.compute(plan, op) for op in mine if op.kind in COMPUTE and op.what not in ALL_TO_ALL)
            for mine in programs
        ]
        operations = {" ".join(map(str, key)): value for key, value in sorted(costs.ops.items())}
        return {
            "simulated": step,
            "simulated p2p": step - still,
            "simulated without compute": step - statistics.mean(computing),
            "message": costs.messages["streams"],
            "messages": costs.messages,
            "operations": operations,
        }

    # What the profiler sees

    def profiled(self, options: argparse.Namespace, picture: Path) -> Row:
        """Milliseconds of a step, mean over the ranks; see `trace.summary`."""
        self.first_step()
        for _ in range(options.warmup):
            self.step()
        layout = self.case.layout
        kinds = [ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
        if layout.pp > 1 and layout.ep > 1:
            kinds.append(ProfilerActivity.CPU)  # slower, but messages and all-to-alls can be told apart
        dist.barrier()
        synchronize()
        with tempfile.TemporaryDirectory() as folder:
            with profile(activities=kinds) as recorded:
                self.step()
                synchronize()
            path = Path(folder) / "trace.json"
            recorded.export_chrome_trace(str(path))
            ranks = everywhere(trace.read_trace(path, layout.pp, layout.ep))
        summaries = [summary for kernels in ranks if (summary := trace.summary(kernels))]
        if not summaries:
            return {"kernels": 0}  # no GPU
        if dist.get_rank() == 0:
            picture.parent.mkdir(parents=True, exist_ok=True)
            trace.draw(ranks, picture, self.case.title)
        mean = {key: statistics.mean(s[key] for s in summaries) for key in summaries[0]}
        noted = {"picture": picture.name, "ranks": summaries, "longest": trace.longest(ranks)}
        return {"kernels": len(ranks[0])} | mean | noted


_costs: dict[Any, Measured] = {}  # Megatron's order and the plugin's have the same parts


def _operation(op: Op) -> tuple[str, str, int, int]:
    return op.kind, op.what, op.stage, op.layer


@contextlib.contextmanager
def on_one_stream() -> Iterator[None]:
    """Have the plugin's schedules run everything in the order of the host."""
    usual = pipeline_step.streams_for
    pipeline_step.streams_for = lambda *_: HostStreams()
    try:
        yield
    finally:
        pipeline_step.streams_for = usual


def everywhere(value: Any) -> list[Any]:
    """A value of every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run(report: Report, options: argparse.Namespace) -> None:
    """Time all cases."""
    for case in cases(options, dist.get_world_size()):
        if report.wanted("measure", case.title):
            torch.cuda.reset_peak_memory_stats()
            bench = Bench(case, options)
            times = bench.times(options)
            row: Row = {"step": statistics.median(times), "steps": times}
            row["peak GiB"] = max(everywhere(torch.cuda.max_memory_allocated())) / 2**30
            report.note("measure", case.title, row)
            row |= bench.simulated() if case.schedule != NONE else {}
            report.add("measure", case.title, row)
            del bench
            clean()


def run_profiles(report: Report, options: argparse.Namespace) -> None:
    """Profile a step of all cases, each with a picture in the folder for such."""
    for case in cases(options, dist.get_world_size()):
        if report.wanted("profile", case.title):
            bench = Bench(case, options)
            picture = options.scratch / "traces" / f"{case.file}.png"
            report.add("profile", case.title, bench.profiled(options, picture))
            del bench
            clean()
