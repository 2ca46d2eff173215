"""Where the spec door takes its options from, with Megatron's parsed arguments standing in."""

import argparse
import types

import megatron.training
import pytest

from megatron_mhc import specs
from megatron_mhc.arguments import add_mhc_args
from megatron_mhc.config import MHCConfig


@pytest.fixture
def parsed(monkeypatch):
    """Pretend that Megatron parsed these arguments."""
    monkeypatch.delenv("MEGATRON_MHC", raising=False)

    def pretend(args):
        monkeypatch.setattr(megatron.training, "get_args", lambda: args)

    return pretend


def flags(line):
    return add_mhc_args(argparse.ArgumentParser()).parse_args(line.split())


def test_flags_decide_where_the_script_has_them(parsed):
    parsed(flags("--mhc-num-residual-streams 8"))
    assert specs.mhc_options() == MHCConfig(num_residual_streams=8)


def test_the_environment_decides_for_a_script_without_flags(parsed, monkeypatch):
    parsed(types.SimpleNamespace())
    assert specs.mhc_options() == MHCConfig()
    monkeypatch.setenv("MEGATRON_MHC", "num_residual_streams=2")
    assert specs.mhc_options() == MHCConfig(num_residual_streams=2)


def test_options_in_both_places_are_refused(parsed, monkeypatch):
    parsed(flags("--mhc-num-residual-streams 8"))
    monkeypatch.setenv("MEGATRON_MHC", "num_residual_streams=2")
    with pytest.raises(ValueError, match="unset MEGATRON_MHC"):
        specs.mhc_options()


@pytest.mark.parametrize("name", ["use_megatron_fsdp", "use_torch_fsdp2"])
def test_fully_sharded_data_parallelism_is_refused(parsed, name):
    parsed(types.SimpleNamespace(**{name: True}))
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: use --use-distributed-optimizer"):
        specs.mhc_options()
