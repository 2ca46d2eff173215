"""Muon, whole and layer-wise: which parameters it takes, layouts, and resumed training."""

import functools

import pytest
import torch
from harness import Layout, global_parameters
from test_checkpoint import FLOAT32_ERROR, SINGLE, check, is_mapping, start, train

from megatron_mhc.testing.ranks import run_ranks as run

pytest.importorskip("emerging_optimizers")  # of the extra `dev`
from megatron.training.training import wrap_model_chunks_with_ddp  # noqa: E402

# Every rank orthogonalises whole matrices, in float32: Megatron's defaults depend on the layout, and on bf16.
MUON = dict(optimizer="muon", muon_tp_mode="duplicated", muon_fp32_matmul_prec="highest")


def in_layers(chunks, config, ddp_config):
    """DDP as megatron.training makes it for the layer-wise optimizer, with Muon's matrices in buffers of
    their own."""
    return wrap_model_chunks_with_ddp(chunks, config, ddp_config, use_layer_wise_distributed_optimizer=True)


LAYER_WISE = MUON | dict(use_layer_wise_distributed_optimizer=True)
OPTIMIZERS = {
    "muon": MUON,
    "layer_wise": LAYER_WISE | dict(wrap=in_layers),
    "layer_wise_without_a_layout": LAYER_WISE,
}


def optimizers_of_mappings():
    """{name: the class of the optimizer that has it} of the mapping parameters."""
    chunks, _, optimizer = start(SINGLE, "dense", torch.float32, **MUON)
    names = {id(p): name for name, p in global_parameters(chunks)}
    return {
        names[id(p)]: type(part.optimizer).__name__
        for part in optimizer.chained_optimizers
        for group in part.param_groups
        for p in group["params"]
        if is_mapping(names[id(p)])
    }


def test_projections_go_to_muon_and_the_rest_of_a_mapping_to_adam(run_ranks):
    """The recipe of DeepSeek-V4: AdamW for mHC's static biases and gating factors alone."""
    found = run_ranks(1, optimizers_of_mappings)[0]
    assert len(found) == 8 * 2 + 3
    for name, optimizer in found.items():
        muon = name.endswith("mapping_proj.weight")
        assert optimizer == ("TensorParallelMuon" if muon else "PlainAdam"), name


LAYOUTS = {
    "tp2": (Layout(tp=2), "dense"),
    "tp2_sp": (Layout(tp=2, sp=True), "dense"),
    "pp2_vpp2": (Layout(pp=2, vpp=2), "dense"),
    "dp2": (SINGLE, "dense"),
    "ep2": (Layout(ep=2), "moe_shared"),
}


@functools.cache
def single(kind):
    return run(1, lambda: train(SINGLE, kind, torch.float32, range(3), **MUON))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_matches_single_process(run_ranks, name):
    layout, kind = LAYOUTS[name]
    history = run_ranks(2, lambda: train(layout, kind, torch.float32, range(3), **MUON))[0]
    check(history, single(kind), FLOAT32_ERROR)


def bf16(steps, load_from=None, save_to=None, **options):
    return run(2, lambda: train(SINGLE, "dense", torch.bfloat16, steps, load_from, save_to, **options))[0]


@functools.cache
def losses_without_clipping(name):
    return [loss for loss, _ in bf16(range(4), **OPTIMIZERS[name], clip_grad=0.0)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumed_matches_unbroken_run_bit_for_bit(tmp_path, name):
    options, folder = OPTIMIZERS[name], tmp_path / "saved"
    history = bf16(range(2), None, folder, **options) + bf16(range(2, 4), folder, **options)
    assert history == bf16(range(4), **options)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "muon"])
def test_layer_wise_optimizer_steps_as_the_whole_one_bit_for_bit(name):
    """Without clipping, whose norm is summed in another order."""
    whole = losses_without_clipping("muon")
    assert losses_without_clipping(name) == whole
    assert len(set(whole)) == 4
