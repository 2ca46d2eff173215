"""The plugin with apex, with Transformer Engine, with neither, and with broken ones: the same training.

Stand-ins in plain torch (optional/fused.py), in interpreters of their own (optional/child.py), because
Megatron looks for both when it is imported.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"apex", "amp_C", "transformer_engine", "transformer_engine_torch", "fused_weight_gradient_mlp_cuda"}
WORKING = ("absent", "apex", "transformer_engine")
CHOSEN = {
    "absent": {"final norm": "WrappedTorchNorm", "adam": "torch.optim.adam"},
    "apex": {"final norm": "FusedLayerNorm", "adam": "fused"},
    "transformer_engine": {"final norm": "TENorm", "adam": "fused"},
    "broken_apex": {"final norm": "FusedLayerNorm", "adam": "torch.optim.adam"},
}
OPTIMIZERS = ("fp32", "bf16", "bf16 distributed")


@pytest.fixture(scope="module")
def found():
    """What child.py found, by kind."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MEGATRON_MHC", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "optional" / "child.py")],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_nothing_heavy(found):
    assert found["bare"] == {"import": [], "options": []}


def test_no_source_names_apex_or_transformer_engine_in_an_import():
    for path in (ROOT / "megatron_mhc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & PARTS, f"{path}:{node.lineno}"


@pytest.mark.parametrize("kind", CHOSEN)
def test_megatron_alone_looks_for_them(found, kind):
    assert found[kind]["chosen"] == CHOSEN[kind]  # the stand-ins are what Megatron took
    assert {name.split(".")[0] for name in found[kind]["importers"]} == {"megatron"}


@pytest.mark.parametrize("kind", CHOSEN)
def test_hooks_register_report_and_revert(found, kind):
    assert found[kind]["hooks"] == {"replaced": True, "reported": True, "restored": True}


@pytest.mark.parametrize("kind", CHOSEN)
def test_a_model_is_built_or_refused_as_without_mhc(found, kind):
    for plain, ours in found[kind]["builds"].values():
        assert ours == plain
    works = found[kind]["builds"]["LayerNorm"][0] is None
    assert works == (kind != "broken_apex")  # apex's norm without its kernels, which Megatron refuses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", WORKING[1:])
def test_losses_and_norms_match_those_without_fused_parts(found, kind, optimizer):
    expected, got = (found[k]["runs"][optimizer]["history"] for k in ("absent", kind))
    # The stand-ins' norms and attention round in bf16 at other places.
    error = 1e-6 if optimizer == "fp32" or kind == "apex" else 2e-3
    for step, wanted in zip(got, expected, strict=True):
        assert step == pytest.approx(wanted, rel=error)
    assert abs(expected[0][0] - expected[1][0]) > 0.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", WORKING)
def test_a_resumed_run_matches_an_unbroken_one(found, kind, optimizer):
    run = found[kind]["runs"][optimizer]
    if (kind, optimizer) == ("absent", "bf16 distributed"):
        assert "resumed" not in run  # Megatron's distributed optimizer needs a fused Adam to load
        return
    assert run["resumed"] == run["history"][2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_state_is_saved_under_the_same_names(found, optimizer):
    expected, got = (found[kind]["runs"][optimizer]["keys"] for kind in ("absent", "apex"))
    assert got == expected
    assert any("self_attention_hyper_connection.mapping_proj.weight" in key for key in got)


@pytest.mark.parametrize("kind", WORKING)
def test_replay_matches_no_replay_bit_for_bit(found, kind):
    """Norms that are modules of their own, or apex's, or inside Transformer Engine's linear layers."""
    assert found[kind]["recompute"] is True


def test_checkpoints_of_norms_with_an_extra_state(found):
    """Transformer Engine's final norm has one, in a plain model just where mHC keeps its arithmetic."""
    checkpoints = found["transformer_engine"]["checkpoints"]
    assert checkpoints["plain resumes"] is None and checkpoints["mHC resumes"] is None
    assert "is an mHC model's: add --spec" in checkpoints["plain takes mHC"]
    assert "pass --mhc-load-dense together with" in checkpoints["mHC takes plain"]
    for way in ("told to", "told to, in the torch format", "converted"):
        assert checkpoints[way] is True, way


@pytest.mark.parametrize("kind", ["absent", "transformer_engine"])
def test_folded_norms_change_neither_numbers_nor_parameters_nor_entries(found, kind):
    """In float64; norms that are modules of the layer, and those inside Transformer Engine's linears."""
    same = found[kind]["folded"]["same"]
    assert same.keys() == ({"dense", "moe", "mla"} if kind == "transformer_engine" else {"dense", "moe"})
    for of_kind in same.values():
        assert of_kind.pop("error") <= 1e-10
        assert of_kind == {"folded": 2, "described": True, "exchanged": True}


@pytest.mark.parametrize("kind", ["absent", "transformer_engine"])
def test_folded_norms_and_others_take_each_others_checkpoints(found, kind):
    """With their optimizer's state; and a plain model's, under --mhc-load-dense."""
    steps = found[kind]["folded"]
    assert steps["plain"] is True
    for of in ("folded", "apart of folded", "folded of apart"):
        assert steps[of] == pytest.approx(steps["apart"], rel=1e-6), of


def test_norms_that_cannot_be_folded_are_named(found):
    fp8, fused, other, *auto = found["transformer_engine"]["refused"]
    assert "linear_qkv takes FP8 or FP4 from the norm inside it; use no --fp8-format" in fp8
    assert "in front of Other, nor in a linear_fc1 of it; use Megatron's GPT layers" in fused
    assert "input_layernorm is a Other; use torch's or Transformer Engine's RMSNorm" in other
    assert all("or --mhc-norm auto or apart" in said for said in (fp8, fused, other))
    assert auto == [None, None, None]


def test_a_broken_transformer_engine_fails_as_in_megatron(found):
    ours, stock = found["broken_transformer_engine"]["errors"]
    assert ours == stock == "ModuleNotFoundError: No module named 'transformer_engine.pytorch'"
