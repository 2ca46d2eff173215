"""The model chunks of one interior pipeline rank, whose neighbours are stand-ins; pipeline.py measures it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from standins import exchange
from timeline import DEVICE

from megatron_mhc import MHCConfig, specs
from megatron_mhc.testing.gpt import Layout


def build(
    mhc: MHCConfig, args: argparse.Namespace, dtype: torch.dtype
) -> tuple[TransformerConfig, list[Any]]:
    """The chunks of the rank that the arguments of pipeline.py describe."""
    settings: dict[str, Any] = dict(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.heads,
        num_query_groups=args.heads,
        use_cpu_initialization=args.cpu,
        bf16=not args.cpu,
        params_dtype=dtype,
        deallocate_pipeline_outputs=False,
    )
    if not args.dense:
        settings |= dict(num_moe_experts=args.experts, moe_router_topk=args.topk)
        settings |= dict(moe_ffn_hidden_size=args.expert_ffn, moe_grouped_gemm=not args.no_te)
        if args.pad:
            settings |= dict(moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True)
    config = Layout().config("dense" if args.dense else "moe", **settings)
    chunks = []
    for _ in range(args.vpp):
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=not args.no_te, normalization="RMSNorm"
        )
        model = GPTModel(
            config,
            specs.wrap_block_spec(block, mhc, config),
            vocab_size=128,
            max_sequence_length=args.sequence,
            pre_process=False,
            post_process=False,
            position_embedding_type="rope",
        ).to(DEVICE)
        model.decoder.final_layernorm = None  # one stage to Megatron; here an interior one
        for at, layer in enumerate(model.decoder.layers):
            layer.layer_number = 2 + at  # the model's first layer would expand an embedding
            if layer.is_moe_layer:
                exchange(layer.mlp.token_dispatcher)
        chunks.append(model)
    return config, chunks
