"""Runs the plugin's pipeline schedule on the harness's tiny models, and compares with a single process."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import torch
from harness import (
    Comparison,
    Iteration,
    Layout,
    build,
    differences,
    global_parameters,
    gradient,
    iterate,
)
from harness import ps as parallel_state

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import engine
from megatron_mhc.pipeline.step import observers
from megatron_mhc.testing import ranks
from megatron_mhc.testing.parameters import fill

ERROR = 1e-10
TRANSPORT = os.environ.get("MEGATRON_MHC_TEST_TRANSPORT", "auto")  # of all tests that name none
BOUNDARIES, SCHEDULES = ("whole", "split"), ("interleaved", "fused")
LAYERS = 12  # unless the number of stages does not divide it


def interleaved(boundary: str = "whole", schedule: str = "interleaved", **options: Any) -> MHCConfig:
    options = dict(pipeline_transport=TRANSPORT) | options
    return MHCConfig(pipeline_schedule=schedule, pp_boundary=boundary, **options)


@functools.cache
def reference_of(kind: str, mhc: MHCConfig, count: int, layers: int = LAYERS) -> Iteration:
    """One iteration of `count` micro-batches in a world of one."""
    return ranks.run_ranks(1, _reference, kind, mhc, count, dict(num_layers=layers))[0]


def partly_trained(patterns: list[str], chunks: list[Any]) -> None:
    """Fill as `build` does, and freeze all parameters but those whose name in the whole model matches."""
    fill(chunks)
    for name, parameter in global_parameters(chunks):
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in patterns))


def compare_partly_trained(
    run_ranks: Callable[..., Any],
    world: int,
    layout: Layout,
    kind: str,
    mhc: MHCConfig,
    patterns: list[str],
    count: int = 4,
    ddp: dict[str, Any] | None = None,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> Comparison:
    """One iteration of a model of which `patterns` name what is trained, against one process.

    Args:
        more: of `compare_all`.
    """
    weights = functools.partial(partly_trained, patterns)
    settings = dict(num_layers=4) | settings
    plain = MHCConfig(sinkhorn_iterations=mhc.sinkhorn_iterations)
    exact = settings | dict(params_dtype=torch.float64, pipeline_dtype=torch.float64)
    expected = run_ranks(1, _reference, kind, plain, count, exact, weights)[0]
    run = functools.partial(compare_all, overrides=settings, weights=weights, ddp=ddp, **more or {})
    return run_ranks(world, run, layout, kind, [(mhc, count, expected)])[0][0]


def _reference(
    kind: str,
    mhc: MHCConfig,
    count: int,
    settings: dict[str, Any],
    weights: Callable[[list[Any]], None] = fill,
) -> Iteration:
    layout = Layout()
    layout.initialize()
    config = layout.config(kind, **settings)
    chunks = build(layout, config, kind, mhc, weights=weights)
    return Iteration.of(iterate(chunks, config, count=count), chunks)


def compare_all(
    layout: Layout,
    kind: str,
    cases: list[tuple[MHCConfig, int, Iteration]],
    overrides: dict[str, Any] | None = None,
    prepare: Callable[[Any, list[Any]], None] | None = None,
    ddp: dict[str, Any] | None = None,
    weights: Callable[[list[Any]], None] = fill,
    schedule: Callable[..., Any] | None = engine.forward_backward,
) -> list[Comparison]:
    """Run one iteration of the schedule on this rank for each (options, micro-batches, expected).

    Args:
        prepare: called with the config and the model chunks before the iteration.
    """
    results = []
    layout.initialize()
    for mhc, count, expected in cases:
        config = layout.config(kind, **(dict(num_layers=LAYERS) | (overrides or {})))
        chunks = build(layout, config, kind, mhc, ddp, weights=weights)
        if prepare:
            prepare(config, chunks)
        loss = iterate(chunks, config, count=count, schedule=schedule)
        results.append(differences(loss, chunks, expected, config.params_dtype))
    return results


def gradients(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {name: gradient(p).clone() for name, p in global_parameters(chunks)}


def pipeline_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def check(run_ranks, world, layout, kind, cases, layers=LAYERS, **options):
    """`cases`: (options of the schedule, micro-batches)."""
    full = []
    for mhc, count in cases:
        plain = MHCConfig(
            num_residual_streams=mhc.num_residual_streams,
            contract=mhc.contract,
            preset=mhc.preset,
            h_res=mhc.h_res,
            read=mhc.read,
        )
        full.append((mhc, count, reference_of(kind, plain, count, layers)))
    results = run_ranks(world, compare_all, layout, kind, full, *options.values())[0]
    for (mhc, count), result in zip(cases, results, strict=True):
        error, name = result.worst
        assert result.loss <= ERROR, (mhc.to_options(), count)
        assert error <= ERROR, (name, mhc.to_options(), count)


def cases(counts, streams=(4,), boundaries=BOUNDARIES, schedules=SCHEDULES, **options):
    return [
        (interleaved(boundary, schedule, num_residual_streams=n, **options), count)
        for schedule in schedules
        for boundary in boundaries
        for n in streams
        for count in counts
    ]


def overlap(align, config, chunks):
    """As megatron.training sets up --overlap-grad-reduce, with or without --align-grad-reduce."""
    config.no_sync_func = [chunk.no_sync for chunk in chunks]
    if align:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
    if len(chunks) == 1:
        config.no_sync_func = config.no_sync_func[0]
        config.grad_sync_func = config.grad_sync_func[0] if align else None
    # In a first batch the wrappers only count which gradients come.
    iterate(chunks, config, count=6, schedule=engine.forward_backward)
    order = []
    for at, chunk in enumerate(chunks):
        for group in chunk.bucket_groups:
            start = group.start_grad_sync

            def watched(*args, start=start, at=at, **kwargs):
                order.append((at, len(config.ran)))
                return start(*args, **kwargs)

            group.start_grad_sync = watched
    config.ran = []
    observers[:] = [lambda op, step: config.ran.append(op) if op.kind == "backward" else None]
    finalize = config.finalize_model_grads_func

    def after(*args, **kwargs):
        # Every bucket was reduced by itself before the end, once, behind its chunk's last backward.
        assert sorted({at for at, _ in order}) == list(range(len(chunks)))
        assert len(order) == sum(len(chunk.bucket_groups) for chunk in chunks)
        last = max(op.microbatch for op in config.ran)
        for at, ran in order:
            stage = at * config.pipeline_model_parallel_size
            mine = [
                i
                for i, op in enumerate(config.ran)
                if op.microbatch == last and stage <= op.stage < stage + config.pipeline_model_parallel_size
            ]
            assert ran > mine[0]
        return finalize(*args, **kwargs)

    config.finalize_model_grads_func = after
