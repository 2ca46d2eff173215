"""Layers in CUDA graphs train as layers without: the same losses and gradients, bit for bit.

The graphs are those of `megatron_mhc.testing.graphs`; the loop is what megatron.training does about them.
"""

import gc

import pytest
import torch
from harness import MICRO_BATCH, SEQUENCE, Layout, build, gpt, ps, tokens
from held_state import state
from megatron.core import tensor_parallel
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from megatron_mhc import MHCConfig
from megatron_mhc.chunk import chunk_of
from megatron_mhc.diagnostics.sampler import Sampler
from megatron_mhc.graphs import release
from megatron_mhc.testing import graphs, parity
from megatron_mhc.testing.parameters import global_parameters, gradient

STEPS, WARMUP = 4, 2


class WholeSteps:
    """`FullCudaGraphWrapper` around Megatron's schedule; it keeps its batches in dictionaries."""

    def __init__(self, warm_up):
        self.wrapper = FullCudaGraphWrapper(get_forward_backward_func(), cuda_graph_warmup_steps=warm_up)

    def __call__(self, *, data_iterator, forward_step_func, **kwargs):
        return self.wrapper(
            data_iterator=({"tokens": batch} for batch in data_iterator),
            forward_step_func=lambda batches, model: forward_step_func(
                (batch["tokens"] for batch in batches), model
            ),
            **kwargs,
        )


def train(layout, kind, mhc, settings, moe_class=False, count=2):
    """Losses and every step's gradients of steps with an evaluation between them, and the replays."""
    layout.initialize()
    graphs.install()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=True, force_reset_rng=True)
    torch.manual_seed(1234 + torch.distributed.get_rank())
    if moe_class:
        gpt_layer_specs.TransformerLayer = MoETransformerLayer
    config = layout.config(
        kind, **dict(params_dtype=torch.float32, cuda_graph_warmup_steps=WARMUP) | settings
    )
    chunks = build(layout, config, kind, mhc)
    helper, options = None, {}
    graphs.Graph.all_replays = 0
    if config.cuda_graph_impl == "full_iteration":
        options["schedule"] = WholeSteps(config.cuda_graph_warmup_steps)
    if config.cuda_graph_impl == "transformer_engine":
        ours = len(range(ps.get_data_parallel_rank(), count, ps.get_data_parallel_world_size()))
        helper = graphs.helper(chunks, config, SEQUENCE, MICRO_BATCH, ours)
    losses, found = [], []
    for step in range(STEPS):
        if helper is not None and step == config.cuda_graph_warmup_steps:
            helper.create_cudagraphs()
        losses.append(gpt.iterate(chunks, config, tokens(count, seed=step), **options))
        if layout.distributed_optimizer:  # else a bucket's rest is what it was before the reduction
            parity._restore_sharded_gradients(chunks)
        parameters = dict(global_parameters(chunks))
        found.append({name: gradient(p).clone() for name, p in parameters.items()})
        with torch.no_grad():
            for p in parameters.values():
                p -= 0.05 * p.main_grad.to(p.dtype)
            for chunk in chunks:
                chunk.eval()
            gpt.forward_backward(chunks, config, tokens(count, seed=99), forward_only=True, **options)
            for chunk in chunks:
                chunk.train()
    return losses, found, graphs.Graph.all_replays


def compare(layout, kind, mhc, graphed, common=None, moe_class=False, count=2):
    common = common or {}
    plain, plain_grads, none = train(layout, kind, mhc, common, moe_class, count)
    losses, grads, replays = train(layout, kind, mhc, graphed | common, moe_class, count)
    assert none == 0 and replays > 0
    assert losses == plain and len(set(losses)) == STEPS
    for step, (got, want) in enumerate(zip(grads, plain_grads, strict=True)):
        wrong = [name for name in want if not torch.equal(got[name], want[name])]
        assert not wrong, (step, wrong)


def local(*modules):
    return dict(cuda_graph_impl="local", cuda_graph_modules=list(modules))


def te(*modules):
    return dict(cuda_graph_impl="transformer_engine", cuda_graph_modules=list(modules))


def full():
    return dict(cuda_graph_impl="full_iteration", cuda_graph_modules=[])


def name(value):
    if isinstance(value, dict) and "cuda_graph_impl" in value:
        return "-".join([value["cuda_graph_impl"], *value["cuda_graph_modules"]])
    if isinstance(value, Layout):
        return "sp" if value.sp else "tp"
    return None


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def product(firsts, seconds, chosen):
    """All pairs: by default those at `chosen`, which has every value; the others under -m slow."""
    assert {i for i, _ in chosen} == set(range(len(firsts)))
    return [
        pytest.param(first, second, marks=[] if (i, j) in chosen else pytest.mark.slow)
        for i, first in enumerate(firsts)
        for j, second in enumerate(seconds)
    ]


@pytest.mark.parametrize(
    "kind, graphed",
    product(
        ["dense", "biased", "mla"], [local(), te(), full()], {(0, 0), (0, 1), (0, 2), (1, 1), (2, 0), (2, 1)}
    ),
    ids=name,
)
def test_whole_layers(run_ranks, kind, graphed):
    run_ranks(1, compare, Layout(), kind, MHCConfig(), graphed)


@pytest.mark.parametrize(
    "graphed",
    [
        local() | dict(cuda_graph_retain_backward_graph=True, cuda_graph_warmup_steps=1),
        te() | dict(cuda_graph_retain_backward_graph=True, cuda_graph_warmup_steps=0),
        full() | dict(cuda_graph_warmup_steps=1),
    ],
)
def test_how_graphs_are_made(run_ranks, graphed):
    run_ranks(1, compare, Layout(), "dense", MHCConfig(), graphed)


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
    run_ranks(1, compare, Layout(), kind, MHCConfig(), graphed)


ROUTER = ("moe_router",)
PREPROCESS = ("moe_router", "moe_preprocess")


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
    run_ranks(1, compare, Layout(), kind, MHCConfig(), graphed)


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
    run_ranks(1, compare, Layout(), kind, MHCConfig(**mhc), graphed, {}, False, 2)


@pytest.mark.parametrize("graphed", [te("attn"), full(), *slow(local(), te())], ids=name)
def test_mtp(run_ranks, graphed):
    bf16 = dict(bf16=True, params_dtype=torch.bfloat16)  # as Megatron's static inputs of a plain layer are
    run_ranks(1, compare, Layout(), "mtp", MHCConfig(), graphed, bf16, False, 2)


PADDED = dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)


@pytest.mark.parametrize("graphed", [te(), te("moe"), full(), *slow(te("attn", "moe"), local())], ids=name)
def test_moe_layers_with_their_experts(run_ranks, graphed):
    run_ranks(1, compare, Layout(), "moe", MHCConfig(), graphed, PADDED)


@pytest.mark.parametrize(
    "kind, recompute",
    product(
        ["moe", "moe_shared", "moe_auxiliary_loss"],
        [{}, dict(recompute_granularity="selective", recompute_modules=["moe"])],
        {(0, 0), (1, 0), (1, 1), (2, 1)},
    ),
)
def test_local_parts_of_moe_layers(run_ranks, kind, recompute):
    run_ranks(1, compare, Layout(), kind, MHCConfig(), local(*ROUTER), recompute, True)


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
    run_ranks(1, compare, Layout(), kind, KERNELS, graphed, common, False, 1, timeout=550)


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
    run_ranks(2, compare, layout, "dense", MHCConfig(), graphed)


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
    run_ranks(2, compare, layout, kind, MHCConfig(), graphed, {}, False, 4)


@pytest.mark.parametrize("graphed", [local(), te(), full()], ids=name)
def test_distributed_optimizer(run_ranks, graphed):
    run_ranks(2, compare, Layout(distributed_optimizer=True), "dense", MHCConfig(), graphed, {}, False, 4)


@pytest.mark.parametrize("graphed", [te("attn", *PREPROCESS)], ids=name)
def test_expert_parallel(run_ranks, graphed):
    run_ranks(2, compare, Layout(ep=2), "moe_shared", MHCConfig(), graphed, {}, False, 4)


@pytest.mark.parametrize(
    "parts, graphed",
    product(["layernorm"], [te(), te("attn"), full()], {(0, 1), (0, 2)})
    + product(["core_attn", "mlp"], [local(), te(), te("attn"), full()], {(0, 0), (0, 2), (1, 0), (1, 1)}),
    ids=name,
)
def test_selective_recompute(run_ranks, parts, graphed):
    recompute = dict(recompute_granularity="selective", recompute_modules=[parts])
    run_ranks(1, compare, Layout(), "dense", MHCConfig(), graphed, recompute)


@pytest.mark.parametrize(
    "parts, graphed",
    product(["shared_experts", "moe"], [local(), te(), full()], {(0, 1), (1, 0), (1, 2)}),
    ids=name,
)
def test_selective_recompute_of_experts(run_ranks, parts, graphed):
    recompute = dict(recompute_granularity="selective", recompute_modules=[parts])
    run_ranks(1, compare, Layout(), "moe_shared", MHCConfig(), graphed, PADDED | recompute, False, 2)


def norms_without_a_gradient(layout):
    recompute = dict(recompute_granularity="selective", recompute_modules=["layernorm"])
    _, plain, _ = train(layout, "dense", None, recompute)
    _, graphed, _ = train(layout, "dense", None, recompute | local())
    return [name for name in plain[1] if not torch.equal(plain[1][name], graphed[1][name])]


def test_stock_local_graphs_lose_the_gradients_of_recomputed_norms(run_ranks):
    """Why `refusals.LAYER` refuses them."""
    lost = run_ranks(1, norms_without_a_gradient, Layout())[0]
    assert len(lost) == 8 and all(name.endswith("layernorm.weight") for name in lost)


def test_recompute_of_the_norm_in_front_of_a_router(run_ranks):
    recompute = dict(recompute_granularity="selective", recompute_modules=["layernorm"])
    run_ranks(1, compare, Layout(), "moe_shared", MHCConfig(), te("attn", *PREPROCESS), recompute)


def test_recompute_of_mhc_in_a_graph_of_the_whole_step(run_ranks):
    run_ranks(1, compare, Layout(), "moe_shared", MHCConfig(recompute_layer_num="3"), full(), PADDED)


@pytest.mark.parametrize("graphed", [te("attn"), te(), full()], ids=name)
def test_dropout(run_ranks, graphed):
    dropout = dict(hidden_dropout=0.1, attention_dropout=0.1)
    run_ranks(1, compare, Layout(), "biased", MHCConfig(), graphed, dropout)


def refused(layout, kind, mhc, settings, match):
    layout.initialize()
    graphs.install()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=True, force_reset_rng=True)
    with pytest.raises(ValueError, match=match):
        build(layout, layout.config(kind, **settings), kind, mhc)


RECOMPUTED = dict(recompute_granularity="selective")


@pytest.mark.parametrize(
    "kind, mhc, settings, match",
    [
        (
            "dense",
            dict(recompute_layer_num="auto"),
            local(),
            "--mhc-recompute-layer-num auto with",
        ),
        ("dense", dict(recompute_layer_num="2"), te("mlp"), "--mhc-recompute-layer-num 2 with"),
        (
            "dense",
            {},
            local() | RECOMPUTED | dict(recompute_modules=["layernorm"]),
            "--recompute-modules layernorm with --cuda-graph-impl local leaves its parameters without",
        ),
        (
            "mla",
            {},
            local() | RECOMPUTED | dict(recompute_modules=["mla_up_proj"]),
            "--recompute-modules mla_up_proj with --cuda-graph-impl local",
        ),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(run_ranks, kind, mhc, settings, match):
    run_ranks(1, refused, Layout(), kind, MHCConfig(**mhc), settings, match)


def built(layout, kind, settings):
    layout.initialize()
    graphs.install()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=True, force_reset_rng=True)
    config = layout.config(kind, params_dtype=torch.float32, cuda_graph_warmup_steps=1, **settings)
    return build(layout, config, kind, MHCConfig()), config


def work_ahead(layout, kind, settings):
    chunk = chunk_of(built(layout, kind, settings)[0][0])
    chunk._works_ahead = True
    for sublayer in chunk.sublayers:
        sublayer.connection.next_pre = lambda streams: "next pre"
    return [chunk.next_pre(sublayer, None) is not None for sublayer in chunk.sublayers[:-1]]


@pytest.mark.parametrize(
    "kind, settings, behind_attention, behind_mlp",
    [
        ("dense", {}, True, True),
        ("dense", full(), True, True),
        ("dense", te(), True, False),
        ("dense", local(), True, False),
        ("dense", te("attn"), False, False),
        ("dense", te("mlp"), False, False),
        ("moe", te("attn", *ROUTER), True, False),
        ("moe", te(*ROUTER), False, True),  # from outside to outside
    ],
    ids=name,
)
def test_connections_work_ahead_on_one_side_of_an_edge(
    run_ranks, kind, settings, behind_attention, behind_mlp
):
    made = run_ranks(1, work_ahead, Layout(), kind, settings)[0]
    assert made[::2] == [behind_attention] * 4 and made[1::2] == [behind_mlp] * 3


def replayed(layout, kind, settings):
    chunks, config = built(layout, kind, settings)
    if config.cuda_graph_impl == "transformer_engine":
        gpt.iterate(chunks, config, tokens(2))
        graphs.helper(chunks, config, SEQUENCE, MICRO_BATCH, 2).create_cudagraphs()
    for _ in range(2):
        gpt.iterate(chunks, config, tokens(2))
    before = state(chunks, config)
    gpt.iterate(chunks, config, tokens(2))
    assert state(chunks, config) == before


@pytest.mark.parametrize("settings", [local(), te(), te("attn"), te("attn", *PREPROCESS)], ids=name)
def test_a_replay_leaves_nothing_behind(run_ranks, settings):
    run_ranks(1, replayed, Layout(), "moe" if settings == te("attn", *PREPROCESS) else "dense", settings)


def released(layout, settings):
    train(layout, "dense", MHCConfig(), settings)
    release()
    return sum(isinstance(one, graphs.Graph) for one in gc.get_objects())


@pytest.mark.parametrize("settings", [local(), full()], ids=name)
def test_graphs_end_with_their_model(run_ranks, settings):
    assert run_ranks(1, released, Layout(), settings) == [0]


def sampled(layout, kind, settings):
    chunks, config = built(layout, kind, settings)
    helper = None
    if config.cuda_graph_impl == "transformer_engine":
        helper = graphs.helper(chunks, config, SEQUENCE, MICRO_BATCH, 2)
    options = dict(schedule=WholeSteps(1)) if config.cuda_graph_impl == "full_iteration" else {}

    def step(seed=0):
        return gpt.iterate(chunks, config, tokens(2, seed=seed), **options)

    with Sampler(chunks, config):  # counts as no warm-up
        want = step()
    step()
    if helper:
        helper.create_cudagraphs()
    assert step() == want
    graphs.Graph.all_replays = 0
    assert step() == want
    replays = graphs.Graph.all_replays
    with Sampler(chunks, config) as sampler:
        got = [step(), step(seed=1)]
    assert len(sampler.samples) == 8 and got[0] == want != got[1]
    assert replays == graphs.Graph.all_replays > 0
    assert step() == want and graphs.Graph.all_replays == 2 * replays


@pytest.mark.parametrize("settings", [local(), full(), *slow(te(), te("attn"))], ids=name)
def test_layers_are_sampled_without_their_graphs(run_ranks, settings):
    run_ranks(1, sampled, Layout(), "dense", settings)
