"""Megatron's dynamic inference engine with its CUDA graphs, on a CPU those of `testing.graphs`."""

import itertools

import pytest
import torch
from graphed_steps import start
from harness import build
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)
from test_inference_engines import CASES, LONGEST, NEW, OPTIONS, PROMPTS, Numbers

from megatron_mhc.testing import graphs, paged


def serve(layout, kind, mhc, scope):
    """What the engine says of all prompts, two at a time, and how many graphs were replayed."""
    start(layout)
    config = layout.config(
        kind,
        params_dtype=torch.float32,
        cuda_graph_impl="local" if scope else "none",
        inference_cuda_graph_scope=scope,
    )
    model = build(layout, config, kind, mhc)[0].module.eval()
    paged.install()
    how = InferenceConfig(
        max_sequence_length=LONGEST,
        max_requests=2,
        block_size_tokens=4,
        buffer_size_gb=0.001,
        unified_memory_level=0,
        num_cuda_graphs=2 if scope else None,
        use_cuda_graphs_for_non_decode_steps=False,
    )
    context = DynamicInferenceContext(config, how)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Numbers())
    graphs.Graph.all_replays = 0
    served = DynamicInferenceEngine(controller, context)
    sampling = SamplingParams(
        top_k=1, num_tokens_to_generate=NEW, return_log_probs=True, skip_prompt_log_probs=True
    )
    done = [record.merge() for record in served.generate(prompts=PROMPTS, sampling_params=sampling)]
    said = [(list(map(int, request.generated_tokens)), request.generated_log_probs) for request in done]
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
