"""What all benchmarks share: the report in JSON, device and versions, tables, figures and ways to time.

A report has a head (device, versions, commit, settings) and rows, each of a section and with a name. It is
written after every row; what failed is a row too, and the exit status says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import gc
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Row, brief, tables

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.empty(0, device="cuda").is_cuda if torch.cuda.is_available() else False  # see testing.cpu
PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "megatron-mhc")
_VARIABLES = ("NCCL_", "CUDA_DEVICE", "CUDA_MODULE", "NVTE_")


# The command line


def command_line(benchmark: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.<benchmark>`, whose help is the docstring as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def numbers(text: str) -> list[int]:
    """Those of "1,2,4"."""
    return list(map(int, text.split(",")))


# What ran, and on what


def machine() -> Row:
    """Device, driver, links, versions, commit, and the variables that decide how ranks communicate."""
    found = {d.name.replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    about: Row = {
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "devices": torch.cuda.device_count() if ON_GPU else 0,
        "versions": {package: found.get(package) for package in PACKAGES},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(_VARIABLES)},
    }
    if ON_GPU:
        query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about |= {"driver": query.partition("\n")[0], "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        about["links"] = _output("nvidia-smi", "topo", "-m")
    return about


def commit() -> str:
    """The commit of this tree, with `+` if files differ from it; MHC_COMMIT where there is no git."""
    if given := os.environ.get("MHC_COMMIT"):
        return given
    here = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD").strip()
    if not here or " " in here:
        return "unknown"
    return here + "+" * bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "-uno"))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}\n"


# Reports


class Report:
    """Rows in a JSON file.

    A file that exists is gone on with: rows in it are not run again, one that was running when its process
    ended counts as failed.

    Args:
        path: None to print alone.
        limit: seconds after which a row's process ends, with all stacks on stderr; 0 for none.

    Raises:
        ValueError: the file's machine, commit or settings are others.
    """

    def __init__(self, path: Path | None, benchmark: str, settings: Row, limit: float = 0):
        # As JSON has it: what is read back compares equal.
        head = {"benchmark": benchmark} | machine() | {"settings": settings}
        self.head: Row = json.loads(json.dumps(head, default=str))
        self.path, self.limit, self.rows = path, limit, []
        self.first = os.environ.get("RANK", "0") == "0"  # of several ranks, the one that writes
        if path is None or not path.exists():
            return
        old = json.loads(path.read_text())
        for key in ("device", "versions", "commit", "environment", "settings"):
            if old.get(key) != self.head[key]:
                raise ValueError(
                    f"--out {path} was made with {key} {old.get(key)}, this run has {self.head[key]}: "
                    "give another file"
                )
        self.rows = old["rows"]
        for row in self.rows:
            if row.pop("running", False):
                row["failed"] = "the run ended in its midst, see its log"

    def row(self, section: str, name: str) -> Row | None:
        return next((r for r in self.rows if (r["section"], r["name"]) == (section, name)), None)

    def wanted(self, section: str, name: str) -> bool:
        """Whether a row is still to be run; if so it counts as running from here on."""
        if self.row(section, name) is not None:
            return False
        self.rows.append({"section": section, "name": name, "running": True})
        self.write()
        if self.limit:
            faulthandler.dump_traceback_later(self.limit, exit=True)
        return True

    def add(self, section: str, name: str, result: Row) -> None:
        """Fill a row, and have it printed."""
        faulthandler.cancel_dump_traceback_later()
        row = self.row(section, name)
        if row is None:
            self.rows.append(row := {"section": section, "name": name})
        row |= json.loads(json.dumps(result, default=str))
        row.pop("running", None)
        self.write()
        if self.first:
            print(f"{section}: {name}: {brief(result)}", flush=True)

    def run(self, section: str, name: str, measure: Callable[[], Row]) -> None:
        """Run and add a row, unless it is there; a failure is its result."""
        if self.wanted(section, name):
            self.add(section, name, attempt(measure))

    def write(self) -> None:
        if self.path is None or not self.first:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")
        new.replace(self.path)  # a killed run leaves a whole file

    def bad(self) -> list[str]:
        """The rows that failed, or are beyond their tolerance."""
        bad = (r for r in self.rows if "failed" in r or r.get("running") or not r.get("ok", True))
        return [f"{row['section']}: {row['name']}" for row in bad]

    def end(self) -> None:
        """Print the tables; SystemExit if a row failed."""
        print(tables(self.rows), flush=True)
        if bad := self.bad():
            raise SystemExit("failed: " + "; ".join(bad))


def attempt(measure: Callable[[], Row]) -> Row:
    """What `measure` returns, or how it failed."""
    try:
        return measure()
    except Exception as failure:
        error: BaseException | None = failure
        reasons = []
        while error is not None:  # a capture's end hides what ended it
            reasons.append(f"{type(error).__name__}: {error}".strip().splitlines()[0][:300])
            error = error.__context__
    clean()
    return {"failed": "; ".join(reasons)}


def over(rows: Sequence[Row], base: Row | None, keys: Sequence[str]) -> None:
    """Add to the rows how many % more than the base's each of `keys` is."""
    for row in rows:
        for key in keys:
            if base is not None and row is not base and row.get(key) and base.get(key):
                row[f"{key} over vanilla, %"] = 100 * (row[key] / base[key] - 1)


def bars(path: Path, title: str, axis: str, groups: dict[str, dict[str, float]]) -> None:
    """A figure of horizontal bars: {bar: {series: value}}; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path}: not drawn, matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(groups)), layout="constrained")
    height = 0.8 / max(1, len(series))
    for at, name in enumerate(series):
        places = [(row + at * height, v[name]) for row, v in enumerate(groups.values()) if name in v]
        drawn = axes.barh(*zip(*places, strict=True), height, label=name)
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=10)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series), fontsize=8)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


# Ways to time


def alternate(runs: dict[str, Callable[[], list[float]]], rounds: int) -> dict[str, Row]:
    """Each run's samples, the runs taking turns: median, and how far apart the rounds' medians are, in %."""
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
    return {name: summary(parts) for name, parts in samples.items()}


def summary(rounds: list[list[float]]) -> Row:
    """`median` of all samples, and `apart, %`: the distance of the rounds' medians."""
    medians = [statistics.median(part) for part in rounds]
    apart = 100 * (max(medians) / min(medians) - 1) if min(medians) > 0 else 0.0
    return {"median": statistics.median([s for part in rounds for s in part]), "apart, %": apart}


def intervals(run: Callable[[], Any], steps: int) -> list[float]:
    """Milliseconds between the ends of successive calls, none of which is waited for."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(marks)]


def host_ms(run: Callable[[], Any], times: int) -> list[float]:
    """Milliseconds until each of some calls has returned, from an idle device."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return found


def captured(run: Callable[[], Any], times: int = 1) -> Callable[[], Any]:
    """`times` calls as one CUDA graph, which is replayed; on a CPU the calls themselves."""
    if not ON_GPU:
        return lambda: [run() for _ in range(times)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Backward runs on autograd's thread, whose own calls must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(times):
            run()
    return graph.replay


def bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy from the device to itself."""
    source = torch.empty(1 << (29 if ON_GPU else 16), device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    ms = statistics.median(intervals(lambda: target.copy_(source), 10)[1:])
    return 2 * source.nbytes / max(1e-6, ms * 1e-3)


def gpu_work(run: Callable[[], Any]) -> Row:
    """Of a call, by CUPTI: kernels and copies summed, when any of them ran (ms), and their number."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    on_gpu = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    work = (e for e in on_gpu if not e.is_user_annotation and not e.name.endswith(" Sync"))
    spans = sorted((e.time_range.start, e.time_range.end) for e in work)
    busy = reached = 0.0
    for begin, end in spans:  # kernels on several streams overlap
        busy, reached = busy + max(0.0, end - max(begin, reached)), max(reached, end)
    return {"kernels_ms": sum(b - a for a, b in spans) / 1e3, "any_ms": busy / 1e3, "launches": len(spans)}


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


def clean() -> None:
    """Give back the memory of what is no longer referred to."""
    gc.collect()
    torch.cuda.empty_cache()


def one_rank() -> None:
    """Process groups of one rank, and Megatron's."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    backend = "nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
