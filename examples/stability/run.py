"""Train a deep narrow GPT plainly, with hyper-connections (HC) and with mHC, and draw the paper's figures.

`--models` takes other forms too: single-pass mHC, mHC with H_res = identity, and Qwen4-Exp's gated residual.

    python examples/stability/run.py                        one GPU (or --cpu), 48 layers, 2 seeds
    python examples/stability/run.py --jobs 3               three runs at a time on that GPU
    python examples/stability/run.py --minutes 6            each run ends itself after 6 minutes
    python examples/stability/run.py --figures-only         draw again, from the runs that are finished

All go through Megatron's own `pretrain()` on the quickstart's text, with the same data for one seed.
A finished run is not repeated, and an interrupted one goes on from its last checkpoint; figures take in what
an unfinished one has logged. Per run:
OUT/<model>_seed<seed>/ with train.sh, log.txt and tensorboard/; the figures: OUT/figures/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "quickstart"))
from settings import CPU, MODEL, NO_FUSION, ROOT, Machine, data_arguments, transformer_engine  # noqa: E402
from tqdm import tqdm  # noqa: E402

MODELS = {
    "plain": ["--no-mhc"],
    "hc": ["--mhc-h-res", "unconstrained"],
    "mhc": ["--mhc-h-res", "sinkhorn"],
    "single_pass": ["--mhc-read", "previous"],
    "identity": ["--mhc-h-res", "identity"],
    "gated": ["--mhc-preset", "qwen4_exp"],
}
ITERATION = re.compile(r"iteration +(\d+)/ *(\d+) ")
# What runs of one folder must share.
SHARED = "layers hidden heads sequence batch steps lr warmup clip log_interval extra mhc_extra cpu".split()


class Runs:
    """All runs of one call.

    Args:
        options: the parsed command line.
        machine: where to train; one process for each run.
    """

    def __init__(self, options: argparse.Namespace, machine: Machine):
        self.options, self.machine = options, machine
        self.out: Path = options.out
        self.names = [(model, seed) for seed in options.seeds for model in options.models]
        self.stopping = threading.Event()
        self.processes: set[subprocess.Popen] = set()
        self.bar: tqdm | None = None

    def folder(self, model: str, seed: int) -> Path:
        return self.out / f"{model}_seed{seed}"

    def arguments(self, model: str, seed: int) -> list[str]:
        """Megatron's arguments of one run."""
        o, folder = self.options, self.folder(model, seed)
        text = (
            MODEL
            + f"""
            --num-layers {o.layers} --hidden-size {o.hidden} --num-attention-heads {o.heads}
            --seq-length {o.sequence} --max-position-embeddings {o.sequence}
            --micro-batch-size {o.micro_batch or o.batch} --global-batch-size {o.batch}
            --train-iters {o.steps} --lr {o.lr} --min-lr {o.lr / 10} --lr-decay-style cosine
            --lr-decay-iters {o.steps} --lr-warmup-iters {o.warmup} --weight-decay 0.1 --adam-beta2 0.95
            --clip-grad {o.clip} --seed {seed} --log-interval 10 --eval-iters 5 --eval-interval {o.steps}
            --rerun-mode disabled --no-check-for-nan-in-loss-and-grad
        """
        )
        if not self.machine.gpu:
            text += CPU + NO_FUSION + "--num-workers 0"
        elif transformer_engine():
            text += "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion"
        else:
            text += "--bf16 --transformer-impl local" + NO_FUSION
        if o.minutes:
            text += f" --exit-duration-in-mins {o.minutes}"
        words = shlex.split(text) + data_arguments(self.out / "data" / "stdlib")
        # Runs of one seed that start together would write the same index at the same time.
        words += ["--data-cache-path", str(folder / "cache")]
        if o.save_interval:
            words += ["--save", str(folder / "checkpoint"), "--load", str(folder / "checkpoint")]
            words += ["--save-interval", str(o.save_interval)]
        words += ["--tensorboard-dir", str(folder / "tensorboard")]
        words += MODELS[model]
        if model != "plain":
            words += ["--mhc-log-interval", str(o.log_interval), "--mhc-alarm", "warn"]
            words += shlex.split(o.mhc_extra)
        return words + shlex.split(o.extra)

    def train(self, model: str, seed: int) -> str | None:
        """Run to the end; returns what went wrong, or None."""
        folder = self.folder(model, seed)
        if (folder / "finished.json").exists():
            return self._progress(self.options.steps)
        if self.stopping.is_set():
            return "not started"
        folder.mkdir(parents=True, exist_ok=True)
        command = self.machine.launch(["-m", "megatron_mhc.pretrain_gpt"], processes=1)
        command += self.arguments(model, seed)
        script = folder / "train.sh"
        script.write_text(f"""#!/bin/bash
set -e
cd {shlex.quote(str(ROOT))}
export OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH="$PWD:$PYTHONPATH"
exec {shlex.join(command)}
""")
        started, reached, ended = time.time(), 0, False
        with open(folder / "log.txt", "a") as log:
            pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
            process = subprocess.Popen(["bash", str(script)], **pipe)  # type: ignore[call-overload]
            self.processes.add(process)
            for line in process.stdout:
                log.write(line)
                log.flush()
                ended |= "exiting program after" in line  # --exit-duration-in-mins
                if found := ITERATION.search(line):
                    self._progress(int(found[1]) - reached)
                    reached = int(found[1])
        status = process.wait()
        self.processes.discard(process)
        if status:
            return f"exit status {status}; see {folder / 'log.txt'}"
        if ended:
            return f"--minutes {self.options.minutes} are over; without --minutes it goes on or begins again"
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        seconds = time.time() - started
        (folder / "finished.json").write_text(json.dumps({"model": model, "seed": seed, "seconds": seconds}))
        return None

    def _progress(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.update(steps)

    def train_all(self) -> dict[tuple[str, int], str]:
        """Run all, `--jobs` at a time; returns what went wrong."""
        failures: dict[tuple[str, int], str] = {}
        form = "{percentage:3.0f}% |{bar}| {n}/{total} steps [{elapsed} elapsed, {remaining} left]"
        seconds = 0.3 if sys.stderr.isatty() else 20
        total = len(self.names) * self.options.steps
        with (
            tqdm(total=total, bar_format=form, mininterval=seconds) as self.bar,
            ThreadPoolExecutor(self.options.jobs) as pool,
        ):
            futures = {pool.submit(self.train, *name): name for name in self.names}
            try:
                for future in as_completed(futures):
                    if problem := future.result():
                        failures[futures[future]] = problem
            except BaseException:
                self.stopping.set()
                for process in list(self.processes):
                    process.terminate()  # Ctrl-C: torchrun ends its ranks
                raise
        return failures

    def prepare(self) -> None:
        """Make the text, and hold the folder to one set of settings."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(self.options, name) for name in SHARED}
        record = self.out / "settings.json"
        if record.exists() and (known := json.loads(record.read_text())) != settings:
            name = next(n for n in SHARED if known.get(n) != settings[n])
            flag = f"--{name.replace('_', '-')}"
            raise SystemExit(
                f"{self.out} holds runs with {flag} {known.get(name)}, not {settings[name]}: give the same, "
                "or another --out"
            )
        record.write_text(json.dumps(settings))
        text = self.out / "data" / "stdlib"
        if not text.with_suffix(".idx").exists():
            subprocess.run(
                [sys.executable, str(HERE.parent / "quickstart" / "prepare_text.py"), str(text)], check=True
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--micro-batch", type=int, help="sequences of a micro-batch (all of a step)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=20, help="steps of warm-up")
    parser.add_argument("--clip", type=float, default=1.0, help="gradient clipping; 0 is none")
    parser.add_argument("--seeds", default="1,2", help="by commas (1,2)")
    parser.add_argument(
        "--models", default="plain,hc,mhc", help=f"of {', '.join(MODELS)}, by commas (plain,hc,mhc)"
    )
    parser.add_argument("--log-interval", type=int, default=25, help="steps between two diagnostics (25)")
    parser.add_argument("--minutes", type=int, help="end each run after so many (never)")
    parser.add_argument("--save-interval", type=int, help="steps between checkpoints; 0: none (a 4th of all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on the one device (1)")
    parser.add_argument("--extra", default="", help="further arguments of all runs, in one quoted string")
    parser.add_argument(
        "--mhc-extra", default="", help="the same of all but plain: --mhc-extra='--mhc-init uniform'"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "stability")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where a GPU is")
    figures = parser.add_mutually_exclusive_group()
    figures.add_argument("--figures-only", action="store_true", help="train nothing")
    figures.add_argument("--no-figures", action="store_true", help="draw elsewhere, from OUT/*/tensorboard")
    options = parser.parse_args()
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
    options.models = options.models.split(",")
    options.out = options.out.resolve()
    if options.save_interval is None:
        options.save_interval = max(1, options.steps // 4)
    if unknown := [model for model in options.models if model not in MODELS]:
        parser.error(f"--models {unknown[0]}: choose of {', '.join(MODELS)}")
    if options.steps < options.log_interval:
        parser.error(f"--steps {options.steps} is less than --log-interval {options.log_interval}")
    if options.warmup >= options.steps:
        parser.error(f"--warmup {options.warmup}: give less than --steps {options.steps}")
    return options


def main() -> int:
    options = parse()
    # As Ctrl-C does it, so that a time limit leaves no training behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    machine = Machine(gpu=Machine.find(options.cpu).gpu, processes=1)
    runs = Runs(options, machine)
    failures: dict[tuple[str, int], str] = {}
    if not options.figures_only:
        print(f"{len(runs.names)} runs of {options.steps} steps on {machine}, results in {options.out}")
        runs.prepare()
        failures = runs.train_all()
        for (model, seed), problem in failures.items():
            print(f"stability: {model}, seed {seed}: {problem}", file=sys.stderr)
    if not options.no_figures:
        subprocess.run([sys.executable, str(HERE / "report.py"), str(options.out)], check=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
