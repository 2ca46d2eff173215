"""Time whole training steps with mHC against the same model without it, on one GPU.

    python scripts/bench/train.py --out train.json [--models moe_ep8,dense] [--rows vanilla,triton/4,...]

embedding, layers, head, loss, backward, gradient buffers, clipping, Adam: a GPTModel in bf16 under
Megatron's DDP and distributed optimizer, several micro-batches a step, through its own schedule. The layers
are those of layer.py: dense (4096/14336), moe_ep8 (the paper's 27B layer as a rank of EP=8 computes it, 9
experts, no exchange), moe (all 72 experts: --layers 2 on 80 GB). The vocabulary is cut in proportion to the
layers, so that embedding and head take the share that they have of the whole 32 or 30 layers. Weight
gradients accumulate inside TE's GEMMs. All rows see the same seeds and tokens.

A row is OPS, OPS/N, or OPS/N/auto for --mhc-recompute-layer-num auto. Rows come in the order given:

vanilla, again  without mHC, at the start and at the end; the rest is compared with their mean
triton, hopper  these kernels; with -linked or -fused under this --mhc-boundary
reference       plain torch; compile: torch.compile of it. They come last, after the profiles of the others

wall            median interval between the ends of steps
kernels         GPU time summed over kernels and copies (CUPTI, after the wall times; each model built anew)
busy            part of the wall time in which any of them ran; below 0.95 the host sets the pace
launches        of the whole step, per layer and micro-batch
peak            memory of a step, MiB, of which `states` are weights, gradients and optimizer
loss            of the last timed step; `from reference` is its distance from the reference's
MHz             the GPU's clock in the last step of the warm-up

--limit and --row-limit bound the whole and each pass of a row, in seconds: what does not fit is named as
failed, or not begun. --out is written after every row, and drawn by train_figure.py; a second run with the
same --out adds the rows that it lacks and tries failed ones again.

Without a GPU, to check the program and no speed:

    python -m megatron_mhc.testing.cpu scripts/bench/train.py --tiny --out train.json
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import MODELS, ON_GPU, attempt, clean, gpu_work, intervals, start, summary
from train_figure import KEYS, draw, table
from trainer import LATE, OPS, PLAIN, Row, Trainer

ROWS = "vanilla,hopper/4,triton/4,hopper-linked/4,hopper/4/auto,triton/4/auto,triton/2,triton-fused/4,again"
ROWS += ",reference/4,compile/4"


@contextlib.contextmanager
def clock(found: Row) -> Iterator[None]:
    """Add to `found` the GPU's clock and power while the block runs.

    Not of timed steps: nvidia-smi's question may hold up launches.
    """
    if not ON_GPU or not shutil.which("nvidia-smi"):
        yield
        return
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    question = f"nvidia-smi -i {device} --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits"
    asked = subprocess.Popen(question.split(), stdout=subprocess.PIPE, text=True)
    yield
    torch.cuda.synchronize()
    try:
        answer = re.fullmatch(r"(\d+), ([\d.]+)", asked.communicate(timeout=10)[0].strip())
    except subprocess.TimeoutExpired:
        asked.kill()
        return
    found |= dict(zip(("MHz", "W"), map(float, answer.groups()), strict=True)) if answer else {}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer, and again should something swallow it."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, 1e6), 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def time_steps(trainer: Trainer, options: argparse.Namespace) -> Row:
    """Wall time, memory and losses."""
    found: Row = {}
    history = [trainer.step() for _ in range(options.warm_up - 1)]
    with clock(found):
        history.append(trainer.step())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    states = torch.cuda.memory_allocated()
    walls = intervals(lambda: history.append(trainer.step()), options.steps)
    wall = statistics.median(walls)
    tokens = math.prod(trainer.shape) * options.micro_batches
    found |= {"wall_ms": wall, "walls_ms": walls, "tokens_per_s": 1e3 * tokens / wall}
    found |= {"peak_MiB": torch.cuda.max_memory_allocated() / 2**20, "states_MiB": states / 2**20}
    found |= {"losses": [loss.item() for loss, _ in history], "grad_norms": [norm for _, norm in history]}
    if not all(map(math.isfinite, found["losses"] + found["grad_norms"])):
        raise FloatingPointError(f"losses {found['losses']}, gradient norms {found['grad_norms']}")
    return found | {"loss": found["losses"][-1]}


def profile_steps(trainer: Trainer, options: argparse.Namespace) -> Row:
    """Kernel time and launches of a step, in all and of the kernels that take longest."""
    for _ in range(options.warm_up):
        trainer.step()
    torch.cuda.synchronize()
    work = gpu_work(trainer.step, 1)
    found: Row = summary(work, 1)
    found["launches_per_layer"] = found["launches"] / options.layers / options.micro_batches
    by_name: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    for begin, end, name in work:
        by_name[name[:80]][0] += (end - begin) / 1e3
        by_name[name[:80]][1] += 1
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:25]
    return found | {"ms_and_launches_of": {name: [round(ms, 3), count] for name, (ms, count) in longest}}


MEASURE = {"time": time_steps, "profile": profile_steps}  # in this order: CUPTI slows launches for good
RESULT = {"time": "wall_ms", "profile": "kernels_ms"}


def run(row: Row, name: str, options: argparse.Namespace, seconds: float) -> None:
    """Add to a row what a pass finds within so many seconds, with a model of its own."""

    def measure() -> Row:
        with at_most(seconds), contextlib.closing(Trainer(row, options)) as trainer:
            return MEASURE[name](trainer, options)

    clean()
    row["left_MiB"] = torch.cuda.memory_allocated() / 2**20  # by the rows before
    if row["ops"] == "compile":
        torch._dynamo.reset()  # compiled as if it were the only shape
    row.get("failed", {}).pop(name, None)  # an earlier run's
    began = time.perf_counter()
    row |= attempt(row, name, measure) or {}
    row.setdefault("seconds", {})[name] = time.perf_counter() - began


def finish(group: list[Row]) -> None:
    """Bring the rows of one model and batch into relation: % over the mean of vanilla's two."""
    base: dict[str, float] = {}
    for name in KEYS:
        if found := [r[name] for r in group if r["ops"] in PLAIN and r.get(name)]:
            base[name] = statistics.mean(found)
    for row in group:
        row["overhead_pct"] = {k: 100 * (row[k] / base[k] - 1) for k in base if row.get(k)}
        if row.get("any_ms") and row.get("wall_ms"):
            row["busy"] = row["any_ms"] / row["wall_ms"]
        same = (r for r in group if (r["ops"], r["n"], r["recompute"]) == ("reference", row["n"], "off"))
        reference = next(same, {}).get("loss")
        if row.get("loss") and reference:
            row["loss_from_reference"] = row["loss"] - reference


def plan(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, what is worth most first.

    Raises:
        ValueError: a row that cannot be.
    """
    rows = []
    for text in options.rows:
        ops, *more = text.split("/")
        if ops not in OPS or len(more) > 2 or (ops in PLAIN) != (not more):
            raise ValueError(f"--rows {text}: give {', '.join(PLAIN)}, or one of {', '.join(OPS)} and /N")
        n, recompute = int(more[0]) if more else None, more[1] if more[1:] else "off"
        if recompute not in ("off", "auto") or (ops == "compile" and recompute != "off"):
            raise ValueError(f"--rows {text}: recompute is off or auto, and off with compile")
        kind = dict(ops=ops, n=n, recompute=recompute)
        rows += [dict(model=m, batch=int(b)) | kind for m in options.models for b in options.batches]
    return rows


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "batch", "ops", "n", "recompute"))


def take_up(path: Path, report: Row) -> list[Row]:
    """The rows of an earlier run with the same settings, none where there was no run.

    Raises:
        SystemExit: it had other settings.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    for name in ("device", "versions", "settings"):
        if earlier[name] != report[name]:
            raise SystemExit(f"{path}: {name} {earlier[name]}, here {report[name]}: give another --out")
    return earlier["rows"]


def lacks(row: Row, name: str) -> bool:
    """Whether a row is to be measured by a pass."""
    possible = name == "time" or (ON_GPU and "time" not in row.get("failed", {}))
    return possible and RESULT[name] not in row


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lists = dict(models="moe_ep8,dense", batches="4", rows=ROWS, measure=",".join(MEASURE))
    known = dict(models=MODELS, measure=MEASURE)
    for name, default in lists.items():
        among = f"some of {','.join(known[name])}; " if name in known else ""
        parser.add_argument("--" + name, default=default, help=f"{among}default {default}")
    numbers = {"seq": 4096, "layers": 4, "micro-batches": 4, "warm-up": 2, "steps": 5}
    for name, number in numbers.items():
        parser.add_argument("--" + name, default=number, type=int, help=f"default {number}")
    bounds = {"limit": "of the whole", "row-limit": "of a pass of a row"}
    for name, what in bounds.items():
        parser.add_argument("--" + name, default=math.inf, type=float, help=f"seconds {what}")
    parser.add_argument("--permute-fusion", action="store_true", help="Megatron's --moe-permute-fusion")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="JSON, taken up where it exists; the figure goes beside it")
    options = parser.parse_args()
    if options.tiny:
        options.seq, options.layers = min(options.seq, 32), min(options.layers, 2)
        options.micro_batches, options.steps = min(options.micro_batches, 2), min(options.steps, 2)
    for name in lists:
        setattr(options, name, getattr(options, name).split(","))
        if unknown := set(getattr(options, name)) - set(known.get(name, getattr(options, name))):
            parser.error(f"--{name} {','.join(unknown)}: choose from {','.join(known[name])}")
    try:
        asked = plan(options)
    except ValueError as error:
        parser.error(str(error))
    apart = {*lists, "out", "limit", "row_limit"}
    report = start() | {"settings": {k: v for k, v in vars(options).items() if k not in apart}}
    print(report, flush=True)

    earlier = take_up(options.out, report) if options.out else []
    done = {key(row): row for row in earlier}
    asked = [done.get(key(row), row) for row in asked]
    report["rows"] = rows = earlier + [row for row in asked if key(row) not in done]
    for late in (False, True):  # what may take long to compile or finds no memory comes last, of all models
        for name in (name for name in MEASURE if name in options.measure):
            for row in (r for r in asked if (r["ops"] in LATE) == late and lacks(r, name)):
                left = options.limit - (time.perf_counter() - began)
                if left <= 0:
                    print(f"--limit {options.limit:.0f}: {key(row)}, {name}: not begun", flush=True)
                    continue
                run(row, name, options, min(left, options.row_limit))
                finish([r for r in rows if (r["model"], r["batch"]) == (row["model"], row["batch"])])
                if options.out:
                    options.out.write_text(json.dumps(report, indent=1) + "\n")
                print(table([row]).splitlines()[-1], flush=True)
    rows.sort(key=lambda row: options.models.index(row["model"]) if row["model"] in options.models else -1)
    print(f"\n{table(rows)}")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        draw(report, options.out.with_suffix(".png"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
