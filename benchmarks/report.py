"""Make one page of results of a folder of raw JSON, as all.sh leaves it.

    python -m benchmarks.report runs/benchmarks [--docs docs/results]

writes docs/results/<gpu>_<date>.md, with device, versions and commit in the head and a table for each
section, and copies the raw JSON and the figures into the folder docs/results/<gpu>_<date>/. All files must be
of one device, one set of versions and one commit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, tables

TITLES = {
    "step": "Training steps",
    "kernels": "Connections by themselves",
    "memory": "Activation memory",
    "decode": "Generating",
    "multi_gpu": "Several GPUs",
    "diagnostics": "Logging",
    "parity": "Parity with one GPU",
    "curves": "Loss curves",
    "resume": "Checkpoints between layouts, and a rank that dies",
    "losses": "Losses of small models",
    "stability": "Stability",
}
# What a table leaves out: the raw file has it.
HIDDEN = {"loss", "least_ms", "states_MiB", "flags", "exit", "steps"}


def page(reports: dict[str, Row]) -> str:
    """The Markdown page of reports, {file name: report}.

    Raises:
        ValueError: they are of several devices, versions or commits.
    """
    first_name, first = next(iter(reports.items()))
    for name, other in reports.items():
        for key in ("device", "versions", "commit", "driver"):
            if other.get(key) != first.get(key):
                raise ValueError(
                    f"{name}: {key} {other.get(key)}, in {first_name} {first.get(key)}: run one of them again"
                )
    dates = sorted({report["date"] for report in reports.values()})
    versions = ", ".join(f"{name} {found}" for name, found in first["versions"].items() if found)
    lines = [f"# {first['device']}, {dates[-1]}", ""]
    lines += [f"Commit {first['commit']}; {versions}; driver {first.get('driver', '-')}."]
    lines += [f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} by `benchmarks/all.sh`."]
    lines += ["What the columns are: `python -m benchmarks.NAME --help`."]
    kinds = dict.fromkeys([*TITLES, *(report["benchmark"] for report in reports.values())])
    for kind in kinds:
        mine = {name: report for name, report in reports.items() if report["benchmark"] == kind}
        if not mine:
            continue
        lines += ["", f"## {TITLES.get(kind, kind)}", "", "Raw: " + ", ".join(f"`{name}`" for name in mine)]
        rows = [{k: v for k, v in row.items() if k not in HIDDEN} for r in mine.values() for row in r["rows"]]
        lines.append(tables(rows))
    bad = [row for report in reports.values() for row in report["rows"] if "failed" in row]
    if bad:
        lines += ["", "## Failed", "", *(f"- {row['section']}: {row['name']}" for row in bad)]
    return "\n".join(lines) + "\n"


def publish(folder: Path, docs: Path) -> Path:
    """Write the page of a folder's reports, and copy them beside it; returns the page's path."""
    files = sorted(file for file in folder.glob("*.json") if not file.name.endswith(".partial.json"))
    if not files:
        raise ValueError(f"{folder}: no reports; make them by benchmarks/all.sh --out {folder}")
    reports = {file.name: json.loads(file.read_text()) for file in files}
    text = page(reports)
    device = next(iter(reports.values()))["device"].removeprefix("NVIDIA ")
    name = re.sub(r"\W+", "_", device).strip("_").lower()
    target = docs / f"{name}_{max(report['date'] for report in reports.values())}"
    target.mkdir(parents=True, exist_ok=True)
    pictures = [file for file in folder.glob("*.png")]
    for file in [*files, *pictures]:
        shutil.copy(file, target / file.name.replace(".partial", ""))
    figures = [
        f"![{file.stem}]({target.name}/{file.name.replace('.partial', '')})" for file in sorted(pictures)
    ]
    page_ = docs / f"{target.name}.md"
    page_.write_text(text + ("\n## Figures\n\n" + "\n\n".join(figures) + "\n" if figures else ""))
    return page_


def adopt(source: Path, out: Path) -> None:
    """Make a report of a JSON file with a list of rows, or with lists of them by section."""
    from benchmarks.harness import Report

    name = out.name.partition(".")[0]
    out.unlink(missing_ok=True)
    report = Report(out, name, {})
    found: Any = json.loads(source.read_text()) if source.exists() else {}
    lists = (
        {name: found} if isinstance(found, list) else {k: v for k, v in found.items() if isinstance(v, list)}
    )
    for section, rows in lists.items():
        for row in (row for row in rows if isinstance(row, dict)):
            title = row.get("name") or " ".join(str(row[k]) for k in ("model", "seed") if k in row)
            bad = {"failed": "not healthy, see its log"} if row.get("ok") is False else {}
            report.add(section, title, {k: v for k, v in row.items() if k != "name"} | bad)


def close(path: Path, piece: str, status: int, seconds: int, log: Path) -> None:
    """Note how a piece ended; one that failed outside of its rows gets a row that says so."""
    if path.exists():
        found = json.loads(path.read_text())
    else:
        from benchmarks.harness import Report

        found = Report(None, piece, {}).head | {"rows": []}
    for row in found["rows"]:
        if row.pop("running", False):
            row["failed"] = "the run ended in its midst, see its log"
    if status and not any("failed" in row for row in found["rows"]):
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        told = [line for line in lines if "Error" in line][-1:] or lines[-1:] or ["no word"]
        found["rows"].append(
            {"section": piece, "name": "all of it", "failed": f"exit {status}: {told[0][:300]}"}
        )
    path.write_text(json.dumps(found | {"exit": status, "seconds": seconds}, indent=1) + "\n")


def reopen(done: Path, partial: Path) -> None:
    """Make a finished piece one that goes on with the rows that failed."""
    found = json.loads(done.read_text())
    found["rows"] = [row for row in found["rows"] if "failed" not in row]
    partial.write_text(json.dumps(found, indent=1) + "\n")
    done.unlink()


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["--adopt"]:
        return adopt(Path(words[1]), Path(words[2]))
    if words[:1] == ["--reopen"]:
        return reopen(Path(words[1]), Path(words[2]))
    if words[:1] == ["--close"]:
        return close(Path(words[1]), words[2], int(words[3]), int(words[4]), Path(words[5]))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    options = parser.parse_args(words)
    print(f"wrote {publish(options.folder, options.docs)}")
    return None


if __name__ == "__main__":
    main()
