"""What the tests that the support matrix names did where they ran: docs/results/support/*.json.

MEGATRON_MHC_TEST_REPORT=docs/results/support/cpu.json python -m pytest $(python tests/support_runs.py)
python tests/support_runs.py build/support.json   # fails where this run shows less than the kept ones

Under MEGATRON_MHC_GPU_TESTS=1 and =nccl the first line is that of gpu.json and nccl.json; bridge.json and
releases.json are runs of what is installed beside the plugin, Megatron-Bridge or other Megatrons. A file
holds device, date, commit and versions, and of each test that a row names how many of its cases passed, and
which failed or were skipped. A test that a file does not name was not part of that run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support_matrix import FEATURES, REFUSED, YES, Feature

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "results" / "support"
NOT_SHOWN = "not shown"
Run = dict[str, Any]  # the contents of a file

NAMED = frozenset(test for feature in FEATURES for test in feature.tests)


def kind(path: Path, mode: str) -> str:
    """Of a run that is to be written there; `mode` as MEGATRON_MHC_GPU_TESTS."""
    beside = path.stem if path.stem in ("bridge", "releases") else "cpu"
    return {"": beside, "1": "gpu"}.get(mode, mode)


class Recorder:
    """A plugin of pytest, of the process that all workers report to: writes a file as the session ends.

    Args:
        path: of the file.
        kind: of `kind`.
        named: "file under tests/::function" of each test whose outcome is kept.
    """

    def __init__(self, path: Path, kind: str, named: Iterable[str] = NAMED):
        self.path, self.kind, self.named = path.absolute(), kind, frozenset(named)
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep the worst of set-up, call and tear-down; what was skipped never gets to its call."""
        worst = {"passed": 0, "skipped": 1, "failed": 2}
        known = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(known, report.outcome, key=worst.__getitem__)

    def pytest_sessionfinish(self) -> None:
        from benchmarks.harness import machine

        about = machine()
        tests: dict[str, dict[str, Any]] = {}
        for node, outcome in sorted(self.outcomes.items()):
            name, _, case = node.removeprefix("tests/").partition("[")
            if name not in self.named:
                continue
            found = tests.setdefault(name, dict(passed=0, failed=[], skipped=[]))
            if outcome == "passed":
                found["passed"] += 1
            else:
                found[outcome].append(case.removesuffix("]"))
        head = dict(kind=self.kind) | {key: about[key] for key in ("device", "date", "commit", "versions")}
        lines = (f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in tests.items())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(head)[:-1] + ', "tests": {\n' + ",\n".join(lines) + "\n}}\n")


def runs(folder: Path = FOLDER) -> list[Run]:
    """The runs that the repository keeps."""
    return [json.loads(file.read_text()) | dict(file=file.name) for file in sorted(folder.glob("*.json"))]


def missing(feature: Feature, runs: Iterable[Run]) -> str | None:
    """The first of a row's tests that no run shows, and why; None where all passed and none failed."""
    runs = [run for run in runs if feature.on in ("", run["kind"])]
    places = {"gpu": "on a GPU", "nccl": "on two GPUs", "bridge": "beside it", "releases": "beside them"}
    where = f" {places[feature.on]}" if feature.on else ""
    for test in feature.tests:
        found = [run["tests"][test] for run in runs if test in run["tests"]]
        name = test.partition("::")[2].removeprefix("test_")
        if any(one["failed"] for one in found):
            return f"{name} failed"
        if not any(one["passed"] for one in found):
            return f"{name} was skipped" if found else f"{name} did not run{where}"
    return None


def state(feature: Feature, runs: Iterable[Run]) -> tuple[str, str | None]:
    """A row's state, which is NOT_SHOWN where its tests were skipped or failed; and which of them was."""
    why = missing(feature, runs) if feature.state in (YES, REFUSED) else None
    return (NOT_SHOWN if why else feature.state), why


def contradicted(run: Run, kept: list[Run]) -> list[str]:
    """The tests that passed in a kept run of the same kind, and failed or were skipped in this one."""
    same = [one["tests"] for one in kept if one["kind"] == run["kind"]]
    passed = {test for tests in same for test, found in tests.items() if found["passed"]}
    return [
        test
        for test, found in run["tests"].items()
        if test in passed and (found["failed"] or not found["passed"])
    ]


def named(mode: str = "") -> list[str]:
    """The tests that the matrix names and that such a machine can run; `mode` as MEGATRON_MHC_GPU_TESTS."""
    if mode == "nccl":
        names = {test for feature in FEATURES for test in feature.tests if feature.on == "nccl"}
    else:
        on_gpu = {test for test in NAMED if test.startswith("gpu/")}
        names = on_gpu | {test for test in NAMED if test.startswith("ops/")} if mode else NAMED - on_gpu
    return sorted(f"tests/{test}" for test in names)


def main() -> None:
    """Print the tests that the matrix names for this kind of machine, or check a run's file."""
    if len(sys.argv) == 1:
        print(*named(os.environ.get("MEGATRON_MHC_GPU_TESTS", "")), sep="\n")
        return
    found = contradicted(json.loads(Path(sys.argv[1]).read_text()), runs())
    for test in found:
        print(f"{test} failed or was skipped: the support matrix says more than this run shows")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
