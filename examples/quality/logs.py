"""What is kept of a quality run: one small JSON, made from Megatron's log and TensorBoard folder.

Losses and gradient norms are means over equal stretches of steps, at most POINTS of them.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_mhc.run_logs import read_run

POINTS = 120
ITERATION = re.compile(r"iteration +(\d+)/ *\d+ \|(.*)")
TIME = re.compile(r"elapsed time per iteration \(ms\): ([0-9.]+)")
LOSS = re.compile(r"lm loss: ([-+0-9.EeNnAaIiFf]+)")
NORM = re.compile(r"grad norm: ([-+0-9.eNnAaIiFf]+)")
VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+)")
FINAL = re.compile(r"validation loss at iteration (\d+) on test set \| lm loss value: (\S+)")
PARAMETERS = re.compile(r"number of parameters on \([\w, ]+\) model parallel rank \([0, ]+\): (\d+)")
NO_LOGS = ("data.json", "tokenizer.json")
GAINS = ("composite_gain_forward", "composite_gain_backward", "gain_forward", "gain_backward")


def read(folder: Path) -> list[dict[str, Any]]:
    """All logs of a folder, by name."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in NO_LOGS]
    return [json.loads(path.read_text()) for path in paths]


def furthest(every: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of logs of one name, the one that has come furthest; by name."""
    found: dict[str, dict[str, Any]] = {}
    for log in every:
        old = found.get(log["name"])
        if old is None or (log["finished"], log["reached"]) > (old["finished"], old["reached"]):
            found[log["name"]] = log
    return [found[name] for name in sorted(found)]


def means(points: dict[int, float], digits: int = 4) -> list[list[float]]:
    """Means over equal stretches of steps: [[last step of a stretch, mean], ...]."""
    steps = sorted(points)
    width = max(1, math.ceil(len(steps) / POINTS))
    parts = [steps[i : i + width] for i in range(0, len(steps), width)]
    return [[part[-1], round(statistics.fmean(points[step] for step in part), digits)] for part in parts]


def parse(text: str) -> dict[str, Any]:
    """What a log says; of a step that a resumed run repeated, the later."""
    losses: dict[int, float] = {}
    norms: dict[int, float] = {}
    times: dict[int, float] = {}
    for line in text.splitlines():
        if not (found := ITERATION.search(line)):
            continue
        step = int(found[1])
        for pattern, into in ((LOSS, losses), (NORM, norms), (TIME, times)):
            if value := pattern.search(found[2]):
                into[step] = float(value[1])
    diverged = next((step for step, loss in sorted(losses.items()) if not math.isfinite(loss)), None)
    ends = [(int(step), float(value)) for step, value in FINAL.findall(text)]
    last, final = ends[-1] if ends else (0, math.nan)
    validation = dict(VALIDATION.findall(text))
    size = PARAMETERS.search(text)
    settled = [ms for step, ms in sorted(times.items())][len(times) // 3 :]
    return {
        "reached": max(last, *losses, 0),
        "diverged": diverged,
        "parameters": int(size[1]) if size else None,
        "final": final if math.isfinite(final) else None,
        "validation": sorted([int(step), float(value)] for step, value in validation.items()),
        "loss": means({step: loss for step, loss in losses.items() if math.isfinite(loss)}),
        "gradient_norm": means({step: norm for step, norm in norms.items() if math.isfinite(norm)}),
        "step_ms": round(statistics.median(settled), 3) if settled else None,
    }


def gains(folder: Path) -> dict[str, list[list[float]]]:
    """The gains of the worst sub-layer by step; empty without mHC or TensorBoard."""
    if not any(folder.glob("events.*")):
        return {}
    try:
        scalars = read_run(str(folder)).scalars
    except SystemExit:  # no tensorboard to read it with
        return {}
    found = {name: scalars.get(f"mhc/{name}", {}) for name in GAINS}
    return {
        name: [[step, float(f"{value:.4g}")] for step, value in sorted(values.items())]
        for name, values in found.items()
        if values
    }
