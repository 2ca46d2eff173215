"""Megatron's inference engines: batches of prompts of several lengths, greedy, in parallel layouts.

On a CPU flash-attn, which the dynamic engine's attention calls, is `testing.paged`.
"""

import itertools

import pytest
import torch
from harness import Layout, build
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
from megatron.core.inference.engines import DynamicInferenceEngine, StaticInferenceEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)

from megatron_mhc import MHCConfig
from megatron_mhc.testing import paged

NEW, LONGEST = 8, 16
PROMPTS = ["5 17 3", "60 2 2 41 9 33", "8", "1 2 3 4 5 6"]


class Numbers:
    """A tokenizer whose words are token ids."""

    vocab_size, eod, bos, pad = 64, 63, None, 63

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, ids, **_):
        return " ".join(str(i) for i in ids)

    def offsets(self, ids, text):
        return list(range(len(ids)))


def serve(layout, kind, mhc, dynamic):
    """What Megatron's engine says of all prompts, of which it takes two at a time."""
    layout.initialize()
    # The other dispatcher, Megatron's default, needs NVLink's multicast.
    config = layout.config(kind, params_dtype=torch.float32, inference_moe_token_dispatcher_type="nccl")
    model = build(layout, config, kind, mhc)[0].module.eval()
    if dynamic:
        paged.install()
        how = InferenceConfig(
            max_sequence_length=LONGEST,
            max_requests=2,
            block_size_tokens=4,
            buffer_size_gb=0.001,
            unified_memory_level=0,
        )
        context = DynamicInferenceContext(config, how)
    else:
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=LONGEST)
    controller = TextGenerationController(GPTInferenceWrapper(model, context), Numbers())
    sampling = SamplingParams(
        top_k=1, num_tokens_to_generate=NEW, return_log_probs=True, skip_prompt_log_probs=dynamic
    )
    if dynamic:
        served = DynamicInferenceEngine(controller, context)
        done = [record.merge() for record in served.generate(prompts=PROMPTS, sampling_params=sampling)]
    else:
        served = StaticInferenceEngine(controller, max_batch_size=2, legacy=True)
        done = served.generate(prompts=PROMPTS, sampling_params=sampling)
    return [(list(map(int, request.generated_tokens)), request.generated_log_probs) for request in done]


def training_forward(kind, mhc):
    """Greedy tokens by whole passes, each prompt by itself, and the logarithms of their probabilities."""
    layout = Layout()
    layout.initialize()
    config = layout.config(kind, params_dtype=torch.float32)
    model = build(layout, config, kind, mhc)[0].module
    out = []
    for prompt in PROMPTS:
        ids, chosen = Numbers().tokenize(prompt), []
        for _ in range(NEW):
            length = len(ids)
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
            with torch.no_grad():
                scores = model(torch.tensor([ids]), torch.arange(length)[None], mask)[0, -1].log_softmax(-1)
            ids.append(int(scores.argmax()))
            chosen.append(scores.max().item())
            if ids[-1] == Numbers.eod:  # which ends a text and is no part of it
                break
        found = [word for word in ids[-len(chosen) :] if word != Numbers.eod]
        out.append((found, chosen[: len(found)]))
    return out


# Of the kind of model, a layout. With sequence parallelism Megatron serves by the dynamic engine alone.
CASES = {
    "one": ("dense", Layout()),
    "tp2": ("dense", Layout(tp=2)),
    "tp2_sp": ("dense", Layout(tp=2, sp=True)),
    "pp2": ("dense", Layout(pp=2)),
    "pp2_mla": ("mla", Layout(pp=2)),
    "ep2": ("moe", Layout(ep=2)),
    "pp2_tied": ("tied", Layout(pp=2)),
    "tp2_pp2": ("dense", Layout(tp=2, pp=2)),
    "tp2_pp2_sp": ("dense", Layout(tp=2, pp=2, sp=True)),
}
OPTIONS = {"stock": None, "mhc": MHCConfig(), "v4": MHCConfig(preset="deepseek_v4")}


NOW = {
    ("static", "one", "stock"),
    ("static", "tp2_pp2", "mhc"),
    ("static", "pp2_mla", "v4"),
    ("static", "ep2", "mhc"),
    ("dynamic", "one", "stock"),
    ("dynamic", "tp2_pp2_sp", "mhc"),
    ("dynamic", "pp2_tied", "v4"),
    ("dynamic", "ep2", "mhc"),
}


def cases():
    """Every engine, layout and form; most of them slow."""
    for engine, case, mhc in itertools.product(("static", "dynamic"), CASES, OPTIONS):
        if engine == "static" and CASES[case][1].sp or engine == "dynamic" and CASES[case][0] == "mla":
            continue  # Megatron's static engine knows no sequence parallelism, its dynamic MLA is FlashMLA's
        marks = () if (engine, case, mhc) in NOW else pytest.mark.slow
        yield pytest.param(engine, case, mhc, marks=marks)


@pytest.mark.parametrize("engine, case, mhc", cases())
def test_engine_says_what_the_training_forward_finds_likeliest(run_ranks, engine, case, mhc):
    """Texts and the logarithms of their probabilities, of each prompt by itself in whole passes."""
    kind, layout = CASES[case]
    expected = run_ranks(1, training_forward, kind, OPTIONS[mhc])[0]
    ranks = layout.tp * layout.pp * layout.ep
    for found in run_ranks(ranks, serve, layout, kind, OPTIONS[mhc], engine == "dynamic"):
        assert [ids[: len(want)] for (ids, _), (want, _) in zip(found, expected, strict=True)] == [
            want for want, _ in expected
        ]
        for (_, got), (_, want) in zip(found, expected, strict=True):
            assert got[: len(want)] == pytest.approx(want, abs=1e-5)
