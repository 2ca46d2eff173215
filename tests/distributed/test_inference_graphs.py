"""Megatron's dynamic inference engine with its CUDA graphs, on a CPU those of `testing.graphs`."""

import itertools

import engines
import pytest
import torch
from engines import CASES, NEW, OPTIONS
from graphed_steps import start
from harness import build

from megatron_mhc.testing import graphs


def serve(layout, kind, mhc, scope):
    """What the engine says of all prompts, and how many graphs were replayed."""
    start(layout)
    config = layout.config(
        kind,
        params_dtype=torch.float32,
        cuda_graph_impl="local" if scope else "none",
        inference_cuda_graph_scope=scope,
    )
    model = build(layout, config, kind, mhc)[0].module.eval()
    graphs.Graph.all_replays = 0
    said = engines.serve(
        model,
        config,
        num_cuda_graphs=2 if scope else None,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    return said, graphs.Graph.all_replays


# Stock's own bits change under TP without sequence parallelism, and on a pipeline with graphs of the block.
CASES_OF = {"layer": ("one", "tp2_sp", "pp2", "pp2_tied", "tp2_pp2_sp"), "block": ("one", "tp2_sp")}
NOW = {
    ("layer", "one", "mhc"),
    ("layer", "tp2_pp2_sp", "v4"),
    ("block", "one", "mhc"),
    ("layer", "one", "stock"),
}


def cases():
    for scope, names in CASES_OF.items():
        for case, mhc in itertools.product(names, OPTIONS):
            marks = () if (scope, case, mhc) in NOW else pytest.mark.slow
            yield pytest.param(scope, case, mhc, marks=marks)


@pytest.mark.parametrize("scope, case, mhc", cases())
def test_an_engine_with_graphs_says_what_it_does_without(run_ranks, scope, case, mhc):
    """To the last bit of the probabilities."""
    kind, layout = CASES[case]
    ranks = layout.tp * layout.pp * layout.ep
    plain = run_ranks(ranks, serve, layout, kind, OPTIONS[mhc], None)
    graphed = run_ranks(ranks, serve, layout, kind, OPTIONS[mhc], scope)
    for (expected, none), (found, replays) in zip(plain, graphed, strict=True):
        assert found == expected and none == 0
        assert replays >= 2 * (NEW - 1) * (4 // layout.pp if scope == "layer" else 1)
