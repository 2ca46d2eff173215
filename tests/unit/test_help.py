"""Every script says by --help what it does, and does nothing else."""

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_mhc.pretrain_gpt  # noqa: F401  # once, not in every process that is forked

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("scripts", "examples", "benchmarks")
SCRIPTS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.sh")
    if not path.read_text().startswith("# Sourced by")
)
PROGRAMS = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_a_shell_script_needs_nothing_to_say_what_it_does(script, word, tmp_path):
    for program in ("python", "python3", "python3.12", "python3.13", "pip", "torchrun", "nvidia-smi"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        ["bash", str(script), word], env=environment, cwd=tmp_path / "here", capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert f"bash {name_of(script)}" in done.stdout and "set -" not in done.stdout
    assert not (tmp_path / "started").exists() and not list((tmp_path / "here").iterdir())


def test_the_quickstarts_help_has_every_option():
    program = (ROOT / "examples" / "quickstart" / "run.py").read_text()
    options = set(re.findall(r'add_argument\(\s*"(--\w+)"', program))
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    assert options == {"--steps", "--out", "--cpu"} and all(f"#   {name}" in text for name in options)


def said(path, folder):
    """What a program prints for --help, where it was started, and its exit status."""
    os.chdir(folder)
    sys.argv = [str(path), "--help"]
    sys.path[:0] = [str(path.parent), str(ROOT)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            if path.parent.name == "benchmarks":
                runpy.run_module(f"benchmarks.{path.stem}", run_name="__main__")
            else:
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            if isinstance(ended.code, str):  # printed, for programs that hand their arguments on
                return ended.code, 0
            return out.getvalue(), ended.code
    return out.getvalue(), None


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_a_program_says_what_it_does_and_ends(program, tmp_path, run_ranks):
    text, status = run_ranks(1, said, program, tmp_path)[0]
    assert status == 0
    first = ast.get_docstring(ast.parse(program.read_text())).split()[:4]
    assert " ".join(first) in " ".join(text.split())
    assert not list(tmp_path.iterdir())
