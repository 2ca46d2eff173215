"""--heterogeneous-layers-config-path: layers of other sizes, without attention or without an MLP."""

import functools
import json

import pytest
import torch
from harness import Iteration, Layout, build, differences, global_parameters, iterate
from layout_cases import UNIFORM
from megatron.core.models.gpt.heterogeneous import heterogeneous_layer_specs
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from test_checkpoint import FLOAT32_ERROR, check, train
from thinned import each_value

from megatron_mhc import MHCConfig
from megatron_mhc.pipeline import engine
from megatron_mhc.testing import cpu, gpt, ranks
from megatron_mhc.testing.parameters import fill

ERROR = 1e-10
NONE = dict(n_heads_in_group=None, ffn_mult=None)
NOTHING, LINEAR = dict(no_op=True, **NONE), dict(replace_with_linear=True, **NONE)
FEW, MANY, SMALL, LARGE = (
    dict(n_heads_in_group=4),
    dict(n_heads_in_group=2),
    dict(ffn_mult=1),
    dict(ffn_mult=3),
)
LAYERS = {
    "lacking": [(FEW, SMALL), (NOTHING, LARGE), (MANY, NOTHING), (NOTHING, NOTHING)],
    "lacking_first": [(NOTHING, LARGE), (FEW, SMALL), (MANY, NOTHING), (FEW, LARGE)],
    "empty_first": [(NOTHING, NOTHING), (FEW, SMALL), (MANY, LARGE), (NOTHING, LARGE)],
    "empty_half": [(NOTHING, NOTHING), (NOTHING, NOTHING), (FEW, SMALL), (MANY, LARGE)],
    "linear": [(FEW, LINEAR), (LINEAR, LARGE), (MANY, SMALL), (FEW, LARGE)],
}


def heterogeneous(layers):
    """Have this rank's models built of these layers; returns settings of their configuration."""
    gpt.TransformerConfig = HeterogeneousTransformerConfig
    heterogeneous_layer_specs.WrappedTorchNorm = cpu.local_norm
    gpt.get_gpt_decoder_block_spec = lambda config, use_transformer_engine, normalization, vp_stage: (
        heterogeneous_layer_specs.get_gpt_heterogeneous_layer_spec(config, use_transformer_engine, vp_stage)
    )
    blocks = [dict(attention=dict(a), ffn=dict(f)) for a, f in LAYERS[layers]]
    return dict(heterogeneous_layers_config_encoded_json=json.dumps(dict(block_configs=blocks)))


def run(layout, layers, mhc, weights=fill, **settings):
    settings |= heterogeneous(layers)
    layout.initialize()
    config = layout.config("dense", **settings)
    chunks = build(layout, config, "dense", mhc, weights=weights)
    megatron = mhc is None or mhc.pipeline_schedule == "megatron"
    return iterate(chunks, config, schedule=None if megatron else engine.forward_backward), chunks


@functools.cache
def alone(layers, mhc):
    return ranks.run_ranks(1, lambda: Iteration.of(*run(Layout(), layers, mhc)))[0]


def compare(layout, layers, mhc, expected, settings):
    return differences(*run(layout, layers, mhc, **settings), expected, torch.float64)


def check_parity(run_ranks, world, layout, layers, mhc, settings, expected):
    result = run_ranks(world, compare, layout, layers, mhc, expected, settings)[0]
    error, name = result.worst
    assert result.loss <= ERROR
    assert error <= ERROR, name


MHC, PP2 = MHCConfig(), Layout(pp=2)
CASES = {
    "tp2_sp": (Layout(tp=2, sp=True), MHC, {}),
    "pp2": (PP2, MHC, {}),
    "pp2_vpp2": (Layout(pp=2, vpp=2), MHC, {}),
    "pp2_interleaved": (PP2, MHCConfig(pipeline_schedule="interleaved"), {}),
    "pp2_full_recompute": (PP2, MHC, UNIFORM),
}


# A stage, or a virtual one, that hands on what it received.
ALSO = [("tp2_sp", "linear"), *((case, "empty_half") for case in ("pp2", "pp2_vpp2", "pp2_interleaved"))]


@pytest.mark.parametrize("case, layers", each_value(CASES, LAYERS, also=ALSO))
def test_layout_matches_single_process(run_ranks, case, layers):
    layout, mhc, settings = CASES[case]
    if layers == "linear" and layout.sp:  # in stock such a layer gives every rank the whole sequence
        layout = Layout(tp=2)
    check_parity(run_ranks, 2, layout, layers, mhc, settings, alone(layers, MHC))


PLAIN = MHCConfig(num_residual_streams=1, h_res="identity", h_pre="fixed", h_post="fixed")


def fill_alike(chunks):
    """As `fill`, but for the final norm, whose name is another with mHC."""
    fill(chunks)
    for name, parameter in global_parameters(chunks):
        if "final_layernorm" in name:
            torch.nn.init.ones_(parameter)


@pytest.mark.parametrize("layers", LAYERS)
def test_one_stream_that_nothing_maps_is_stock(run_ranks, layers):
    def loss(mhc):
        return run(Layout(), layers, mhc, weights=fill_alike)[0]

    stock, one = (run_ranks(1, loss, mhc)[0] for mhc in (None, PLAIN))
    assert abs(stock - one) <= ERROR


def test_resharded_training_matches_unbroken_run(run_ranks, tmp_path):
    def part(world, layout, steps, *folders):
        def train_them():
            settings = heterogeneous("lacking")
            config = Layout.config
            Layout.config = lambda self, kind, **more: config(self, kind, **settings, **more)
            return train(layout, "dense", torch.float32, steps, *folders, lr=3e-2)

        return run_ranks(world, train_them)[0]

    folder = tmp_path / "saved"
    history = part(2, PP2, range(2), None, folder) + part(2, Layout(tp=2), range(2, 4), folder)
    check(history, part(1, Layout(), range(4)), FLOAT32_ERROR)


@pytest.mark.parametrize(
    "option",
    [
        dict(recompute_layer_num="2"),
        dict(pipeline_schedule="fused"),
        dict(pipeline_schedule="interleaved", pp_boundary="split"),
    ],
    ids=lambda option: "_".join(option.values()),
)
def test_options_that_ask_for_every_sub_layer_are_refused(run_ranks, option):
    def refused():
        with pytest.raises(ValueError, match="does not support layers without attention or without an MLP"):
            run(PP2, "lacking", MHCConfig(**option))
        torch.distributed.barrier()

    run_ranks(2, refused)
