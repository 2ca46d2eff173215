"""The example scripts' command lines against Megatron's own parser and checks; nothing is trained."""

import os
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {"MEGATRON_LM": str(EXAMPLES), "GPUS": "1"}


def command_of(tmp_path: Path, script: str, *arguments: str) -> list[str]:
    """What a script hands to torchrun."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/bash\nprintf "%q " "$@"\n')
    torchrun.chmod(0o755)
    environment = os.environ | ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def parsed(argv: list[str], world: int):
    """Run Megatron's parser and all of its checks, and build the transformer's config."""
    import sys

    from megatron.training.arguments import core_transformer_config_from_args, parse_args, validate_args

    from megatron_mhc.config import MHCConfig
    from megatron_mhc.pretrain_gpt import add_args, check_args

    sys.argv = ["pretrain_gpt", *argv]
    os.environ.update(RANK="0", WORLD_SIZE=str(world), CUDA_DEVICE_MAX_CONNECTIONS="1")
    args = parse_args(add_args)
    validate_args(args, {})
    check_args(args)
    args.padded_vocab_size = 129280
    return vars(args), vars(core_transformer_config_from_args(args)), MHCConfig.from_args(args)


@pytest.mark.parametrize("script", ["spec_door.sh", "launch_door.sh", "wheel_door.sh"])
def test_door_is_valid(tmp_path, run_ranks, script):
    words = command_of(tmp_path, script)
    if script == "spec_door.sh":
        at = words.index("--spec")
        assert words[at + 1 : at + 3] == ["megatron_mhc.specs", "gpt_mhc_spec"]
        del words[at : at + 3]
    argv = [*words[words.index("--num-layers") :], "--no-rope-fusion"]  # the fusion needs TransformerEngine
    args, _, mhc = run_ranks(1, parsed, argv, 1)[0]
    assert (args["num_layers"], mhc.num_residual_streams) == (12, 4)


def test_the_quickstart_logs_what_plot_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "quickstart"))
    run = runpy.run_path(str(EXAMPLES / "quickstart" / "run.py"))
    run["train"].__globals__["run"] = lambda *_: {}  # nothing is trained
    machine = run["Machine"](gpu=False, processes=2)
    for kind in run["NAMES"]:
        run["train"](kind, machine, 240, tmp_path)
    assert "--mhc-log-interval 12" in (tmp_path / "mhc" / "train.sh").read_text()
    assert "--mhc-log-interval 12" in (tmp_path / "mhc" / "resume.sh").read_text()
    assert "--mhc" not in (tmp_path / "plain" / "train.sh").read_text()


def test_the_quickstart_asks_for_transformers_before_it_trains(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES / "quickstart"))
    run = runpy.run_path(str(EXAMPLES / "quickstart" / "run.py"))
    run["main"].__globals__.update(version=lambda _: "4.57.1", quickstart=lambda *_: None)
    monkeypatch.setattr("sys.argv", ["run.py", "--cpu"])
    with pytest.raises(SystemExit, match="2"):
        run["main"]()
    assert "pip install 'transformers>=5'" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(p.name for p in EXAMPLES.glob("*.s*") if p.suffix != ".py"))
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(EXAMPLES / script)], check=True)
