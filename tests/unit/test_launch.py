"""The launcher takes its flags out of the command line and leaves the rest as it was."""

import os

import pytest

from megatron_mhc import launch
from megatron_mhc.config import MHCConfig

SPEC = ["--spec", "megatron_mhc.specs", "gpt_mhc_spec"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGATRON_MHC", raising=False)
    path = tmp_path / "pretrain_gpt.py"
    path.write_text("import os, sys\nprint('ran', sys.argv[1:], os.environ['MEGATRON_MHC'])\n")
    return str(path)


def test_flags_are_taken_out_and_the_spec_is_added(script):
    argv, mhc = launch.prepare(
        [script, "--num-layers", "4", "--mhc-num-residual-streams", "2", "--lr", "1e-3"]
    )
    assert argv == [script, "--num-layers", "4", "--lr", "1e-3", *SPEC]
    assert mhc == MHCConfig(num_residual_streams=2)


def test_own_spec_and_environment_are_kept(script, monkeypatch):
    monkeypatch.setenv("MEGATRON_MHC", "num_residual_streams=8")
    argv, mhc = launch.prepare([script, *SPEC])
    assert argv == [script, *SPEC] and mhc.num_residual_streams == 8


def test_script_runs_as_main(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch", script, "--mhc-init", "uniform", "--seed", "1"])
    monkeypatch.setattr("sys.path", list(os.sys.path))
    monkeypatch.setitem(os.environ, "MEGATRON_MHC", "")
    launch.main()
    out = capsys.readouterr().out
    assert out.startswith(f"ran {['--seed', '1', *SPEC]}") and "init=uniform" in out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--mhc-streams", "4"], "--mhc-streams: no such flag, give --mhc-num-residual-streams"),
        (["--mhc-num-residual", "4"], "--mhc-num-residual: no such flag, give --mhc-num-residual-streams"),
        (["--mhc-preset", "v4"], "invalid choice: 'v4'"),
        (["--mhc-num-residual-streams", "0"], "give a whole number, at least 1"),
        (["--spec", "my.specs", "layer"], "--spec my.specs layer: drop it"),
    ],
)
def test_wrong_flag_is_refused(script, arguments, words):
    with pytest.raises(ValueError) as error:
        launch.prepare([script, *arguments])
    assert words in str(error.value)


def test_missing_script_is_refused():
    with pytest.raises(ValueError, match="no such script"):
        launch.prepare(["--num-layers", "4"])


def test_options_in_two_places_are_refused(script, monkeypatch):
    monkeypatch.setenv("MEGATRON_MHC", "num_residual_streams=8")
    with pytest.raises(ValueError, match="unset MEGATRON_MHC"):
        launch.prepare([script, "--mhc-num-residual-streams", "2"])


HYBRID = ["--spec", "megatron_mhc.specs", "hybrid_mhc_spec"]


@pytest.mark.parametrize(
    "name, arguments, spec",
    [
        ("pretrain_hybrid.py", [], HYBRID),
        ("pretrain_mamba.py", [], HYBRID),
        ("own.py", ["--hybrid-layer-pattern=*-"], HYBRID),
        ("own.py", [], SPEC),
        ("pretrain_gpt.py", ["--hybrid-layer-pattern", "*-"], SPEC),  # whose spec refuses it
    ],
)
def test_the_spec_is_that_of_the_scripts_model(script, name, arguments, spec):
    other = os.path.join(os.path.dirname(script), name)
    os.rename(script, other)
    assert launch.prepare([other, *arguments])[0] == [other, *arguments, *spec]
    assert launch.prepare([other, *arguments, *spec])[0] == [other, *arguments, *spec]
    wrong = SPEC if spec is HYBRID else HYBRID
    with pytest.raises(ValueError, match="drop it; mHC wraps what Megatron chooses"):
        launch.prepare([other, *arguments, *wrong])


def test_script_of_another_model_is_refused(script):
    other = os.path.join(os.path.dirname(script), "pretrain_vlm.py")
    os.rename(script, other)
    with pytest.raises(ValueError, match="pretrain_vlm.py: .*use pretrain_gpt.py or pretrain_hybrid.py"):
        launch.prepare([other])
