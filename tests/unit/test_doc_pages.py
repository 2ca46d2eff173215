"""README and docs: generated tables are current, commands run, numbers come from files."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
import doc_tables  # noqa: E402
from support_matrix import FEATURES, GROUPS, UNTESTED  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, ROOT / "examples" / "README.md", ROOT / "patches" / "README.md"]
NEEDS = {"gpu", "network", "minutes", "checkout", "cluster"}


class Block(NamedTuple):
    """Commands of a page, and the comment in front of them: `needs: a, b` or `tested by: a test`."""

    page: str
    needs: frozenset[str]
    tested_by: str
    code: str


def blocks():
    for page in ALL_PAGES:
        for mark, words, code in re.findall(
            r"(?:<!-- (needs|tested by): ([^>]*?) -->\n)?^```bash\n(.*?)^```$",
            page.read_text(),
            re.DOTALL | re.MULTILINE,
        ):
            needs = frozenset(words.split(", ")) if mark == "needs" else frozenset()
            yield Block(str(page.relative_to(ROOT)), needs, words if mark == "tested by" else "", code)


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if not block.needs and not block.tested_by]
SLOW = [block for block in BLOCKS if block.needs == {"minutes"}]


def name_of(block):
    return f"{block.page}:{block.code.split()[0]}"


def assert_a_test(name):
    """`tests/file.py::function` exists."""
    file, _, function = name.partition("::")
    path = ROOT / file
    assert path.exists(), name
    found = {node.name for node in functions_of(path)}
    assert function in found, name


@functools.cache
def functions_of(path):
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("table", doc_tables.TABLES)
def test_generated_tables_are_current(table):
    """`python scripts/doc_tables.py` writes them anew."""
    file, make = doc_tables.TABLES[table]
    page = (ROOT / file).read_text()
    assert page == doc_tables.filled(page, table, make())


def test_memory_of_a_step_has_columns_where_it_was_measured(tmp_path, monkeypatch):
    folder = tmp_path / "docs" / "results" / "gpu_2026-12-01"
    folder.mkdir(parents=True)
    rows = [{"section": "3b", "name": f"micro-batch 4, {form}", "wall_ms": 8} for form in ("vanilla", "mhc")]
    rows[1]["wall_ms over vanilla, %"] = 0
    report = {"device": "GPU", "date": "2026-12-01", "commit": "1", "versions": {}, "rows": rows}
    monkeypatch.setattr(doc_tables, "ROOT", tmp_path)
    (folder / "step.json").write_text(json.dumps(report))
    assert "GiB" not in doc_tables.costs() and "| 3b | 4 | 8 | 8 | **+0.0 %** |\n" in doc_tables.costs()
    rows[0]["reserved_MiB"], rows[1]["reserved_MiB"] = 1024, 1536
    (folder / "step.json").write_text(json.dumps(report))
    table = doc_tables.costs()
    assert "| reserved, GiB: vanilla | mHC |\n" in table and "| 1.0 | 1.5 |\n" in table


def test_the_matrix_names_tests_that_exist():
    for feature in FEATURES:
        assert bool(feature.tests) == (feature.state != UNTESTED), feature.name
        for test in feature.tests:
            assert_a_test("tests/" + test)


def test_every_feature_is_in_a_group_and_every_group_is_a_line_of_the_readme():
    assert {feature.group for feature in FEATURES} == set(GROUPS)
    lines = doc_tables.works().splitlines()[2:]
    assert [line.split("]")[0].removeprefix("| [") for line in lines] == list(GROUPS)
    assert all(any(feature.name.replace("|", "\\|") in line for line in lines) for feature in FEATURES)


def test_a_cell_may_hold_what_separates_cells():
    assert doc_tables.table(["a"], [["`E|t`"]]) == "| a |\n| --- |\n| `E\\|t` |\n"


def test_a_refusal_that_no_run_shows_is_still_listed_as_refused(monkeypatch):
    monkeypatch.setattr(doc_tables.support_runs, "runs", list)
    row = next(line for line in doc_tables.matrix().splitlines() if line.startswith("| cross-attention"))
    assert "| refused, not shown |" in row
    models = next(line for line in doc_tables.works().splitlines() if line.startswith("| [models]"))
    assert "cross-attention" in models.split(" | ")[3] and "HybridModel" in models.split(" | ")[2]


@pytest.mark.parametrize("package", ["pipeline", "schedule"])
def test_the_page_of_the_pipeline_names_every_file_of_it(package):
    page = (ROOT / "docs" / "pipeline.md").read_text()
    start = "schedule/" if package == "schedule" else ""
    files = [path.name for path in (ROOT / "megatron_mhc" / package).glob("*.py") if path.stem != "__init__"]
    assert not [name for name in files if f"`{start}{name}`" not in page]


def test_measured_tables_are_generated():
    """A table of times, memory or percentages stands between markers, or is a result or an experiment."""
    measured = re.compile(r"^\|.*\d ?(ms|µs|us|GiB|MiB|%)( |,|\*|$)", re.MULTILINE)
    for page in PAGES:
        text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", page.read_text(), flags=re.DOTALL)
        assert not measured.search(text), (page.name, measured.search(text))


def test_result_pages_are_what_their_raw_data_gives():
    report = pytest.importorskip("benchmarks.report")
    for page in sorted((ROOT / "docs" / "results").glob("*.md")):
        files = sorted(page.with_suffix("").glob("*.json"))
        reports = {file.name: json.loads(file.read_text()) for file in files}
        assert page.read_text().startswith(report.page(reports)), page.name


def test_no_file_of_the_docs_is_named_by_its_history():
    names = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*")]
    assert not [name for name in names if re.search("again|before|_old|_new", name)]


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_commands_name_what_exists(block):
    assert block.needs <= NEEDS
    assert "network" in block.needs or not re.search("pip install|git clone|quickstart.sh", block.code)
    if block.tested_by:
        assert_a_test(block.tested_by)
    subprocess.run(["bash", "-n", "-c", block.code], check=True)
    assert "..." not in block.code, "a pattern is no command: use ```text"
    for path in re.findall(r"(?<![\w/])(?:scripts|examples|tests|benchmarks)/[\w./]*\w", block.code):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m (megatron_mhc[\w.]*|benchmarks[\w.]*)", block.code):
        assert find_spec(module), module


def run(block, folder, seconds):
    """Run a block where what it writes is not the checkout."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("runs", "build"):
            (folder / path.name).symlink_to(path)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, "\n".join(done.stdout.splitlines()[-30:])


@pytest.mark.parametrize("block", RUN, ids=name_of)
def test_commands_run(block, tmp_path):
    run(block, tmp_path, 250)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", SLOW, ids=name_of)
def test_commands_that_take_minutes_run(block, tmp_path):
    run(block, tmp_path, 850)


def test_the_first_files_of_how_a_step_runs_do_what_it_says():
    """By what each imports: who checks and registers, and who wraps."""
    step = (ROOT / "CONTRIBUTING.md").read_text().partition("1. `specs.py`")[2].partition("\n2. ")[0]
    said = {file: words for file, words in re.findall(r"`(\w+\.py)`([^`]*)", step)}
    for file, word, imported in (
        ("preparation.py", "checks", "hooks, parallel"),
        ("wrapping.py", "puts", "HyperConnectionTransformerLayer"),
    ):
        assert word in said[file] and imported in (ROOT / "megatron_mhc" / file).read_text()
    assert "hooks" not in (ROOT / "megatron_mhc" / "wrapping.py").read_text()
