"""Generation on a pipeline, by Megatron's own wrapper: the logits of one process."""

import pytest
import torch
from harness import Layout, build, ps, tokens
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.utils import InferenceMode

from megatron_mhc import MHCConfig
from megatron_mhc.testing import hybrid
from megatron_mhc.testing.gpt import SMALL

PROMPT, NEW = 5, 4
MHC = MHCConfig()
GATED = MHCConfig(preset="qwen4_exp", gated_rank=8)


def generate(layout, mhc, stages=None, pattern=None, kind="dense"):
    """A prompt, then tokens with a KV cache: logits [b, PROMPT + NEW, vocabulary] of the last stage."""
    layout.initialize()
    config = layout.config(kind, params_dtype=torch.float32, pipeline_model_parallel_layout=stages)
    of = hybrid.model(pattern, SMALL) if pattern else None
    model = build(layout, config, kind, mhc, model=of)[0].module
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=PROMPT + NEW)
    wrapper = GPTInferenceWrapper(model, context)
    wrapper.prep_model_for_inference()
    words = tokens(1)[0, :, : PROMPT + NEW].cuda()
    given = wrapper.prep_inference_input(words)
    logits = []
    for start, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + NEW))]:
        window = wrapper.get_batch_for_context_window(given, start, end)
        logits.append(wrapper.run_one_forward_step(window))
        context.decode_mode = end >= PROMPT
    last = ps.is_pipeline_last_stage(ignore_virtual=True)
    return torch.cat(logits, 1) if last else None


def generate_as_an_engine(layout, mhc, stages):
    """`generate` in the mode that Megatron's engines set, in which layers of MTP do not run."""
    with InferenceMode.active():
        return generate(layout, mhc, stages, kind="mtp")


@pytest.mark.parametrize(
    "mhc", [None, MHC, MHCConfig(contract="learned_head"), GATED], ids=["stock", "mhc", "head", "gated"]
)
@pytest.mark.parametrize("pp, stages", [(2, None), (2, "Etttt|L"), (4, "Ett|t||tL")])
def test_tokens_on_a_pipeline_have_the_logits_of_one_process(run_ranks, pp, stages, mhc):
    expected = run_ranks(1, generate, Layout(), mhc)[0]
    *others, found = run_ranks(pp, generate, Layout(pp=pp), mhc, stages)
    assert others == [None] * (pp - 1)
    assert found.shape == (2, PROMPT + NEW, 64)
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("mhc", [None, MHC], ids=["stock", "mhc"])
def test_tokens_of_a_hybrid_model_on_a_pipeline_have_the_logits_of_one_process(run_ranks, mhc):
    expected = run_ranks(1, generate, Layout(), mhc, None, "*-*-")[0]
    _, found = run_ranks(2, generate, Layout(pp=2), mhc, None, "*-*|-")
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("form", ["single", "multistream"])
@pytest.mark.parametrize("pp, stages", [(2, None), (2, "Etttt|mL"), (4, "Ett|tt|m|L")])
def test_layers_of_mtp_stand_aside_on_a_pipeline(run_ranks, pp, stages, form):
    """Wherever they are, also alone on a stage, behind which messages are one stream wide."""
    mhc = MHCConfig(mtp=form)
    expected = run_ranks(1, generate_as_an_engine, Layout(), mhc, None)[0]
    *_, found = run_ranks(pp, generate_as_an_engine, Layout(pp=pp), mhc, stages)
    assert found.shape == (2, 1 + NEW, 64)  # of the prompt's last token alone
    assert (found - expected).abs().max() <= 1e-5
