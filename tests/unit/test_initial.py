"""Mapping parameters at step 0."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_mhc import MHCConfig
from megatron_mhc.gated import ExitMixer, GatedConnection
from megatron_mhc.hyper_connection import HyperConnectionModule
from megatron_mhc.streams import ContractHead

MODULES = {
    "uniform": (dict(init="uniform"), HyperConnectionModule),
    "mean_read": (dict(preset="hy_v4"), HyperConnectionModule),
    "home_stream": (dict(init="home_stream"), HyperConnectionModule),
    "hc": (dict(h_res="unconstrained"), HyperConnectionModule),
    "gated": (dict(preset="qwen4_exp"), GatedConnection),
    "exit_mixer": (dict(preset="qwen4_exp"), ExitMixer),
    "head": (dict(contract="learned_head"), ContractHead),
    "head_mean_read": (dict(preset="hy_v4", contract="learned_head"), ContractHead),
}
DRAWN = {"uniform", "mean_read", "gated", "exit_mixer", "head_mean_read"}


def parameters(name, **settings):
    options, module = MODULES[name]
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, use_cpu_initialization=True, **settings
    )
    torch.manual_seed(7)
    index = [1] if issubclass(module, HyperConnectionModule) else []
    return dict(module(config, MHCConfig(**options), *index).named_parameters())


@pytest.mark.parametrize("name", MODULES)
def test_parameters_that_no_file_provides_are_drawn_whatever_megatron_is_told(monkeypatch, name):
    """perform_initialization is off where a file has the model's weights, as in Megatron-Bridge's import."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **how: empty(*args, **how).fill_(float("nan")))
    usual = parameters(name, perform_initialization=True)
    ours = parameters(name, perform_initialization=False)
    assert usual.keys() == ours.keys()
    for key, value in ours.items():
        assert value.isfinite().all() and torch.equal(value, usual[key]), key
    matrices = [value for value in ours.values() if value.dim() == 2]
    assert matrices and all((value.std() > 0) == (name in DRAWN) for value in matrices)
