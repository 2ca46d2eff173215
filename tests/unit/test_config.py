"""Options: defaults, doors, and errors that name flag, value and remedy."""

import argparse
import subprocess
import sys

import pytest

from megatron_mhc.arguments import add_mhc_args
from megatron_mhc.config import MHCConfig


def test_defaults_are_the_papers():
    mhc = MHCConfig()
    assert (mhc.num_residual_streams, mhc.sinkhorn_iterations, mhc.init_gating_factor) == (4, 20, 0.01)
    assert (mhc.preset, mhc.h_res, mhc.contract) == ("paper", "sinkhorn", "mean")
    assert MHCConfig(preset="deepseek_v4").contract == "learned_head"


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(num_residual_streams=0), "--mhc-num-residual-streams=0: give at least 1"),
        (dict(sinkhorn_iterations=0), "--mhc-sinkhorn-iterations=0: give at least 1"),
        (dict(preset="deepseek"), "--mhc-preset='deepseek' is unknown: choose one of paper, deepseek_v4"),
        (dict(h_res="birkhoff"), "--mhc-h-res='birkhoff' is unknown"),
        (dict(init_gating_factor=-1.0), "--mhc-init-gating-factor=-1.0: give 0 or more"),
        (dict(norm_eps=0.0), "--mhc-norm-eps=0.0: give a positive number"),
        (dict(preset="deepseek_v4", h_res="unconstrained"), "use --mhc-preset paper"),
    ],
)
def test_wrong_value_names_flag_value_and_remedy(options, words):
    with pytest.raises(ValueError) as error:
        MHCConfig(**options)
    assert words in str(error.value)


def test_options_round_trip_through_every_door(tmp_path, monkeypatch):
    want = MHCConfig(num_residual_streams=2, preset="deepseek_v4", init="uniform", load_dense=True)
    assert MHCConfig.from_options(want.to_options()) == want

    file = tmp_path / "mhc.yaml"
    file.write_text("num-residual-streams: 2\npreset: deepseek_v4\ninit: uniform\nload_dense: true\n")
    monkeypatch.setenv("MEGATRON_MHC", str(file))
    assert MHCConfig.from_environment() == want

    flags = "--mhc-num-residual-streams 2 --mhc-preset deepseek_v4 --mhc-init uniform --mhc-load-dense"
    parser = add_mhc_args(argparse.ArgumentParser())
    assert MHCConfig.from_args(parser.parse_args(flags.split())) == want
    assert MHCConfig.from_args(parser.parse_args([])) == MHCConfig()


@pytest.mark.parametrize(
    "text, words",
    [
        ("streams=4", "no mHC option 'streams'"),
        ("num_residual_streams=four", "num_residual_streams='four' is not a valid int"),
        ("load_dense=maybe", "is not a valid bool"),
        ("4", "'4' is not key=value"),
        ("/nowhere/mhc.yaml", "no such file"),
    ],
)
def test_wrong_options_text_is_refused(text, words):
    with pytest.raises(ValueError) as error:
        MHCConfig.from_options(text)
    assert words in str(error.value)


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_mhc; print({'torch', 'megatron'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
