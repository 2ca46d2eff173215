"""Several GPUs over NCCL: the same numbers as one GPU's, and what communication costs that nothing hides.

    python scripts/bench/multi_gpu.py --ranks 2 --out multi_gpu.json [--limit 540]
        [--only parity,curves,measure,profile,resume] [--layouts tp2,...] [--schedules megatron,...]
        [--widths 2560,4096] [--streams 4,1] [--dtype float64] [--backend reference] [--list]

parity   one float32 iteration in every layout and schedule: loss and gradients within 1e-5 of one GPU's,
         every token with its expert; the plugin's schedules run a step before, whose messages go by way of
         the hosts
curves   50 steps in bf16 with Transformer Engine: losses as near to one GPU's as its noise allows
measure  PP2 x VPP2 and expert parallelism: step time, beside the simulator's from measured parts
profile  the exposed communication of a step of each of these, with a picture
resume   multi_gpu_resume.py: checkpoints between two GPUs and one, a rank killed in the midst of a step

Rows run in the order of n, width, layout and schedule as these are given; --list prints them, and runs none.
--out is written after every row, and with what a row has so far. A row that fails, or takes longer than
--row-timeout, is counted as failed and the ranks are started again behind it, until --limit seconds are over;
the same call later goes on there too. With NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 in the environment (and
another --out) messages cross the network stack. Without a GPU, to check the program and no speed:

    torchrun --standalone --nproc-per-node 2 -m megatron_mhc.testing.cpu scripts/bench/multi_gpu.py --tiny \\
        --out multi_gpu.json
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

# Many queues: with one, a message that waits for its sender holds up whatever stands behind it.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast
if "LOCAL_RANK" not in os.environ:
    if "--ranks" not in sys.argv:
        raise SystemExit(__doc__)
    import multi_gpu_supervise

    raise SystemExit(multi_gpu_supervise.main(__file__))  # by way of torchrun

import torch
import torch.distributed as dist

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything else touches a GPU
warnings.filterwarnings("ignore", module="megatron")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import multi_gpu_curves as curves  # noqa: E402
import multi_gpu_measure as measure  # noqa: E402
import multi_gpu_parity as parity  # noqa: E402
import multi_gpu_resume as resume  # noqa: E402
from multi_gpu_report import Report  # noqa: E402

ON_GPU = parity.ON_GPU
SECTIONS = ("parity", "curves", "measure", "profile", "resume")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def listed(allowed: Any, kind: Any = str) -> Any:
        def parse(given: str) -> list[Any]:
            values = [kind(value) for value in given.split(",")]
            if allowed and (unknown := [value for value in values if value not in allowed]):
                raise argparse.ArgumentTypeError(f"no {unknown[0]}; there are {', '.join(allowed)}")
            return values

        return parse

    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--only", type=listed(SECTIONS), default=list(SECTIONS))
    add("--layouts", type=listed(parity.LAYOUTS), default=[], help="default all")
    add("--schedules", type=listed(parity.SCHEDULES), default=list(parity.SCHEDULES))
    add("--widths", type=listed(None, int), default=[2560, 4096], help="of measure and profile")
    add("--streams", type=listed(None, int), default=[4, 1], help="n; curves take the largest")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of parity")
    add("--backend", choices=("auto", "reference"), default="auto", help="--mhc-backend")
    sizes = dict(layers=2, sequence=4096, micro_batch=2, microbatches=8, steps=5, warmup=2, timeout=180)
    notes = dict(layers="of a model chunk", microbatches="of a pipeline", timeout="of a collective, in s")
    for name, default in sizes.items():
        what = f"{notes.get(name, 'of measure')}; default {default}"
        add("--" + name.replace("_", "-"), type=int, default=default, help=what)
    add("--row-timeout", type=int, default=90, help="seconds; 0: none. resume has limits of its own")
    add("--scratch", type=Path, help="for checkpoints, logs and pictures; default beside --out")
    add("--list", action="store_true", help="print the rows that would run, in their order, and end")
    add("--tiny", action="store_true", help="toy sizes, for a CPU")
    options = parser.parse_args()
    if options.tiny:
        options.widths, options.steps, options.warmup = [64], 2, 1
        options.layers, options.sequence, options.micro_batch, options.microbatches = 1, 16, 1, 4
    options.dtype = getattr(torch, options.dtype)
    options.scratch = options.scratch or options.out.with_suffix(".scratch")
    world = int(os.environ["WORLD_SIZE"])
    if world % 2 and set(options.only) - {"resume"}:
        raise SystemExit(f"--nproc-per-node {world}: the layouts need an even number of GPUs, two or more")
    if ON_GPU and not parity.HAVE_TE and set(options.only) - {"parity"}:
        raise SystemExit(
            f"--only {','.join(options.only)}: install Transformer Engine, or give --only parity"
        )
    return options


def references(options: argparse.Namespace, backend: str, settings: dict[str, str]) -> dict[Any, Any]:
    """This rank's share of what one GPU computes, each a world of its own at that time; kept in a file."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tasks: dict[Any, Any] = {}
    if "parity" in options.only:
        tasks |= parity.exact_references(options, world)
    if "curves" in options.only:
        tasks |= curves.references(options, world)
    mine = list(tasks)[rank::world]
    file = options.scratch / f"references_{rank}_of_{world}.pt"
    kept = torch.load(file, weights_only=False) if file.exists() else {}
    found = kept["found"] if kept.get("settings") == settings else {}
    if not set(mine) - set(found):
        return {key: found[key] for key in mine}
    options.scratch.mkdir(parents=True, exist_ok=True)
    with parity.alone(backend):
        for key in mine:
            if key not in found:
                found[key] = tasks[key]()
                torch.save({"settings": settings, "found": found}, file)
    return {key: found[key] for key in mine}


def rows(options: argparse.Namespace) -> list[str]:
    """Names of all rows but those of `resume`, in the order in which they run."""
    world, names = int(os.environ["WORLD_SIZE"]), []
    if "parity" in options.only:
        names += [f"parity: {case.title}" for case in parity.exact_cases(options, world)]
    if "curves" in options.only:
        names += [f"curves: {curves.title(*case, options)}" for case in curves.cases(options, world)]
    for section in ("measure", "profile"):
        if section in options.only:
            names += [f"{section}: {case.title}" for case in measure.cases(options, world)]
    return names


def main() -> None:
    options = arguments()
    if options.list:
        if os.environ["RANK"] == "0":
            print("\n".join(rows(options)), flush=True)
        return
    logging.getLogger("megatron").setLevel(logging.ERROR)
    backend = "nccl" if ON_GPU else "gloo"
    torch.backends.cuda.matmul.allow_tf32 = False
    sizes = ("layers", "sequence", "micro_batch", "microbatches", "steps", "dtype", "backend", "tiny")
    settings = {name: str(getattr(options, name)) for name in sizes}
    report = Report(options.out, settings, options.row_timeout)
    if options.row_timeout:  # the ranks wait for each other's share; a hang ends with all stacks on stderr
        faulthandler.dump_traceback_later(max(options.timeout, 4 * options.row_timeout), exit=True)
    found = references(options, backend, settings)
    # Not with a device_id: it would put all messages of a group on one stream.
    dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    expected = {key: value for share in shares for key, value in share.items()}
    if "parity" in options.only:
        parity.run_exact(report, expected, options)
    if "curves" in options.only:
        curves.run(report, expected, options)
    if "measure" in options.only:
        measure.run(report, options)
    if "profile" in options.only:
        measure.run_profiles(report, options)
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()
    dist.destroy_process_group()
    if os.environ["RANK"] != "0":
        return
    if "resume" in options.only:
        resume.run(report, options.scratch / "resume", not ON_GPU)
    print({key: value for key, value in report.head.items() if key != "links"})
    print(report.tables(), flush=True)
    if bad := report.bad():
        raise SystemExit("failed or beyond its tolerance: " + "; ".join(bad))


if __name__ == "__main__":
    main()
