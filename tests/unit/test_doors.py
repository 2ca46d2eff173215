"""The doors ask for Megatron's version first, and the spec door knows who calls it and who does not."""

import copy
import inspect
import os
import pickle
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import megatron.training
import pytest
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.training import argument_utils
from megatron.training.models.gpt import GPTModelConfig
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_mhc import MHCConfig, hooks, specs
from megatron_mhc.layer import HyperConnectionTransformerLayer
from megatron_mhc.testing import cpu
from megatron_mhc.version import SUPPORTED

ROOT = Path(__file__).resolve().parents[2]
DOORS = {
    "spec": "import megatron_mhc.specs",
    "library": "from megatron_mhc import wrap_block_spec",
    "library, one layer": "from megatron_mhc import wrap_layer_spec",
    "hooks": "from megatron_mhc import register",
    "wheel": "import megatron_mhc.pretrain_gpt",
    "patch": "import megatron.core, argparse, megatron_mhc as m; m.add_mhc_args(argparse.ArgumentParser())",
    "launch": "from megatron_mhc.launch import prepare; prepare(['no_script.py', '--mhc-no-such-flag', '1'])",
}


@pytest.fixture
def other_megatron(tmp_path):
    """Run code beside a Megatron that has a version, and nothing else that a door could import."""

    def run(code, version, own):
        core = tmp_path / "megatron" / "core"
        (core / "transformer").mkdir(parents=True)
        (core / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (core / "transformer" / "__init__.py").touch()
        if own:
            (core / "transformer" / "hyper_connection.py").touch()
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "MEGATRON_MHC": "n=no"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize(
    "version, own, words",
    [
        ("0.19.0", True, "megatron-core 0.19.0 has hyper-connections of its own"),
        ("0.16.1", False, "megatron-core 0.16.1 is not supported: install megatron-core"),
    ],
)
@pytest.mark.parametrize("door", DOORS)
def test_version_is_asked_for_before_anything_else(other_megatron, door, version, own, words):
    ended = other_megatron(DOORS[door], version, own)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"ValueError: {words}")


def test_launcher_takes_the_megatron_that_lies_beside_the_script(other_megatron, tmp_path):
    """As `python pretrain_gpt.py` in a checkout does."""
    (tmp_path / "pretrain_gpt.py").touch()
    code = (
        f"import sys; sys.path.remove({str(tmp_path)!r}); sys.argv[1:] = ['{tmp_path}/pretrain_gpt.py'];"
        "from megatron_mhc.launch import main; main()"
    )
    assert "megatron-core 0.16.1 is not supported" in other_megatron(code, "0.16.1", False).stderr


def test_the_package_asks_pip_for_the_versions_that_it_supports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (core,) = [Requirement(line) for line in project["dependencies"] if line.startswith("megatron-core")]
    assert core.specifier == SpecifierSet(SUPPORTED)


def test_a_script_of_another_model_is_told_what_the_spec_is_for(monkeypatch):
    """HybridModel's scripts hand the target to `build_module` as it is."""
    monkeypatch.setattr("sys.argv", ["/somewhere/pretrain_hybrid.py"])
    with pytest.raises(ValueError, match="pretrain_hybrid.py takes it for the spec of another.*HybridModel"):
        build_module(specs.gpt_mhc_spec, config=None)
    with pytest.raises(ValueError, match="hybrid_mhc_spec"):
        assert specs.gpt_mhc_spec.submodules.mtp_block_spec


def test_each_spec_builds_a_hybrid_model_or_says_which_does(run_ranks):
    kinds, refusal = run_ranks(1, lambda: (build_hybrid("hybrid_mhc_spec"), build_hybrid("gpt_mhc_spec")))[0]
    assert kinds == ["HyperConnectionTransformerLayer"] * 2
    assert "that is --spec megatron_mhc.specs hybrid_mhc_spec" in refusal


def build_hybrid(spec):
    """The classes of its layers, or why it is refused; the options are those of MEGATRON_MHC."""
    from megatron.core import tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import global_vars
    from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

    os.environ["MEGATRON_MHC"] = "num_residual_streams=2"
    cpu.use_local_modules()
    global_vars.get_args = megatron.training.get_args = types.SimpleNamespace
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = HybridModelConfig(
        transformer=transformer(is_hybrid_model=True),
        hybrid_stack_spec=getattr(specs, spec),
        hybrid_layer_pattern="*-",
        vocab_size=64,
        seq_length=8,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    try:
        built = HybridModelBuilder(model).build_model(groups, True, True)
    except ValueError as error:
        return str(error)
    assert built.config.mhc == MHCConfig(num_residual_streams=2)
    return [type(layer).__name__ for layer in built.decoder.layers]


def test_the_target_is_copied_and_pickled_by_name():
    target = specs.gpt_mhc_spec
    assert copy.deepcopy(target) is target and pickle.loads(pickle.dumps(target)) is target


def transformer(**settings):
    return TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, **settings
    )


@pytest.mark.parametrize("how", ["megatron", "positional", "slime"])
def test_gpt_scripts_call_the_target_with_two_arguments_or_three(monkeypatch, how):
    monkeypatch.setenv("MEGATRON_MHC", "num_residual_streams=2")
    config = transformer(transformer_impl="local")
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    args, model = types.SimpleNamespace(), GPTModelConfig(transformer=config, vocab_size=64)
    if how == "slime":
        monkeypatch.setattr("megatron.training.get_args", lambda: pytest.fail("the arguments are given"))

        def from_args(args_given, config=None, model_config_cls=None):
            assert args_given is args and config is model.transformer
            return model

        from_args.__signature__ = inspect.signature(argument_utils.gpt_config_from_args)
        monkeypatch.setattr(argument_utils, "gpt_config_from_args", from_args)
        spec = specs.gpt_mhc_spec(args, config, None)
    else:
        monkeypatch.setattr("megatron.training.get_args", lambda: args)
        spec = specs.gpt_mhc_spec(model, 0) if how == "positional" else specs.gpt_mhc_spec(model, vp_stage=0)
    assert [layer.module for layer in spec.layer_specs] == [HyperConnectionTransformerLayer] * 2
    assert config.mhc == MHCConfig(num_residual_streams=2)
    hooks.revert_all()
