"""Starts a program that writes a report, and again behind a row at which it failed."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any


def supervise(command: list[str], out: Path, limit: float, **how: Any) -> int:
    """Run a command until all rows of its report are there; returns its exit status.

    A row that fails or hangs ends the command, which then goes on behind it. One that ends outside of its
    rows, or twice at the same, is not tried again.

    Args:
        limit: seconds for everything.
        how: of subprocess.Popen.
    """
    deadline, tried = time.monotonic() + limit, set()
    while True:
        process = subprocess.Popen(command, **how)
        try:
            status = process.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            stop(process)
            print(f"{limit:.0f} s are over", flush=True)
            return 124
        except BaseException:
            stop(process)
            raise
        rows = json.loads(out.read_text())["rows"] if out.exists() else []
        running = frozenset((row["section"], row["name"]) for row in rows if row.get("running"))
        if not status or not running or running in tried:
            return status
        tried.add(running)
        print(f"failed, going on behind: {sorted(running)}", flush=True)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Have torchrun end its ranks, which are no children of this process, and itself."""
    process.terminate()
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
