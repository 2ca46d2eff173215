"""What CUDA graphs hold of a model: where they end, what they leave behind, and what is refused."""

import gc

import pytest
import torch
from graphed_steps import PREPROCESS, ROUTER, WholeSteps, full, local, name, slow, start, te, train
from harness import MICRO_BATCH, SEQUENCE, Layout, build, gpt, tokens
from held_state import state

from megatron_mhc import MHCConfig
from megatron_mhc.chunk import chunk_of
from megatron_mhc.diagnostics.sampler import Sampler
from megatron_mhc.graphs import release
from megatron_mhc.testing import graphs


def refused(layout, kind, mhc, settings, match):
    start(layout)
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
    start(layout)
    config = layout.config(kind, params_dtype=torch.float32, cuda_graph_warmup_steps=1, **settings)
    return build(layout, config, kind, MHCConfig()), config


def work_ahead(layout, kind, settings):
    chunk = chunk_of(built(layout, kind, settings)[0][0])
    chunk._works_ahead = True
    for sublayer in chunk.sublayers:
        sublayer.connection.next_pre = lambda streams, handed_on: "next pre"
    return [chunk.next_pre(sublayer, None, None) is not None for sublayer in chunk.sublayers[:-1]]


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
