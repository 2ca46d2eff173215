"""Several GPUs against one: float32 loss and gradients of one iteration, and bf16 loss curves.

float32 runs on Megatron's local layers: Transformer Engine's GEMMs round float32 to TF32. The curves run on
Transformer Engine's layers where it is installed, and train on the Python standard library's sources.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from multi_gpu_report import Report, Row
from torch import Tensor

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline.engine import forward_backward
from megatron_mhc.testing import cpu, gpt
from megatron_mhc.testing.gpt import Layout, Sizes
from megatron_mhc.testing.parameters import fill
from megatron_mhc.testing.parity import Iteration, differences

ON_GPU = torch.empty(0, device="cuda").is_cuda  # testing.cpu redirects "cuda"
HAVE_TE = ON_GPU and importlib.util.find_spec("transformer_engine") is not None

ERROR = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative, loss and gradients
CURVE_ERROR = 0.02  # nats: mean over the steps of |loss - one GPU's loss|

MEGATRON, NONE = "megatron", "-"
SCHEDULES = {
    MEGATRON: {},
    "interleaved-whole": dict(pipeline_schedule="interleaved"),
    "interleaved-split": dict(pipeline_schedule="interleaved", pp_boundary="split"),
    "fused-whole": dict(pipeline_schedule="fused"),
    "fused-split": dict(pipeline_schedule="fused", pp_boundary="split"),
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
CURVES = (
    ("tp2_sp", "dense", NONE),
    ("pp2", "dense", MEGATRON),
    ("pp2_vpp2", "dense", MEGATRON),
    ("pp2_vpp2", "dense", "interleaved-split"),
    ("pp2_vpp2", "dense", "fused-split"),
    ("dp_distributed_optimizer", "dense", NONE),
    ("ep2", "moe", NONE),
    ("pp2_vpp2", "moe", "fused-split"),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of the model whose gradients are compared and of the one that is trained; std of their weights.

    A larger or deeper first model would say less: in float32 the gradients of an alpha, sums over all tokens
    that nearly cancel, then differ by more than 1e-5 from rounding alone.
    """

    exact: dict[str, int]
    exact_batch: Sizes
    exact_std: float
    trained: dict[str, int]
    trained_batch: Sizes
    trained_std: float
    steps: int


LARGE = Scale(
    exact=dict(num_layers=8, hidden_size=64, ffn_hidden_size=128, moe_ffn_hidden_size=64),
    exact_batch=Sizes(sequence=32, micro_batch=2, vocabulary=256),
    exact_std=0.05,
    trained=dict(num_layers=8, hidden_size=512, ffn_hidden_size=1536, num_attention_heads=8)
    | dict(moe_ffn_hidden_size=512),
    trained_batch=Sizes(sequence=512, micro_batch=4, vocabulary=256),
    trained_std=0.02,
    steps=50,
)
TINY = Scale(
    exact=dict(num_layers=4),
    exact_batch=Sizes(),
    exact_std=0.1,
    trained=dict(num_layers=4),
    trained_batch=Sizes(sequence=32, micro_batch=2, vocabulary=256),
    trained_std=0.1,
    steps=4,
)


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


def schedules_of(layout: Layout, options: argparse.Namespace) -> list[str]:
    return options.schedules if layout.pp > 1 else [NONE]


def mhc_of(schedule: str, n: int, options: argparse.Namespace) -> MHCConfig:
    return MHCConfig(num_residual_streams=n, backend=options.backend, **SCHEDULES.get(schedule, {}))


def schedule_of(schedule: str) -> Callable[..., Any] | None:
    """The forward_backward_func; None is Megatron's."""
    return None if schedule in (MEGATRON, NONE) else forward_backward


def scale_of(options: argparse.Namespace) -> Scale:
    return TINY if options.tiny else LARGE


def micro_batches(world: int) -> int:
    """Of the whole batch: as many as a pipeline has stages, and more, on every data-parallel rank."""
    return 2 * world


# One iteration


def iteration(layout: Layout, kind: str, schedule: str, n: int, count: int, options: argparse.Namespace):
    """(loss, model chunks) of one iteration in `options.dtype`."""
    scale = scale_of(options)
    switch(layout)
    cpu.use_local_modules()  # norms that allow sequence parallelism
    settings = {k: v for k, v in scale.exact.items() if kind != "dense" or "moe" not in k}
    config = layout.config(kind, **settings, params_dtype=options.dtype)
    how: dict[str, Any] = dict(sizes=scale.exact_batch, weights=functools.partial(fill, std=scale.exact_std))
    chunks = gpt.build(layout, config, kind, mhc_of(schedule, n, options), **how)
    batch = gpt.tokens(count, 0, scale.exact_batch)
    run = functools.partial(gpt.iterate, chunks, config, batch, schedule=schedule_of(schedule))
    if schedule_of(schedule) is not None:
        run()  # the first step's messages go by way of the hosts
    return run(), chunks


def exact_cases(options: argparse.Namespace, world: int) -> list[tuple[str, str, str, int]]:
    return [
        (name, kind, schedule, n)
        for name in options.layouts or LAYOUTS
        for kind in LAYOUTS[name][1]
        for schedule in schedules_of(LAYOUTS[name][0], options)
        for n in options.streams
        if fits(LAYOUTS[name][0], world)
    ]


def exact_references(options: argparse.Namespace, world: int) -> dict[Any, Callable[[], Iteration]]:
    """What one GPU is to compute, by (kind, n)."""

    def run(kind: str, n: int) -> Iteration:
        return Iteration.of(*iteration(Layout(), kind, NONE, n, micro_batches(world), options))

    wanted = dict.fromkeys((kind, n) for _, kind, _, n in exact_cases(options, world))
    return {("exact", *key): lambda key=key: run(*key) for key in wanted}  # type: ignore[misc]


def run_exact(report: Report, references: dict[Any, Any], options: argparse.Namespace) -> None:
    """Compare an iteration of every layout with one GPU's."""
    world = dist.get_world_size()
    for name, kind, schedule, n in exact_cases(options, world):
        title = f"{name}, {kind}, n={n}, {schedule}"
        if not report.wanted("parity", title):
            continue
        expected = references["exact", kind, n]
        loss, chunks = iteration(LAYOUTS[name][0], kind, schedule, n, micro_batches(world), options)
        found = differences(loss, chunks, expected, options.dtype)
        error, where = found.worst
        relative, limit = found.loss / abs(expected.loss), ERROR[options.dtype]
        ok = relative <= limit and error <= limit
        report.add("parity", title, {"loss": relative, "gradients": error, "worst": where, "ok": ok})


# Loss curves


def text(sizes: Sizes, step: int, count: int) -> Tensor:
    """`count` micro-batches of bytes of the standard library: [count, micro-batch, sequence + 1]."""
    data = _library()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(data) - sizes.sequence - 1, (count, sizes.micro_batch), generator=generator)
    return data[starts[..., None] + torch.arange(sizes.sequence + 1)]


def _library(cache: list[Tensor] = []) -> Tensor:  # noqa: B006
    if not cache:
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        joined = bytearray(b"\n".join(file.read_bytes() for file in files))
        cache.append(torch.frombuffer(joined, dtype=torch.uint8).long())
    return cache[0]


def curve(
    layout: Layout, kind: str, schedule: str, n: int, count: int, backwards: bool, options: argparse.Namespace
) -> list[float]:
    """The loss of every step of a training run in bf16.

    Args:
        backwards: take the micro-batches of a step in reverse: the same numbers, rounded differently.
    """
    scale = scale_of(options)
    switch(layout)
    dtype = torch.bfloat16
    settings = {k: v for k, v in scale.trained.items() if kind != "dense" or "moe" not in k}
    settings |= dict(bf16=True, params_dtype=dtype, use_cpu_initialization=not HAVE_TE)
    if kind == "moe":
        settings |= dict(moe_grouped_gemm=HAVE_TE)
    config = layout.config(kind, **settings)
    how: dict[str, Any] = dict(sizes=scale.trained_batch, te=HAVE_TE)
    how |= dict(weights=functools.partial(fill, std=scale.trained_std))
    chunks = gpt.build(layout, config, kind, mhc_of(schedule, n, options), **how)
    adam = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        weight_decay=0.1,
        clip_grad=1.0,
        adam_beta2=0.95,
        bf16=True,
        params_dtype=dtype,
        use_distributed_optimizer=layout.distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(adam, chunks, use_gloo_process_groups=False)
    losses = []
    for step in range(scale.steps):
        optimizer.zero_grad()
        batch = text(scale.trained_batch, step, count)
        batch = batch.flip(0) if backwards else batch
        run = dict(schedule=schedule_of(schedule), masked=not HAVE_TE)
        losses.append(gpt.iterate(chunks, config, batch, **run))
        optimizer.step()
    return losses


def curve_cases(options: argparse.Namespace, world: int) -> list[tuple[str, str, str]]:
    return [
        (name, kind, schedule)
        for name, kind, schedule in CURVES
        if (not options.layouts or name in options.layouts)
        and schedule in schedules_of(LAYOUTS[name][0], options)
        and fits(LAYOUTS[name][0], world)
    ]


def curve_references(options: argparse.Namespace, world: int) -> dict[Any, Callable[[], list[float]]]:
    """What one GPU is to train, by (kind, whether the micro-batches are taken in reverse)."""

    def run(kind: str, backwards: bool) -> list[float]:
        return curve(Layout(), kind, NONE, max(options.streams), micro_batches(world), backwards, options)

    kinds = dict.fromkeys(kind for _, kind, _ in curve_cases(options, world))
    keys = [(kind, backwards) for kind in kinds for backwards in (False, True)]
    return {("curve", *key): lambda key=key: run(*key) for key in keys}  # type: ignore[misc]


def run_curves(report: Report, references: dict[Any, Any], options: argparse.Namespace) -> None:
    """Train in every layout, and compare with one GPU; the noise is that of another order on one GPU."""
    world, n = dist.get_world_size(), max(options.streams)
    for name, kind, schedule in curve_cases(options, world):
        title = f"{name}, {kind}, n={n}, {schedule}"
        if not report.wanted("curves", title):
            continue
        layout = LAYOUTS[name][0]
        losses = curve(layout, kind, schedule, n, micro_batches(world), False, options)
        expected, reordered = references["curve", kind, False], references["curve", kind, True]
        error, noise = distance(losses, expected), distance(reordered, expected)
        row: Row = {"first": losses[0], "last": losses[-1], "one GPU's last": expected[-1]}
        row |= {"mean error": error, "noise": noise, "ok": error <= CURVE_ERROR}
        report.add("curves", title, row | {"losses": losses, "expected": expected, "reordered": reordered})


def distance(losses: list[float], expected: list[float]) -> float:
    """Mean over the steps of the absolute difference, in nats; infinite where a loss is not a number."""
    errors = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    mean = sum(errors) / len(errors)
    return mean if mean == mean else float("inf")
