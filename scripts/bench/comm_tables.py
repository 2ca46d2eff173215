"""The tables of docs/pipeline.md and docs/multi_gpu.md from the files that the benchmarks wrote.

    python scripts/bench/comm_tables.py docs/results/multi_gpu_nvlink.json docs/results/pipeline_moe_h200.json

Takes reports of multi_gpu.py and results.json of pipeline.py, and prints markdown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipeline_model import NOTED, PARTS, WITHOUT

Row = dict[str, Any]
MEASURED = ("step", "simulated", "simulated p2p", "simulated without compute", "message", "peak GiB")
PROFILED = ("compute", "exposed p2p", "exposed all-to-all", "exposed collectives", "without compute", "idle")
MODELS = [column for column, left_out in WITHOUT.items() if left_out]
RESUMED = ("error", "last step", "exit", "seconds", "names rank 1", "ok")


def number(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int) or value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 0.01 else f"{value:.3g}"


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *([number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def multi_gpu(report: Row) -> list[str]:
    """Parity and curves by layout, the worst of their rows; measurements and profiles side by side."""
    settings = {key: value for key, value in report.items() if key not in ("rows", "links")}
    parts = [f"`{json.dumps(settings)}`", f"```\n{report.get('links', '').strip()}\n```"]
    sections: dict[str, dict[str, Row]] = {}
    for row in report["rows"]:
        sections.setdefault(row["section"], {})[row["name"]] = row
    for section, columns in (("parity", ["loss", "gradients"]), ("curves", ["mean error", "noise", "last"])):
        groups: dict[tuple[str, str], list[Row]] = {}
        for name, row in sections.get(section, {}).items():
            layout, kind, _, schedule = name.split(", ")
            # NONE of multi_gpu_parity.py where there is no pipeline
            groups.setdefault((f"{layout}, {kind}", schedule), []).append(row)
        if groups:
            rows = [
                [*key, len(found), *(_worst(found, column) for column in columns), _all_well(found)]
                for key, found in groups.items()
            ]
            parts.append(table([section, "schedule", "rows", *columns, "within"], rows))
    measured, profiled = sections.get("measure", {}), sections.get("profile", {})
    if names := list(dict.fromkeys([*measured, *profiled])):
        rows = []
        for name in names:
            times, seen = measured.get(name, {}), profiled.get(name, {})
            failed = times.get("failed") or seen.get("failed") or ""
            rows.append([name, *map(times.get, MEASURED), *map(seen.get, PROFILED), failed])
        parts.append(table(["ms a step", *MEASURED, *PROFILED, "failed"], rows))
    if resumed := sections.get("resume"):
        rows = [[name, *map(row.get, RESUMED)] for name, row in resumed.items()]
        parts.append(table(["resume", *RESUMED], rows))
        parts += [f"```\n{line.strip()}\n```" for row in resumed.values() for line in row.get("messages", ())]
    return parts


def _worst(rows: list[Row], column: str) -> float | None:
    return max((row[column] for row in rows if column in row), default=None)


def _all_well(rows: list[Row]) -> bool:
    return all(row.get("ok", False) for row in rows)


def pipeline(report: Row) -> list[str]:
    """One line for each program; what the simulator says, in ms and as a part of what was measured."""
    columns = ["step", "exposed messages", "messages", "hidden", "exposed all-to-all", "simulated"]
    columns += ["simulated / measured", "peak GiB", "failed"]
    rows, models, noted = [], [], []
    for name, run in report["runs"].items():
        reason = run.get("failed", "").strip().splitlines()[-1:]
        rows.append([name, *map(run.get, columns[:-1]), *(reason or ["-"])])
        if other := run.get("other models"):
            cells = [run["simulated / measured"], *(other[model] / run["step"] for model in MODELS)]
            models.append([name, *cells, *(other[part] / run[part] for part in PARTS)])
        if NOTED[0] in run:
            noted.append([name, *(run[column][1] / run[column][0] for column in NOTED)])
    parts = [f"{report['device']}, `{json.dumps(report['arguments'])}`", table(["ms", *columns], rows)]
    if link := report.get("link"):
        parts.append(f"link: `{json.dumps({key: link[key] for key in link if key != 'asked'})}`")
    if models:
        header = ["simulated / measured", "step", *MODELS, *(f"step {part}" for part in PARTS)]
        parts.append(table(header, models))
    if noted:
        parts.append(table(["simulated / measured, given", *NOTED], noted))
    for name, run in report["runs"].items():
        keys = [key for key in run if key.startswith("combine end to post end")]
        late = [[key.removeprefix("combine end to post end, "), *run[key].values()] for key in keys]
        if any(len(line) > 1 for line in late):
            parts.append(
                table([f"{name}: from a combine's end to its post_res's, ms", "median", "p95"], late)
            )
    return parts


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit(__doc__)
    for path in paths:
        report = json.loads(Path(path).read_text())
        parts = pipeline(report) if "runs" in report else multi_gpu(report)
        print(f"## {Path(path).name}\n", *parts, sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
