"""Which operations run: what --mhc-backend says, checked against what the kernels can serve."""

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from megatron.core.transformer import TransformerConfig

import megatron_mhc.backend as backends
from megatron_mhc.backend import (
    H100,
    Backend,
    choose,
    norms_in_words,
    triton_obstacle,
    why_norms_apart,
)
from megatron_mhc.config import MHCConfig
from megatron_mhc.hyper_connection import HyperConnectionModule, _runs

BF16 = torch.bfloat16
A100, H20 = (8, 0, 108), (9, 0, 78)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Sets the GPU and whether cuda-bindings is installed; at first, neither is there."""

    def pretend(gpu, installed=True):
        monkeypatch.setattr(backends, "_gpu", lambda: gpu)
        monkeypatch.setattr(backends, "_has_cuda_bindings", lambda: installed)

    pretend(None, False)
    return pretend


@pytest.mark.parametrize(
    "options, width, dtype, device, backend",
    [
        ({}, 4096, BF16, "cuda", "triton"),
        ({}, 4096, torch.float32, "cuda", "triton"),
        ({}, 4096, BF16, "cpu", "reference"),
        ({}, 4100, BF16, "cuda", "reference"),
        ({}, 4096, torch.float64, "cuda", "reference"),
        (dict(backend="reference"), 4096, BF16, "cuda", "reference"),
        (dict(h_res="identity"), 4096, BF16, "cuda", "triton"),
        (dict(h_pre="fixed"), 4096, BF16, "cuda", "triton"),
        (dict(h_res="unconstrained"), 4096, BF16, "cuda", "reference"),
        (dict(num_residual_streams=2), 4096, BF16, "cuda", "triton"),
        (dict(num_residual_streams=3), 4096, BF16, "cuda", "triton"),
        (dict(num_residual_streams=5), 4096, BF16, "cuda", "reference"),
        (dict(num_residual_streams=8), 4096, torch.float16, "cuda", "triton"),
        (dict(preset="deepseek_v4"), 4096, BF16, "cuda", "triton"),
        (dict(preset="glm_5_3"), 4096, BF16, "cuda", "triton"),
        (dict(preset="hy_v4"), 4096, BF16, "cuda", "triton"),
        (dict(h_res="identity", h_pre="fixed", h_post="fixed"), 4096, BF16, "cuda", "triton"),
    ],
)
def test_backend_follows_the_option_and_the_streams(options, width, dtype, device, backend):
    assert choose(MHCConfig(**options), width, dtype, device) == backend


@pytest.mark.parametrize(
    "options, width, dtype, backend",
    [
        ({}, 4096, BF16, "hopper"),
        ({}, 4096, torch.float16, "triton"),
        (dict(num_residual_streams=2), 4096, BF16, "triton"),
        (dict(sinkhorn_iterations=64), 4096, BF16, "hopper"),
        (dict(sinkhorn_iterations=65), 4096, BF16, "triton"),
        ({}, 132 * 64 + 16, BF16, "triton"),
        (dict(backend="hopper"), 4096, BF16, "hopper"),
        (dict(backend="hopper", preset="deepseek_v4"), 16, BF16, "hopper"),
        (dict(backend="hopper", boundary="fused"), 132 * 64, BF16, "hopper"),
        (dict(backend="triton"), 4096, BF16, "triton"),
        (dict(backend="reference"), 4096, BF16, "reference"),
        (dict(h_post="fixed"), 4096, BF16, "triton"),
        (dict(preset="hy_v4"), 4096, BF16, "triton"),
        (dict(preset="glm_5_3"), 4096, BF16, "hopper"),
        ({}, 4100, BF16, "reference"),
    ],
)
def test_backend_of_an_h100(machine, options, width, dtype, backend):
    machine(H100)
    assert choose(MHCConfig(**options), width, dtype, "cuda") == backend


def test_streams_on_a_cpu_ask_for_no_gpu(monkeypatch):
    monkeypatch.setattr(backends, "_gpu", lambda: pytest.fail("asked"))
    assert choose(MHCConfig(), 4096, BF16, "cpu") == "reference"
    with pytest.raises(ValueError, match="--mhc-backend hopper: the streams are on cpu"):
        choose(MHCConfig(backend="hopper"), 4096, BF16, "cpu")


@pytest.mark.parametrize(
    "gpu, installed, options, width, dtype, words",
    [
        (None, True, {}, 4096, BF16, "there is no CUDA device"),
        (A100, True, {}, 4096, BF16, "the GPU's compute capability is 8.0, not 9.0 (H100, H200)"),
        (H20, True, {}, 5120, BF16, "--hidden-size 5120 is more than 78 SMs can take"),
        (H100, False, {}, 4096, BF16, "cuda-bindings is not installed"),
        (H100, True, {}, 4096, torch.float32, "the streams are torch.float32, not torch.bfloat16"),
        (H100, True, {}, 4100, BF16, "--hidden-size 4100 is no multiple of 16"),
        (
            H100,
            True,
            dict(num_residual_streams=2),
            4096,
            BF16,
            "--mhc-num-residual-streams 2 is not 4",
        ),
        (H100, True, dict(h_res="identity"), 4096, BF16, "--mhc-h-res is identity"),
        (H100, True, dict(preset="hy_v4"), 4096, BF16, "--mhc-h-res is identity"),
        (H100, True, dict(h_pre="fixed"), 4096, BF16, "--mhc-h-pre is fixed"),
    ],
)
def test_hopper_where_it_cannot_serve_is_refused(machine, gpu, installed, options, width, dtype, words):
    machine(gpu, installed)
    with pytest.raises(ValueError) as error:
        choose(MHCConfig(backend="hopper", **options), width, dtype, "cuda")
    assert f"--mhc-backend hopper: {words}; use --mhc-backend auto or change that" == str(error.value)


def test_hopper_without_triton_is_refused(machine, monkeypatch):
    machine(H100)
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="hopper: triton is not installed"):
        choose(MHCConfig(backend="hopper"), 4096, BF16, "cuda")


@pytest.mark.parametrize(
    "options, width, dtype, words",
    [
        (dict(num_residual_streams=5), 4096, BF16, "--mhc-num-residual-streams 5 is not 1, 2, 3, 4 or 8"),
        ({}, 4100, BF16, "--hidden-size 4100 is no multiple of 16"),
        ({}, 4096, torch.float64, "the streams are torch.float64"),
        (dict(h_res="unconstrained"), 4096, BF16, "--mhc-h-res is unconstrained"),
    ],
)
def test_triton_where_it_cannot_serve_is_refused(options, width, dtype, words):
    with pytest.raises(ValueError) as error:
        choose(MHCConfig(backend="triton", **options), width, dtype, "cuda")
    assert words in str(error.value) and "--mhc-backend auto" in str(error.value)


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the streams are on cpu"):
        choose(MHCConfig(backend="triton"), 64, BF16, "cpu")


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_width_that_kernels_cannot_serve_is_refused_when_the_layer_is_built(machine, backend):
    machine(None)
    config = TransformerConfig(
        num_layers=1, hidden_size=20, num_attention_heads=2, use_cpu_initialization=True
    )
    with pytest.raises(ValueError, match="--hidden-size 20 is no multiple of 16"):
        HyperConnectionModule(config, MHCConfig(backend=backend), 0)
    HyperConnectionModule(config, MHCConfig(), 0)


def test_a_layer_for_hopper_is_built_where_none_is(machine):
    machine(None)
    shape = dict(num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True)
    HyperConnectionModule(TransformerConfig(params_dtype=BF16, **shape), MHCConfig(backend="hopper"), 0)
    with pytest.raises(ValueError, match="the streams are torch.float32, not torch.bfloat16"):
        HyperConnectionModule(TransformerConfig(**shape), MHCConfig(backend="hopper"), 0)


@pytest.mark.parametrize(
    "option, settings, backend, said",
    [
        ("apart", {}, "hopper", "apart"),
        ("auto", {}, "hopper", "folded into pre"),
        ("auto", {}, "triton", "folded into pre"),
        ("auto", {}, "reference", "apart, since reference has no kernels for it"),
        ("auto", dict(normalization="LayerNorm"), "triton", "apart, since --normalization is LayerNorm"),
        ("auto", dict(fp8="hybrid"), "triton", "apart, since linears take FP8"),
        ("auto", dict(fp32_residual_connection=True), "triton", "apart, since --fp32-residual-connection"),
        ("folded", {}, "reference", "folded into pre"),
        (
            "folded",
            dict(recompute_granularity="selective", recompute_modules=["layernorm"]),
            "triton",
            "folded into pre, so --recompute-modules layernorm finds nothing of it",
        ),
    ],
)
def test_the_norm_in_front_of_f_follows_option_settings_and_back_end(option, settings, backend, said):
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=1, normalization="RMSNorm")
    for name, value in settings.items():  # which Megatron checks beside Transformer Engine alone
        setattr(config, name, value)
    assert norms_in_words(config, MHCConfig(norm=option), backend).startswith(said)
    whatever_serves = why_norms_apart(config, MHCConfig(norm=option)) is None
    assert whatever_serves == (said.startswith("folded") or backend == "reference")


def test_a_connection_chooses_once_for_each_kind_of_streams(machine, monkeypatch):
    machine(H100)
    asked = []
    monkeypatch.setattr(backends, "choose", lambda *args: asked.append(args) or choose(*args))
    backend = Backend(MHCConfig())
    x = torch.empty(2, 64, dtype=BF16)
    for _ in range(3):
        assert backend.kernels(x, 64) is None
        assert backend.kernels_of(64, BF16, "cuda").name == "hopper"
        assert backend.kernels_of(64, torch.float32, "cuda").name == "triton"
        assert backend.kernels_of(68, BF16, "cuda") is None
    assert len(asked) == 4


def test_the_report_is_of_what_a_connection_has_chosen(machine):
    machine(H100)
    shape = dict(num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True)
    config = TransformerConfig(params_dtype=BF16, **shape)
    connection = HyperConnectionModule(config, MHCConfig(pp_boundary="split"), 0, reserved_sms=8)
    connection.backend.kernels_of(32, BF16, "cuda")
    machine(A100)
    runs = _runs(connection, 32, BF16, "cuda")
    assert runs.startswith("hopper, which leaves 8 SMs to receives that wait; triton in the backward of")


@pytest.mark.parametrize(
    "gpu, boundary, makes",
    [
        (H100, "auto", "hopper"),
        (H100, "fused", "hopper"),
        (A100, "auto", None),
        (A100, "fused", "triton"),
    ],
)
def test_post_res_works_ahead_by_default_where_that_changes_no_bit(
    machine, monkeypatch, gpu, boundary, makes
):
    machine(gpu)
    shape = dict(num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True)
    config = TransformerConfig(params_dtype=BF16, **shape)
    connection = HyperConnectionModule(config, MHCConfig(boundary=boundary), 0)
    on_gpu = types.SimpleNamespace(shape=(2, 1, 128), dtype=BF16, device=types.SimpleNamespace(type="cuda"))
    next_pre = connection.next_pre(on_gpu)
    assert makes is None if next_pre is None else next_pre.kernels.name == makes


def test_operations_know_nothing_of_the_options_and_of_megatron():
    for path in Path(backends.__file__).with_name("ops").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("megatron") or name.startswith("megatron_mhc.ops"), (path, name)


def test_the_machine_is_asked_once_and_by_no_import():
    code = """
import sys, torch
from megatron_mhc.backend import choose
from megatron_mhc.config import MHCConfig
assert not torch.cuda.is_initialized() and "megatron_mhc.ops.hopper" not in sys.modules
assert choose(MHCConfig(), 64, torch.bfloat16, "cpu") == "reference"
assert not torch.cuda.is_initialized() and "megatron_mhc.ops.hopper" not in sys.modules
times = []
torch.cuda.is_available = lambda: bool(times.append(0))
assert choose(MHCConfig(), 64, torch.bfloat16, "cuda") == "triton"
for _ in range(2):
    try:
        choose(MHCConfig(backend="hopper"), 64, torch.bfloat16, "cuda")
        raise SystemExit("not refused")
    except ValueError as error:
        assert "there is no CUDA device" in str(error)
assert times == [0], times
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_gated_residual_runs_by_the_reference_and_the_report_says_why(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    mhc = MHCConfig(preset="qwen4_exp")
    assert choose(mhc, 4096, BF16, "cuda", (9, 0, 132)) == "reference"
    assert triton_obstacle(mhc, 4096, BF16, "cuda") == "--mhc-preset is qwen4_exp"
    assert norms_in_words(None, mhc, "reference") == "none, since the read normalises the streams"
