"""patches/: that they apply and revert, and do what the launch door does.

Megatron-LM's code is not here. The file that a patch is tried on is made of the patch's own lines at their
line numbers; with MEGATRON_LM=/path/to/Megatron-LM it is the real one, known by its git hash.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pretrain_runs
import pytest

from megatron_mhc import MHCConfig, launch
from megatron_mhc.arguments import use_mhc

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted((ROOT / "patches").glob("*/*.patch"))
MEGATRON_LM = os.environ.get("MEGATRON_LM")
needs_megatron_lm = pytest.mark.skipif(not MEGATRON_LM, reason="MEGATRON_LM names no Megatron-LM checkout")
FLAGS = PATCHES[0]


def target(patch):
    return re.search(r"^--- a/(\S+)$", patch.read_text(), re.M).group(1)


def blobs(patch):
    return re.search(r"^index ([0-9a-f]{40})\.\.([0-9a-f]{40})", patch.read_text(), re.M).groups()


def lines(patch):
    """[(old line number, mark, text)] of all hunks; an added line has the number of the next old one."""
    found, number = [], 0
    for line in patch.read_text().splitlines():
        if match := re.match(r"@@ -(\d+)", line):
            number = int(match.group(1))
        elif number and line[:1] in (" ", "-", "+"):
            found.append((number, line[0], line[1:]))
            number += line[0] != "+"
    return found


def added(patch):
    return "\n".join(text for _, mark, text in lines(patch) if mark == "+")


def sides(patch):
    """A file that has what the patch asks for, and what it must become."""
    old = [""] * max(number for number, _, _ in lines(patch))
    inserted: dict[int, list[str]] = {}
    removed = set()
    for number, mark, text in lines(patch):
        if mark == "+":
            inserted.setdefault(number, []).append(text)
        else:
            old[number - 1] = text
            removed |= {number} if mark == "-" else set()
    new = []
    for number, text in enumerate(old, 1):
        new += inserted.get(number, []) + ([] if number in removed else [text])
    return "\n".join(old) + "\n", "\n".join(new) + "\n"


def git_apply(folder, patch, *options):
    command = ["git", "apply", "--whitespace=error", *options, str(patch)]
    # Outside of a repository git applies to files as they lie there.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def git_hash(file):
    command = ["git", "hash-object", "--no-filters", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_patch_applies_and_reverts(tmp_path, patch):
    file = tmp_path / target(patch)
    before, after = sides(patch)
    file.write_text(before)
    assert git_apply(tmp_path, patch, "--check").returncode == 0
    assert git_apply(tmp_path, patch).returncode == 0
    assert file.read_text() == after != before
    assert git_apply(tmp_path, patch, "--check").returncode != 0  # a second time
    assert git_apply(tmp_path, patch, "--reverse").returncode == 0
    assert file.read_text() == before


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_patch_refuses_a_file_that_has_changed_there(tmp_path, patch):
    file = tmp_path / target(patch)
    before, _ = sides(patch)
    context = next(text for _, mark, text in lines(patch) if mark == "-")
    file.write_text(before.replace(context, context + " # changed"))
    assert git_apply(tmp_path, patch, "--check").returncode != 0


@needs_megatron_lm
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_patch_applies_to_and_reverts_from_the_real_file(tmp_path, patch):
    file = tmp_path / target(patch)
    shutil.copy(Path(MEGATRON_LM) / target(patch), file)
    before, after = blobs(patch)
    assert git_hash(file) == before, f"{MEGATRON_LM} is not at the patch's tag"
    assert git_apply(tmp_path, patch).returncode == 0
    assert git_hash(file) == after
    assert git_apply(tmp_path, patch, "--reverse").returncode == 0
    assert git_hash(file) == before


def parser_of_the_patch(modelopt):
    """The parser that the patch's own lines make of Megatron's."""
    source = added(FLAGS)
    names = {"has_nvidia_modelopt": modelopt, "add_modelopt_args": add_modelopt_args}
    exec(re.search(r"^from megatron_mhc.*$", source, re.M).group(), names)
    expression = re.search(r"extra_args_provider=(lambda parser:.*?\n\s+\)),", source, re.S).group(1)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--spec", nargs="*", default=None)
    return eval(expression, names)(parser)


def add_modelopt_args(parser):
    parser.add_argument("--modelopt-enabled", action="store_true")
    return parser


@pytest.mark.parametrize("modelopt", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        ["--mhc-num-residual-streams", "4"],
        ["--mhc-preset", "deepseek_v4", "--mhc-sinkhorn-iterations", "7", "--mhc-load-dense"],
        ["--mhc-h-res", "unconstrained", "--mhc-init-gating-factor", "0"],
    ],
    ids=" ".join,
)
def test_patched_script_builds_what_the_launch_door_builds(monkeypatch, words, modelopt):
    from megatron_mhc.specs import gpt_mhc_spec

    monkeypatch.delenv("MEGATRON_MHC", raising=False)
    args = parser_of_the_patch(modelopt).parse_args(words)
    model = types.SimpleNamespace(transformer_layer_spec="Megatron's")
    names = {"use_mhc": use_mhc, "args": args, "model_cfg": model}
    exec(re.search(r"^    (use_mhc\(.*\))$", added(FLAGS), re.M).group(1), names)

    argv, mhc = launch.prepare([__file__, *words])  # any script that exists
    assert argv == [__file__, "--spec", "megatron_mhc.specs", "gpt_mhc_spec"]
    assert model.transformer_layer_spec is gpt_mhc_spec
    assert MHCConfig.from_args(args) == mhc


def test_without_a_flag_the_patched_script_is_as_before(monkeypatch):
    monkeypatch.delenv("MEGATRON_MHC", raising=False)
    model = types.SimpleNamespace(transformer_layer_spec="Megatron's")
    use_mhc(parser_of_the_patch(False).parse_args([]), model)
    assert model.transformer_layer_spec == "Megatron's"


@pytest.mark.parametrize(
    "words, environment, model, message",
    [
        (["--spec", "a", "b"], "", ["transformer_layer_spec"], "--spec a b: drop it"),
        ([], "preset=paper", ["transformer_layer_spec"], "unset MEGATRON_MHC"),
        (["--modelopt-enabled"], "", ["transformer_layer_spec"], "not for ModelOpt"),
        ([], "", [], "takes a layer spec"),
    ],
)
def test_contradictions_are_refused(monkeypatch, words, environment, model, message):
    monkeypatch.setenv("MEGATRON_MHC", environment)
    args = parser_of_the_patch(True).parse_args(["--mhc-num-residual-streams", "4", *words])
    with pytest.raises(ValueError, match=message):
        use_mhc(args, types.SimpleNamespace(**dict.fromkeys(model)))


@needs_megatron_lm
@pytest.mark.slow
def test_real_script_trains_alike_through_patch_launch_and_spec(tmp_path):
    """Ten steps on two pipeline stages; every loss of Megatron-LM's own pretrain_gpt.py is the same."""
    scripts = tmp_path / "patched"
    scripts.mkdir()
    for name in ("pretrain_gpt.py", "gpt_builders.py", "model_provider.py"):
        shutil.copy(Path(MEGATRON_LM) / name, scripts)
    assert git_apply(scripts, FLAGS).returncode == 0
    real = str(Path(MEGATRON_LM) / "pretrain_gpt.py")
    options = "init=uniform,init_gating_factor=0.5"
    spec = ["--spec", "megatron_mhc.specs", "gpt_mhc_spec"]
    runs = {
        "patch": ([str(scripts / "pretrain_gpt.py")], pretrain_runs.MHC, {}),
        "launch": (["-m", "megatron_mhc.launch", real], pretrain_runs.MHC, {}),
        "spec": ([real], spec, {"MEGATRON_MHC": options}),
        "own": (["-m", "megatron_mhc.pretrain_gpt"], pretrain_runs.MHC, {}),
    }
    losses = {}
    for name, (door, mhc, variables) in runs.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "megatron_mhc.testing.cpu", *door, *pretrain_runs.ARGUMENTS, *mhc]
        command += ["--pipeline-model-parallel-size", "2", "--tensorboard-dir", str(tmp_path / name)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-2000:]
        losses[name] = pretrain_runs.losses(tmp_path / name)
    assert len(losses["own"]) == pretrain_runs.STEPS
    assert all(values == losses["own"] for values in losses.values()), losses
