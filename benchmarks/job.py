"""One job of `jobs`: trains through megatron_mhc.pretrain_gpt, in turns that another process gives."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TEARDOWN_CUPTI", "0")

import torch

from benchmarks.harness import ON_GPU, gpu_work

PROFILE = "profile"


class Turns:
    """Wraps Megatron's train_step."""

    def __init__(self, step: Callable[..., Any], folder: Path, plan: list[int | str]):
        self.step, self.folder, self.rank = step, folder, int(os.environ["RANK"])
        self.turns, self.parent = list(enumerate(plan)), os.getppid()
        self.left: int = 0
        self.kind: int | str = 0
        self.number = -1
        self.hosts: list[float] = []
        self.marks: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.left:
            self.begin()
        self.left -= 1
        if self.kind == PROFILE:
            results: list[Any] = []
            self.answer(self.profile(lambda: results.append(self.step(*args, **kwargs))))
            return results[0]
        result = self.step(*self.timed(args), **kwargs)
        self.marks.append(mark())
        if not self.left:
            self.end(result)
        return result

    def timed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a step, whose schedule (the seventh) is timed on the host until it returns."""
        schedule = args[6]

        def forward_backward(*inner: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return schedule(*inner, **named)
            finally:
                self.hosts.append(1e3 * (time.perf_counter() - began))

        return *args[:6], forward_backward, *args[7:]

    def begin(self) -> None:
        """Wait for the next turn."""
        self.number, self.kind = self.turns.pop(0)
        if self.number == 0:
            write(self.folder / f"ready_{self.rank}", {})
        self.left = 1 if self.kind == PROFILE else int(self.kind)
        torch.cuda.synchronize()
        while not (self.folder / f"go_{self.number}").exists():
            if os.getppid() != self.parent:
                os._exit(1)  # torchrun is gone: nobody would end this process
            time.sleep(0.002)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.cuda.synchronize()
        if self.number == 1:
            torch.cuda.reset_peak_memory_stats()
        self.hosts, self.began, self.marks = [], time.perf_counter(), [mark()]

    def end(self, result: Any) -> None:
        """Answer what a turn took."""
        from megatron_mhc.pipeline.links import slots_bytes  # Megatron is imported in `main`

        torch.cuda.synchronize()
        whole = 1e3 * (time.perf_counter() - self.began) / (len(self.marks) - 1)
        steps = [a.elapsed_time(b) for a, b in itertools.pairwise(self.marks)]
        losses = result[0] if isinstance(result[0], dict) else {}
        loss = next((float(value.float().mean()) for value in losses.values()), None)
        found = {"steps_ms": steps, "turn_ms": whole, "host_ms": self.hosts, "loss": loss}
        # With the slots of pushed messages, which are not the allocator's.
        found["peak_MiB"] = (torch.cuda.max_memory_allocated() + slots_bytes()) / 2**20
        found["states_MiB"] = torch.cuda.memory_allocated() / 2**20
        found["reserved_MiB"] = torch.cuda.max_memory_reserved() / 2**20
        self.answer(found)

    def profile(self, run: Callable[[], Any]) -> dict[str, float]:
        """GPU work of a step; with BENCHMARK_TRACE by kind, and what of it nothing hides."""
        if os.environ.get("BENCHMARK_TRACE"):
            from benchmarks.trace import traced

            return traced(run, self.folder / f"trace_{self.rank}.json")
        if ON_GPU:
            return gpu_work(run)
        run()
        return {}

    def answer(self, found: dict[str, Any]) -> None:
        write(self.folder / f"done_{self.number}_{self.rank}", found)


def mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def write(path: Path, found: dict[str, Any]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(found))
    new.rename(path)  # whole, once it is there


def main() -> None:
    if "BENCHMARK_FOLDER" not in os.environ:
        raise SystemExit(__doc__)
    import megatron.training.training as training

    import megatron_mhc
    from megatron_mhc import pretrain_gpt

    megatron_mhc.register(training=True)  # whose replacement of train_step is the one that is timed
    folder, plan = Path(os.environ["BENCHMARK_FOLDER"]), json.loads(os.environ["BENCHMARK_TURNS"])
    training.train_step = Turns(training.train_step, folder, plan)
    pretrain_gpt.main()


if __name__ == "__main__":
    sys.exit(main())
