"""Sampling of a running model: first calls, copies, hooks that come off."""

import pytest
import torch
from diagnostics_cases import C, N, T, config_of, connections, random_samples
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_mhc import MHCConfig
from megatron_mhc.diagnostics import Sampler, amax_gain, capture_h_res, composite
from megatron_mhc.diagnostics.report import reduce_samples
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.ops import reference


def test_captured_mappings_match_the_coefficients_in_order():
    modules = connections(3)
    streams = torch.randn(T, 1, N * C)
    with torch.no_grad():
        expected = [module(streams)[1].h_res for module in modules]
        with capture_h_res(modules) as captured:
            for module in modules:
                module(streams)
        modules[0](streams)  # after the block: not collected
    assert len(captured) == 3
    for got, want in zip(captured, expected, strict=True):
        assert got.shape == (T, N, N)
        assert torch.equal(got, want)
    forward, _ = amax_gain(composite(captured))
    torch.testing.assert_close(forward, torch.ones_like(forward), rtol=0, atol=1e-5)


def test_a_list_of_chunks_is_captured_like_one_model():
    modules = connections(2)
    streams = torch.randn(T, 1, N * C)
    with torch.no_grad(), capture_h_res([modules[0], modules[1]]) as captured:
        modules[1](streams)
        modules[0](streams)
    assert len(captured) == 2


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
def test_samples_match_the_connection_and_its_streams(preset):
    mhc = MHCConfig(preset=preset, init_gating_factor=1.0)
    modules = connections(2, mhc)
    streams = torch.randn(6, 2, N * C)
    with Sampler(modules, config_of(mhc), tokens=4) as sampler:
        for module in modules:
            _, mappings = module(streams)
    every = [0, 3, 6, 9]  # 4 of 12 tokens, evenly spaced
    sample, x = sampler.samples[1], streams.view(12, N, C)[every].double()
    for name in ("h_pre", "h_post", "h_res"):
        got = getattr(sample, name)
        assert not got.requires_grad
        assert torch.equal(got, getattr(mappings, name)[every].double()), name
    torch.testing.assert_close(sample.gram, x @ x.transpose(1, 2), rtol=1e-12, atol=0)
    # The logits are what the sigmoids and Sinkhorn got: they give the mappings.
    v4 = preset == "deepseek_v4"
    logits = torch.cat([sample.logits[part] for part in ("pre", "post", "res")], dim=1).double()
    again = reference.mhc_mappings(logits, N, deepseek_v4=v4)
    for name in ("h_pre", "h_post", "h_res"):
        torch.testing.assert_close(getattr(again, name), getattr(sample, name), rtol=1e-5, atol=1e-6)


def test_samples_of_the_triton_path_match_the_reference():
    pytest.importorskip("triton")
    taken = {}
    for backend in ("reference", "triton"):
        mhc = MHCConfig(backend=backend, init_gating_factor=1.0)
        torch.manual_seed(3)
        config = config_of(mhc)
        config.hidden_size = 16
        module = HyperConnectionModule(config, mhc, 0)
        nn.init.normal_(module.mapping_proj.weight)
        streams = torch.randn(T, 1, N * 16)
        with torch.no_grad(), Sampler(module, config) as sampler:
            module(streams)
        taken[backend] = sampler.samples[0]
    got, want = taken["triton"], taken["reference"]
    for name in ("h_pre", "h_post", "h_res", "gram"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-6)
    assert got.logits.keys() == want.logits.keys() == {"pre", "post", "res"}
    for part in got.logits:
        torch.testing.assert_close(got.logits[part], want.logits[part], rtol=1e-5, atol=1e-5)


def test_only_the_first_call_is_sampled_and_no_hook_stays():
    modules = connections(2)
    mhc = modules[0].mhc
    first, second = torch.randn(2, T, 1, N * C).unbind(0)
    with torch.no_grad():
        expected = [module(first)[1].h_res for module in modules]
        assert not any(module._forward_hooks for module in modules)
        with Sampler(modules, config_of(mhc)) as sampler:
            for streams in (first, second):
                for module in modules:
                    module(streams)
        assert not any(module._forward_hooks for module in modules)
    for i in range(2):
        assert torch.equal(sampler.samples[i].h_res, expected[i].double())


class NoNumberOnTheHost(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a number, or a shape that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"h_res": "unconstrained"}, {"h_pre": "fixed"}], ids=str)
def test_the_host_waits_for_no_number_while_sampling(options):
    mhc = MHCConfig(**options)
    modules = connections(2, mhc)
    with torch.no_grad(), NoNumberOnTheHost(), Sampler(modules, config_of(mhc), tokens=4) as sampler:
        for module in modules:
            module(torch.randn(T, 2, N * C))
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            sampler.samples[0].gram.sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_copies(dtype):
    """Block recomputation empties mappings before the step ends, and the optimizer changes parameters."""
    mhc = MHCConfig(init_gating_factor=1.0, backend="reference")
    module = HyperConnectionModule(config_of(mhc, params_dtype=dtype), mhc, 0)
    streams = torch.randn(T, 1, N * C, dtype=dtype)
    with Sampler(module, config_of(mhc)) as sampler:
        _, mappings = module(streams)
    before = mappings.h_res.detach().clone().double()
    with torch.no_grad():
        for tensor in (streams, *mappings, *module.parameters()):
            tensor.zero_()
    sample = sampler.samples[0]
    assert torch.equal(sample.h_res, before) and sample.alphas["res"].item() == 1.0
    assert sample.h_pre.abs().min() > 0 and sample.gram.abs().max() > 0


def test_a_microbatch_without_tokens_is_passed_over():
    (module,) = connections(1)
    with torch.no_grad(), Sampler(module, config_of(module.mhc)) as sampler:
        module(torch.randn(0, 1, N * C))
        assert not sampler.samples
        module(torch.randn(T, 1, N * C))
    assert sampler.samples[0].h_res.shape[0] > 0


def test_hooks_are_removed_when_the_step_fails():
    modules = connections(1)
    with pytest.raises(RuntimeError, match="step"), Sampler(modules, config_of(modules[0].mhc)):
        assert modules[0]._forward_hooks
        raise RuntimeError("step")
    assert not modules[0]._forward_hooks


def test_a_model_without_mhc_is_refused():
    with pytest.raises(ValueError, match="no mHC connections"), capture_h_res(nn.Linear(2, 2)):
        pass
    plain = TransformerConfig(num_layers=1, hidden_size=C, num_attention_heads=1)
    with pytest.raises(ValueError, match="has no mHC"):
        Sampler(nn.Linear(2, 2), plain)


def test_a_sublayer_that_did_not_run_is_named():
    modules = connections(2)
    with Sampler(modules, config_of(modules[0].mhc)) as sampler:
        modules[0](torch.randn(T, 1, N * C))
    with pytest.raises(ValueError, match=r"\[1\] did not run"):
        sampler.report()
    samples, _ = random_samples(1)
    with pytest.raises(ValueError, match="layer_002_attention, layer_002_mlp"):
        reduce_samples(samples, config_of(MHCConfig(), layers=2), MHCConfig(), T)


def test_composite_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        composite([])
