"""Transformer Engine's layers on one GPU: its importers are skipped where there is none."""

import os

import pytest
import torch

if not os.environ.get("MEGATRON_MHC_GPU_TESTS"):
    pytest.skip("set MEGATRON_MHC_GPU_TESTS=1 on a machine with a GPU", allow_module_level=True)
pytest.importorskip("transformer_engine")

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

SEQ, BATCH, WIDTH, LAYERS = 128, 2, 256, 4
MOE = dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=256,
    moe_grouped_gemm=True,
    moe_token_dispatcher_type="alltoall",
    moe_shared_expert_intermediate_size=256,
    moe_router_load_balancing_type="none",
    moe_layer_freq=[0, 1, 1, 1],
)
MLA = dict(
    kv_lora_rank=64, q_lora_rank=64, qk_head_dim=64, qk_pos_emb_head_dim=32, v_head_dim=64, rope_type="rope"
)


def make_config(kind="dense", **settings):
    base = dict(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        ffn_hidden_size=512,
        num_attention_heads=4,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False,
    )
    base.update(MOE if kind == "moe" else {}, **(MLA if kind == "mla" else {}))
    base.update(settings)
    return (MLATransformerConfig if kind == "mla" else TransformerConfig)(**base)


def te_spec(config, kind):
    if kind == "moe":
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    return get_gpt_layer_with_transformer_engine_spec(multi_latent_attention=kind == "mla")


def wake(model):
    """Give phi and the gates values that make the mappings depend on the token."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "mapping_proj" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        elif "alpha_" in name:
            parameter.data.fill_(0.5)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
