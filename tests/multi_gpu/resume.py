"""Checkpoints between several GPUs and one, and a rank killed in the midst of a step; through pretrain().

Jobs of `torchrun -m megatron_mhc.pretrain_gpt`, on mock data:

reshard  unbroken   ten steps on two ranks, PP2 x VPP2, `fused` with the split boundary; saved after five
         one        its checkpoint of step 5 on one rank, saved and ended after step 8
         two        that one's checkpoint on two ranks, TP2 with sequence parallelism
kill     killed     as unbroken, in a folder of its own; rank 1 gets SIGKILL after step 7
         resumed    the same command again
silent   stopped    as unbroken, but rank 1 gets SIGSTOP after step 7 and is silent from there on

The losses of `one`, `two` and `resumed` are compared with the unbroken run's. Stages run side by side as far
as there are pairs of GPUs, never two on the same: kernels of two processes take turns on a GPU, and those
that wait for a message take theirs too. --out is written after every job.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.harness import Report, Row
from megatron_mhc.run_logs import LOSS, read_run, series
from multi_gpu.supervise import stop

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVED, KILLED, AGAIN = 10, 5, 7, 8  # AGAIN: the step after which `one` saves
LIMIT = 150  # seconds of a job
UNBROKEN, ONE, TWO = "unbroken", "on one rank", "on two ranks again"
DEAD, RESUMED, SILENT = "rank 1 killed", "resumed", "rank 1 silent"
COMMON = f"""
    --num-layers 4 --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope
    --swiglu --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
    --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --make-vocab-size-divisible-by 64
    --micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --lr-decay-style cosine
    --weight-decay 0.1 --split 90,10,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --distributed-timeout-minutes 2 --mhc-init uniform --mhc-init-gating-factor 0.5
"""
GPU = """
    --hidden-size 512 --num-attention-heads 8 --transformer-impl transformer_engine --bf16
    --no-gradient-accumulation-fusion --num-workers 0 --lr 1e-3
"""
CPU = """
    --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --num-workers 0
    --distributed-backend gloo --transformer-impl local --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion
"""
PIPELINE = """
    --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1
    --mhc-pipeline-schedule fused --mhc-pp-boundary split
"""
TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
# Relative, of the loss. bf16: another layout rounds differently, and Transformer Engine's backward of
# attention does not always add in one order.
ERROR = {True: 5e-3, False: 1e-5}
_STEP = re.compile(r"iteration\s+(\d+)/.*lm loss")


@dataclass
class Job:
    """A finished torchrun: exit status, losses by step as TensorBoard has them, and all that it printed."""

    status: int
    losses: dict[int, float]
    output: str
    seconds: float

    @property
    def last(self) -> int:
        """The last step that it logged."""
        return max(steps_of(self.output), default=0)


def steps_of(output: str) -> set[int]:
    return {int(step) for step in _STEP.findall(output)}


class Driver:
    """Starts jobs whose checkpoints and logs lie in `folder`, each on a pair of GPUs of its own.

    Args:
        pairs: GPUs as CUDA_VISIBLE_DEVICES names them; on a CPU one empty string.
    """

    def __init__(self, folder: Path, cpu: bool, pairs: list[str], transport: str = "auto"):
        self.folder, self.cpu, self.transport = folder, cpu, transport
        self.free: queue.Queue[str] = queue.Queue()
        for pair in pairs:
            self.free.put(pair)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def command(self, ranks: int, arguments: str) -> list[str]:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        run += ["-m", "megatron_mhc.testing.cpu"] if self.cpu else []
        run += ["-m", "megatron_mhc.pretrain_gpt"]
        transport = f"--mhc-pipeline-transport {self.transport}"
        return run + shlex.split(f"{COMMON} {CPU if self.cpu else GPU} {transport} {arguments}")

    def environment(self, arguments: str, pair: str) -> dict[str, str]:
        """This process's, without what torchrun may have told it, for a job of these arguments."""
        mine = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
        path = f"{ROOT}:{kept['PYTHONPATH']}" if "PYTHONPATH" in kept else str(ROOT)
        # The plugin's schedules over NCCL refuse 1; Megatron demands it under TP.
        pushes = self.transport == "push"
        kept["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if PIPELINE in arguments and not pushes else "1"
        kept["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        kept["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
        kept["TORCH_COMPILE_DISABLE"] = "1"  # Megatron compiles at every start
        kept["PYTHONFAULTHANDLER"] = "1"  # see _stacks
        kept |= {"CUDA_VISIBLE_DEVICES": pair} if pair else {}
        return kept | dict(PYTHONPATH=path, PYTHONUNBUFFERED="1")

    def run(self, name: str, ranks: int, arguments: str, hit: signal.Signals | None = None) -> Job:
        """Run a job.

        Args:
            hit: what rank 1 gets after step KILLED.

        Raises:
            RuntimeError: a job failed that was not to be killed, or did not end in LIMIT seconds.
        """
        log, events = self.folder / f"{name}.log", self.folder / f"{name}.events"
        pair, begin = self.free.get(), time.monotonic()
        try:
            with log.open("w") as file:
                torchrun = subprocess.Popen(
                    self.command(ranks, f"{arguments} --tensorboard-dir {events}"),
                    cwd=ROOT,
                    env=self.environment(arguments, pair),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                try:
                    if hit is not None:
                        self._hit(torchrun, log, hit)
                        begin = time.monotonic()  # from here on it counts until the job ends
                    status = torchrun.wait(timeout=LIMIT)
                except subprocess.TimeoutExpired:
                    _stacks(torchrun)
                    raise RuntimeError(f"{log}: not done after {LIMIT} s\n{_tail(log)}") from None
                finally:
                    if torchrun.poll() is None:
                        stop(torchrun)
        finally:
            self.free.put(pair)
        seconds = time.monotonic() - begin
        if status and hit is None:
            raise RuntimeError(f"{log}: exit {status}\n{_tail(log)}")
        losses = {} if status else series(read_run(str(events)), LOSS)
        return Job(status, losses, log.read_text(errors="replace"), seconds)

    def _hit(self, torchrun: subprocess.Popen[bytes], log: Path, hit: signal.Signals) -> None:
        deadline = time.monotonic() + LIMIT
        while KILLED not in steps_of(log.read_text(errors="replace")):
            if torchrun.poll() is not None:
                raise RuntimeError(f"{log}: the job ended before step {KILLED}\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(torchrun.args, LIMIT)
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(torchrun.pid).children() if p.environ().get("RANK") == "1"]
        if len(ranks) != 1:
            raise RuntimeError(f"{log}: found {len(ranks)} processes of rank 1")
        ranks[0].send_signal(hit)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def _stacks(torchrun: subprocess.Popen[bytes]) -> None:
    """Have the ranks end with the stacks of all threads in their log."""
    for process in psutil.Process(torchrun.pid).children():
        if "RANK" in process.environ():
            process.send_signal(signal.SIGABRT)
    time.sleep(5)


class Chains:
    """The jobs of each stage, one after the other; a row as each of them ends."""

    def __init__(self, driver: Driver, add: Callable[[str, Row], None]):
        self.driver, self.add = driver, add
        self.unbroken: Future[Job] = Future()

    def reshard(self) -> None:
        """Two ranks, one, two."""
        folder = self.driver.folder
        save = f"--save {folder}/unbroken --save-interval {SAVED}"
        try:
            unbroken = self.driver.run("unbroken", 2, f"{PIPELINE} {save}")
        except BaseException as error:
            self.unbroken.set_exception(error)
            raise
        self.unbroken.set_result(unbroken)
        row: Row = {"last step": unbroken.last, "losses": unbroken.losses, "seconds": unbroken.seconds}
        self.add(UNBROKEN, row | {"ok": len(unbroken.losses) == STEPS})
        load = f"--load {folder}/unbroken --ckpt-step {SAVED}"
        one = self.driver.run(
            "one", 1, f"{load} --save {folder}/one --save-interval {AGAIN} --exit-interval {AGAIN}"
        )
        self._compare(ONE, one, SAVED, AGAIN)
        two = self.driver.run("two", 2, f"{TENSOR} --load {folder}/one --ckpt-step {AGAIN}")
        self._compare(TWO, two, AGAIN, STEPS)

    def kill(self) -> None:
        """A job that loses rank 1, and its command again."""
        folder = self.driver.folder / "killed"
        again = f"{PIPELINE} --save {folder} --load {folder} --save-interval {SAVED}"
        killed = self.driver.run("killed", 2, again, signal.SIGKILL)
        messages = re.findall(r".*(?:Signal 9|PipelineError|has failed or was silent).*", killed.output)
        named = bool(re.search(r"rank\s*:\s*1 ", killed.output)) and "Signal 9 (SIGKILL)" in killed.output
        row: Row = {"last step": killed.last, "exit": killed.status, "seconds": killed.seconds}
        row |= {"names rank 1": named, "messages": messages}
        row["ok"] = killed.status != 0 and named and KILLED <= killed.last < STEPS
        self.add(DEAD, row)
        self._compare(RESUMED, self.driver.run("resumed", 2, again), SAVED, STEPS)

    def silent(self) -> None:
        """A job whose rank 1 says nothing any more: how it ends, and after how long."""
        arguments = f"{PIPELINE} --distributed-timeout-minutes 1"
        stopped = self.driver.run("stopped", 2, arguments, signal.SIGSTOP)
        pattern = r".*(?:has failed or was silent for 60 s|Watchdog caught collective operation timeout).*"
        messages = list(dict.fromkeys(re.findall(pattern, stopped.output)))
        row: Row = {"last step": stopped.last, "exit": stopped.status, "seconds": stopped.seconds}
        self.add(SILENT, row | {"messages": messages[:3], "ok": stopped.status != 0 and bool(messages)})

    def _compare(self, name: str, job: Job, after: int, until: int) -> None:
        """A job that went on behind a checkpoint, beside the unbroken one."""
        if not self.unbroken.done():  # it was not asked for
            self.add(name, {"last step": max(job.losses, default=0), "losses": job.losses})
            return
        error = worst(job.losses, self.unbroken.result().losses, after, until)
        row: Row = {"error": error, "last step": max(job.losses, default=0), "losses": job.losses}
        row |= {"seconds": job.seconds, "ok": error <= ERROR[not self.driver.cpu]}
        self.add(name, row)


ROWS = {"reshard": (UNBROKEN, ONE, TWO), "kill": (DEAD, RESUMED), "silent": (SILENT,)}


def worst(losses: dict[int, float], unbroken: dict[int, float], after: int, until: int) -> float:
    """Largest relative error of the losses behind step `after`; infinite unless all are there, to `until`."""
    steps = range(after + 1, until + 1)
    if sorted(losses) != list(steps) or set(steps) - set(unbroken):
        return float("inf")
    errors = [abs(losses[step] - unbroken[step]) / abs(unbroken[step]) for step in steps]
    return max(error if error == error else float("inf") for error in errors)


def run(report: Report, options: argparse.Namespace) -> None:
    """All stages of which a row is missing."""
    folder, cpu, stages = options.scratch, options.tiny, options.stages
    missing = {stage: [row for row in ROWS[stage] if report.row("resume", row) is None] for stage in stages}
    missing = {stage: rows for stage, rows in missing.items() if rows}
    if not missing:
        return
    pairs = [""] if cpu else pairs_of_gpus()
    lock = threading.Lock()

    def add(name: str, row: Row) -> None:
        with lock:
            if report.wanted("resume", name):
                report.add("resume", name, row)

    chains = Chains(Driver(folder, cpu, pairs, options.transport), add)
    if "reshard" in stages and "reshard" not in missing:  # a run that was cut is gone on with
        losses = (report.row("resume", UNBROKEN) or {}).get("losses", {})
        chains.unbroken.set_result(Job(0, {int(step): loss for step, loss in losses.items()}, "", 0.0))
    with ThreadPoolExecutor(len(pairs)) as pool:
        ends = {stage: pool.submit(getattr(chains, stage)) for stage in missing}
        for stage, end in ends.items():
            if (error := end.exception()) is not None:
                print(error, flush=True)
                for name in missing[stage]:
                    add(name, {"failed": f"{stage}: {error}"})  # those that are not there yet


def pairs_of_gpus() -> list[str]:
    """All GPUs that this process sees, two by two, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if len(gpus) < 2:
        raise SystemExit("resume needs two GPUs")
    return [",".join(gpus[at : at + 2]) for at in range(0, len(gpus) - 1, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="for checkpoints and logs")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    parser.add_argument("--transport", choices=("auto", "push", "nccl"), default="auto")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(ROWS))
    options = parser.parse_args()
    report = Report(options.out, "resume", {"tiny": options.tiny, "transport": options.transport})
    run(report, options)
    report.end()


if __name__ == "__main__":
    main()
