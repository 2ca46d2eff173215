"""Layers in CUDA graphs train as layers without: the same losses and gradients, bit for bit.

The graphs are those of `megatron_mhc.testing.graphs`; the loop is what megatron.training does about them.
"""

import pytest
import torch
from harness import Layout, build, gpt, tokens

from megatron_mhc import MHCConfig
from megatron_mhc.testing import graphs
from megatron_mhc.testing.parameters import global_parameters, gradient

STEPS, WARMUP = 5, 2


def train(layout, kind, mhc, settings, evaluate=False):
    """Losses, every step's gradients, and how often a graph was replayed."""
    from megatron.core import tensor_parallel
    from megatron.core.full_cuda_graph import FullCudaGraphWrapper
    from megatron.core.pipeline_parallel import get_forward_backward_func

    layout.initialize()
    graphs.install()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=True, force_reset_rng=True)
    settings = dict(params_dtype=torch.float32, cuda_graph_warmup_steps=WARMUP, **settings)
    config = layout.config(kind, **settings)
    chunks = build(layout, config, kind, mhc)
    impl, options, helper = config.cuda_graph_impl, {}, None
    replays = graphs.Graph.all_replays = 0
    if impl == "full_iteration":
        options["schedule"] = FullCudaGraphWrapper(get_forward_backward_func(), cuda_graph_warmup_steps=WARMUP)
    if impl == "transformer_engine":
        helper = graphs.helper(chunks, config, gpt.SMALL.sequence, gpt.SMALL.micro_batch, 4)
    losses, found = [], []
    for step in range(STEPS):
        if helper is not None and step == WARMUP:
            helper.create_cudagraphs()
        losses.append(gpt.iterate(chunks, config, tokens(4, seed=step), **options))
        parameters = dict(global_parameters(chunks))
        found.append({name: gradient(p).clone() for name, p in parameters.items()})
        with torch.no_grad():
            for p in parameters.values():
                p -= 0.05 * p.main_grad.to(p.dtype)
        if evaluate and impl != "full_iteration":
            for chunk in chunks:
                chunk.eval()
            with torch.no_grad():
                losses.append(gpt.iterate(chunks, config, tokens(2, seed=99), forward_only=True))
            for chunk in chunks:
                chunk.train()
    return losses, found, graphs.Graph.all_replays


def compare(layout, kind, mhc, graphed, common, **options):
    plain, plain_grads, none = train(layout, kind, mhc, common, **options)
    losses, grads, replays = train(layout, kind, mhc, graphed | common, **options)
    assert none == 0 and replays > 0
    assert losses == plain and len(set(losses)) > STEPS - 1
    for step, (got, want) in enumerate(zip(grads, plain_grads, strict=True)):
        wrong = [name for name in want if not torch.equal(got[name], want[name])]
        assert not wrong, (step, wrong)
    return replays


MHC = dict(reference=MHCConfig(backend="reference"))
LOCAL = dict(cuda_graph_impl="local")
TE = dict(cuda_graph_impl="transformer_engine")
FULL = dict(cuda_graph_impl="full_iteration")


def modules(*names):
    return dict(cuda_graph_modules=list(names))


@pytest.mark.parametrize("impl", [LOCAL, TE, FULL], ids=["local", "te", "full"])
@pytest.mark.parametrize("kind", ["dense", "biased", "mla"])
def test_whole_layers(run_ranks, kind, impl):
    common = {} if kind == "mla" else {}
    run_ranks(1, compare, Layout(), kind, MHCConfig(), impl, common)
