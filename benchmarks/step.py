"""Whole training steps with mHC beside vanilla's, alternating in one call, by the recipes of examples/.

    python -m benchmarks.step --out step.json [--model llama-1b] [--batches 1,2,4] [--forms mhc,mhc/auto]
        [--tp 2] [--graphs none,local] [--together 2]

Every job is `examples/train.sh MODEL FORM` on mock data: Transformer Engine's layers, Megatron's DDP and
distributed optimizer, clipping and Adam. `vanilla` is Megatron's own; a form `mhc[/WHAT[/BOUNDARY[/NORM]]]`
has WHAT for --mhc-recompute-layer-num, off unless given, BOUNDARY for --mhc-boundary and NORM for --mhc-norm.
Jobs take turns of a few steps (see `jobs`), so that their times are of the same minutes; with --together 1,
where two find no memory beside each other, one after the other, vanilla first and last. Numbers are of a
rank and of a step:

wall_ms             median interval between the ends of steps, of the slowest rank; apart: of the turns
kernels_ms          GPU time summed over kernels and copies, any_ms: in which any of them ran (CUPTI)
busy                any_ms / wall_ms; below 0.95 the host sets the pace
host_ms_per_layer   until forward and backward have returned on the host, a layer and micro-batch
launches_per_layer  kernels and copies of the whole step, a layer and micro-batch
peak_MiB            of a step; states_MiB: what of it is there between steps; reserved_MiB: with graphs' pools

--graphs names values of --cuda-graph-impl, each for a comparison of its own: all its jobs have it, and graphs
are made in the warm-up. A form that Megatron or the plugin refuses is a failed row.
Without a GPU, to check the program and no speed: --tiny.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

from benchmarks.harness import Report, Row, bars, command_line, numbers, over
from benchmarks.jobs import KEYS, Job, Turns, recipe, take_turns, tiny

LAYERS = {"llama-1b": 16, "3b": 12, "9b": 18, "27b": 30}
VANILLA, AGAIN = "vanilla", "vanilla again"


GRAPHS = {"full_iteration": ["--no-check-for-nan-in-loss-and-grad"]}  # which Megatron demands


def job(form: str, batch: int, graphs: str, options: argparse.Namespace) -> Job:
    """A side of a comparison."""
    what, recompute, boundary, norm = (*form.split("/"), "", "", "")[:4]
    micro_batches = options.micro_batches or max(4, 8 // batch)
    ranks = options.tp
    if options.tiny:
        arguments, layers = tiny(what, options.model != "llama-1b"), 2
        arguments += ["--tensor-model-parallel-size", str(options.tp)] * (options.tp > 1)
        arguments += ["--sequence-parallel"] * (options.tp > 1)
    else:
        arguments, layers = recipe(options.model, what, TP=options.tp), LAYERS[options.model]
    arguments += ["--micro-batch-size", str(batch), "--global-batch-size", str(batch * micro_batches)]
    if what != VANILLA:
        arguments += ["--mhc-recompute-layer-num", recompute or "off"]
        arguments += ["--mhc-boundary", boundary] if boundary else []
        arguments += ["--mhc-norm", norm] if norm else []
    if graphs != "none":
        arguments += ["--cuda-graph-impl", graphs, *GRAPHS.get(graphs, [])]
    # Which Megatron demands under TP, and of graphs beside segments that expand.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_GRAPH_REGISTER": "0"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    return Job(form, arguments, ranks, environment, layers * micro_batches)


def run(report: Report, batch: int, graphs: str, options: argparse.Namespace) -> None:
    """All forms at one micro-batch and in one kind of graphs, each group with a vanilla of its own."""
    layout = f"TP{options.tp}" if options.tp > 1 else "one GPU"
    section = f"{options.model}, {layout}" + (f", graphs {graphs}" if graphs != "none" else "")
    turns = Turns(options.warm_up, options.turns, options.steps)
    size = max(1, options.together - 1)
    groups = [options.forms[at : at + size] for at in range(0, len(options.forms), size)]
    for number, forms in enumerate(groups):
        names = {form: f"micro-batch {batch}, {form}" for form in forms}
        names[VANILLA] = f"micro-batch {batch}, {VANILLA}" + (f" {number + 1}" if number else "")
        if all(report.row(section, name) for name in names.values()):
            continue
        jobs = [job(form, batch, graphs, options) for form in (VANILLA, *forms)]
        if options.together > 1:
            found = take_turns(jobs, turns, options.logs)
            base = found[VANILLA]
        else:  # memory for one alone: vanilla before and after
            again = dataclasses.replace(jobs[0], name=AGAIN)
            names[AGAIN] = f"micro-batch {batch}, {AGAIN}"
            found = {one.name: take_turns([one], turns, options.logs)[one.name] for one in [*jobs, again]}
            both = [found[name] for name in (VANILLA, AGAIN) if "failed" not in found[name]]
            base = {key: statistics.mean(row[key] for row in both if key in row) for key in KEYS if both}
        over([found[form] for form in forms], base, KEYS)
        for name, row in found.items():
            report.add(section, names[name], row)


def draw(report: Report, path: Path) -> None:
    """What forms have over vanilla."""
    shown: dict[str, dict[str, float]] = {}
    for row in report.rows:
        values = {key: row.get(f"{key}_ms over vanilla, %") for key in ("wall", "kernels")}
        if any(value is not None for value in values.values()):
            label = f"{row['section']}, {row['name']}"
            shown[label] = {f"{k} time": v for k, v in values.items() if v is not None}
    if shown:
        title = f"mHC over vanilla, a training step, {report.head['device']}"
        bars(path, title, "% over vanilla", shown)


def main(argv: list[str] | None = None) -> None:
    parser = command_line("step", __doc__)
    add = parser.add_argument
    add("--out", type=Path, help="JSON; the figure goes beside it")
    add("--logs", type=Path, help="folder for the jobs' logs")
    add("--model", choices=LAYERS, default="llama-1b")
    add("--forms", type=lambda text: text.split(","), default=["mhc", "mhc/auto"])
    add("--batches", type=numbers, default=[1, 2, 4])
    add("--micro-batches", type=int, help="of a step; default 4, and 8 of one sequence")
    add("--tp", type=int, default=1, help="with sequence parallelism; a GPU for each")
    add("--graphs", type=lambda text: text.split(","), default=["none"], help="none, local, ...")
    add("--together", type=int, default=3, help="jobs in memory at once, vanilla among them")
    for name, default in (("warm-up", 4), ("turns", 3), ("steps", 4)):
        add("--" + name, type=int, default=default, help=f"default {default}")
    add("--tiny", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(argv)
    apart = ("out", "logs")
    settings: Row = {k: v for k, v in vars(options).items() if k not in apart}
    report = Report(options.out, "step", settings)
    for batch in options.batches:
        for graphs in options.graphs:
            run(report, batch, graphs, options)
    if options.out:
        draw(report, options.out.with_suffix(".png"))
    report.end()


if __name__ == "__main__":
    main()
