"""Steps in the graphs of `megatron_mhc.testing.graphs`, as megatron.training makes and replays them."""

from typing import Any

import pytest
import torch
from harness import MICRO_BATCH, SEQUENCE, Layout, build, gpt, ps, tokens
from megatron.core import tensor_parallel
from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_layer import MoETransformerLayer

from megatron_mhc.testing import graphs, parity
from megatron_mhc.testing.parameters import global_parameters, gradient

STEPS, WARMUP = 3, 1
ROUTER = ("moe_router",)
PREPROCESS = ("moe_router", "moe_preprocess")


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


def start(layout):
    """Process groups, the graphs' stand-ins, and generators that graphs may hold."""
    layout.initialize()
    graphs.install()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, use_cudagraphable_rng=True, force_reset_rng=True)


def train(layout, kind, mhc, settings, moe_class=False, count=2):
    """Losses and every step's gradients of steps with an evaluation between them, and the replays."""
    start(layout)
    torch.manual_seed(1234 + torch.distributed.get_rank())
    if moe_class:
        gpt_layer_specs.TransformerLayer = MoETransformerLayer
    layers = 4 if layout.pp > 1 or "moe_layer_freq" in gpt.KINDS[kind] else 3
    usual = dict(params_dtype=torch.float32, cuda_graph_warmup_steps=WARMUP, num_layers=layers)
    config = layout.config(kind, **usual | settings)
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


_plain: dict[str, list[Any]] = {}  # what `train` gives on every rank, by what it is given


def compare(run_ranks, world, layout, kind, mhc, graphed, common=None, moe_class=False, count=2):
    """Train with the settings `common`, and with `graphed` too: the same bits, of which replays made some."""
    common = common or {}
    plain = layout, kind, mhc, common, moe_class, count
    if repr(plain) not in _plain:
        _plain[repr(plain)] = run_ranks(world, train, *plain)
    ours = run_ranks(world, train, layout, kind, mhc, graphed | common, moe_class, count)
    for (expected, wanted, none), (losses, found, replays) in zip(_plain[repr(plain)], ours, strict=True):
        assert none == 0 and replays > 0
        assert losses == expected and len(set(losses)) == STEPS
        for step, (got, want) in enumerate(zip(found, wanted, strict=True)):
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
