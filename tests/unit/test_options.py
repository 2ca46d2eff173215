"""Where the spec door takes its options from, with Megatron's parsed arguments standing in."""

import argparse
import types

import megatron.training
import pytest
from megatron.training.arguments import parse_args

from megatron_mhc import pretrain_gpt, specs
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


def test_the_wheels_door_has_a_help_although_megatrons_texts_break_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", "--help"])
    with pytest.raises(ValueError, match="unsupported format character"):
        parse_args(add_mhc_args)  # if this works, Megatron has mended its texts
    with pytest.raises(SystemExit) as ended:
        parse_args(pretrain_gpt.add_args)
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and "--mhc-num-residual-streams" in text
    assert "default 100%" in text and "90% of data for training" in text and "%%" not in text


def test_help_texts_that_are_formats_stay_what_they_are():
    parser = argparse.ArgumentParser(prog="me")
    parser.add_argument("--good", default=3, help="%(prog)s takes %(default)s, 5%%")
    parser.add_argument("--bad", default=4, help="%(default)s, 5%% or 6% of it")
    text = " ".join(pretrain_gpt.add_args(parser).format_help().split())
    assert "me takes 3, 5%" in text and "4, 5% or 6% of it" in text


@pytest.mark.parametrize("door", [add_mhc_args, pretrain_gpt.add_args])
def test_a_misspelt_flag_gets_a_hint(door, monkeypatch, capsys):
    """By a patched script and by the wheel's door; `test_launch` has the launcher's."""
    monkeypatch.setattr("sys.argv", ["x.py", "--mhc-residual-streams", "4", "--mhc_preset", "hc", "--flag"])
    with pytest.raises(SystemExit):
        parse_args(door)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(
        "--flag; --mhc-residual-streams: no such flag, give --mhc-num-residual-streams; "
        "--mhc_preset: no such flag, give --mhc-preset"
    )
    monkeypatch.setattr("sys.argv", ["x.py", "--mhc-h-res", "none"])
    with pytest.raises(SystemExit):
        parse_args(door)
    assert "no such flag" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["use_megatron_fsdp", "use_torch_fsdp2"])
def test_fully_sharded_pipeline_is_refused(parsed, name):
    args = types.SimpleNamespace(**{name: True}, pipeline_model_parallel_size=2)
    parsed(args)
    found = (
        f"--{name.replace('_', '-')} with --pipeline-model-parallel-size 2.*: use --use-distributed-optimizer"
    )
    with pytest.raises(ValueError, match=found):
        specs.mhc_options()
    args.pipeline_model_parallel_size = 1
    specs.mhc_options()
