"""Every --flag that a message, a docstring or a page names exists."""

import ast
import re
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from megatron_mhc import door_refusals, layer_refusals, refusals
from megatron_mhc.pipeline import refusals as of_pipeline
from megatron_mhc.pipeline.costs import Times
from megatron_mhc.pipeline.simulate import LAYOUT
from megatron_mhc.releases import OWN_SWITCHES

ROOT = Path(__file__).resolve().parents[2]
# Not behind a word, and no arrow: a--b, --a-->.
FLAG = re.compile(r"--\w[^\n-]*-->|(?<![\w>-])(--[a-z][\w-]*[a-z0-9])")
OTHER_MEGATRONS = {"--" + name.replace("_", "-") for name in OWN_SWITCHES} | {"--num-residual-streams"}
# Of programs that a page or a message has the reader run, or the package runs.
TOOLS = {
    "git": "--check",
    "pip": "--no-deps",
    "pytest": "--dist",
    "srun": "--kill-on-bad-exit",
    "lm_eval": "--batch_size --model --model_args --tasks",
    "nvcc": "--gpu-architecture --std",
    "nvidia-smi": "--format --query-gpu",
    "uv": "--directory --env-file --extra --group --project --python --with --with-editable",
    "python": "--check-hash-based-pycs",
    "cProfile": "--outfile --sort",
    "debugpy": "--connect --listen --log-to",
}
PARSERS = """
import argparse, sys
from megatron_mhc.testing import cpu
cpu.install(pretend_cuda=True)
from megatron.training.arguments import add_megatron_arguments
from torch.distributed.run import get_args_parser
from megatron_mhc.pretrain_gpt import add_args
parser = argparse.ArgumentParser(allow_abbrev=False)
add_args(add_megatron_arguments(parser))
for one in (parser, get_args_parser()):
    print(*(name for action in one._actions for name in action.option_strings))
"""


@cache
def of_megatron():
    """The flags of Megatron's parser and ours, and those of torchrun."""
    command = [sys.executable, "-W", "ignore", "-c", PARSERS]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    return [set(line.split()) for line in lines[-2:]]


def of_programs():
    """Those of this repository's programs, as they are added to a parser."""
    found = {f"--{name}" for name in LAYOUT} | {"--" + f.name.replace("_", "-") for f in fields(Times)}
    for folder in ("megatron_mhc", "scripts", "examples", "benchmarks", "patches"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                    found |= {word for word in words if str(word).startswith("--")}
    return found


def known():
    tools = {flag for flags in TOOLS.values() for flag in flags.split()}
    return set().union(*of_megatron(), of_programs(), OTHER_MEGATRONS, tools, {"--help", "--mhc"})


def flags_of(text):
    return [flag for flag in FLAG.findall(text) if flag]


def named_in_package():
    """(place, flag), of all strings of the package; a concatenated one is one."""
    for path in sorted((ROOT / "megatron_mhc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from ((f"{path.name}:{node.lineno}", flag) for flag in flags_of(node.value))


def named_in_pages():
    # Not those of docs/experiments, which are of their commits.
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    for page in (*pages, ROOT / "examples/README.md", ROOT / "patches/README.md"):
        yield from ((page.name, flag) for flag in flags_of(page.read_text()))


def named_in_refusals():
    """Where a flag is made of a setting's name."""
    for module in (refusals, door_refusals, layer_refusals, of_pipeline):
        for name, rows in vars(module).items():
            if isinstance(rows, tuple) and rows and isinstance(rows[0], refusals.Refusal):
                texts = [f"{row.what} {row.remedy}" for row in rows]
                yield from ((name, flag) for text in texts for flag in flags_of(text))


@pytest.mark.parametrize("named", [named_in_package, named_in_pages, named_in_refusals])
def test_every_flag_that_is_named_exists(named):
    flags = known()
    found = list(named())
    assert len(found) > 100
    assert [f"{place} names {flag}" for place, flag in found if flag not in flags] == []


def test_settings_that_are_spelled_as_of_a_config_have_no_flag():
    from megatron.core.transformer import TransformerConfig

    of_config = {f.name for f in fields(TransformerConfig)}
    for name in refusals.WITHOUT_FLAG:
        assert name in of_config and "--" + name.replace("_", "-") not in of_megatron()[0]


def test_a_flag_that_does_not_exist_is_found():
    assert flags_of("give --no-such-flag, or `--variable-seq-lengths`") == [
        "--no-such-flag",
        "--variable-seq-lengths",
    ]
    assert not {"--variable-seq-lengths", "--align-grad-reduce"} & known()
    assert flags_of("x --pre--> y --connection k--> z a--b") == []
