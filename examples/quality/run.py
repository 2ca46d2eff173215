"""Train GPTs of several sizes with and without mHC on real text, and report losses, gains and time.

    python examples/quality/run.py --list                 the runs, what is missing, GPU hours
    python examples/quality/run.py --budget-minutes 9     what fits into nine minutes; the same call goes on
    python examples/quality/run.py --sizes 30m --jobs 2   one size, two runs at a time on each GPU
    python examples/quality/run.py --only '*mhc4*' --only '*vanilla*'
    python examples/quality/run.py --scale tiny --cpu     the whole chain at a tiny scale, on a CPU

The first call makes the text (data.py). A finished run is not repeated, whether its log lies in OUT/logs or
in --kept; one that was cut off goes on from its checkpoint in OUT/runs. plan.py says which runs there are and
in which order. To keep results, copy OUT/logs/*.json into docs/results/quality/, of which report.py makes
docs/quality.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "quickstart"), str(HERE.parents[1])]
import data  # noqa: E402
import logs  # noqa: E402
from plan import ALL_FORMS, SCALES, Planned, Scale, by_name, estimate, plan  # noqa: E402
from settings import CPU, NO_FUSION, ROOT, Machine, transformer_engine  # noqa: E402

KEPT = ROOT / "docs" / "results" / "quality"
START_MINUTES = 0.8  # of a run, before its first step
GRACE = 25  # seconds before the end at which runs are asked to save
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+)")
COMMON = """
    --position-embedding-type rope --swiglu --disable-bias-linear --normalization RMSNorm
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 64 --no-create-attention-mask-in-dataloader
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
    --rerun-mode disabled --no-check-for-nan-in-loss-and-grad --exit-signal-handler --ckpt-format torch_dist
"""


def start(words: list[str], log: Path, gpu: int | None) -> subprocess.Popen:
    """Start `python -m <words>` as the only rank of its world, its output added to `log`."""
    environment = os.environ | dict(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="localhost"
    )
    # Port 0 is a free one, which nobody else has to know.
    environment |= dict(MASTER_PORT="0", OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if gpu is not None:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        environment["CUDA_VISIBLE_DEVICES"] = shown.split(",")[gpu] if shown else str(gpu)
    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


@dataclass
class Running:
    """A run that goes on: its process, its GPU, when it started and from which step."""

    run: Planned
    process: Any
    gpu: int
    started: float
    first: int = 0
    stopped: bool = False


class Runs:
    """Trains what is missing.

    Args:
        options: the parsed command line.
        launch: starts a run; see `start`.
    """

    def __init__(self, options: argparse.Namespace, launch: Callable[..., Any] = start):
        self.options, self.launch = options, launch
        self.deadline = time.time() + 60 * options.budget_minutes if options.budget_minutes else math.inf
        self.scale: Scale = SCALES[options.scale]
        self.out: Path = options.out
        self.machine = Machine(gpu=Machine.find(options.cpu).gpu, processes=1)
        self.about: dict[str, Any] = {}
        self.running: list[Running] = []
        self.failed: dict[str, str] = {}

    def prepare(self) -> None:
        """Make the text, and put down what it is beside the logs."""
        recipe = data.TINY if self.options.scale == "tiny" else data.RECIPE
        self.about = data.prepare(self.out / "data", recipe, self.options.kept / "tokenizer.json")
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        for name in ("data.json", "tokenizer.json"):
            shutil.copy(self.out / "data" / name, self.out / "logs" / name)

        others = {log["data"] for log in logs.read(self.options.kept)} - {self.about["hash"]}
        if others:
            print(f"kept logs of other texts ({', '.join(sorted(others))}) are not counted", flush=True)

    def known(self) -> dict[str, dict[str, Any]]:
        """Logs of this budget and text, and timings, by name: those here and those kept."""
        every = logs.read(self.options.kept) + logs.read(self.out / "logs")
        mine = (self.options.tokens_per_parameter, self.about.get("hash"))
        fit = [log for log in every if log["study"] == "timing" or (log["budget"], log["data"]) == mine]
        return by_name(logs.furthest(fit))

    def planned(self, known: dict[str, dict[str, Any]]) -> list[Planned]:
        """The runs that were asked for."""
        o = self.options
        every = plan(self.scale, o.tokens_per_parameter, known.values())
        return [
            run
            for run in every
            if (not o.sizes or run.size in o.sizes)
            and (not o.only or any(fnmatch.fnmatch(run.name, pattern) for pattern in o.only))
        ]

    def missing(self) -> list[Planned]:
        """The runs that were asked for and are not finished."""
        known = self.known()
        return [run for run in self.planned(known) if not known.get(run.name, {}).get("finished")]

    def minutes(self, run: Planned, known: dict[str, dict[str, Any]]) -> float:
        """What a run takes by the clock, as several share a GPU; what it has done already is taken off."""
        log, jobs = known.get(run.name), 1 if run.study == "timing" else self.options.jobs
        left = 1 - log["reached"] / run.steps if log and run.steps and self.checkpoint(run).exists() else 1.0
        return 60 * estimate(run, self.scale, known) * left * jobs + START_MINUTES

    def folder(self, run: Planned) -> Path:
        return self.out / "runs" / run.name

    def checkpoint(self, run: Planned) -> Path:
        return self.folder(run) / "checkpoint"

    def arguments(self, run: Planned) -> list[str]:
        """Megatron's arguments of one run."""
        size, folder = self.scale.sizes[run.size], self.folder(run)
        assert run.lr is not None and run.steps is not None
        steps, timing = run.steps, run.study == "timing"
        interval = steps // (8 if steps >= 1000 else 4)
        # An evaluation reads the held-out text once, the sequences of it that fill whole batches; in a short
        # run, of which it would be too large a part, some three million tokens of it.
        held_out = (self.about["held_out"]["tokens"] - 1) // (size.sequence * size.batch)
        held_out = held_out if steps >= 1000 else min(24, held_out)
        text = (
            COMMON
            + f"""
            --num-layers {size.layers} --hidden-size {size.hidden} --ffn-hidden-size {size.ffn}
            --num-attention-heads {size.heads} --seq-length {size.sequence}
            --max-position-embeddings {size.sequence} --vocab-size {self.about["vocabulary"]}
            --micro-batch-size {size.micro_batch} --global-batch-size {size.batch}
            --train-iters {steps} --lr {run.lr} --min-lr {run.lr / 10:.6g} --lr-decay-iters {steps}
            --lr-warmup-iters {min(self.scale.warmup, steps // 10)} --seed {run.seed}
            --log-interval {max(1, min(10, steps // 40))} --eval-interval {max(1, interval)}
            --eval-iters {0 if timing else max(1, held_out)}
        """
        )
        if not self.machine.gpu:
            text += CPU + NO_FUSION + "--num-workers 0"
        elif transformer_engine():
            text += "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion"
            text += " --cross-entropy-loss-fusion --cross-entropy-fusion-impl native"
            text += " --manual-gc --manual-gc-interval 100"
        else:
            text += "--bf16 --transformer-impl local" + NO_FUSION
        words = [*shlex.split(text), *ALL_FORMS[run.form].arguments]
        for name, prefix in (("train", "train"), ("valid", "held_out"), ("test", "held_out")):
            words += [f"--{name}-data-path", str(self.out / "data" / prefix)]
        # Runs that start together would write the same index at the same time.
        words += [
            "--data-cache-path",
            str(folder / "cache"),
            "--tensorboard-dir",
            str(folder / "tensorboard"),
        ]
        if not timing:
            words += ["--save", str(self.checkpoint(run)), "--load", str(self.checkpoint(run))]
            words += ["--save-interval", str(steps // 4 + 1)]
            if "--no-mhc" not in words:
                words += ["--mhc-log-interval", str(max(1, steps // 20))]
        return words + shlex.split(self.options.extra)

    def begin(self, run: Planned, gpu: int) -> None:
        """Start a run."""
        folder = self.folder(run)
        # What lies there of another text, or of a run that starts over, must not be read as of this one.
        same_text = self.recorded(run).get("data", self.about["hash"]) == self.about["hash"]
        if not same_text or not self.checkpoint(run).exists():
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        words = ["megatron_mhc.pretrain_gpt", *self.arguments(run)]
        if not self.machine.gpu:
            words = ["megatron_mhc.testing.cpu", "-m", *words]
        (folder / "command.txt").write_text(shlex.join(["python", "-m", *words]) + "\n")
        known = self.known().get(run.name)
        first = known["reached"] if known and self.checkpoint(run).exists() else 0
        process = self.launch(words, folder / "log.txt", gpu if self.machine.gpu else None)
        print(f"{self.clock()} {run.name}: {run.steps} steps", flush=True)
        self.running.append(Running(run, process, gpu, time.time(), first))

    def clock(self) -> str:
        return time.strftime("%H:%M:%S")

    def recorded(self, run: Planned) -> dict[str, Any]:
        """What OUT/logs has of a run; nothing where there is none."""
        path = self.out / "logs" / f"{run.name}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record(self, run: Planned, seconds: float) -> dict[str, Any]:
        """Write what is kept of a run; returns it."""
        from benchmarks.harness import machine  # imports torch

        about = machine()
        folder = self.folder(run)
        path = self.out / "logs" / f"{run.name}.json"
        old = self.recorded(run)
        before = old.get("seconds", 0) if old.get("data") == self.about["hash"] else 0
        found = logs.parse((folder / "log.txt").read_text(errors="replace"))
        timed = run.study == "timing" and found["reached"] == run.steps
        log = {
            "name": run.name,
            "study": run.study,
            "size": run.size,
            "form": run.form,
            "seed": run.seed,
            "lr": run.lr,
            "budget": run.budget,
            "steps": run.steps,
            "tokens_per_step": self.scale.sizes[run.size].batch * self.scale.sizes[run.size].sequence,
            "finished": timed or found["final"] is not None or found["diverged"] is not None,
            **found,
            "seconds": round(before + seconds, 1),
            "alone": run.study == "timing" or self.options.jobs == 1,
            "data": self.about["hash"],
            "device": about["device"] if self.machine.gpu else "CPU",
            **{key: about[key] for key in ("versions", "commit", "date")},
            "gains": {} if run.study == "timing" else logs.gains(folder / "tensorboard"),
        }
        lines = (
            f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in log.items()
        )
        path.write_text("{" + ",\n".join(lines) + "}\n")  # a line for each key: small, and diffs can be read
        return log

    def watch(self, one: Running) -> bool:
        """Look after a run; returns whether it goes on."""
        log = self.folder(one.run) / "log.txt"
        tail = _tail(log)
        self._prune(one.run, tail)
        if re.search(r"lm loss: [+-]?(nan|inf)", tail, re.IGNORECASE) and one.process.poll() is None:
            one.process.kill()  # it has diverged: the rest of it would say nothing
            one.process.wait()
        if one.process.poll() is None:
            return True
        kept = self.record(one.run, time.time() - one.started)
        if kept["finished"]:
            shutil.rmtree(self.checkpoint(one.run), ignore_errors=True)
            shutil.rmtree(self.folder(one.run) / "cache", ignore_errors=True)
            said = f"held-out loss {kept['final']}" if kept["final"] else f"{kept['step_ms']} ms a step"
            said = f"diverged at step {kept['diverged']}" if kept["diverged"] is not None else said
        else:
            said = f"ended at step {kept['reached']} of {one.run.steps}"
            if not one.stopped and (one.process.poll() or kept["reached"] <= one.first):
                self.failed[one.run.name] = f"exit status {one.process.poll()}; see {log}"
        print(f"{self.clock()} {one.run.name}: {said}", flush=True)
        return False

    def _prune(self, run: Planned, tail: str) -> None:
        """Leave the last checkpoint alone."""
        saved = [int(step) for step in SAVED.findall(tail)]
        for path in self.checkpoint(run).glob("iter_*") if saved else ():
            if int(path.name.removeprefix("iter_")) < saved[-1]:
                shutil.rmtree(path, ignore_errors=True)

    def stop(self) -> None:
        """Ask all to save and end; after the grace they are killed."""
        until = time.time() + GRACE
        for one in self.running:
            one.stopped = True
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
        while time.time() < until and any(one.process.poll() is None for one in self.running):
            time.sleep(0.2)
        for one in self.running:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()
            self.watch(one)
        self.running = []

    def next_run(self, gpu: int) -> Planned | None:
        """What to start on a GPU with room: the first that is missing, can start, and fits."""
        here = [one.run for one in self.running if one.gpu == gpu]
        if any(run.study == "timing" for run in here):
            return None
        known, taken = self.known(), {one.run.name for one in self.running} | self.failed.keys()
        left = (self.deadline - time.time() - GRACE) / 60
        for run in self.planned(known):
            if run.name in taken or not run.startable or known.get(run.name, {}).get("finished"):
                continue
            if left < START_MINUTES or (self.options.whole and self.minutes(run, known) > left):
                continue
            if run.study == "timing" and here:
                return None  # it waits until the GPU is free, and nothing else starts there
            return run
        return None

    def train(self, gpus: int) -> None:
        """Run what is missing until all is there or time is over."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while True:
                self.running = [one for one in self.running if self.watch(one)]
                if time.time() > self.deadline - GRACE:
                    return
                for gpu in range(gpus):
                    while sum(one.gpu == gpu for one in self.running) < self.options.jobs:
                        if (run := self.next_run(gpu)) is None:
                            break
                        self.begin(run, gpu)
                if not self.running:
                    return
                time.sleep(self.options.poll)
        finally:
            self.stop()

    def table(self) -> str:
        """Every run, its state and what it takes, and the sum of GPU hours that are missing."""
        known = self.known()
        lines, missing = [], 0.0
        for run in self.planned(known):
            hours, log = estimate(run, self.scale, known), known.get(run.name)
            if log and log["finished"]:
                state = f"diverged at {log['diverged']}" if log["diverged"] is not None else "there"
            else:
                missing += hours
                state = f"at step {log['reached']}" if log else "missing"
                state += f", waits for {run.waits_for}" if run.waits_for else ""
            lines.append(f"{run.name:34} {run.study:10} {run.steps or '?':>6} steps {hours:7.3f} h  {state}")
        return "\n".join([*lines, f"{len(lines)} runs; missing: {missing:.1f} GPU hours, estimated"])


def _tail(path: Path, size: int = 20_000) -> str:
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument(
        "--kept", type=Path, help="folder of kept logs, which are not repeated (docs/results/quality)"
    )
    parser.add_argument("--tokens-per-parameter", type=float, default=20, help="of the plain form (20)")
    parser.add_argument("--sizes", default="", help="by commas; all by default")
    parser.add_argument(
        "--only", action="append", default=[], help="names of runs, as '*mhc4*'; may be repeated"
    )
    parser.add_argument("--budget-minutes", type=float, help="end after so many, checkpoints saved (never)")
    parser.add_argument(
        "--whole", action="store_true", help="start only what by its estimate ends within them"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each GPU (1)")
    parser.add_argument("--gpus", type=int, help="GPUs to use (all that are there)")
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--extra", default="", help="further arguments of all runs, in one quoted string")
    parser.add_argument("--poll", type=float, default=0.5, help=argparse.SUPPRESS)
    parser.add_argument(
        "--list", action="store_true", help="say what there is and what is missing, train nothing"
    )
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where a GPU is")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.kept is None:
        options.kept = KEPT if options.scale == "full" else options.out / "kept"
    options.kept = options.kept.resolve()
    options.sizes = [size for size in options.sizes.split(",") if size]
    if unknown := [size for size in options.sizes if size not in SCALES[options.scale].sizes]:
        parser.error(f"--sizes {unknown[0]}: choose of {', '.join(SCALES[options.scale].sizes)}")
    if options.budget_minutes is not None and options.budget_minutes * 60 <= 2 * GRACE:
        parser.error(f"--budget-minutes {options.budget_minutes}: give at least 1, for starting and saving")
    if options.tokens_per_parameter <= 0:
        parser.error(f"--tokens-per-parameter {options.tokens_per_parameter}: give more than 0")
    return options


def main(arguments: Sequence[str] | None = None, launch: Callable[..., Any] = start) -> int:
    options = parse(arguments)
    runs = Runs(options, launch)
    if options.list:
        record = options.out / "data" / "data.json"
        kept = options.kept / "data.json"
        for path in (record, kept):
            if path.exists():
                runs.about = json.loads(path.read_text())
                break
        print(runs.table())
        return 0
    if not runs.machine.gpu and options.scale == "full" and not options.cpu:
        raise SystemExit(
            "no GPU: --scale tiny --cpu shows the chain; --cpu alone trains the full runs, very slowly"
        )
    runs.prepare()
    import torch

    gpus = options.gpus or (torch.cuda.device_count() if runs.machine.gpu else 1)
    runs.train(gpus)
    print(f"{len(runs.missing())} runs missing; logs: {options.out / 'logs'}")
    for name, problem in runs.failed.items():
        print(f"quality: {name}: {problem}", file=sys.stderr)
    return 1 if runs.failed else 0


if __name__ == "__main__":
    sys.exit(main())
