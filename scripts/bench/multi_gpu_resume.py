"""Checkpoints between several GPUs and one, and a rank killed in the midst of a step; through pretrain().

    python scripts/bench/multi_gpu_resume.py --out resume.json [--scratch DIR] [--cpu]

Six jobs of `torchrun -m megatron_mhc.pretrain_gpt`, on mock data:

unbroken   ten steps on two ranks, PP2 x VPP2, `fused` with the split boundary; saved after five and ten
one        its checkpoint of step 5 on one rank, saved after every other step
two        that one's of step 8 on two ranks, TP2 with sequence parallelism
killed     as unbroken, in a folder of its own; rank 1 gets SIGKILL after step 7
resumed    the same command again
stopped    as unbroken, but rank 1 gets SIGSTOP after step 7 and is silent from there on

The losses of `one`, `two` and `resumed` are compared with the unbroken run's.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from multi_gpu_report import Report, Row  # noqa: E402
from multi_gpu_supervise import stop  # noqa: E402
from run_logs import LOSS, read_run, series  # noqa: E402

STEPS, SAVED, KILLED = 10, 5, 7
LIMIT = 180  # seconds of a job
COMMON = f"""
    --num-layers 8 --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope
    --swiglu --disable-bias-linear --normalization RMSNorm --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0 --no-create-attention-mask-in-dataloader
    --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --make-vocab-size-divisible-by 64
    --micro-batch-size 1 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --lr-decay-style cosine
    --weight-decay 0.1 --split 90,10,0 --eval-iters 0 --eval-interval 1000 --log-interval 1
    --distributed-timeout-minutes 2 --mhc-init uniform --mhc-init-gating-factor 0.5
"""
GPU = """
    --hidden-size 512 --num-attention-heads 8 --transformer-impl transformer_engine --bf16
    --no-gradient-accumulation-fusion --num-workers 1 --lr 1e-3
"""
CPU = """
    --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --num-workers 0
    --distributed-backend gloo --transformer-impl local --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion
    --no-bias-dropout-fusion
"""
PIPELINE = """
    --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2
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
    """Starts jobs whose checkpoints and logs lie in `folder`."""

    def __init__(self, folder: Path, cpu: bool):
        self.folder, self.cpu = folder, cpu
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    def command(self, ranks: int, arguments: str) -> list[str]:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        run += ["-m", "megatron_mhc.testing.cpu"] if self.cpu else []
        run += ["-m", "megatron_mhc.pretrain_gpt"]
        return run + shlex.split(COMMON) + shlex.split(CPU if self.cpu else GPU) + shlex.split(arguments)

    def environment(self, arguments: str) -> dict[str, str]:
        """This process's, without what torchrun may have told it, for a job of these arguments."""
        mine = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
        path = f"{ROOT}:{kept['PYTHONPATH']}" if "PYTHONPATH" in kept else str(ROOT)
        # The plugin's schedules refuse 1; Megatron demands it under TP.
        kept["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if PIPELINE in arguments else "1"
        kept["NCCL_NVLS_ENABLE"] = "0"  # no NVLink multicast
        return kept | dict(PYTHONPATH=path, PYTHONUNBUFFERED="1")

    def run(self, name: str, ranks: int, arguments: str, hit: signal.Signals | None = None) -> Job:
        """Run a job.

        Args:
            hit: what rank 1 gets after step KILLED.

        Raises:
            RuntimeError: a job failed that was not to be killed.
        """
        log, events, begin = self.folder / f"{name}.log", self.folder / f"{name}.events", time.monotonic()
        with log.open("w") as file:
            torchrun = subprocess.Popen(
                self.command(ranks, f"{arguments} --tensorboard-dir {events}"),
                cwd=ROOT,
                env=self.environment(arguments),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            try:
                if hit is not None:
                    self._hit(torchrun, log, hit)
                    begin = time.monotonic()  # from here on it counts until the job ends
                status = torchrun.wait(timeout=LIMIT)
            finally:
                if torchrun.poll() is None:
                    stop(torchrun)
        output, seconds = log.read_text(errors="replace"), time.monotonic() - begin
        if status and hit is None:
            raise RuntimeError(f"{log}: exit {status}\n" + "\n".join(output.splitlines()[-40:]))
        losses = {} if status else series(read_run(str(events)), LOSS)
        return Job(status, losses, output, seconds)

    def _hit(self, torchrun: subprocess.Popen[bytes], log: Path, hit: signal.Signals) -> None:
        deadline = time.monotonic() + LIMIT
        while KILLED not in steps_of(log.read_text(errors="replace")):
            if torchrun.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{log}: the job ended, or {LIMIT} s did, before step {KILLED}")
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(torchrun.pid).children() if p.environ().get("RANK") == "1"]
        if len(ranks) != 1:
            raise RuntimeError(f"{log}: found {len(ranks)} processes of rank 1")
        ranks[0].send_signal(hit)


def reshard(driver: Driver) -> tuple[Job, Row]:
    """Two ranks, one, two: (the unbroken run, what was found)."""
    folder = driver.folder
    save = f"--save {folder}/unbroken --save-interval {SAVED}"
    unbroken = driver.run("unbroken", 2, f"{PIPELINE} {save}")
    one = driver.run(
        "one", 1, f"--load {folder}/unbroken --ckpt-step {SAVED} --save {folder}/one --save-interval 2"
    )
    two = driver.run("two", 2, f"{TENSOR} --load {folder}/one --ckpt-step 8")
    first, second = worst(one, unbroken, SAVED), worst(two, unbroken, 8)
    row: Row = {"error": max(first, second), "errors": [first, second], "losses": [*unbroken.losses.values()]}
    row |= {"seconds": unbroken.seconds + one.seconds + two.seconds}
    return unbroken, row | {"ok": len(unbroken.losses) == STEPS and row["error"] <= ERROR[not driver.cpu]}


def kill(driver: Driver) -> tuple[Job, Row]:
    """A job that loses rank 1, and its command again: (the resumed job, what was found of the killed)."""
    again = f"{PIPELINE} --save {driver.folder}/killed --load {driver.folder}/killed --save-interval {SAVED}"
    killed = driver.run("killed", 2, again, signal.SIGKILL)
    resumed = driver.run("resumed", 2, again)
    messages = re.findall(r".*(?:Signal 9|PipelineError|has failed or was silent).*", killed.output)
    named = bool(re.search(r"rank\s*:\s*1 ", killed.output)) and "Signal 9 (SIGKILL)" in killed.output
    row: Row = {"last step": killed.last, "exit": killed.status, "seconds": killed.seconds}
    row |= {"names rank 1": named, "messages": messages}
    return resumed, row | {"ok": killed.status != 0 and named and KILLED <= killed.last < STEPS}


def halt(driver: Driver) -> tuple[Job, Row]:
    """A job whose rank 1 says nothing any more: how it ends, and after how long."""
    stopped = driver.run("stopped", 2, f"{PIPELINE} --distributed-timeout-minutes 1", signal.SIGSTOP)
    pattern = r".*(?:has failed or was silent for 60 s|Watchdog caught collective operation timeout).*"
    messages = list(dict.fromkeys(re.findall(pattern, stopped.output)))
    row: Row = {"last step": stopped.last, "exit": stopped.status, "seconds": stopped.seconds}
    return stopped, row | {"messages": messages[:3], "ok": stopped.status != 0 and bool(messages)}


def worst(job: Job, unbroken: Job, after: int) -> float:
    """Largest relative error of the losses of the steps behind `after`; infinite where one is missing."""
    wanted = {step: loss for step, loss in unbroken.losses.items() if step > after}
    if not wanted or wanted.keys() != job.losses.keys():
        return float("inf")
    errors = [abs(job.losses[step] - loss) / abs(loss) for step, loss in wanted.items()]
    return max(error if error == error else float("inf") for error in errors)


def run(report: Report, folder: Path, cpu: bool) -> None:
    """All chains of jobs, on GPUs side by side."""
    names = "two ranks, one, two", "rank 1 killed", "rank 1 silent", "resumed"
    report.limit = 0  # every job has its own
    if not [name for name in names if report.wanted("resume", name)]:
        return
    driver = Driver(folder, cpu)
    with ThreadPoolExecutor(1 if cpu else 3) as pool:
        chains = [pool.submit(chain, driver) for chain in (reshard, kill, halt)]
        for name, chain in zip(names, chains, strict=False):
            report.add("resume", name, outcome(chain)[1])
    unbroken, resumed = (outcome(chain)[0] for chain in chains[:2])
    if unbroken is None or resumed is None:
        report.add("resume", names[-1], {"failed": "a job before it failed"})
        return
    row = {"error": worst(resumed, unbroken, SAVED), "last step": max(resumed.losses)}
    report.add("resume", names[-1], row | {"ok": row["error"] <= ERROR[not cpu]})


def outcome(chain: Future[tuple[Job, Row]]) -> tuple[Job | None, Row]:
    """What a chain of jobs came to, a failure included."""
    try:
        return chain.result()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(error, flush=True)
        return None, {"failed": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, help="for checkpoints and logs; default beside --out")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    os.environ |= dict(RANK="0", WORLD_SIZE="2")
    if options.cpu:
        from megatron_mhc.testing import cpu

        cpu.install()
    report = Report(options.out, {"cpu": str(options.cpu)})
    run(report, options.scratch or options.out.with_suffix(".scratch"), options.cpu)
    print(report.tables())
    if bad := report.bad():
        raise SystemExit("failed or beyond its tolerance: " + "; ".join(bad))


if __name__ == "__main__":
    main()
