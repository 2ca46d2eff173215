"""register / revert / report: idempotent, reversible, and closed to anything it was not written for."""

import dataclasses
import functools
import gc
import importlib
import inspect
import types

import pytest
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer import TransformerConfig

import megatron_mhc
from megatron_mhc import hooks, ops
from megatron_mhc.hooks import targets
from megatron_mhc.hyper_connection import HyperConnectionModule


@pytest.fixture(autouse=True)
def reverted():
    hooks._handle.revert()
    yield
    hooks._handle.revert()


def current():
    """Every replaced symbol, as it is stored."""
    return [inspect.getattr_static(*owner_and_name(hook)) for hook in targets.HOOKS]


def owner_and_name(hook):
    module, path = hook.target.split(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    return owner, name


def test_register_twice_is_once_and_revert_restores():
    before = current()
    handle = megatron_mhc.register()
    replaced = current()
    assert all(new is not old for new, old in zip(replaced, before, strict=True))
    assert megatron_mhc.register() is handle and current() == replaced
    assert "not registered" not in handle.report()
    handle.revert()
    handle.revert()
    assert current() == before
    assert "not registered" in handle.report()


def test_with_block_reverts():
    before = current()
    with megatron_mhc.register():
        assert current() != before
    assert current() == before


def test_report_names_every_symbol_and_its_reason():
    report = megatron_mhc.register().report()
    for hook in targets.HOOKS:
        assert hook.target in report and hook.reason in report


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "auto runs reference, since the streams are on cpu"),
        (dict(backend="reference"), "reference runs reference"),
        (dict(backend="triton"), "triton runs triton"),  # in the interpreter
        (dict(backend="triton", pp_boundary="split", pipeline_schedule="fused"), "triton runs triton"),
    ],
)
def test_report_says_which_operations_the_models_run(options, words):
    gc.collect()
    assert "no connection is built yet" in megatron_mhc.register().report()
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True
    )
    mhc = megatron_mhc.MHCConfig(num_residual_streams=2, **options)
    connections = [HyperConnectionModule(config, mhc, k) for k in range(2)]
    (line,) = [line for line in megatron_mhc.register().report().splitlines() if "connections of" in line]
    assert line.startswith("  2 connections of 2 streams of 32 channels, torch.float32, cpu: ")
    assert words in line
    del connections


@pytest.mark.parametrize(
    "backend, gpu, words",
    [
        ("auto", (9, 0, 132), "auto runs hopper"),
        ("auto", (8, 0, 108), "auto runs triton"),
        ("hopper", (9, 0, 132), "hopper runs hopper"),
        ("hopper", (8, 0, 108), "hopper runs none, --mhc-backend hopper: the GPU's compute capability"),
    ],
)
def test_report_says_whether_hopper_runs(monkeypatch, backend, gpu, words):
    monkeypatch.setattr(ops, "_gpu", lambda: gpu)
    monkeypatch.setattr(ops, "_has_cuda_bindings", lambda: True)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
    )
    connection = HyperConnectionModule(config, megatron_mhc.MHCConfig(backend=backend), 0)
    on_gpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(connection, "parameters", lambda: iter([on_gpu]))
    assert words in megatron_mhc.register().report()
    del connection


def test_report_says_that_triton_cannot_serve(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True
    )
    connection = HyperConnectionModule(config, megatron_mhc.MHCConfig(backend="triton"), 0)
    assert (
        "triton runs none, --mhc-backend triton: the streams are on cpu" in megatron_mhc.register().report()
    )
    del connection


@pytest.mark.parametrize("version", ["0.18.2", "0.20.0", "0.20.0rc0", "1.0"])
def test_unsupported_version_is_refused(monkeypatch, version):
    before = current()
    monkeypatch.setattr("megatron.core.__version__", version)
    with pytest.raises(ValueError, match=f"megatron-core {version} is not supported: install"):
        megatron_mhc.register()
    assert current() == before


@pytest.mark.parametrize("version", ["0.19.0", "0.19.2", "0.19.0+0123abc"])
def test_supported_version_is_accepted(monkeypatch, version):
    monkeypatch.setattr("megatron.core.__version__", version)
    assert megatron_mhc.register().active


def test_core_with_its_own_hyper_connections_is_refused(monkeypatch):
    monkeypatch.setattr(hooks, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="has hyper-connections of its own"):
        megatron_mhc.register()


def test_foreign_patch_is_refused_and_left_alone(monkeypatch):
    original = P2PCommunicator._communicate

    @functools.wraps(original)
    def foreign(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(P2PCommunicator, "_communicate", foreign)
    with pytest.raises(ValueError, match="_communicate was replaced by"):
        megatron_mhc.register()
    assert P2PCommunicator._communicate is foreign


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(parameters=("self", "other")), "expected .*'other'.*install megatron-core"),
        (
            dict(target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._gone"),
            "_gone does not exist",
        ),
    ],
)
def test_changed_megatron_is_refused_before_anything_is_replaced(monkeypatch, change, words):
    before = current()
    changed = (*targets.HOOKS[1:], dataclasses.replace(targets.HOOKS[0], **change))
    monkeypatch.setattr(hooks, "HOOKS", changed)
    with pytest.raises(ValueError, match=words):
        megatron_mhc.register()
    assert current() == before
