"""Megatron's inference engines, for their tests: prompts, a tokenizer, layouts, and what an engine says.

On a CPU flash-attn, which the dynamic engine's attention calls, is `testing.paged`.
"""

from harness import Layout
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


def serve(model, config, dynamic=True, **settings):
    """The tokens and the logarithms of their probabilities of each prompt, of which two at a time are taken.

    Args:
        settings: further ones of the dynamic engine's InferenceConfig.
    """
    if dynamic:
        paged.install()
        how = InferenceConfig(
            max_sequence_length=LONGEST,
            max_requests=2,
            block_size_tokens=4,
            buffer_size_gb=0.001,
            unified_memory_level=0,
            **settings,
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
