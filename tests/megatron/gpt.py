"""A tiny GPT on one rank, built from Megatron's local spec, plain or with mHC."""

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

from megatron_mhc.specs import wrap_block_spec
from megatron_mhc.testing import cpu

VOCAB, SEQ, BATCH = 64, 16, 2
MOE = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_layer_freq=[0, 1],
    moe_token_dispatcher_type="alltoall",
    moe_shared_expert_intermediate_size=32,
    moe_router_load_balancing_type="none",
)


def start():
    """Process groups of one rank, and a fixed seed."""
    cpu.patch_megatron()
    cpu.use_local_modules()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    torch.manual_seed(1234)


def build(mhc=None, tied=False, **settings):
    """A GPTModel of two layers; the seed decides all weights, so plain and mHC models share them."""
    start()
    base = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    config = TransformerConfig(**{**base, **settings})
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    else:
        spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if mhc is not None:
        spec = wrap_block_spec(spec, mhc, config)
    return GPTModel(
        config, spec, VOCAB, SEQ, position_embedding_type="rope", share_embeddings_and_output_weights=tied
    )


def batch(seed):
    """(tokens, positions, mask) and labels."""
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(SEQ).expand(BATCH, SEQ).contiguous()
    mask = torch.triu(torch.ones(1, 1, SEQ, SEQ, dtype=torch.bool), 1)
    return (tokens[:, :-1].contiguous(), positions, mask), tokens[:, 1:].contiguous()


def same_bits(got, want):
    """Assert that two results of `forward_backward` are equal."""
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert torch.equal(got[1][name], want[1][name]), name


def forward_backward(model, seed=0):
    """Mean loss, and gradients by the parameter's name in a plain model."""
    torch.manual_seed(99)  # dropout
    inputs, labels = batch(seed)
    loss = model(*inputs, labels=labels).mean()
    loss.backward()
    return loss.detach(), {plain_name(name): p.grad for name, p in model.named_parameters()}


def plain_name(name):
    return name.replace("final_layernorm.norm.", "final_layernorm.")
