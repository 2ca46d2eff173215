"""Pipeline schedules on several GPUs: both boundaries beside Megatron's own schedule and beside vanilla.

    python -m benchmarks.multi_gpu --out multi_gpu.json [--ranks 2] [--widths 2560,4096] [--streams 4,1]
        [--forms vanilla,megatron,interleaved/whole,interleaved/whole/nccl,...] [--sockets] [--layout pp|ep]

pp: PP2 x VPP2 (the other ranks hold experts, where there are four), ep: experts on all ranks, no pipeline. A
form is SCHEDULE/BOUNDARY[/TRANSPORT], of --mhc-pipeline-schedule, --mhc-pp-boundary and
--mhc-pipeline-transport; auto has no boundary. With --sockets messages cross the
network stack instead of NVLink. Jobs train through megatron_mhc.pretrain_gpt, in bf16 on Transformer Engine's
layers, and take turns of a few steps (see `jobs`).

wall_ms            median step of the slowest rank
compute, p2p, ...  of a profiled step: milliseconds in which a kernel of that kind ran, mean over the ranks
exposed p2p, ...   of them without a compute kernel meanwhile. A NCCL kernel that waits for the other rank
                   runs, so this holds the pipeline's bubble
without compute    from the first kernel to the last, less compute
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks import trace
from benchmarks.harness import ON_GPU, Report, Row, command_line, numbers, over
from benchmarks.jobs import TINY, TINY_MOE, Job, Turns, take_turns

VANILLA = "vanilla"
FORMS = (VANILLA, "megatron", "interleaved/whole", "interleaved/split", "fused/whole", "fused/split")
AUTO = "auto"  # what it takes is among the others
TRANSPORTS = ("push", "nccl")
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


def job(form: str, width: int, n: int, options: argparse.Namespace) -> Job:
    """A side of a comparison."""
    pipeline = options.layout == "pp"
    pp, ep = (2, options.ranks // 2) if pipeline else (1, options.ranks)
    layers = options.layers * (4 if pipeline else 2)
    arguments = list(TINY)
    if not options.tiny:
        arguments = f"""--num-layers {layers} --hidden-size {width} --ffn-hidden-size {3 * width}
            --num-attention-heads {width // 128} --seq-length {options.sequence}
            --max-position-embeddings {options.sequence} --position-embedding-type rope --swiglu
            --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights
            --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader --mock-data
            --tokenizer-type NullTokenizer --vocab-size 1023 --split 99,1,0 --eval-iters 0
            --eval-interval 1000 --lr 1e-4 --transformer-impl transformer_engine --bf16 --log-interval 100
            --no-gradient-accumulation-fusion --use-distributed-optimizer""".split()
    elif pipeline:
        arguments += ["--num-layers", str(layers)]
    if ep > 1:
        arguments += TINY_MOE if options.tiny else moe(width, ep)
        arguments += ["--expert-model-parallel-size", str(ep)]
    if pipeline:
        arguments += ["--pipeline-model-parallel-size", "2"]
        arguments += ["--num-layers-per-virtual-pipeline-stage", str(options.layers)]
    groups = options.ranks // pp  # data-parallel ranks
    arguments += ["--micro-batch-size", str(options.micro_batch)]
    arguments += ["--global-batch-size", str(options.micro_batch * options.micro_batches * groups)]
    if form == VANILLA:
        arguments += ["--no-mhc"]
    else:
        schedule, boundary, transport = (*form.split("/"), "", "")[:3]
        arguments += ["--mhc-num-residual-streams", str(n)]
        if schedule != "megatron":
            arguments += ["--mhc-pipeline-schedule", schedule]
            arguments += ["--mhc-pp-boundary", boundary] if boundary else []
            arguments += ["--mhc-pipeline-transport", transport] if transport else []
    # Many queues: with one, a message that waits for its sender holds up whatever stands behind it.
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": options.connections, "BENCHMARK_TRACE": "1"}
    environment |= SOCKETS if options.sockets else {}
    return Job(form, arguments, options.ranks, environment, layers // pp * options.micro_batches)


def moe(width: int, ep: int) -> list[str]:
    return f"""--num-experts {max(8, ep)} --moe-router-topk 2 --moe-grouped-gemm
        --moe-ffn-hidden-size {max(128, 3 * width // 5 // 128 * 128)} --moe-token-dispatcher-type alltoall
        --moe-router-load-balancing-type none""".split()


def run(report: Report, width: int, n: int, options: argparse.Namespace) -> None:
    """All forms at one size, as many at a time as --together says, vanilla with each."""
    links = "sockets" if options.sockets else "NVLink"
    section = f"{options.layout}, {options.ranks} GPUs, {links}, C={width}, n={n}"
    forms = [form for form in options.forms if form != VANILLA]
    if options.layout == "ep":
        forms = ["megatron"]
    size = max(1, options.together - 1)
    for at in range(0, len(forms), size):
        chosen = forms[at : at + size]
        names = {VANILLA: VANILLA + (f" {at // size + 1}" if at else "")} | {form: form for form in chosen}
        if all(report.row(section, name) for name in names.values()):
            continue
        turns = Turns(options.warm_up, options.turns, options.steps)
        with tempfile.TemporaryDirectory() as scratch:
            keep = options.logs or Path(scratch)
            rows = take_turns([job(form, width, n, options) for form in (VANILLA, *chosen)], turns, keep)
            base = rows[VANILLA] if "failed" not in rows[VANILLA] else None
            over(list(rows.values()), base, ("wall_ms", "peak_MiB"))
            for form, name in names.items():
                report.add(section, name, rows[form])
            for form in names:  # which take as long as the steps do
                picture(report, keep, form, f"{section}, {form}")


def picture(report: Report, logs: Path, form: str, title: str) -> None:
    """A figure of a profiled step, beside the report."""
    files = sorted((logs / "".join(c if c.isalnum() else "_" for c in form)).glob("trace_*.json"))
    ranks = [kernels for file in files if (kernels := trace.kept(file))]
    if ranks and report.path is not None:
        name = "".join(c if c.isalnum() else "_" for c in title)
        try:
            trace.draw(ranks, report.path.with_name(f"{report.path.stem}_{name}.png"), title)
        except ImportError:
            print("no picture: matplotlib is not installed")


def main(argv: list[str] | None = None) -> None:
    parser = command_line("multi_gpu", __doc__)
    add = parser.add_argument
    add("--out", type=Path, help="JSON; pictures go beside it")
    add("--logs", type=Path, help="folder for the jobs' logs and traces")
    add("--layout", choices=("pp", "ep"), default="pp")
    add("--ranks", type=int, default=2)
    add("--forms", type=lambda text: text.split(","), default=list(FORMS))
    add("--widths", type=numbers, default=[2560])
    add("--streams", type=numbers, default=[4], help="n")
    add("--sockets", action="store_true")
    add("--connections", default="32", metavar="N", help="CUDA_DEVICE_MAX_CONNECTIONS; default 32")
    add("--together", type=int, default=3, help="jobs in memory at once, vanilla among them")
    sizes = dict(layers=2, sequence=4096, micro_batch=2, micro_batches=8, warm_up=3, turns=3, steps=3)
    for name, default in sizes.items():
        add("--" + name.replace("_", "-"), type=int, default=default, help=f"default {default}")
    add("--tiny", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args(argv)
    if options.ranks % 2:
        parser.error(f"--ranks {options.ranks}: the layouts need an even number")
    known = {
        *FORMS,
        AUTO,
        *(f"{form}/{transport}" for form in FORMS if "/" in form for transport in TRANSPORTS),
    }
    if unknown := set(options.forms) - known:
        parser.error(f"--forms {','.join(unknown)}: choose from {','.join(sorted(known))}")
    if options.tiny:
        options.widths, options.layers, options.micro_batch, options.micro_batches = [32], 1, 1, 4
    elif not ON_GPU:
        parser.error("no GPU here: --tiny only shows that it runs")
    settings: Row = {k: v for k, v in vars(options).items() if k not in ("out", "logs")}
    report = Report(options.out, "multi_gpu", settings)
    for n in options.streams:
        for width in options.widths:
            run(report, width, n, options)
    report.end()


if __name__ == "__main__":
    main()
