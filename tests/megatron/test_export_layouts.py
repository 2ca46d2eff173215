"""A model in a parallel layout, beside the folder exported from the checkpoint that it saved, in fp32."""

import shlex

import pytest
import torch
from convert_cases import save
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from test_export import BASE, CASES, GQA, MLA, MOE, PLAIN, SIGMOID, transformers

from megatron_mhc import command_line
from megatron_mhc.export import export
from megatron_mhc.export.folder import read
from megatron_mhc.specs import wrap_block_spec
from megatron_mhc.testing import cpu
from megatron_mhc.testing.parameters import fill

PROMPT, NEW = 12, 64
EXPERTS = MOE + SIGMOID + "--rope-type rope "
# The model, the layout's flags, and its ranks. Megatron's local MLA is inexact on TP, with mHC and without.
LAYOUTS = {
    "tp2": (CASES["gqa"], "--tensor-model-parallel-size 2", 2),
    "tp2_tied_v4": (CASES["biases_tied_v4"], "--tensor-model-parallel-size 2", 2),
    "pp2": (CASES["gqa"], "--pipeline-model-parallel-size 2", 2),
    "pp2_mla_v4": (MLA + EXPERTS + "--mhc-preset deepseek_v4", "--pipeline-model-parallel-size 2", 2),
    "pp2_tied": (CASES["biases_tied_v4"], "--pipeline-model-parallel-size 2", 2),
    "ep2": (GQA + PLAIN + MOE + "--moe-layer-freq 1", "--expert-model-parallel-size 2", 2),
    "ep2_mla": (MLA + EXPERTS, "--expert-model-parallel-size 2", 2),
    "tp2_pp2_ep2": (
        GQA + PLAIN + MOE + SIGMOID,
        """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2
        --expert-tensor-parallel-size 1 --sequence-parallel""",
        4,
    ),
}  # fmt: skip
FIRST = ("tp2", "pp2_mla_v4", "ep2", "tp2_pp2_ep2")


def parallel(words, ranks):
    """This rank's stage of the model that these arguments describe; weights follow from their names."""
    cpu.patch_megatron()
    cpu.use_local_modules()
    args, config, mhc = command_line.parse(shlex.split(BASE + words), ranks)
    config.sequence_parallel = False  # of training; Megatron's inference goes without
    args.padded_vocab_size = args.vocab_size
    ps.destroy_model_parallel()
    ps.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    model = GPTModel(
        config,
        wrap_block_spec(block, mhc, config),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=ps.is_pipeline_first_stage(),
        post_process=ps.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    )
    fill([model], std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)))
    return model.eval(), args


def windows(model, tokens, pieces):
    """Logits of the whole vocabulary, on every rank, for tokens [b, s] in windows that share a KV cache.

    Args:
        pieces: (start, end) of each window; a token that is not there yet is the likeliest behind the last.
    """
    context = StaticInferenceContext(max_batch_size=len(tokens), max_sequence_length=PROMPT + NEW)
    wrapper = GPTInferenceWrapper(model, context)
    wrapper.prep_model_for_inference()
    text = torch.zeros(len(tokens), PROMPT + NEW, dtype=torch.long)
    text[:, : tokens.shape[1]] = tokens
    given = wrapper.prep_inference_input(text)
    logits = torch.empty(len(tokens), 0, model.vocab_size)
    for start, end in pieces:
        if end > tokens.shape[1]:
            given["tokens"][:, start] = logits[:, -1].argmax(-1)
        window = wrapper.get_batch_for_context_window(given, start, end)
        found = wrapper.run_one_forward_step(window)
        if found is None:
            found = torch.empty(len(tokens), end - start, model.vocab_size)
        torch.distributed.broadcast(found, torch.distributed.get_world_size() - 1)
        logits = torch.cat([logits, found], 1)
        context.decode_mode = True
    return logits, given["tokens"]


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in LAYOUTS]
)
def test_exported_model_has_the_logits_and_greedy_text_of_the_layout_that_saved_it(
    run_ranks, tmp_path, monkeypatch, layout
):
    """Megatron generates 64 tokens one by one with the KV cache, and reads them in one pass."""
    words, flags, ranks = LAYOUTS[layout]

    @torch.no_grad()
    def megatron():
        model, args = parallel(words + " " + flags, ranks)
        save(model, tmp_path / "checkpoint", "torch_dist", args)
        prompt = torch.randint(0, 64, (2, PROMPT), generator=torch.Generator().manual_seed(0))
        pieces = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + NEW))]
        stepwise, text = windows(model, prompt, pieces)
        return stepwise, windows(model, text, [(0, PROMPT + NEW)])[0], text

    @torch.no_grad()
    def transformers_():
        export(tmp_path / "checkpoint", tmp_path / "out")
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        how = dict(max_new_tokens=NEW, do_sample=False, disable_compile=True)
        return ours(text).logits, ours.generate(text[:, :PROMPT], **how)

    @torch.no_grad()
    def one_process():
        model, args = parallel(words, 1)
        save(model, tmp_path / "single", "torch_dist", args)
        (_, of_one, _), (_, of_layout, _) = read(tmp_path / "single"), read(tmp_path / "checkpoint")
        assert of_one.keys() == of_layout.keys()
        return [key for key, value in of_one.items() if not torch.equal(value, of_layout[key])]

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    stepwise, whole, text = run_ranks(ranks, megatron)[-1]
    found, said = run_ranks(1, transformers_)[0]
    limit = 1e-4 * whole.std().item()
    assert (stepwise - whole).abs().max() <= limit
    assert (found - whole).abs().max() <= limit
    assert torch.equal(said, text)
    # A model of random tied embeddings says one word over and over.
    assert "tied" in layout or len(text[0, PROMPT:].unique()) > 3
    assert run_ranks(1, one_process) == [[]]
