"""The support matrix says of each row what its tests did where they ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import support_runs
from support_matrix import REFUSED, UNTESTED, YES, Feature
from support_runs import NOT_SHOWN, contradicted, missing, state

ROOT = Path(__file__).resolve().parents[2]
PASSED, SKIPPED = dict(passed=2, failed=[], skipped=[]), dict(passed=0, failed=[], skipped=["a"])
FAILED = dict(passed=3, failed=["b"], skipped=[])


def run(kind="cpu", **tests):
    return dict(kind=kind, tests={f"unit/test_x.py::test_{name}": found for name, found in tests.items()})


def feature(*names, declared=YES, on=""):
    return Feature("", declared, "", tuple(f"unit/test_x.py::test_{name}" for name in names), on)


@pytest.mark.parametrize(
    "row, runs, why",
    [
        (feature("a"), [run(a=PASSED)], None),
        (feature("a", declared=REFUSED), [run(a=PASSED)], None),
        (feature("a"), [run(a=SKIPPED), run("gpu", a=PASSED)], None),
        (feature("a"), [run(a=SKIPPED)], "a was skipped"),
        (feature("a", declared=REFUSED), [run(a=SKIPPED)], "a was skipped"),
        (feature("a"), [run(a=FAILED)], "a failed"),
        (feature("a"), [run(a=PASSED), run("gpu", a=FAILED)], "a failed"),
        (feature("a"), [], "a did not run"),
        (feature("a", "b"), [run(a=PASSED)], "b did not run"),
        (feature("a", "b"), [run(a=PASSED), run("gpu", b=PASSED)], None),
        (feature("a", on="nccl"), [run(a=PASSED)], "a did not run on two GPUs"),
        (feature("a", on="nccl"), [run("nccl", a=PASSED)], None),
        (feature(declared=UNTESTED), [], None),
    ],
)
def test_a_row_is_shown_where_all_its_tests_passed_and_none_failed(row, runs, why):
    assert missing(row, runs) == why
    assert state(row, runs) == (NOT_SHOWN if why else row.state, why)


def test_a_run_contradicts_what_passed_on_its_kind_of_machine_and_not_here():
    kept = [run(a=PASSED, b=PASSED, c=PASSED, d=SKIPPED), run("gpu", d=PASSED)]
    names = ["unit/test_x.py::test_b", "unit/test_x.py::test_c"]
    assert contradicted(run(a=PASSED, b=SKIPPED, c=FAILED, d=SKIPPED), kept) == names
    assert contradicted(run(a=PASSED), kept) == []  # of a part of the suite
    assert contradicted(run("gpu", a=SKIPPED), kept) == []


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "worksteal")], ids=["alone", "workers"])
def test_a_session_writes_down_what_each_named_test_did(tmp_path, workers):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(
        "import pathlib, support_runs\n"
        "def pytest_configure(config):\n"
        "    if not hasattr(config, 'workerinput'):\n"
        "        named = [f'test_x.py::test_{name}' for name in ('passed', 'failed', 'skipped', 'broken')]\n"
        "        recorder = support_runs.Recorder(pathlib.Path('out') / 'cpu.json', 'cpu', named)\n"
        "        config.pluginmanager.register(recorder)\n"
    )
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "numbers = pytest.mark.parametrize('number', range(4))\n"
        "@numbers\n"
        "def test_passed(number): pass\n"
        "@numbers\n"
        "def test_failed(number): assert number % 2\n"
        "@numbers\n"
        "def test_skipped(number): number > 2 or pytest.skip()\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    raise RuntimeError\n"
        "def test_broken(broken): pass\n"
        "def test_of_no_row(): pass\n"
    )
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | dict(PYTHONPATH=":".join(paths), MHC_COMMIT="abc")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "cpu.json").read_text())
    assert (
        found["kind"] == "cpu" and found["commit"] == "abc" and found["date"] and found["versions"]["torch"]
    )
    assert found["tests"] == {
        "test_x.py::test_broken": dict(passed=0, failed=[""], skipped=[]),
        "test_x.py::test_failed": dict(passed=2, failed=["0", "2"], skipped=[]),
        "test_x.py::test_passed": dict(passed=4, failed=[], skipped=[]),
        "test_x.py::test_skipped": dict(passed=1, failed=[], skipped=["0", "1", "2"]),
    }


def test_every_run_that_is_kept_says_where_and_of_what_it_was():
    assert "cpu" in [found["kind"] for found in support_runs.runs()]
    for found in support_runs.runs():
        assert found["device"] and found["date"] and found["versions"]["megatron-core"]
        assert not found["commit"].endswith("+"), "files differed from the commit"
