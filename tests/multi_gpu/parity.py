"""Several GPUs against one: loss and gradients of one iteration in float32 or float64.

On Megatron's local layers and with a router in plain torch: Transformer Engine's GEMMs, which Megatron's
float32 routers take where it is installed, round float32 to TF32. What else could tell two runs apart is
measured along with each reference: whether its numbers come again, and how far they move when it adds in
another order. Its tokens are none of them near a tie between experts, which rounding would decide.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from benchmarks.harness import Report, Row
from megatron_mhc import MHCConfig
from megatron_mhc.pipeline.engine import forward_backward
from megatron_mhc.testing import cpu, gpt
from megatron_mhc.testing.gpt import Layout, Sizes
from megatron_mhc.testing.parameters import fill
from megatron_mhc.testing.parity import Iteration, Routing, compare_routing, differences, one_against_one

ON_GPU = torch.empty(0, device="cuda").is_cuda  # testing.cpu redirects "cuda"
HAVE_TE = ON_GPU and importlib.util.find_spec("transformer_engine") is not None

ERROR = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative, loss and gradients
TF32_ERROR = 1e-3  # of gradients, where routers round to TF32: 11 bits
TIE, SEEDS = 1e-5, 32  # how near a tie no token of a reference may be, and how many data seeds are tried

MEGATRON, NONE, TF32 = "megatron", "-", "Megatron's router"
SCHEDULES: dict[str, dict[str, Any]] = {  # the most wanted first
    "interleaved-whole": dict(pipeline_schedule="interleaved"),
    "interleaved-split": dict(pipeline_schedule="interleaved", pp_boundary="split"),
    "fused-split": dict(pipeline_schedule="fused", pp_boundary="split"),
    MEGATRON: {},
    "fused-whole": dict(pipeline_schedule="fused"),
}
BOTH = ("dense", "moe")
# The ranks that are left over are data parallel.
LAYOUTS: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "tp2": (Layout(tp=2), ("dense",)),  # with MoE, Megatron asks for sequence parallelism
    "tp2_sp": (Layout(tp=2, sp=True), BOTH),
    "pp2": (Layout(pp=2), BOTH),
    "pp2_vpp2": (Layout(pp=2, vpp=2), BOTH),
    "ep2": (Layout(ep=2), ("moe",)),
    "dp_distributed_optimizer": (Layout(distributed_optimizer=True), BOTH),
    "pp2_vpp2_ep2": (Layout(pp=2, vpp=2, ep=2), ("moe",)),  # four GPUs
    "tp2_sp_pp2": (Layout(tp=2, sp=True, pp=2), BOTH),
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the model whose gradients are compared, and the std of its weights.

    A larger or deeper one would say less: in float32 the gradients of an alpha, sums over all tokens that
    nearly cancel, then differ by more than 1e-5 from rounding alone.
    """

    model: dict[str, int]
    batch: Sizes
    std: float


LARGE = Scale(
    model=dict(num_layers=8, hidden_size=64, ffn_hidden_size=128, moe_ffn_hidden_size=64),
    batch=Sizes(sequence=32, micro_batch=2, vocabulary=256),
    std=0.05,
)
TINY = Scale(model=dict(num_layers=4), batch=Sizes(), std=0.1)


_current: list[Layout] = []


def switch(layout: Layout) -> None:
    """Make the layout's process groups, unless they are those of the layout before."""
    groups = dataclasses.replace(layout, sp=False, distributed_optimizer=False)
    if _current != [groups]:
        layout.initialize(create_gloo_process_groups=False)
        _current[:] = [groups]


@contextlib.contextmanager
def alone(backend: str) -> Iterator[None]:
    """A world of this process, before it joins the others."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    _current.clear()
    dist.destroy_process_group()


def fits(layout: Layout, world: int) -> bool:
    return world % (layout.tp * layout.pp * layout.ep) == 0


def schedules_of(layout: Layout) -> list[str]:
    return list(SCHEDULES) if layout.pp > 1 else [NONE]


def mhc_of(schedule: str, n: int, transport: str = "auto") -> MHCConfig:
    options = dict(num_residual_streams=n, pipeline_transport=transport)
    return MHCConfig(**options, **SCHEDULES.get(schedule, {}))


def schedule_of(schedule: str) -> Callable[..., Any] | None:
    """The forward_backward_func; None is Megatron's."""
    return None if schedule in (MEGATRON, NONE) else forward_backward


def micro_batches(world: int) -> int:
    """Of the whole batch: as many as a pipeline has stages, and more, on every data-parallel rank."""
    return 2 * world


# One iteration


@dataclasses.dataclass(frozen=True)
class Case:
    """One row. With `tf32`, routers multiply as Megatron has them do."""

    layout: str
    kind: str
    schedule: str
    n: int
    tf32: bool = False

    @property
    def title(self) -> str:
        return f"{self.layout}, {self.kind}, n={self.n}, {TF32 if self.tf32 else self.schedule}"

    @property
    def reference(self) -> tuple[Any, ...]:
        return "exact", self.kind, self.n, self.tf32


@dataclasses.dataclass
class Reference:
    """What one GPU computed.

    Args:
        seed: of the data.
        again, reordered: the largest relative gradient error of the same once more, and with the
            micro-batches in reverse order.
    """

    iteration: Iteration
    routing: Routing
    seed: int
    again: float
    reordered: float


def exact_cases(options: argparse.Namespace, world: int) -> list[Case]:
    cases = [
        Case(name, kind, schedule, n)
        for name in LAYOUTS
        for kind in LAYOUTS[name][1]
        for n in options.streams
        for schedule in schedules_of(LAYOUTS[name][0])
        if fits(LAYOUTS[name][0], world) and (not options.layouts or name in options.layouts)
    ]
    if HAVE_TE and options.dtype == torch.float32:
        rounded = [case for case in cases if case.kind == "moe" and case.schedule == NONE]
        cases += [dataclasses.replace(case, tf32=True) for case in rounded]
    return cases


def iteration(
    case: Case,
    layout: Layout,
    count: int,
    seed: int,
    options: argparse.Namespace,
    backwards: bool = False,
) -> tuple[float, list[Any], Routing]:
    """(loss, model chunks, what their routers did) of one iteration in `options.dtype`.

    Args:
        backwards: take the micro-batches in reverse order.
    """
    scale = TINY if options.tiny else LARGE
    switch(layout)
    cpu.use_local_modules()  # norms that allow sequence parallelism
    gpt.exact_router(not case.tf32)
    settings = {k: v for k, v in scale.model.items() if case.kind != "dense" or "moe" not in k}
    config = layout.config(case.kind, **settings, params_dtype=options.dtype)
    how: dict[str, Any] = dict(sizes=scale.batch, weights=functools.partial(fill, std=scale.std))
    chunks = gpt.build(layout, config, case.kind, mhc_of(case.schedule, case.n, options.transport), **how)
    routing = Routing.record(chunks)
    batch = gpt.tokens(count, seed, scale.batch)
    batch = batch.flip(0) if backwards else batch
    schedule = schedule_of(case.schedule)
    run = functools.partial(gpt.iterate, chunks, config, batch, schedule=schedule)
    try:
        if schedule is not None:
            run()  # over NCCL the first step's messages go by way of the hosts
        return run(), chunks, routing
    finally:
        gpt.exact_router(False)


def exact_references(options: argparse.Namespace, world: int) -> dict[Any, Callable[[], Reference]]:
    """What one GPU is to compute, by `Case.reference`."""
    count = micro_batches(world)
    alone: dict[Any, Case] = {}
    for case in exact_cases(options, world):
        alone.setdefault(case.reference, dataclasses.replace(case, schedule=NONE))
    return {key: functools.partial(reference, case, count, options) for key, case in alone.items()}


def reference(case: Case, count: int, options: argparse.Namespace) -> Reference:
    """What one GPU computes, for the first data seed with which no token is near a tie."""

    def run(seed: int, backwards: bool = False) -> tuple[Iteration, Routing]:
        loss, chunks, routing = iteration(case, Layout(), count, seed, options, backwards)
        return Iteration.of(loss, chunks), routing.of_last(count)

    def apart(seed: int, backwards: bool = False) -> float:
        return one_against_one(run(seed, backwards)[0], first, options.dtype).worst[0]

    for seed in range(SEEDS):
        first, routing = run(seed)
        if routing.gap() > TIE:
            return Reference(first, routing, seed, apart(seed), apart(seed, backwards=True))
    raise RuntimeError(f"{case.title}: with each of {SEEDS} data seeds a token is within {TIE} of a tie")


def run_exact(report: Report, references: dict[Any, Any], options: argparse.Namespace) -> None:
    """Compare an iteration of every layout with one GPU's."""
    world = dist.get_world_size()
    if report.wanted("precision", "float32 products"):
        report.add("precision", "float32 products", precision())
    for case in exact_cases(options, world):
        if not report.wanted("parity", case.title):
            continue
        expected = references[case.reference]
        layout, count = LAYOUTS[case.layout][0], micro_batches(world)
        loss, chunks, routing = iteration(case, layout, count, expected.seed, options)
        found = differences(loss, chunks, expected.iteration, options.dtype)
        error, where = found.worst
        relative, limit = found.loss / abs(expected.iteration.loss), ERROR[options.dtype]
        ok = relative <= limit and error <= (TF32_ERROR if case.tf32 else limit)
        row: Row = {"loss": relative, "gradients": error, "worst": where}
        row |= {"one GPU again": expected.again, "one GPU reordered": expected.reordered}
        if case.kind == "moe":
            routed = compare_routing(routing, expected.routing, layout.sp)
            row |= {"routed otherwise": routed.moved, "of tokens": routed.tokens, "scores": routed.scores}
            row |= {"closest tie": expected.routing.gap(), "data seed": expected.seed}
            ok = ok and not routed.moved
        report.add("parity", case.title, row | {"ok": ok})


def precision() -> Row:
    """Largest relative error of a float32 product: torch's, the router's in parity, Megatron's router's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator) for rows in (256, 64))
    exact = x.double() @ weight.double().T
    x, weight = x.to("cuda"), weight.to("cuda")

    def error(product: torch.Tensor) -> float:
        return ((product.double().cpu() - exact).abs().max() / exact.abs().max()).item()

    def router() -> torch.Tensor:
        return router_gating_linear(x, weight, None, torch.float32)

    gpt.exact_router()
    row: Row = {"torch": error(x @ weight.T), "router": error(router())}
    gpt.exact_router(False)
    return row | {TF32: error(router()), "ok": max(row.values()) <= 1e-6}
