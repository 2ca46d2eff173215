"""Training jobs through the project's doors, several of them alive at once and taking turns at the same GPUs.

A job is `torchrun -m benchmarks.job` and Megatron's arguments. Each is built by itself and then waits; the
jobs train in turn, a few steps each, while the others are idle, so that whatever the machine does slowly
all of them meet. `go_K` in a job's folder lets it take turn K, `done_K_R` is rank R's answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import ON_GPU, ROOT, Row

PROFILE = "profile"
KEYS = ("wall_ms", "kernels_ms", "host_ms_per_layer", "launches_per_layer", "peak_MiB", "reserved_MiB")


@dataclass
class Job:
    """What one side of a comparison runs.

    Args:
        arguments: Megatron's and the plugin's.
        environment: variables that differ from this process's.
        layers: of the model on one rank, times micro-batches of a step: what per-layer numbers divide by.
    """

    name: str
    arguments: list[str]
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    layers: int = 1


@dataclass
class Turns:
    """How jobs are timed: `warm_up` steps, then `turns` turns of `steps`, then one profiled step.

    Args:
        start, turn: seconds after which a job that starts, or has its turn, is given up.
    """

    warm_up: int = 4
    turns: int = 3
    steps: int = 4
    start: float = 240
    turn: float = 150

    @property
    def total(self) -> int:
        return self.warm_up + self.turns * self.steps + 1


class Failed(RuntimeError):
    """A job ended, or did not answer."""


class _Running:
    """A job's process, its folder and what it answered."""

    def __init__(self, job: Job, turns: Turns, folder: Path):
        self.job, self.folder, self.failure = job, folder, ""
        self.answers: list[list[Row]] = []  # of each turn, of each rank
        folder.mkdir(parents=True)
        self.log = (folder / "log").open("w")
        # Standalone: the port is the one that torchrun listens at, so nobody takes it while a rank starts.
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(job.ranks)]
        command += ["-m", "megatron_mhc.testing.cpu"] * (not ON_GPU) + ["-m", "benchmarks.job"]
        path = f"{ROOT}:{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else str(ROOT)
        plan = [turns.warm_up, *[turns.steps] * turns.turns, PROFILE]
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "NCCL_NVLS_ENABLE": "0"}
        environment |= {"BENCHMARK_FOLDER": str(folder), "BENCHMARK_TURNS": json.dumps(plan)}
        arguments = [*job.arguments, "--train-iters", str(turns.total)]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=folder,
            env=environment | job.environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, name: str, seconds: float) -> list[Row]:
        """All ranks' answers of that name."""
        files = [self.folder / f"{name}_{rank}" for rank in range(self.job.ranks)]
        deadline = time.monotonic() + seconds
        while not all(file.exists() for file in files):
            # A job may answer and end between two looks.
            if self.process.poll() is not None and not all(file.exists() for file in files):
                raise Failed(f"exit {self.process.returncode}: {reason(self.folder / 'log')}")
            if time.monotonic() > deadline:
                raise Failed(f"{name}: no answer after {seconds:.0f} s: {reason(self.folder / 'log')}")
            time.sleep(0.02)
        return [json.loads(file.read_text()) for file in files]

    def stop(self) -> None:
        """End torchrun and its ranks, which have process groups of their own."""
        ranks = children(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self.log.close()


def children(pid: int) -> list[int]:
    """The processes that a process has started and not yet waited for."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    with contextlib.suppress(OSError):
        return [int(word) for file in files for word in file.read_text().split()]
    return []


# The end of a traceback, or what argparse says.
_ERROR = re.compile(r"(\[rank\d+\]:\s*)?(\w[\w.]*(Error|Exception): |.*: error: )")


def reason(log: Path) -> str:
    """What a log says of why its job ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    # The first error names the cause; torchrun's own come after.
    told = [line for line in lines if _ERROR.match(line)]
    return (told or [line for line in lines if line][-3:] or ["no word"])[0][:400]


def take_turns(jobs: list[Job], turns: Turns, keep: Path | None = None) -> dict[str, Row]:
    """Run jobs side by side; a row of each, `failed` where it failed. The others go on.

    Args:
        keep: folder for the logs, and for the traces that a profiled step leaves.
    """
    with (
        tempfile.TemporaryDirectory(prefix="turns_") as scratch,
        _started(jobs, turns, Path(scratch)) as all_,
    ):

        def each(name: str, seconds: float, answered: bool) -> None:
            for one in all_:
                if not one.failure:
                    try:
                        (one.folder / f"go_{name}").touch()
                        found = one.wait(f"done_{name}" if answered else name, seconds)
                        if answered:
                            one.answers.append(found)
                    except Failed as failure:
                        one.failure = str(failure)
                        one.stop()  # what it holds is free for the others

        each("ready", turns.start, answered=False)
        for turn in range(turns.turns + 2):
            each(str(turn), turns.start if turn == 0 else turns.turn, answered=True)
        rows = {one.job.name: _row(one) for one in all_}
        if keep is not None:
            for one in all_:
                target = keep / "".join(c if c.isalnum() else "_" for c in one.job.name)
                target.mkdir(parents=True, exist_ok=True)
                for file in [one.folder / "log", *one.folder.glob("trace_*.json")]:
                    shutil.copy(file, target / file.name)
        return rows


@contextlib.contextmanager
def _started(jobs: list[Job], turns: Turns, folder: str) -> Iterator[list[_Running]]:
    running: list[_Running] = []
    try:
        for number, job in enumerate(jobs):
            running.append(_Running(job, turns, Path(folder) / str(number)))
        yield running
    finally:
        for one in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if not one.failure and len(one.answers) == turns.turns + 2:
                    one.process.wait(timeout=15)  # the job ends by itself
            one.stop()


def _row(one: _Running) -> Row:
    """What a job's answers say: times of the slowest rank, GPU work as a mean."""
    if one.failure:
        return {"failed": one.failure}
    _, *timed, profiles = one.answers
    profiled = {key: statistics.mean(rank[key] for rank in profiles) for key in profiles[0]}
    walls = [max(parts) for turn in timed for parts in zip(*(r["steps_ms"] for r in turn), strict=True)]
    means = [max(rank["turn_ms"] for rank in turn) for turn in timed]
    hosts = [value for turn in timed for value in turn[0]["host_ms"]]
    row: Row = {"wall_ms": statistics.median(walls), "turns_ms": means, "steps_ms": walls}
    row |= {"apart, %": 100 * (max(means) / min(means) - 1), "least_ms": min(walls)}
    row |= {"host_ms_per_layer": statistics.median(hosts) / one.job.layers}
    if "launches" in profiled:
        row["launches_per_layer"] = profiled.pop("launches") / one.job.layers
        row["busy"] = profiled["any_ms"] / row["wall_ms"]
    row |= profiled
    row["peak_MiB"] = max(rank["peak_MiB"] for rank in timed[-1])
    for key in ("states_MiB", "reserved_MiB"):
        row[key] = max(rank[key] for rank in timed[-1])
    return row | {"loss": timed[-1][-1].get("loss")}


_RECIPE = 'source "$1/examples/recipe.sh"; recipe "$2" "$3"; printf "%s\\0" "${ARGUMENTS[@]}"'
# Nothing is written, or sampled.
_VALUED = {"--save", "--load", "--save-interval", "--tensorboard-dir", "--mhc-log-interval", "--train-iters"}


def recipe(model: str, form: str, **variables: object) -> list[str]:
    """The arguments that `examples/train.sh MODEL FORM` trains with, on mock data, without what it saves."""
    given = {name: str(value) for name, value in variables.items()}
    environment = os.environ | {"DATA": "mock", "EP": "1", "PP": "1", "VPP": "1", "TP": "1"} | given
    command = ["bash", "-euc", _RECIPE, "recipe", str(ROOT), model, form]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"examples/recipe.sh {model} {form}: {done.stderr.strip()}")
    words, kept = iter(done.stdout.split("\0")[:-1]), []
    for word in words:
        if word in _VALUED:
            next(words)
        elif word != "--exit-signal-handler":
            kept.append(word)
    return [*kept, "--no-gradient-accumulation-fusion", "--lr-warmup-iters", "2", "--eval-iters", "0"]


TINY = shlex.split(
    """--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --position-embedding-type rope --swiglu --disable-bias-linear
    --normalization RMSNorm --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --no-create-attention-mask-in-dataloader --mock-data --tokenizer-type NullTokenizer --vocab-size 63
    --make-vocab-size-divisible-by 64 --split 99,1,0 --eval-iters 0 --eval-interval 1000 --lr 1e-3
    --num-workers 0 --distributed-backend gloo --transformer-impl local --no-rope-fusion
    --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-dropout-fusion"""
)
TINY_MOE = shlex.split(
    """--num-experts 2 --moe-router-topk 1 --moe-ffn-hidden-size 32 --moe-token-dispatcher-type alltoall
    --moe-router-load-balancing-type none"""
)


def tiny(form: str, moe: bool = False) -> list[str]:
    """A toy in place of a recipe, for a CPU."""
    how = ["--no-mhc"] if form == "vanilla" else ["--mhc-num-residual-streams", "4"]
    return [*TINY, *(TINY_MOE if moe else []), *how]
