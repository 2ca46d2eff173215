"""Layers in CUDA graphs train as layers without: the same losses and gradients, bit for bit."""

import pytest
import torch
from graphed_steps import PREPROCESS, ROUTER, compare, full, local, name, product, slow, te, train
from harness import Layout

from megatron_mhc import MHCConfig


@pytest.mark.parametrize(
    "kind, graphed",
    product(
        ["dense", "biased", "mla"], [local(), te(), full()], {(0, 0), (0, 1), (0, 2), (1, 1), (2, 0), (2, 1)}
    ),
    ids=name,
)
def test_whole_layers(run_ranks, kind, graphed):
    compare(run_ranks, 1, Layout(), kind, MHCConfig(), graphed)


@pytest.mark.parametrize(
    "graphed",
    [
        local() | dict(cuda_graph_retain_backward_graph=True, cuda_graph_warmup_steps=1),
        te() | dict(cuda_graph_retain_backward_graph=True, cuda_graph_warmup_steps=0),
        full() | dict(cuda_graph_warmup_steps=1),
    ],
)
def test_how_graphs_are_made(run_ranks, graphed):
    compare(run_ranks, 1, Layout(), "dense", MHCConfig(), graphed)


@pytest.mark.parametrize(
    "kind, graphed",
    product(
        ["dense", "biased"],
        [local("attn"), te("attn"), te("mlp"), te("attn", "mlp")],
        {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (1, 2)},
    ),
    ids=name,
)
def test_parts_of_dense_layers(run_ranks, kind, graphed):
    compare(run_ranks, 1, Layout(), kind, MHCConfig(), graphed)


@pytest.mark.parametrize(
    "kind, graphed",
    product(
        ["moe", "moe_shared", "moe_after_dense", "moe_auxiliary_loss"],
        [te("attn"), te(*ROUTER), te(*PREPROCESS), te("attn", *ROUTER), te("attn", *PREPROCESS)],
        {(0, 0), (0, 1), (0, 4), (1, 1), (1, 4), (2, 3), (3, 2)},
    ),
    ids=name,
)
def test_parts_of_moe_layers(run_ranks, kind, graphed):
    compare(run_ranks, 1, Layout(), kind, MHCConfig(), graphed)


OTHER_MAPPINGS = [
    dict(num_residual_streams=1),
    dict(preset="deepseek_v4"),
    dict(h_res="unconstrained"),
    dict(h_pre="fixed", h_post="fixed", h_res="identity"),
]


@pytest.mark.parametrize(
    "mhc, graphed",
    product(
        OTHER_MAPPINGS, [local(), te(), te("attn", *PREPROCESS)], {(0, 0), (1, 1), (2, 2), (3, 1), (3, 2)}
    ),
    ids=name,
)
def test_other_mappings(run_ranks, mhc, graphed):
    kind = "moe" if graphed["cuda_graph_modules"] else "dense"
    compare(run_ranks, 1, Layout(), kind, MHCConfig(**mhc), graphed, {}, False, 2)


@pytest.mark.parametrize("graphed", [te("attn"), full(), *slow(local(), te())], ids=name)
def test_mtp(run_ranks, graphed):
    bf16 = dict(bf16=True, params_dtype=torch.bfloat16)  # as Megatron's static inputs of a plain layer are
    compare(run_ranks, 1, Layout(), "mtp", MHCConfig(), graphed, bf16, False, 2)


@pytest.mark.parametrize("graphed", [te("attn"), full(), *slow(local(), te())], ids=name)
def test_mtp_between_streams(run_ranks, graphed):
    compare(run_ranks, 1, Layout(), "mtp2", MHCConfig(mtp="multistream"), graphed, {}, False, 2)


PADDED = dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)


@pytest.mark.parametrize("graphed", [te(), te("moe"), full(), *slow(te("attn", "moe"), local())], ids=name)
def test_moe_layers_with_their_experts(run_ranks, graphed):
    compare(run_ranks, 1, Layout(), "moe", MHCConfig(), graphed, PADDED)


@pytest.mark.parametrize(
    "kind, recompute",
    product(
        ["moe", "moe_shared", "moe_auxiliary_loss"],
        [{}, dict(recompute_granularity="selective", recompute_modules=["moe"])],
        {(0, 0), (1, 0), (1, 1), (2, 1)},
    ),
)
def test_local_parts_of_moe_layers(run_ranks, kind, recompute):
    compare(run_ranks, 1, Layout(), kind, MHCConfig(), local(*ROUTER), recompute, True)


KERNELS = MHCConfig(backend="triton", sinkhorn_iterations=2, boundary="fused")


@pytest.mark.slow  # Triton's interpreter
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "kind, graphed",
    [
        ("dense", local()),
        ("dense", te()),
        ("dense", te("attn")),
        ("dense", te("mlp")),
        ("moe", te("attn", *PREPROCESS)),
        ("moe", te(*ROUTER)),
    ],
    ids=name,
)
def test_kernels(run_ranks, kind, graphed):
    common = dict(num_layers=2)
    compare(run_ranks, 1, Layout(), kind, KERNELS, graphed, common, False, 1)


@pytest.mark.parametrize(
    "layout, graphed",
    product(
        [Layout(tp=2), Layout(tp=2, sp=True)],
        [local(), te("attn"), te(), full()],
        {(0, 2), (1, 0), (1, 1), (1, 3)},
    ),
    ids=name,
)
def test_tensor_parallel(run_ranks, layout, graphed):
    compare(run_ranks, 2, layout, "dense", MHCConfig(), graphed)


@pytest.mark.parametrize(
    "layout, model",
    product(
        [Layout(pp=2), Layout(pp=2, vpp=2)],
        [("dense", te()), ("moe", te("attn", *PREPROCESS))],
        {(0, 1), (1, 0)},
    ),
    ids=["pp-dense", "pp-moe", "vpp-dense", "vpp-moe"],
)
def test_pipelines(run_ranks, layout, model):
    kind, graphed = model
    compare(run_ranks, 2, layout, kind, MHCConfig(), graphed, {}, False, 4)


@pytest.mark.parametrize("graphed", [local(), te(), full()], ids=name)
def test_distributed_optimizer(run_ranks, graphed):
    compare(run_ranks, 2, Layout(distributed_optimizer=True), "dense", MHCConfig(), graphed, {}, False, 4)


@pytest.mark.parametrize("graphed", [te("attn", *PREPROCESS)], ids=name)
def test_expert_parallel(run_ranks, graphed):
    compare(run_ranks, 2, Layout(ep=2), "moe_shared", MHCConfig(), graphed, {}, False, 4)


@pytest.mark.parametrize(
    "parts, graphed",
    product(["layernorm"], [te(), te("attn"), full()], {(0, 1), (0, 2)})
    + product(["core_attn", "mlp"], [local(), te(), te("attn"), full()], {(0, 0), (0, 2), (1, 0), (1, 1)}),
    ids=name,
)
def test_selective_recompute(run_ranks, parts, graphed):
    recompute = dict(recompute_granularity="selective", recompute_modules=[parts])
    compare(run_ranks, 1, Layout(), "dense", MHCConfig(), graphed, recompute)


@pytest.mark.parametrize(
    "parts, graphed",
    product(["shared_experts", "moe"], [local(), te(), full()], {(0, 1), (1, 0), (1, 2)}),
    ids=name,
)
def test_selective_recompute_of_experts(run_ranks, parts, graphed):
    recompute = dict(recompute_granularity="selective", recompute_modules=[parts])
    compare(run_ranks, 1, Layout(), "moe_shared", MHCConfig(), graphed, PADDED | recompute, False, 2)


def norms_without_a_gradient(layout):
    recompute = dict(recompute_granularity="selective", recompute_modules=["layernorm"])
    _, plain, _ = train(layout, "dense", None, recompute)
    _, graphed, _ = train(layout, "dense", None, recompute | local())
    return [name for name in plain[1] if not torch.equal(plain[1][name], graphed[1][name])]


def test_stock_local_graphs_lose_the_gradients_of_recomputed_norms(run_ranks):
    """Why `refusals.LAYER` refuses them."""
    lost = run_ranks(1, norms_without_a_gradient, Layout())[0]
    assert len(lost) == 6 and all(name.endswith("layernorm.weight") for name in lost)


def test_recompute_of_the_norm_in_front_of_a_router(run_ranks):
    recompute = dict(recompute_granularity="selective", recompute_modules=["layernorm"])
    compare(run_ranks, 1, Layout(), "moe_shared", MHCConfig(), te("attn", *PREPROCESS), recompute)


def test_recompute_of_mhc_in_a_graph_of_the_whole_step(run_ranks):
    compare(run_ranks, 1, Layout(), "moe_shared", MHCConfig(recompute_layer_num="3"), full(), PADDED)


@pytest.mark.parametrize("graphed", [te("attn"), te(), full()], ids=name)
def test_dropout(run_ranks, graphed):
    dropout = dict(hidden_dropout=0.1, attention_dropout=0.1)
    compare(run_ranks, 1, Layout(), "biased", MHCConfig(), graphed, dropout)
